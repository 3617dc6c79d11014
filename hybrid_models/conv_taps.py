"""The defect of March 2025: short convolutions of which only the last tap was ever trained. How to see it and undo it.

For ten days a common training stack (flame with fla) passed position ids that its convolution kernel took for document
numbers, so that only the tap of the current token worked or learned. The other taps kept the noise they were initialised
with, which every evaluation since adds to the signal. It shows as taps that are alike, unrelated to each other and weaker
than the last one. Zeroing them gives back the function that was trained; whether that is better, a text tells.

    >>> import torch
    >>> from hybrid_models.conv_taps import taps_verdict
    >>> taps = 0.02 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    >>> taps[:, 3] *= 2
    >>> taps_verdict(taps)
    'untrained'
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .checkpoint import LazyTensor
from .convert import write_checkpoint
from .fla_format import Checkpoint, open_checkpoint

REPAIR = "last-tap-conv"
WINDOW = 1024


def conv_names(checkpoint: Checkpoint) -> list[str]:
    """The short convolutions of a checkpoint, q, k and v of a layer in one tensor [C, 1, W]."""
    return [name for name in checkpoint.tensors if name.endswith("linear_attn.conv1d.weight")]


def taps_verdict(taps: torch.Tensor) -> str:
    """ "trained", "untrained" or "last tap only", for the convolutions [channels, W] of a whole model.

    Untrained taps are noise of one variance: alike in size, weaker than the last, and uncorrelated with each other.
    """
    rms = taps.square().mean(0).sqrt()
    old, last = rms[:-1], rms[-1]
    if not old.any():
        return "last tap only"
    # Three standard errors of a ratio of two root mean squares, or of a correlation, for this many channels.
    noise = 3 / math.sqrt(len(taps))
    alike = old.max() / old.min().clamp(min=1e-12) < 1.1 + noise
    weaker = old.square().mean().sqrt() < last * (0.9 - noise)
    unit = taps[:, :-1] / old.clamp(min=1e-12)
    related = (unit.T @ unit / len(taps)).triu(1).abs().max() > 0.05 + noise
    return "untrained" if alike and weaker and not related else "trained"


def last_tap_only(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a convolution [C, 1, W] in which every tap but the last is zero."""
    weight = weight.clone()
    weight[..., :-1] = 0
    return weight


def repair_last_tap_conv(
    path: str | os.PathLike, destination: str | os.PathLike, overwrite: bool = False, **download
) -> Path:
    """Write a copy of a checkpoint, in its own layout, whose convolutions have only their last tap.

    The source is not touched; ``repairs`` in the copy's config.json and provenance.json says what was done.

    Raises:
        ValueError: it has no short convolutions, or cannot be loaded.
        FileExistsError: ``destination`` holds something, and ``overwrite`` is false.
    """
    checkpoint = open_checkpoint(path, **download).check()
    names = conv_names(checkpoint)
    if not names:
        raise ValueError(f"{path} has no short convolutions (mixer={checkpoint.config.mixer!r}): nothing to repair.")
    for name in names:
        old = checkpoint.tensors[name]
        checkpoint.tensors[name] = LazyTensor(old.shape, old.dtype, lambda old=old: last_tap_only(old[...]))
    checkpoint.config.repairs = checkpoint.record["repairs"] = [*checkpoint.record.get("repairs", ()), REPAIR]
    return write_checkpoint(checkpoint, destination, checkpoint.layout, overwrite=overwrite)


@torch.no_grad()
def losses(model, ids: torch.Tensor) -> dict[str, float]:
    """Mean loss in nats on ``ids`` [T], in windows of 1024: {"whole": ...}, with convolutions also "last_tap_only".

    Changes the model's convolutions for good.
    """

    def loss() -> float:
        windows = [window[None] for window in ids.split(WINDOW) if len(window) > 1]
        total = sum(float(model(window, labels=window).loss) * (window.shape[1] - 1) for window in windows)
        return total / sum(window.shape[1] - 1 for window in windows)

    out = {"whole": loss()}
    convs = [module.conv1d.weight for module in model.modules() if getattr(module, "conv1d", None) is not None]
    for weight in convs:
        weight.copy_(last_tap_only(weight))
    return out | ({"last_tap_only": loss()} if convs else {})


__all__ = ["REPAIR", "conv_names", "last_tap_only", "losses", "repair_last_tap_conv", "taps_verdict"]
