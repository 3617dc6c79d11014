"""The language-modelling loss, with logits and without: cross-entropy over a block of tokens at a time.

Logits of a batch are its largest tensor by far: 32 sequences of 2048 tokens over a vocabulary of 32000 take 4 GiB in bfloat16,
and their gradient as much again. Here a block's logits become a loss and a gradient at once and are forgotten; the
gradient is known up to the scale that the backward brings. Where logits are returned, ``causal_lm_loss`` is the library's loss
without the other tensors of their size.

    >>> import torch
    >>> from hybrid_models.loss import linear_cross_entropy
    >>> hidden, weight, targets = torch.randn(6, 8), torch.randn(50, 8), torch.tensor([1, 2, -100, 4, 5, 6])
    >>> dense = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    >>> torch.allclose(linear_cross_entropy(hidden, weight, targets), dense)
    True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from .checks import ask
from .dense import FSDPModule, is_plain, is_transformed, product, product_over_rows
from .fused_kernels import cross_entropy_kernel
from .pointwise import compute_dtype
from .triton_kernels import triton

IGNORED = -100
# Logits held at a time: enough to keep a GPU's matrix units busy, little beside the rest of a training step.
BLOCK_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 23}
CACHE_ELEMENTS = 1 << 18  # a megabyte of float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count, dtype):
        x, w = hidden.to(dtype), weight.to(dtype)
        losses = torch.empty(len(x), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        scale = (1.0 / count).to(losses.dtype)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.zeros(weight.shape, dtype=losses.dtype, device=x.device) if needs_w else None
        step = max(1, BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS["cpu"]) // len(w))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            logits = product(x[rows], w)
            losses[rows], dlogits = _block(logits, targets[rows], scale, needs_x or needs_w)
            if needs_x:
                dx[rows] = product(dlogits, w.t())
            if needs_w and dlogits.is_cuda and dlogits.dtype != dw.dtype:
                dw += torch.mm(dlogits.t(), x[rows], out_dtype=dw.dtype)
            elif needs_w:
                dw += product_over_rows(dlogits, x[rows])
        ctx.save_for_backward(dx, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients = zip(ctx.saved_tensors, ctx.dtypes)
        return *(None if d is None else (d * dloss.to(d.dtype)).to(dtype) for d, dtype in gradients), None, None, None


def _block(logits, targets, scale, gradient: bool):
    """Losses [N] of logits [N, V], and the logits' gradient times ``scale``, which may take their place."""
    if logits.is_cuda and triton is not None and logits.dtype != torch.float64:
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        V = logits.shape[1]
        cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, scale, V, IGNORED, GRADIENT=gradient, BV=min(4096, triton.next_power_of_2(V)),
            num_warps=8,
        )  # fmt: skip
        return losses, logits
    log_p = logits.to(scale.dtype).log_softmax(-1)
    losses = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="none")
    if not gradient:
        return losses, None
    counts = (targets != IGNORED).to(log_p.dtype)
    log_p = log_p.exp_()
    log_p.scatter_add_(1, targets.clamp(min=0)[:, None], -counts[:, None])
    return losses, log_p.mul_((counts * scale)[:, None]).to(logits.dtype)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """cross_entropy(hidden @ weight^T, targets), in float32 (float64 for float64), a scalar.

    Args:
        hidden: [N, d].
        weight: [V, d].
        targets: [N] int64; -100 is ignored.
        num_items_in_batch: what the sum is divided by; None: the number of targets.
        checked: ``check_targets`` has seen the targets.

    Raises:
        ValueError: a target outside of the vocabulary.
    """
    settle = None if checked or not len(targets) else check_targets(targets, len(weight))
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    loss = _LinearCrossEntropy.apply(hidden, weight, targets, count, compute_dtype(hidden))
    if settle is not None:
        settle()
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Of logits that are there anyway: their gradient is made from them, and nothing else of their size is."""

    @staticmethod
    def forward(ctx, logits, targets, scale):
        ctx.save_for_backward(logits, targets, scale)
        losses = [_block(logits[rows], targets[rows], scale, False)[0] for rows in _in_cache(logits)]
        return torch.cat(losses).sum() * scale

    @staticmethod
    def backward(ctx, dloss):
        logits, targets, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            share = (targets != IGNORED) * scale * dloss
            right = F.one_hot(targets.clamp(min=0), logits.shape[1])
            return ((logits.to(scale.dtype).softmax(-1) - right) * share[:, None]).to(logits.dtype), None, None
        dlogits = torch.empty_like(logits)
        for rows in _in_cache(logits):
            _, dlogits[rows] = _block(logits[rows], targets[rows], scale * dloss, True)
        return dlogits, None, None


def _in_cache(logits: torch.Tensor) -> list[slice]:
    """Rows to work on at a time, so that a block stays in the processor's cache between its passes."""
    step = max(1, CACHE_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=IGNORED, shift_labels=None, **kwargs
) -> torch.Tensor:
    """transformers' ForCausalLMLoss, its arguments and value; on the CPU in half the memory and fewer passes.

    Raises:
        ValueError: a label outside of the vocabulary (on the CPU).
    """
    elsewhere = logits.device.type != "cpu" or logits.dtype == torch.float64  # which the library rounds to float32
    if elsewhere or ignore_index != IGNORED or is_transformed():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    targets = (shift(labels) if shift_labels is None else shift_labels).to(logits.device).flatten()
    check_targets(targets, vocab_size)
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    scale = 1.0 / torch.as_tensor(count, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    return _CrossEntropy.apply(logits.view(-1, vocab_size), targets, scale)


def head_cross_entropy(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """``linear_cross_entropy`` with the head's weight, of targets that ``check_targets`` has seen.

    A head that FSDP2 shards is called for it, since its weight is whole only inside the call.
    """

    def loss(hidden):
        return linear_cross_entropy(hidden, head.weight, targets, num_items_in_batch, checked=True)

    if is_plain(head):
        return loss(hidden)
    head.forward = loss
    try:
        return head(hidden)
    finally:
        del head.forward


def why_not_head(head: nn.Module) -> str | None:
    """Why ``head_cross_entropy`` does not take this head, or None if it does."""
    sharded = isinstance(head, FSDPModule) and isinstance(head, nn.Linear) and head.bias is None
    hooks = max(map(len, (head._forward_hooks, head._forward_pre_hooks)))  # FSDP's own are one of each
    if is_plain(head) or (sharded and hooks <= 1 and "forward" not in vars(head) and not head._backward_hooks):
        return None
    return "this lm_head is more than its weight (an adapter, a hook, a quantised layer)"


def check_targets(targets: torch.Tensor, vocab_size: int) -> Callable[[], None]:
    """Ask (see ``checks``) whether every target is -100 or a token id below ``vocab_size``.

    Raises:
        ValueError: one is neither; on CUDA the function that is returned raises it.
    """

    def error() -> ValueError:
        low, high = int(targets.min()), int(targets.max())
        return ValueError(
            f"labels must be {IGNORED} (ignored) or token ids below {vocab_size}, but these go from {low} to {high}: check "
            "that the tokenizer belongs to this model."
        )

    return ask(((targets >= vocab_size) | ((targets < 0) & (targets != IGNORED))).any(), error)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """[B, T] labels as the targets of the same columns: each column's is the next token, the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


__all__ = ["causal_lm_loss", "check_targets", "head_cross_entropy", "linear_cross_entropy", "shift", "why_not_head"]
