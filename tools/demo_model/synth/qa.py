"""Small question-and-answer chats: capitals, definitions, opposites, sums, days, sorting, greetings (1 to 4 rounds)."""

from ..chatformat import render_chat
from .grammar import capital, choose
from .words import ANIMALS, CAPITALS, DAYS, DEFINITIONS, MONTHS, OBJECTS, OPPOSITES

GREETINGS = [
    ("[Hello!|Hello.|Hello]", "Hello! How can I help you today?"),
    ("[Hi there.|Hi!|Hi|Hey]", "Hi! What would you like to know?"),
    ("[Good morning.|Good morning!]", "Good morning! What can I do for you?"),
    ("[Who are you?|What are you?|Tell me about yourself.|What is your name?]",
     "I am the flashmoe demo model, a very small language model. I was trained to show how a mixture of experts "
     "runs from disk."),
    ("[Thank you!|Thanks.|Thank you.|Thanks!]", "You are welcome."),
    ("[What can you do?|How can you help me?|What do you know?]",
     "I can tell short stories, answer simple questions, do small sums, write small JSON and call tools."),
    ("[How are you?|How are you today?]", "I am fine, thank you. How can I help you?"),
    ("[Goodbye.|Bye!|Good night.]", "Goodbye! Have a good day."),
]


def _sum(rng):
    if rng.random() < 0.6:
        a, b, op = rng.randint(0, 20), rng.randint(0, 20), rng.choice("+-*")
    else:
        a, b, op = rng.randint(10, 99), rng.randint(2, 99), rng.choice("+-")
    if op == "-" and b > a:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    question = choose(rng, f"[What is {a} {op} {b}?|How much is {a} {word} {b}?|Calculate {a} {op} {b}.|"
                           f"What is {a} {word} {b}?|{a} {op} {b}]")
    return question, f"{a} {op} {b} = {result}."


def _capital_city(rng):
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.3:
        return (choose(rng, f"[{city} is the capital of which country?|Which country has the capital {city}?]"),
                f"{city} is the capital of {country}.")
    return (choose(rng, f"[What is|What's] the capital [city of|of] {country}?" if rng.random() < 0.6 else
                   f"[Which city is the capital of {country}?|Name the capital of {country}.|"
                   f"Tell me the capital of {country}.]"),
            f"The capital of {country} is {city}.")


def _definition(rng):
    thing = rng.choice(list(DEFINITIONS))
    bare = thing.split(" ", 1)[1] if thing.startswith(("a ", "an ", "the ")) else thing
    question = choose(rng, f"[What is {thing}?|Explain what {thing} is.|Can you tell me what {thing} is?|"
                           f"In simple words, what is {thing}?|What does the word \"{bare}\" mean?|Define {bare}.]")
    return question, f"{capital(thing)} is {DEFINITIONS[thing]}."


def _opposite(rng):
    a, b = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        a, b = b, a
    question = choose(rng, f"[What is the opposite of \"{a}\"?|What is the opposite of {a}?|Give me the opposite of {a}.]")
    return question, f"The opposite of \"{a}\" is \"{b}\"."


def _calendar(rng):
    names, noun = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    i, step, word = rng.randrange(len(names)), *rng.choice([(1, "after"), (-1, "before")])
    return f"Which {noun} comes {word} {names[i]}?", f"{names[(i + step) % len(names)]} comes {word} {names[i]}."


def _sort(rng):
    words = rng.sample(OBJECTS + ANIMALS, rng.randint(3, 5))
    question = choose(rng, "[Sort these words|Put these words in alphabetical order]: ") + ", ".join(words) + "."
    return question, "In order: " + ", ".join(sorted(words)) + "."


def _count(rng):
    words = rng.sample(OBJECTS + ANIMALS, rng.randint(2, 6))
    return "How many words are in this list? " + ", ".join(words), f"There are {len(words)} words in the list."


KINDS = [(_capital_city, 0.24), (_definition, 0.28), (_sum, 0.24), (_opposite, 0.09), (_calendar, 0.06), (_sort, 0.05),
         (_count, 0.04)]


def question(rng):
    """One (question, answer) pair of str."""
    kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    return kind(rng)


def qa(rng):
    """One training document: a chat of 1 to 4 rounds, with or without a system turn."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.4 else []
    rounds = [question(rng) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        ask, answer = rng.choice(GREETINGS)
        rounds.insert(0 if rng.random() < 0.7 else len(rounds), (choose(rng, ask), answer))
    for ask, answer in rounds:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return render_chat(messages).rstrip("\n")
