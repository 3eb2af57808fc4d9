"""All errors that flashmoe raises on purpose; each derives from :class:`FlashMoeError`."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "Cancelled",
    "FlashMoeError",
    "ModelFileError",
    "OutOfMemory",
    "StateError",
    "StorageError",
    "TokenizerError",
    "UnsupportedError",
]


class FlashMoeError(Exception):
    """Base of every error of this package."""


class ArgumentError(FlashMoeError, ValueError):
    """An argument is out of range, of the wrong kind, or unknown."""


class OutOfMemory(FlashMoeError, MemoryError):
    """The memory, or the budget given as ``memory=``, does not suffice."""


class StorageError(FlashMoeError, OSError):
    """The system refused or failed a file operation; ``filename`` and mostly ``errno`` are set.

    A file that ends early has no ``errno``: the system did not fail.
    """

    def __str__(self) -> str:
        # OSError would say "[Errno None] None" of a message that came without an errno.
        return str(self.args[0]) if self.errno is None and self.args else super().__str__()


class ModelFileError(FlashMoeError, ValueError):
    """A model file is damaged, truncated, or contradicts itself or its configuration."""


class UnsupportedError(FlashMoeError, RuntimeError):
    """Known, but not implemented; the message names what was asked and what exists."""


class BackendError(FlashMoeError, RuntimeError):
    """The compute device failed."""


class StateError(FlashMoeError, RuntimeError):
    """The right call at the wrong moment, such as use after close."""


class TokenizerError(FlashMoeError, RuntimeError):
    """The checkpoint has no (usable) tokenizer or chat template for what was asked."""


class Cancelled(FlashMoeError):
    """The work was cancelled from another thread."""
