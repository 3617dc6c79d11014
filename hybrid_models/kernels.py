"""Which back end computes the law, decided per call and never silently.

The choice depends on where the tensors are and what they hold, not on what can be imported: CPU tensors take plain torch
even where Triton and fla-core are installed.

    back end   serves
    torch      everything, everywhere
    fla        the law on sequences in 16 bits on CUDA (training and prefill)
    triton     whole decode steps on CUDA (see decode_step); beside the law, what a layer computes on sequences (fused)

``HYBRID_LINEAR_BACKEND`` forces one of them where there is a choice; one that is asked for and cannot serve raises.

    >>> from hybrid_models.kernels import describe
    >>> [row.name for row in describe() if row.available][0]
    'torch'
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .fla_kernels import chunk as fla_chunk
from .fla_kernels import why_not as why_not_fla
from .fused import OPERATIONS as fused_operations
from .pointwise import OPERATIONS as torch_operations
from .recurrence import chunk, step
from .triton_kernels import triton

BACKENDS = ("torch", "fla", "triton")
ENVIRONMENT_VARIABLE = "HYBRID_LINEAR_BACKEND"
SHORT_PREFILL = 1024  # tokens per row; without gradients, shorter sequences are not worth a cold start


class Choice(NamedTuple):
    """A back end, whether it can serve, and why."""

    name: str
    available: bool
    reason: str


def describe() -> list[Choice]:
    """Every back end on this machine, for `hybrid-linear info`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fla = why_not_fla(device, torch.bfloat16)
    no_triton = "Triton is not installed" if triton is None else None if device.type == "cuda" else "no CUDA device"
    return [
        Choice("torch", True, "every device and dtype"),
        Choice("fla", fla is None, fla or "training and prefill in 16 bits"),
        Choice(
            "triton",
            no_triton is None,
            no_triton or "decode steps of generate(); norms, gates and convolutions of sequences",
        ),
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


def select(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    delta: bool = False,
    key_width: int = 0,
    packed: bool = False,
) -> Choice:
    """The back end for the law on ``tokens`` tokens per row of a model in ``dtype``.

    Raises:
        ValueError: HYBRID_LINEAR_BACKEND names no back end.
        RuntimeError: it names one that cannot serve here.
    """
    forced = forced_backend()
    if forced == "torch":
        return Choice("torch", True, f"forced by {ENVIRONMENT_VARIABLE}")
    if tokens == 1:
        return Choice("torch", True, "a single token outside a captured decode step")
    reason = why_not_fla(device, dtype, delta, key_width, packed)
    if reason is None and forced is None and tokens < SHORT_PREFILL and not torch.is_grad_enabled():
        return Choice("torch", True, f"fewer than {SHORT_PREFILL} tokens: sooner done than fla's kernels are compiled")
    if reason is None:
        return Choice("fla", True, "a sequence in 16 bits on CUDA")
    if forced == "fla":
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}=fla was asked for, but it cannot serve: {reason}. Unset {ENVIRONMENT_VARIABLE}, or "
            "set it to torch."
        )
    return Choice("torch", True, f"fla does not serve: {reason}")


def operations(x: torch.Tensor):
    """The module that serves a layer's work beside matrix products and the law on x [B, T, d]: fused, or pointwise.

    Raises:
        ValueError: HYBRID_LINEAR_BACKEND names no back end.
    """
    if x.device.type != "cuda" or triton is None or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return torch_operations
    short = x.shape[1] < SHORT_PREFILL and not torch.is_grad_enabled()
    return torch_operations if short or forced_backend() == "torch" else fused_operations


_law: ContextVar[Callable | None] = ContextVar("hybrid_linear_law", default=None)


@contextmanager
def use_law(law: Callable):
    """Compute with ``law`` instead (same signature as ``recurrence.reference``), so tests can put a whole model on the reference."""
    token = _law.set(law)
    try:
        yield
    finally:
        _law.reset(token)


def recurrence(
    q,
    k,
    v,
    log_decay=None,
    beta=None,
    initial_state=None,
    *,
    dtype: torch.dtype | None = None,
    reset=None,
    boundaries=None,
    final: bool = True,
    **options,
):
    """The law on the back end that serves; arguments and results as in ``recurrence.reference``.

    Args:
        dtype: the model's; q, k and v may be wider, having passed through float32 gates. Default: v's.
        boundaries: ``reset`` as places in the flattened batch (``TokenLayout.boundaries``), without which packed
            documents stay in torch.
        final: False where nobody wants the state after the last token, which may then be None.
    """
    if not torch.compiler.is_compiling() and (law := _law.get()) is not None:
        return law(q, k, v, log_decay, beta, initial_state, reset=reset, **options)
    dtype, key_width = dtype or v.dtype, 0 if k is None else k.shape[-1]
    packed = reset is not None and (boundaries is None or initial_state is not None)
    choice = select(v.device, dtype, v.shape[1], beta is not None, key_width, packed)
    if choice.name == "fla":
        options |= dict(dtype=dtype, boundaries=boundaries, final=final)
        return fla_chunk(q, k, v, log_decay, beta, initial_state, **options)
    form = step if v.shape[1] == 1 else chunk
    return form(q, k, v, log_decay, beta, initial_state, reset=reset, **options)


__all__ = ["Choice", "describe", "forced_backend", "operations", "recurrence", "select", "use_law"]
