"""Short, coherent children's stories: a plot from plots.txt, filled with two characters, a place and some things."""

import os

from ..chatformat import render_chat
from .grammar import article, capital, expand
from .words import ADJECTIVES, ANIMALS, BOYS, COLORS, FOODS, GIRLS, OBJECTS

PLACES = [
    ("the village", "by the river"), ("the forest", "near a tall oak tree"), ("the town", "behind the old church"),
    ("the countryside", "on top of a green hill"), ("the valley", "next to a clear lake"),
    ("the harbor", "close to the lighthouse"), ("the meadow", "where the wild flowers grow"),
    ("the city", "in a narrow street"), ("the park", "beside a small pond"),
    ("the mountains", "under a steep cliff"),
]
SPOTS = ["the market", "the old mill", "the bridge", "the school", "the library", "the bakery", "the garden", "the barn",
         "the well", "the station"]
ELDERS = ["grandmother", "grandfather", "aunt", "uncle", "mother", "father", "teacher", "neighbor"]
FEELINGS = [("sad", "happy"), ("worried", "calm"), ("lonely", "glad"), ("afraid", "brave"), ("tired", "cheerful"),
            ("angry", "peaceful")]
NUMBERS = "two three four five six seven eight nine".split()
MORALS = [
    "helping a friend is better than winning", "it is good to tell the truth",
    "small steps can lead to a great result", "sharing makes every meal taste better", "patience is a kind of strength",
    "everyone makes mistakes and can learn from them", "kind words cost nothing", "it is fine to ask for help",
    "hard work and rest belong together", "a promise should be kept",
]
BUILDS = ["tree house", "small boat", "stone bridge", "bird house", "wooden cart", "snow fort", "sand castle"]


def _load_plots():
    """plots.txt -> {name: [line, ...]}; '#name' opens a plot, '//' lines are comments."""
    plots, name = {}, None
    with open(os.path.join(os.path.dirname(__file__), "plots.txt"), encoding="utf-8") as f:
        for line in f:
            line = line.strip()
            if line.startswith("#"):
                name = line[1:]
                plots[name] = []
            elif line and not line.startswith("//"):
                plots[name].append(line)
    return plots


PLOTS = _load_plots()
COMMON = {name: PLOTS.pop(name) for name in ("intro", "close", "request")}


def _character(rng):
    sex = rng.choice("fm")
    noun = rng.choice(ANIMALS) if rng.random() < 0.45 else ("girl" if sex == "f" else "boy")
    he, him, his = ("he", "him", "his") if sex == "m" else ("she", "her", "her")
    name = rng.choice(BOYS if sex == "m" else GIRLS)
    return {"": name, ".kind": article(f"{rng.choice(ADJECTIVES)} {noun}"), ".noun": noun, ".anoun": article(noun),
            ".he": he, ".him": him, ".his": his}


def world(rng):
    """The values that one story may mention; characters a and b always differ in name and noun."""
    a = _character(rng)
    b = _character(rng)
    while b[""] == a[""] or b[".noun"] == a[".noun"]:
        b = _character(rng)
    values = {"a" + k: v for k, v in a.items()} | {"b" + k: v for k, v in b.items()}
    values["place"], values["near"] = rng.choice(PLACES)
    values["thing"], values["thing2"] = rng.sample(OBJECTS, 2)
    values["athing"] = article(values["thing"])
    values["color"], values["color2"] = rng.sample([c for c in COLORS if c != "orange"], 2)  # plots say "a {color}"
    values["spot"], values["spot2"] = rng.sample(SPOTS, 2)
    values["sad"], values["glad"] = rng.choice(FEELINGS)
    values.update(food=rng.choice(FOODS), moral=rng.choice(MORALS), elder=rng.choice(ELDERS), n=rng.choice(NUMBERS),
                  build=rng.choice(BUILDS))
    return values


def story_text(rng):
    """Return (values, plot name, text of 100 to 250 words in short paragraphs)."""
    values = world(rng)
    plot = rng.choice(list(PLOTS))
    lines = [*COMMON["intro"], *PLOTS[plot]]
    if rng.random() < 0.5:
        lines += COMMON["close"]
    paragraphs = [""]
    for line in lines:
        if paragraphs[-1] and rng.random() < 0.5:
            paragraphs.append("")
        paragraphs[-1] = (paragraphs[-1] + " " + expand(rng, line, values)).strip()
    return values, plot, "\n\n".join(paragraphs)


def story(rng):
    """One training document: the bare story, or a chat that asks for it."""
    values, plot, text = story_text(rng)
    if rng.random() < 0.5:
        return text
    topics = {"lost": f"a lost {values['thing']}", "build": article(values["build"]), "race": "a race",
              "cook": values["food"], "storm": "a storm", "lie": "telling the truth", "garden": "a garden",
              "letter": "a letter", "night": "the night sky", "market": "the market"}
    values = values | {"topic": topics[plot]}
    request = capital(expand(rng, rng.choice(COMMON["request"]), values))
    return render_chat([{"role": "user", "content": request}, {"role": "assistant", "content": text}]).rstrip("\n")
