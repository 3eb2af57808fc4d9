"""Seeded text generators (own work, no third-party text): stories, questions, tool calls, JSON extraction.

`generate(kind, seed)` gives one document; the same arguments always give the same text.  Training uses seeds below
HELD_OUT_SEED, every measurement uses seeds from HELD_OUT_SEED on.
"""

import random

from .invented import invented_tool
from .opening import opening
from .qa import qa
from .records import records
from .story import story
from .tools import tool

KINDS = {"story": story, "qa": qa, "tool": tool, "json": records}
# written for the next training; the shipped weights have not seen them
MORE_KINDS = {"invented": invented_tool, "opening": opening}
HELD_OUT_SEED = 10**9


def generate(kind, seed):
    """Return document number `seed` of `kind` ("story", "qa", "tool", "json", or one of MORE_KINDS) as str."""
    return (KINDS | MORE_KINDS)[kind](random.Random(f"{kind}:{seed}"))
