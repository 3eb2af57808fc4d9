"""Ctrl-C during long calls: a chunk of a large prompt may take the core minutes.

Python sees a signal only when the main thread is back from C.  So a worker does the calls, the main
thread waits for its pieces, and an interrupt cancels the core at once.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.engine import Engine
    from flashmoe.generation import Piece

__all__ = ["interruptible"]


def interruptible(engine: Engine, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces; the first Ctrl-C ends them with "cancelled", a second ends the process."""
    results: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for piece in pieces:
                results.put(piece)
            results.put(None)
        except BaseException as e:  # handed over to the main thread
            results.put(e)

    worker = threading.Thread(target=work, name="flashmoe-generate", daemon=True)
    worker.start()
    interrupted = False
    try:
        while True:
            try:
                result = results.get()
                if result is None:
                    return
                if isinstance(result, BaseException):
                    raise result
                yield result
            except KeyboardInterrupt:
                if interrupted:
                    os._exit(130)
                interrupted = True
                engine.cancel()
    finally:  # also when the consumer left early
        if worker.is_alive():
            engine.cancel()
        worker.join()
