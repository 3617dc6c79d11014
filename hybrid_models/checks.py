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


__all__ = ["ask"]
