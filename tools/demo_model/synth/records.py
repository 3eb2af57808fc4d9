"""JSON extraction: a short text about a person, product, event or book, and the keys to return.  Gold = the dict."""

import json

from ..chatformat import render_chat
from .grammar import choose
from .tools import clock, date
from .words import BOYS, CITIES, COLORS, DAYS, NAMES, NOUNS, OBJECTS, SURNAMES


def _person(rng):
    first = rng.choice(NAMES)
    he, his = ("He", "His") if first in BOYS else ("She", "Her")
    d = {"name": f"{first} {rng.choice(SURNAMES)}", "age": rng.randint(18, 90), "city": rng.choice(CITIES),
         "email": f"{first.lower()}@example.com", "likes": rng.sample(OBJECTS, rng.randint(1, 3)),
         "member": rng.random() < 0.5}
    says = {"age": f"[{he} is {d['age']} years old.|{his} age is {d['age']}.]",
            "city": f"[{he} lives in {d['city']}.|{his} home is {d['city']}.]",
            "email": f"[The email address is {d['email']}.|{his} email is {d['email']}.]",
            "likes": f"{he} likes {' and '.join('the ' + x for x in d['likes'])}.",
            "member": f"{he} is {'a' if d['member'] else 'not a'} member."}
    return d, f"[This is {d['name']}.|{he} is called {d['name']}.|The name is {d['name']}.]", says


def _product(rng):
    d = {"product": f"{rng.choice(COLORS)} {rng.choice(NOUNS)}", "price": round(rng.uniform(1, 300), 2),
         "currency": rng.choice(["USD", "EUR", "GBP"]), "stock": rng.randint(0, 500),
         "available": rng.random() < 0.7}
    cost = f"{d['price']} {d['currency']}"
    price = rng.choice([f"It costs {cost}.", f"The price is {cost}."])  # one sentence says price and currency
    says = {"price": price, "currency": price,
            "stock": f"[There are {d['stock']} pieces in stock.|We have {d['stock']} of them.]",
            "available": f"It is {'' if d['available'] else 'not '}available."}
    return d, f"[We sell the {d['product']}.|The product is the {d['product']}.]", says


def _event(rng):
    d = {"event": f"{rng.choice(NOUNS)} {rng.choice(['meeting', 'party', 'concert', 'workshop', 'lecture'])}",
         "day": rng.choice(DAYS), "date": date(rng), "time": clock(rng), "place": rng.choice(CITIES),
         "guests": rng.sample(NAMES, rng.randint(1, 3))}
    says = {"day": f"It is on a {d['day']}.", "date": f"The date is {d['date']}.",
            "time": f"[It starts at {d['time']}.|The time is {d['time']}.]",
            "place": f"[It takes place in {d['place']}.|The place is {d['place']}.]",
            "guests": f"The guests are {' and '.join(d['guests'])}."}
    return d, f"[The event is the {d['event']}.|You are invited to the {d['event']}.]", says


def _book(rng):
    d = {"title": f"The {rng.choice(COLORS).capitalize()} {rng.choice(NOUNS).capitalize()}",
         "author": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}", "year": rng.randint(1900, 2029),
         "pages": rng.randint(60, 900), "lent": rng.random() < 0.5}
    says = {"author": f"[It was written by {d['author']}.|The author is {d['author']}.]",
            "year": f"[It came out in {d['year']}.|It is from {d['year']}.]",
            "pages": f"[It has {d['pages']} pages.|The book is {d['pages']} pages long.]",
            "lent": f"It is {'lent out' if d['lent'] else 'on the shelf'}."}
    return d, f"[The book is called \"{d['title']}\".|This is \"{d['title']}\", a novel.]", says


def record_case(rng):
    """One extraction task.

    Returns
    -------
    messages : list of dict
        One user message.
    gold : dict
        The object to return, keys in the order asked for.
    indent : int or None
        2 when the user asks for indented JSON.
    """
    data, first, says = rng.choice([_person, _person, _product, _event, _book])(rng)
    main = next(iter(data))
    others = rng.sample(list(says), rng.randint(1, len(says)))
    sentences = list(dict.fromkeys(choose(rng, says[key]) for key in others))
    asked = [main, *rng.sample(others, rng.randint(max(1, len(others) - 1), len(others)))]
    keys = [k for k in data if k in asked]
    indent = 2 if rng.random() < 0.3 else None
    text = " ".join([choose(rng, first), *sentences])
    names = ", ".join(keys)
    ask = choose(rng, f"[Return JSON with the keys {names}.|Extract {names} as JSON.|Give me a JSON object with {names}.|"
                      f"Turn this text into JSON with the keys {names}.]")
    if indent:
        ask += choose(rng, " [Indent it.|Use indented JSON.|Indent it by two spaces.]")
    user = f"{ask}\n\n{text}" if rng.random() < 0.8 else f"{text}\n\n{ask}"
    return [{"role": "user", "content": user}], {k: data[k] for k in keys}, indent


def records(rng):
    """One training document: the task and its JSON answer."""
    messages, gold, indent = record_case(rng)
    answer = json.dumps(gold, ensure_ascii=False, indent=indent)
    return render_chat([*messages, {"role": "assistant", "content": answer}]).rstrip("\n")
