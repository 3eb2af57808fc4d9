"""Who may call the core, and when: one call at a time, never after close, never in a forked child.

Also keeps the sessions' memory within the plan: each one beyond the first takes its state from the
expert slots.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from flashmoe.errors import OutOfMemory, StateError
from flashmoe.memory import MemoryPlan, format_bytes

if TYPE_CHECKING:
    from flashmoe import _core
    from flashmoe.session import Session

__all__ = ["Owner"]


class Owner:
    """Owns a core engine and knows its sessions.

    Parameters
    ----------
    core : _core.Engine
        Closed with this.
    plan : MemoryPlan
        What it was opened with.
    """

    def __init__(self, core: _core.Engine, plan: MemoryPlan) -> None:
        self.core = core
        self.plan = plan
        self.closed = False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._slots_limit = plan.n_slots

    @contextmanager
    def exclusive(self) -> Iterator[_core.Engine]:
        """Hold the core for one call or several; other threads wait."""
        self.check_open()
        with self._lock:
            self.check_open()
            yield self.core

    def check_open(self) -> None:
        """Refuse a closed engine and a forked child."""
        if os.getpid() != self._pid:
            raise StateError(
                f"the engine was opened by process {self._pid}; a forked child ({os.getpid()}) "
                "cannot use it, open a new one there"
            )
        if self.closed:
            raise StateError("the engine is closed")

    def add(self, session: Session) -> None:
        """Take note of a new session."""
        self._sessions.add(session)

    def make_room(self) -> None:
        """Shrink the expert slots so that one more session fits.

        Raises
        ------
        OutOfMemory
            They cannot give that much.
        """
        self._fit_slots(len(self._sessions) + 1)

    def limit_slots(self, n_slots: int) -> int:
        """Use at most so many expert slots from now on; return how many there are."""
        with self.exclusive() as core:
            self._slots_limit = n_slots
            self._fit_slots(len(self._sessions))
            return int(core.info["n_slots"])

    def remove(self, session: Session) -> None:
        """Close a session's core and give its memory back to the slots."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if session in self._sessions:
                self._sessions.discard(session)
                session.core.close()
                with suppress(StateError):  # at exit the core is closed before the last session
                    self._fit_slots(len(self._sessions))

    def cancel(self) -> None:
        """Cancel every session; needs no lock."""
        for session in list(self._sessions):
            session.cancel()

    def close(self) -> None:
        """Cancel what runs, close sessions and core; twice is fine."""
        if os.getpid() != self._pid:  # what the parent owns is not the child's to close
            self.closed = True
            return
        self.cancel()
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for session in list(self._sessions):
                session.core.close()
            self._sessions.clear()
            self.core.close()

    def _fit_slots(self, n_sessions: int) -> None:
        plan = self.plan
        extra = max(n_sessions - 1, 0) * plan.state_bytes
        short = max(extra - max(plan.budget_bytes - plan.total_bytes, 0), 0)
        give = -(-short // plan.slot_bytes) if plan.slot_bytes else 0
        want = plan.n_slots - give
        if want < plan.n_slots_min or (short and not plan.slot_bytes):
            raise OutOfMemory(
                f"session {n_sessions} needs {format_bytes(plan.state_bytes)} more, the budget of "
                f"{format_bytes(plan.budget_bytes)} has none left and of {plan.n_slots} expert "
                f"slots {plan.n_slots_min} must stay; close a session, or give more memory="
            )
        want = max(min(want, self._slots_limit), plan.n_slots_min)
        if plan.slot_bytes and self.core.set_slots(want) > want:
            raise OutOfMemory(f"session {n_sessions}: the expert slots are in use; try again")
