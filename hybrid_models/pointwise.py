"""What a layer computes beside matrix products and the law, in plain torch: norms, gates, the short convolution, rotation.

``fused`` has the same functions as CUDA operations; ``kernels.operations`` says which of the two modules serves a call, and
the tests hold one against the other. Here everything is written out, in float32 for 16-bit inputs, in float64 for float64.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from .dense import dense, is_swiglu

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 for 16-bit tensors; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer would answer in: autocast's under autocast, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def project(x, *groups):
    """Linear layers of one input.

    Args:
        x: [B, T, d].
        groups: tuples of ``nn.Linear``; the members of one go to the same consumer.

    Returns:
        For each group its layer's output, or, of several, whatever the other functions of this module take as ``parts``.
    """
    return [tuple(dense(linear, x) for linear in group) if len(group) > 1 else dense(group[0], x) for group in groups]


def members(parts, counts):
    """The outputs of a group one by one, ``counts`` channels wide."""
    return parts


def rms_norm(norm, x, residual=None):
    """The norm's module applied to x, or to x + residual.

    Returns:
        The sum (x itself without residual) and its norm. Use both: a fused backward then adds their gradients in one pass.
    """
    total = x if residual is None else x + residual
    return total, norm(total)


def output_norm(norm, o, dtype, gate=None, act=None):
    """norm(o) [* act(gate)] in ``dtype``.

    Args:
        o: [B, T, H, V]; the norm is over V.
        gate: [B, T, H * V].

    Returns:
        [B, T, H * V].
    """
    o = norm(full_precision(o)).flatten(2)
    return (o if gate is None else o * ACTIVATIONS[act](full_precision(gate))).to(dtype)


def short_convolution(parts, conv1d, heads, window=None, layout=None, keep_inputs=True):
    """The convolution of x, and silu, by head.

    Args:
        parts: from ``project``: the channels of the convolution.
        conv1d: ``ShortConvolution``, or None for silu(x).
        heads: (heads, width, what follows) of each output: "nothing", "silu", or "unit", which is silu and then a division
            by the vector's length, as delta rules want queries and keys.
        window: [B, kernel - 1, C], inputs before the first; None for zeros.
        layout: packed documents; no tap reaches into the one before. They do not go with a window.
        keep_inputs: whether a cache will ask for the inputs.

    Returns:
        The outputs, [B, T, heads, width] each, and the inputs, [B, kernel - 1 + T, C], that ``cache.conv_window`` can be cut
        from (None without conv1d, and perhaps where they are not asked for).
    """
    inputs = None
    if conv1d is None:
        parts = map(full_precision, parts)
    else:
        convolved, inputs = conv1d(torch.cat(parts, -1), window, None if layout is None else layout.reset)
        parts = convolved.split([count * width for count, width, _ in heads], -1)
    outputs = []
    for part, (count, width, follows) in zip(parts, heads):
        part = (part if follows == "nothing" else F.silu(part)).unflatten(-1, (count, width))
        if follows == "unit":
            part = part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6)
        outputs.append(part)
    return outputs, inputs


def forget_gate(parts, bounds=None, scale=1.0, form="log", through=None):
    """The forget gate a = floor + room * sigmoid(f), its logarithm times ``scale``, and what else it decides.

    Args:
        parts: f [B, T, D] for form "log" (GLA), else (z, f).
        bounds: floor and room [D], room = 1 - floor; None for 0 and 1.
        through: a linear layer with a bias that makes f of the parts (GLA's low rank).
        form: "input" (HGRN) adds silu(z) * (1 - a), "key" (HGRN2) adds silu(z) and 1 - a.

    Returns:
        log a in float32 (float64), and what the form adds.
    """
    if through is not None:
        parts = dense(through, parts)
    z, f = (None, parts) if form == "log" else (full_precision(part.flatten(2)) for part in parts)
    log_a = F.logsigmoid(full_precision(f))
    if bounds is not None:
        floor, room = bounds
        log_a = torch.logaddexp(floor.log(), room.log() + log_a)
    if form == "log":
        return (log_a * scale,)
    rest = -torch.expm1(log_a)
    return (log_a, F.silu(z) * rest) if form == "input" else (log_a, F.silu(z), rest)


def rotate(parts, cos, sin, counts):
    """Rotary positions: channels j and j + D / 2 of every head turned by the token's angle j.

    Args:
        parts: from ``project``, [B, T, counts[i] * D] each.
        cos, sin: [1 or B, T, D], the two halves alike.

    Returns:
        [B, T, counts[i], D] each, in the dtype of the parts.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = []
    for part, count in zip(parts, counts):
        x = full_precision(part).unflatten(-1, (count, -1))
        half = x.shape[-1] // 2
        swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
        turned.append((x * cos + swapped * sin).to(part.dtype))
    return turned


def mlp(module, x):
    """The layer's SwiGLU module."""
    if not is_swiglu(module):
        return module(x)
    gate, up = module.act_fn(dense(module.gate_proj, x)), dense(module.up_proj, x)
    return dense(module.down_proj, gate * up if torch.is_grad_enabled() else gate.mul_(up))


# Passed around as one object, so that a layer names the operation and not who serves it.
OPERATIONS = sys.modules[__name__]

__all__ = [
    "OPERATIONS",
    "compute_dtype",
    "forget_gate",
    "members",
    "mlp",
    "output_norm",
    "project",
    "rms_norm",
    "rotate",
    "short_convolution",
]
