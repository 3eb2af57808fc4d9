"""Calls of functions made up for one document: verb, noun and argument names are random, so only copying helps.

Not part of the mixture that trained the shipped weights; see "Notes for the next training" in README.md.
"""

from ..chatformat import render_call, render_chat
from .tools import (
    DATE,
    FAMILIES,
    city,
    clock,
    enum,
    filename,
    identifier,
    instance,
    integer,
    number,
    path,
    person,
    phrase,
    string_list,
    text,
    word,
)
from .words import COLORS, NOUNS, OBJECTS

VERBS = """count find open close move clean paint measure list show start stop check load save print mix sort build
repair fetch record plan test update remove add order watch scan pack label lock rename compare draw copy log""".split()
KEYS = NOUNS + OBJECTS + "name target source limit size kind place level".split()
VALUES = [text(city), text(person), text(word), text(phrase), text(identifier), text(filename), text(path), text(clock),
          DATE, integer(0, 200), integer(1, 9999), number(0, 100), enum(*COLORS[:4]), enum("small", "medium", "large"),
          string_list(word)]
LINKS = ["with {k} {v}", "with the {k} {v}", "and set {k} to {v}", "using {k} {v}", "where the {k} is {v}"]


def invented_family(rng):
    """A family in the form of tools.FAMILIES whose request repeats the argument names in plain words."""
    verb, noun = rng.choice(VERBS), word(rng)
    keys = [f"{k}_{rng.choice(['id', 'name', 'type', 'count', 'size'])}" if rng.random() < 0.25 else k
            for k in rng.sample(KEYS, 4)]
    say = [rng.choice(LINKS).replace("{k}", k.replace("_", " ")).replace("{v}", "{}") for k in keys]
    thing = f"{rng.choice(['the', 'a', 'my'])} {noun}"
    first = rng.choice([say[0], "for {}", "in {}", "at {}"]).replace("{}", "{0}")
    others = [(keys[i], rng.choice(VALUES), say[i]) for i in range(1, rng.randint(1, 4))]
    return (f"{verb}_{noun}|{noun}_{verb}|{verb}{noun.capitalize()}|{verb}_{noun}s",
            f"{verb.capitalize()} {thing}|{verb.capitalize()} something",
            f"{verb.capitalize()} {thing} {first}|Please {verb} {thing} {first}|I want to {verb} {thing} {first}",
            (keys[0], rng.choice(VALUES)), others)


def invented_tool(rng):
    """One training document: one to three functions, half of the others from the known families, and the right call."""
    schema, request, gold = instance(rng, invented_family(rng))
    offered = {schema["function"]["name"]: schema}
    for _ in range(rng.randint(0, 2)):
        family = rng.choice(list(FAMILIES.values())) if rng.random() < 0.5 else invented_family(rng)
        other = instance(rng, family)[0]
        offered.setdefault(other["function"]["name"], other)
    tools = list(offered.values())
    rng.shuffle(tools)
    call = render_call(schema["function"]["name"], gold)
    messages = [{"role": "user", "content": request + rng.choice([".", "", "?"])}, {"role": "assistant", "content": call}]
    return render_chat(messages, tools).rstrip("\n")
