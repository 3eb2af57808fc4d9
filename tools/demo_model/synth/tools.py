"""Tool-call chats: made-up but typical functions, a request in plain words, the call, sometimes its result.

Every family has several function names, descriptions and argument names, drawn anew for each document.  The gold call
is known exactly.  The families in UNSEEN are never used for training: they measure functions that the model does not
know.
"""

import json
import random

from ..chatformat import render_call, render_chat
from .grammar import choose
from .qa import question
from .words import ANIMALS, CITIES, COLORS, EXTENSIONS, FOLDERS, MONTHS, NAMES, NOUNS, OBJECTS, SURNAMES


def date(rng):
    """ISO date as str."""
    return f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock(rng):
    """HH:MM as str."""
    return f"{rng.randint(0, 23):02d}:{rng.choice([0, 5, 10, 15, 20, 25, 30, 40, 45, 50, 55]):02d}"


# Value makers: rng -> (JSON schema of the argument, value).
def enum(*options):
    return lambda rng: ({"type": "string", "enum": list(options)}, rng.choice(options))


def text(make):
    return lambda rng: ({"type": "string"}, make(rng))


def integer(low, high):
    return lambda rng: ({"type": "integer"}, rng.randint(low, high))


def number(low, high, digits=1):
    return lambda rng: ({"type": "number"}, round(rng.uniform(low, high), digits))


def boolean(rng):
    return {"type": "boolean"}, True


def string_list(make):
    return lambda rng: ({"type": "array", "items": {"type": "string"}},
                        list(dict.fromkeys(make(rng) for _ in range(rng.randint(1, 3)))))


def city(rng):
    return rng.choice(CITIES)


def person(rng):
    return rng.choice(NAMES)


def full_name(rng):
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def email(rng):
    host = rng.choice(["example.com", "example.org", f"{rng.choice(NOUNS)}.net"])
    name = rng.choice(NAMES).lower()
    return f"{name}.{rng.choice(SURNAMES).lower()}@{host}" if rng.random() < 0.4 else f"{name}@{host}"


def phrase(rng):
    """Two or three words that rarely repeat, so that they can only be copied."""
    return rng.choice([f"{rng.choice(COLORS)} {rng.choice(NOUNS)}", f"the {rng.choice(COLORS)} {rng.choice(OBJECTS)}",
                       f"{rng.choice(NOUNS)} {rng.choice(NOUNS)}", f"{rng.choice(NOUNS)} and {rng.choice(OBJECTS)}"])


def word(rng):
    return rng.choice(rng.choice([NOUNS, OBJECTS, ANIMALS]))


def path(rng):
    return "/" + "/".join([rng.choice(["home", "data", "srv", "tmp", "mnt"]), *rng.sample(FOLDERS, rng.randint(1, 2))])


def filename(rng):
    return f"{rng.choice(NOUNS)}{rng.choice(['', f'_{rng.randint(1, 99)}'])}.{rng.choice(EXTENSIONS)}"


def identifier(rng):
    return rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") + str(rng.randint(100, 99999))


DATE = (lambda rng: ({"type": "string", "format": "date"}, date(rng)))

# name variants, description variants, request variants ({0} = first argument),
# further arguments: (name variants, maker, how the user says it), in the order in which they are said
FAMILIES = {
    "weather": ("get_weather|weather|get_forecast|lookup_weather|weather_forecast",
                "Get the weather for a city|Return the weather forecast|Look up the weather of a place",
                "[What is|What's|How is|Tell me|Show me] the weather [like |]in {0}|Weather in {0}|"
                "What will the weather be in {0}|I need the weather forecast for {0}",
                ("city|location|place", text(city)),
                [("unit|units", enum("celsius", "fahrenheit"), "in {}"),
                 ("days|num_days", integer(2, 14), "for the next {} days")]),
    "mail": ("send_email|send_mail|email|compose_email", "Send an email|Write and send an e-mail message",
             "[Send|Write] an email to {0}|[Send|Write] {0} an email|Email {0}",
             ("to|recipient|address", text(email)),
             [("subject|title", text(phrase), "with the subject \"{}\"|about \"{}\""),
              ("urgent|important", boolean, "and mark it as urgent")]),
    "alarm": ("set_alarm|create_alarm|add_alarm", "Set an alarm|Set an alarm on the phone",
              "Set an alarm for {0}|Wake me up at {0}|I need an alarm at {0}",
              ("time|at", text(clock)),
              [("label|name", text(word), "called \"{}\"|with the label \"{}\""),
               ("repeat|repeats", enum("daily", "weekly", "never"), "repeating {}")]),
    "event": ("create_event|add_event|new_calendar_entry|schedule_meeting", "Create a calendar event|Put an entry into the calendar",
              "[Create|Add] an event \"{0}\"|Put \"{0}\" in my calendar|Schedule \"{0}\"",
              ("title|name|summary", text(phrase)),
              [("date|day", DATE, "on {}"), ("time|start", text(clock), "at {}"),
               ("guests|people|attendees", string_list(person), "with {}")]),
    "currency": ("convert_currency|currency_convert|exchange", "Convert an amount between currencies|Exchange money",
                 "Convert {0}|Change {0}|How much is {0}",
                 ("amount|value", number(1, 900)),
                 [("from|from_currency|source", enum("USD", "EUR", "GBP", "JPY", "CHF"), "{}"),
                  ("to|to_currency|target", enum("USD", "EUR", "GBP", "JPY", "CHF"), "to {}|in {}")]),
    "files": ("search_files|find_files|file_search", "Search for files|Find files by name or content",
              "Search my files for \"{0}\"|Find files with \"{0}\"|Look for files about \"{0}\"",
              ("query|text|pattern", text(word)),
              [("folder|directory|path", text(path), "in {}"),
               ("limit|max_results", integer(1, 50), "and show at most {} results")]),
    "music": ("play_music|play|start_music", "Play music|Play songs by an artist",
              "Play [music|songs|something] by {0}|I want to hear {0}",
              ("artist|singer", text(full_name)),
              [("volume|loudness", integer(0, 100), "at volume {}"), ("shuffle|random_order", boolean, "in random order")]),
    "table": ("book_table|reserve_table|make_reservation", "Book a table in a restaurant|Reserve a table",
              "[Book|Reserve] a table at the {0}|I want to eat at the {0}",
              ("restaurant|place", text(lambda r: f"{r.choice(COLORS).capitalize()} {r.choice(ANIMALS).capitalize()}")),
              [("people|guests|party_size", integer(1, 12), "for {} people"), ("date|day", DATE, "on {}"),
               ("time|at", text(clock), "at {}")]),
    "shopping": ("add_item|add_to_list|shopping_list_add", "Add an item to the shopping list",
                 "Put {0} on my shopping list|Add {0} to the shopping list|I need to buy {0}",
                 ("item|product", text(lambda r: r.choice(["milk", "eggs", "bread", "rice", "apples", "tea", "soap", "butter",
                                                           "beans", "salt", "pepper", "garlic", "lemons", "honey"]))),
                 [("quantity|count|amount", integer(2, 20), "{} times")]),
    "route": ("get_route|find_route|directions|plan_trip", "Find a route between two places|Plan a trip",
              "[Find|Show me|Plan] a route from {0}|How do I get from {0}",
              ("start|from|origin", text(city)),
              [("end|to|destination", text(city), "to {}"), ("mode|by", enum("car", "train", "bike", "foot"), "by {}")]),
    "translate": ("translate_text|translate|translation", "Translate a text|Translate words into another language",
                  "Translate \"{0}\"|How do you say \"{0}\"",
                  ("text|phrase|input", text(phrase)),
                  [("language|target_language|to", enum("French", "German", "Spanish", "Italian", "Polish"), "into {}|in {}")]),
    "sensor": ("read_sensor|get_sensor|sensor_value", "Read a sensor of the house|Return the value of a sensor",
               "Read the sensor in the {0}|Check the sensor in the {0}",
               ("room|where", enum("kitchen", "bedroom", "office", "garage", "bathroom")),
               [("kind|quantity|type", enum("temperature", "humidity", "light"), "for {}")]),
    "light": ("set_light|control_light|switch_light", "Control a light|Set the light of a room",
              "Set the light in the {0}|Change the light in the {0}",
              ("room|where", enum("kitchen", "bedroom", "office", "garage", "hall")),
              [("brightness|level", integer(0, 100), "to {} percent"), ("color|colour", enum(*COLORS[:6]), "with the color {}")]),
    "timer": ("start_timer|set_timer|timer", "Start a timer|Start a countdown",
              "[Start|Set] a timer for {0} minutes|Count down {0} minutes",
              ("minutes|duration", integer(1, 120)), [("label|name", text(word), "called \"{}\"|named \"{}\"")]),
    "note": ("create_note|save_note|write_note", "Save a note|Write a note to the notebook",
             "[Save|Write|Make] a note \"{0}\"|Note down \"{0}\"",
             ("text|content|body", text(phrase)),
             [("tags|labels", string_list(word), "with the tags {}"), ("pinned|sticky", boolean, "and pin it")]),
    "copy": ("copy_file|duplicate_file|file_copy", "Copy a file|Copy a file to another folder",
             "Copy {0}|Copy the file {0}|Make a copy of {0}",
             ("source|file|name", text(filename)),
             [("target|folder|destination", text(path), "to {}"), ("overwrite|force", boolean, "and overwrite it")]),
    "order": ("get_order|order_status|track_order", "Look up an order|Return the status of an order",
              "Where is [my |]order {0}|Look up order {0}|[What is|Check] the status of order {0}",
              ("order_id|id|number", text(identifier)), [("details|verbose", boolean, "with all details")]),
    "stock": ("get_stock_price|stock_quote|quote", "Get the price of a stock|Return a stock quote",
              "What is the [stock price of|price of the stock] {0}|Get the stock price of {0}",
              ("symbol|ticker", text(lambda r: "".join(r.sample("ABCDEFGHIKLMNOPRSTUVW", r.randint(3, 4))))),
              [("date|day", DATE, "on {}"), ("currency", enum("USD", "EUR", "GBP"), "in {}")]),
    "message": ("send_message|text_message|send_sms", "Send a text message|Send a message to a person",
                "[Send|Write] a message to {0}|Text {0}|Message {0}",
                ("to|contact|person", text(person)),
                [("text|message|body", text(phrase), "saying \"{}\"|that says \"{}\"")]),
    "flight": ("find_flights|search_flights|flight_search", "Find flights between two cities|Search for flights",
               "[Find|Search|Show me] flights from {0}|I want to fly from {0}",
               ("from|origin|departure", text(city)),
               [("to|destination|arrival", text(city), "to {}"), ("date|day", DATE, "on {}"),
                ("passengers|seats", integer(1, 9), "for {} people")]),
    "reminder": ("set_reminder|remind|add_reminder", "Set a reminder|Remind the user of something",
                 "Remind me of \"{0}\"|Set a reminder \"{0}\"",
                 ("text|what|task", text(phrase)), [("date|day", DATE, "on {}"), ("time|at", text(clock), "at {}")]),
    "product": ("search_products|find_product|shop_search", "Search the shop|Find products in the shop",
                "[Search the shop for|Find me] a {0}|I want to buy a {0}",
                ("query|product|item", text(word)),
                [("max_price|limit", integer(5, 500), "for at most {} dollars"), ("color|colour", enum(*COLORS[:6]), "in {}")]),
    "thermostat": ("set_temperature|thermostat|heat_room", "Set the temperature of a room|Control the heating",
                   "[Set the temperature|Heat the room] to {0} degrees|Make it {0} degrees",
                   ("degrees|temperature|target", number(15, 26)),
                   [("room|where", enum("kitchen", "bedroom", "office", "bathroom"), "in the {}")]),
    "wiki": ("search_web|web_search|lookup|search", "Search the web|Look something up on the internet",
             "Search the web for \"{0}\"|Look up \"{0}\"|Find something about \"{0}\" on the internet",
             ("query|q|text", text(phrase)), [("results|count|limit", integer(1, 20), "and give me {} results")]),
}
UNSEEN = {
    "taxi": ("call_taxi|order_cab", "Order a taxi", "Call a taxi to {0}|I need a taxi to {0}", ("destination|to", text(city)),
             [("passengers|people", integer(1, 6), "for {} people"), ("time|at", text(clock), "at {}")]),
    "meter": ("log_meter|save_reading", "Save a meter reading", "Save the meter reading {0}|Log the reading {0}",
              ("value|reading", number(10, 9999)), [("month|period", enum(*MONTHS[:6]), "for {}")]),
    "rename": ("rename_file|file_rename", "Rename a file", "Rename {0}|Rename the file {0}", ("file|old_name", text(filename)),
               [("new_name|to", text(filename), "to {}")]),
}


def instance(rng, family):
    """Draw names and wording for one tool of a family -> (schema dict, request str, gold arguments dict)."""
    names, descriptions, requests, first, others = family
    fields = [(first, None)] + [((n, make), say) for n, make, say in others]
    properties, gold, request = {}, {}, None
    for i, ((variants, make), say) in enumerate(fields):
        key = rng.choice([v for v in variants.split("|") if v not in properties] or [f"arg{i}"])
        properties[key], value = make(rng)
        said = ", ".join(value) if isinstance(value, list) else str(value)
        if i == 0:
            request = choose(rng, "[" + requests + "]").replace("{0}", said)
            gold[key] = value
        elif rng.random() < 0.6:
            request += " " + rng.choice(say.split("|")).replace("{}", said)
            gold[key] = value
    function = {"name": rng.choice(names.split("|")), "description": rng.choice(descriptions.split("|")),
                "parameters": {"type": "object", "properties": properties, "required": [next(iter(properties))]}}
    return {"type": "function", "function": function}, request, gold


def tool_case(rng, unseen=False):
    """One request with one right answer.

    Returns
    -------
    messages : list of dict
        Optional system message, then the user's request.
    tools : list of dict
        One to three schemas, the right one at a random place.
    gold : (str, dict)
        Function name and arguments.
    """
    family = rng.choice(list(UNSEEN if unseen else FAMILIES))
    tool_schema, request, gold = instance(rng, (UNSEEN if unseen else FAMILIES)[family])
    tools = [tool_schema]
    for other in rng.sample([f for f in FAMILIES if f != family], rng.randint(0, 2)):
        schema = instance(rng, FAMILIES[other])[0]
        if schema["function"]["name"] not in [t["function"]["name"] for t in tools]:
            tools.append(schema)
    rng.shuffle(tools)
    request = rng.choice(["", "", "", "Please: ", "Hi. ", "Can you do this? "]) + request + rng.choice([".", ".", "", "?"])
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.4 else []
    return [*messages, {"role": "user", "content": request}], tools, (tool_schema["function"]["name"], gold)


def tool(rng):
    """One training document: request and call, in half of the cases the result and a closing sentence.

    In 10 % of the documents no offered function fits, and the right answer is plain words.
    """
    messages, tools, (name, arguments) = tool_case(rng)
    if rng.random() < 0.10:
        ask, answer = question(rng)
        messages = [*messages[:-1], {"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        return render_chat(messages, tools).rstrip("\n")
    messages.append({"role": "assistant", "content": render_call(name, arguments)})
    if rng.random() < 0.4:
        if rng.random() < 0.7:
            number_ = rng.randint(100, 999)
            result, answer = {"status": "ok", "id": number_}, f"Done. The call to {name} worked and returned the id {number_}."
        else:
            reason = rng.choice(["not found", "no permission", "timeout", "bad request"])
            result, answer = {"status": "error", "reason": reason}, f"I am sorry, the call to {name} failed: {reason}."
        messages += [{"role": "tool", "content": json.dumps(result)}, {"role": "assistant", "content": answer}]
    return render_chat(messages, tools).rstrip("\n")


if __name__ == "__main__":  # a look at the text
    print(tool(random.Random()))
