"""Held-out synthetic cases with known answers, and how an answer is judged."""

import json
import random
import re
from typing import NamedTuple

from .chatformat import IM_END, render_call, render_chat
from .synth import HELD_OUT_SEED
from .synth.qa import question
from .synth.records import record_case
from .synth.tools import tool_case


class Case(NamedTuple):
    """One prompt (text that ends with the opened assistant turn) and its expected answer."""

    kind: str       # "tool", "unseen tool", "json" or "qa"
    prompt: str
    answer: str     # the answer as the training format writes it, without <|im_end|>
    gold: object    # what is compared: (name, arguments), dict or str
    schema: object  # properties of the called function, or None


def make_cases(kind, n, seed=HELD_OUT_SEED):
    """`n` cases of `kind`, the same for the same seed; no training document uses these seeds."""
    cases = []
    for i in range(n):
        rng = random.Random(f"held-out {kind}:{seed + i}")
        schema = None
        if kind in ("tool", "unseen tool"):
            messages, tools, gold = tool_case(rng, unseen=kind == "unseen tool")
            answer = render_call(*gold)
            schema = next(t["function"]["parameters"]["properties"] for t in tools if t["function"]["name"] == gold[0])
            prompt = render_chat(messages, tools, add_generation_prompt=True)
        elif kind == "json":
            messages, gold, indent = record_case(rng)
            prompt, answer = render_chat(messages, add_generation_prompt=True), json.dumps(gold, indent=indent)
        else:
            ask, gold = question(rng)
            prompt, answer = render_chat([{"role": "user", "content": ask}], add_generation_prompt=True), gold
        cases.append(Case(kind, prompt, answer, gold, schema))
    return cases


def parse_call(text, schema=None):
    """XML tool call -> (name, arguments), typed by the schema's properties; None if it is not one well-formed call."""
    match = re.fullmatch(r"<tool_call>\n<function=([\w.-]+)>\n((?:<parameter=[\w.-]+>\n.*?\n</parameter>\n)*)"
                         r"</function>\n</tool_call>", text.strip(), re.S)
    if not match:
        return None
    arguments = {}
    for key, value in re.findall(r"<parameter=([\w.-]+)>\n(.*?)\n</parameter>\n", match[2], re.S):
        if (schema or {}).get(key, {}).get("type", "string") != "string":
            try:
                value = json.loads(value)
            except ValueError:
                return None
        arguments[key] = value
    return match[1], arguments


def judge(case, text):
    """-> (valid, exact): is the answer well formed, and does it say exactly what was asked for?"""
    text = text.split(IM_END)[0].strip()
    if case.kind == "json":
        try:
            value = json.loads(text)
        except ValueError:
            return False, False
        return True, value == case.gold
    if case.kind == "qa":
        return bool(text), text == case.gold
    call = parse_call(text, case.schema)
    return call is not None, call == case.gold
