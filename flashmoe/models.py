"""The model that comes along, and telling a model from a prompt on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flashmoe.errors import StorageError

__all__ = ["default_model", "is_noise", "looks_like_model"]

_PACKAGE = Path(__file__).resolve().parent
_DEFAULTS = ("demo", "demo_noise")
"""Folders of the package; the first that holds a checkpoint is the default model."""


def default_model() -> Path:
    """Return the checkpoint that comes along with the package.

    >>> default_model().is_dir()
    True
    """
    for name in _DEFAULTS:
        if (_PACKAGE / name / "config.json").is_file():
            return _PACKAGE / name
    raise StorageError(2, "this installation has no model of its own, name one", str(_PACKAGE))


def is_noise(path: Path) -> bool:
    """Tell whether `path` is the untrained model, whose text means nothing."""
    return path.resolve() == (_PACKAGE / "demo_noise").resolve()


def looks_like_model(text: str) -> bool:
    """Tell whether a lone argument means a model (an existing path, or spelled like one).

    >>> looks_like_model("Why is the sky blue?"), looks_like_model("models/qwen")
    (False, True)
    """
    if "\n" in text or len(text) > 4096:
        return False
    spelled = re.fullmatch(r"[.~]?[\w.~-]*(/[\w.~-]+)+/?", text) is not None
    return spelled or os.path.isdir(Path(text).expanduser())
