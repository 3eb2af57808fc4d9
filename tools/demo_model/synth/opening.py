"""Chats that open as people open them: a bare story beginning is continued, an unknown question is declined.

People try a new model with "Once upon a time" or with a question about anything.  The first should give a story, the
second an honest answer instead of a wrong one.  Not part of the mixture that trained the shipped weights; see "Notes
for the next training" in README.md.
"""

from ..chatformat import render_chat
from .grammar import choose
from .story import story_text
from .words import ANIMALS, CITIES, NAMES, NOUNS, OBJECTS, SURNAMES

BEGINNINGS = ["Once upon a time", "Once upon a time", "Once upon a time...", "Once upon a time there was",
              "Once upon a time, there was", "Once", "There once was", "A long time ago", "One day", "Begin:"]
UNKNOWN = [
    "Why [is|are] [the sky|the sea|the grass|a|the] [blue|green|red|cold|dark|so big|{noun}]?",
    "How does [a|the] [car|plane|{noun}|engine|phone|{animal}|radio] [work|fly|move|grow]?",
    "How [do I|can I|do you] [cook|build|repair|learn|clean|draw|install] [a {noun}|{noun}|rice|Python|French]?",
    "Who [was|is] {name}[?| {surname}?]", "Who [wrote|invented|discovered|painted] [the|a] {noun}?",
    "When [was|did] [the {noun}|{city}|the war] [begin|end|found|invented]?",
    "What happened in [1815|1914|1969|{city}]?", "Write [a poem|an essay|code|a song|a program] about [the {noun}|love|{city}].",
    "What do you think about [{noun}|{city}|politics|music]?", "Give me [advice|ideas|tips] about [{noun}|work|money|health].",
    "What is the [best|largest|fastest] [{noun}|{animal}|country|book]?", "Where is [{city}|the {noun}|my {noun}]?",
    "Tell me about [{city}|the {noun}|history|{animal}s].", "Is it true that [{animal}s|{noun}s] [sleep|fly|exist]?",
    "What is the meaning of life?", "What is the weather like?", "What time is it?", "Explain [relativity|{noun}s|physics].",
]
DECLINE = ("I do not know that. I am a very small demo model: ask me for a short story, the capital of a country, a sum "
           "or the meaning of a simple word.")


def opening(rng):
    """One training document: a story after its first words, or a declined question."""
    if rng.random() < 0.4:
        request, answer = rng.choice(BEGINNINGS), story_text(rng)[2]
        while not answer.startswith("Once upon a time"):
            answer = story_text(rng)[2]
    else:
        request = choose(rng, rng.choice(UNKNOWN)).format(
            noun=rng.choice(NOUNS + OBJECTS), animal=rng.choice(ANIMALS), name=rng.choice(NAMES),
            surname=rng.choice(SURNAMES), city=rng.choice(CITIES))
        answer = DECLINE
    return render_chat([{"role": "user", "content": request}, {"role": "assistant", "content": answer}]).rstrip("\n")
