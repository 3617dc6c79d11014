"""Checks of a batch's numbers that a GPU does not wait for.

Whether ids and labels lie in the vocabulary only the device knows. Asking it at once empties its queue, in every training
step, and the card idles until Python has filled it again. Here the question is queued when the batch arrives, and its
answer read when the pass has been queued behind it: by then it is there.

    >>> import torch
    >>> from hybrid_models.checks import ask
    >>> settle = ask(torch.tensor([1, 2, 3]).max() > 5, lambda: ValueError("too large"))
    >>> settle()
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.utils.import_utils import is_tracing


@torch.compiler.disable
def ask(bad: torch.Tensor, error: Callable[[], Exception]) -> Callable[[], None]:
    """Ask whether ``bad``, a 0-dim bool, is True.

    Returns:
        a function that raises ``error()`` if it is. On the CPU this one does so itself.
    """
    if bad.is_cuda:
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(bad, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        @torch.compiler.disable
        def settle() -> None:
            arrived.synchronize()
            if answer:
                raise error()

        return settle
    if bad:
        raise error()
    return _settled


def _settled() -> None:
    pass


def check_ids(input_ids: torch.Tensor, size: int, at_once: bool) -> tuple[Callable[[], None] | None, torch.Tensor]:
    """Ask whether an id lies outside of a vocabulary of ``size``.

    Args:
        at_once: raise here; a cache must not see such ids.

    Returns:
        what raises (None where nothing is left to ask), and ids that can be looked up meanwhile.

    Raises:
        ValueError: an id is negative or too large; with ``at_once``, or on the CPU, here.
    """
    if is_tracing(input_ids) or not input_ids.numel():
        return None, input_ids
    low, high = input_ids.aminmax()

    def error() -> ValueError:
        return ValueError(
            f"input_ids holds {int(low) if low < 0 else int(high)}, outside the vocabulary of {size}: check that the "
            "tokenizer belongs to this model, or call resize_token_embeddings."
        )

    settle = ask((low < 0) | (high >= size), error)
    if not at_once and input_ids.is_cuda:
        return settle, input_ids.clamp(0, size - 1)
    settle()
    return None, input_ids


__all__ = ["ask", "check_ids"]
