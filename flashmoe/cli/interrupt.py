"""Ctrl-C during long calls: a chunk of a large prompt may take the core minutes.

Python sees a signal only when the main thread is back from C.  So a worker does the calls, the main
thread waits for its pieces, and an interrupt cancels the core at once.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.engine import Engine
    from flashmoe.generation import Piece

__all__ = ["interruptible"]


def interruptible(engine: Engine, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces; the first Ctrl-C ends them with "cancelled", a second ends the process."""
    results: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    interrupted = threading.Event()

    def work() -> None:
        try:
            for piece in pieces:
                results.put(piece)
                if interrupted.is_set():  # the signal came before there was anything to cancel
                    engine.cancel()
            results.put(None)
        except BaseException as e:  # handed over to the main thread
            results.put(e)

    def interrupt() -> None:
        if interrupted.is_set():
            os._exit(130)
        interrupted.set()
        engine.cancel()

    worker = threading.Thread(target=work, name="flashmoe-generate", daemon=True)
    with _on_sigint(interrupt):
        worker.start()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:  # also when the consumer left early
            interrupted.set()
            engine.cancel()
            worker.join()


@contextmanager
def _on_sigint(call: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C call this instead of raising KeyboardInterrupt, where handlers can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(*_: Any) -> None:
        call()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
