"""flashmoe runs Mixture-of-Experts language models larger than memory.

The trunk stays in RAM, routed experts are read from the SSD when the router picks them.

>>> from flashmoe import Engine
>>> with Engine(memory="2GiB") as engine:  # no path: the small model that comes along
...     text = str(engine.generate("Once upon a time", max_tokens=8, seed=1))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module; imported on first use, so that `import flashmoe` costs nothing
_EXPORTS = {
    "ArgumentError": "errors",
    "BackendError": "errors",
    "Cancelled": "errors",
    "Engine": "engine",
    "FlashMoeError": "errors",
    "Generation": "generation",
    "MemoryPlan": "memory",
    "ModelFileError": "errors",
    "OutOfMemory": "errors",
    "Piece": "generation",
    "SamplingConfig": "generation",
    "Session": "session",
    "StateError": "errors",
    "StorageError": "errors",
    "Timings": "generation",
    "TokenLogprob": "generation",
    "TokenizerError": "errors",
    "UnsupportedError": "errors",
    "Usage": "generation",
}
__all__ = [
    "ArgumentError", "BackendError", "Cancelled", "Engine", "FlashMoeError", "Generation",
    "MemoryPlan", "ModelFileError", "OutOfMemory", "Piece", "SamplingConfig", "Session",
    "StateError", "StorageError", "Timings", "TokenLogprob", "TokenizerError",
    "UnsupportedError", "Usage", "__version__",
]  # fmt: skip

if TYPE_CHECKING:
    from flashmoe.engine import Engine
    from flashmoe.errors import (
        ArgumentError,
        BackendError,
        Cancelled,
        FlashMoeError,
        ModelFileError,
        OutOfMemory,
        StateError,
        StorageError,
        TokenizerError,
        UnsupportedError,
    )
    from flashmoe.generation import (
        Generation,
        Piece,
        SamplingConfig,
        Timings,
        TokenLogprob,
        Usage,
    )
    from flashmoe.memory import MemoryPlan
    from flashmoe.session import Session


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
    value = getattr(import_module(f"flashmoe.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
