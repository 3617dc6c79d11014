"""Which back end computes the law, decided per call and never silently.

The choice depends on where the tensors are, not on what can be imported: CPU tensors take plain torch even where Triton
is installed. ``HYBRID_LINEAR_BACKEND`` (torch, fla or triton) forces one; a back end that is asked for and cannot serve
raises. At present torch serves every device; the seam for the others is ``select``.

    >>> from hybrid_models.kernels import describe
    >>> [row.name for row in describe() if row.available]
    ['torch']
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .recurrence import chunk, step

BACKENDS = ("torch", "fla", "triton")
ENVIRONMENT_VARIABLE = "HYBRID_LINEAR_BACKEND"


class Choice(NamedTuple):
    """A back end, whether it can serve, and why."""

    name: str
    available: bool
    reason: str


def describe() -> list[Choice]:
    """Every back end, for `hybrid-linear info`."""
    return [
        Choice("torch", True, "plain torch, every device and dtype"),
        Choice("fla", False, "not in this version"),
        Choice("triton", False, "not in this version"),
    ]


def forced_backend() -> str | None:
    """What HYBRID_LINEAR_BACKEND says, None if it says nothing.

    Raises:
        ValueError: it names no back end.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is not a back end: use one of {', '.join(BACKENDS)}.")
    return forced


def select(device: torch.device, num_tokens: int) -> Choice:
    """The back end for a call on ``device`` with ``num_tokens`` tokens per row.

    Raises:
        ValueError: HYBRID_LINEAR_BACKEND names no back end.
        RuntimeError: it names one that cannot serve here.
    """
    forced = forced_backend()
    form = "step" if num_tokens == 1 else "chunk"
    if forced in (None, "triton"):  # Triton serves whole decode steps (see decode_step), not the law by itself
        return Choice("torch", True, f"the {form} form in torch serves {device.type}")
    choice = next(row for row in describe() if row.name == forced)
    if not choice.available:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={forced} was asked for, but it cannot serve {device.type} tensors: {choice.reason}. "
            f"Unset {ENVIRONMENT_VARIABLE}, or set it to torch."
        )
    return choice._replace(reason=f"forced by {ENVIRONMENT_VARIABLE}")


_law: ContextVar[Callable | None] = ContextVar("hybrid_linear_law", default=None)


@contextmanager
def use_law(law: Callable):
    """Compute with ``law`` instead (same signature as ``recurrence.reference``): how tests put a whole model on the reference."""
    token = _law.set(law)
    try:
        yield
    finally:
        _law.reset(token)


def recurrence(q, k, v, log_decay=None, beta=None, initial_state=None, **options):
    """The law on the back end that serves; arguments and results as in ``recurrence.reference``."""
    if not torch.compiler.is_compiling() and (law := _law.get()) is not None:
        return law(q, k, v, log_decay, beta, initial_state, **options)
    select(v.device, v.shape[1])
    form = step if v.shape[1] == 1 else chunk
    return form(q, k, v, log_decay, beta, initial_state, **options)


__all__ = ["Choice", "describe", "recurrence", "select", "use_law"]
