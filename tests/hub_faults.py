"""Faults of the local Hub: which request goes wrong, and how.

A request has an index, counted from 0 since the last reset, and a fault names one, or all from there on. Faults are what
networks and services do: no answer, an answer that is lost after the work was done, half of a body, a wrong bit, errors
for a while. ``signal`` does none of these: it tells whoever waits that the request is there, and holds it, so that the
client can be killed at exactly that point.

    >>> plan = Faults([Fault("status", at=2, status=503)])
    >>> [plan.next() for _ in range(4)]
    [(0, None), (1, None), (2, Fault(kind='status', at=2, times=1, status=503, headers={}, seconds=30.0, match='')), (3, None)]
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = {
    "status": "answer with an HTTP status and do nothing",
    "drop": "close the connection and do nothing",
    "lose": "do the work, then close the connection without an answer",
    "hang": "do nothing and do not answer either",
    "truncate": "do the work, send half of the body, close the connection",
    "corrupt": "do the work, flip a bit in the body",
    "signal-before": "tell the waiting test, do nothing",
    "signal-after": "do the work, tell the waiting test, do not answer",
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind: one of KINDS.
        at: index of the request.
        times: how many requests from there on.
        status, headers: of the answer, for kind "status"; 429 with ``RateLimit`` or ``Retry-After``, say.
        seconds: how long a request hangs at most.
        match: "METHOD end-of-path": the first such request is hit, whatever its index.
    """

    kind: str
    at: int
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 30.0
    match: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: use one of {', '.join(KINDS)}.")


class Faults:
    """The faults to come, and the counter of requests."""

    def __init__(self, faults: Iterable[Fault] = ()):
        self._lock = threading.Lock()
        self.reset(faults)

    def reset(self, faults: Iterable[Fault] = ()) -> None:
        """Count from 0 again, with these faults; requests that hang are released."""
        if hasattr(self, "released"):
            self.released.set()
        self.released = threading.Event()
        self.signalled = threading.Event()
        with self._lock:
            self.count = 0
            self.faults = list(faults)
            self.hit = 0

    def next(self, line: str = "") -> tuple[int, Fault | None]:
        """The index of a request that has come, "METHOD /path", and its fault."""
        with self._lock:
            index, self.count = self.count, self.count + 1
            for fault in self.faults:
                method, _, end = fault.match.partition(" ")
                if fault.match and line.startswith(f"{method} ") and line.endswith(end):
                    self.faults.remove(fault)
                    break
                if not fault.match and fault.at <= index < fault.at + fault.times:
                    break
            else:
                return index, None
            self.hit += 1
            return index, fault
