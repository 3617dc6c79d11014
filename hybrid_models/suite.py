"""The suite: which name means which architecture, in both directions a table and one parser.

Six mixers at five levels of attention, and the Transformer, six times with different seeds (the baseline's error bar):
36 cells of each size. A name says all of it, ``340M-20B-GatedDeltaNet-hybrid-6-1`` or ``1.3B-100B-Transformer-seed3``.
Size ``tiny`` is for tests: the same 36 architectures at a width, and for each level the smallest depth, at which a CPU
needs seconds. A checkpoint does not carry this file.

What is free to change here: a size is one row of SIZES, a mixer one row of MIXERS.

    >>> from hybrid_models.suite import cell_config, cell_names
    >>> cell_config("340M-20B-GatedDeltaNet-hybrid-12-1").layer_picture()
    'LLLLLLLLLLLALLLLLLLLLLLA'
    >>> len(cell_names("1.3B-100B"))
    36
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from .configuration_hybrid_linear import HybridLinearConfig

# Head counts and MLP widths that are not named follow from hidden_size, as in the published checkpoints. How many heads
# the published hybrids' attention layers have is not documented: 64 channels a head are the Transformer baselines'.
SIZES: dict[str, dict] = {
    "340M-20B": dict(hidden_size=1024, num_attention_heads=16),
    "1.3B-100B": dict(hidden_size=2048, num_attention_heads=32),
    # Sizes for rehearsal, a minute or two on one GPU, as deep as the others, so that a level means the same layers.
    "nano-7M": dict(vocab_size=4096, hidden_size=128, num_attention_heads=2),
    "nano-22M": dict(vocab_size=4096, hidden_size=256, num_attention_heads=4),
    "tiny": dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=2,
    ),
}
MIXERS: dict[str, str] = {
    "DeltaNet": "delta_net",
    "GatedDeltaNet": "gated_delta_net",
    "GLA": "gla",
    "HGRN": "hgrn",
    "HGRN2": "hgrn2",
    "RetNet": "retnet",
}
# Depth of a tiny cell. N-1 means one attention layer in every N; two groups where that is cheap.
TINY_DEPTH = {"pure": 3, "24-1": 24, "12-1": 12, "6-1": 6, "3-1": 6, "full": 2}
SEEDS = range(1, 7)


class Cell(NamedTuple):
    """A cell of the suite, taken apart."""

    size: str  # a key of SIZES
    mixer: str | None  # a key of MIXERS; None for the Transformer
    level: str  # "pure", "24-1", "12-1", "6-1", "3-1" or "full"
    seed: int | None  # the Transformer's; the other cells were trained once

    @property
    def name(self) -> str:
        if self.mixer is None:
            return f"{self.size}-Transformer-seed{self.seed}"
        return f"{self.size}-{self.mixer}-{self.level if self.level == 'pure' else 'hybrid-' + self.level}"

    def config(self) -> HybridLinearConfig:
        fields = dict(SIZES[self.size])
        if self.size == "tiny":
            fields["num_hidden_layers"] = TINY_DEPTH[self.level]
            if self.mixer == "HGRN":  # no heads
                del fields["linear_num_key_heads"]
        mixer = {} if self.mixer is None else {"mixer": MIXERS[self.mixer]}
        return HybridLinearConfig(ratio=self.level, **mixer, **fields)


def _cells(size: str) -> list[Cell]:
    levels = [level for level in TINY_DEPTH if level != "full"]
    hybrids = [Cell(size, mixer, level, None) for mixer in MIXERS for level in levels]
    return hybrids + [Cell(size, None, "full", seed) for seed in SEEDS]


def cell_names(size: str) -> list[str]:
    """The 36 names of a size: by mixer and level, then the six Transformers.

    Raises:
        ValueError: ``size`` is not one of SIZES.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is not known: use one of {', '.join(SIZES)}.")
    return [cell.name for cell in _cells(size)]


def parse_cell(name: str) -> Cell:
    """The cell called ``name``.

    Raises:
        ValueError: no cell is called so; the message names the closest ones.
    """
    cells = {cell.name: cell for size in SIZES for cell in _cells(size)}
    if name in cells:
        return cells[name]
    by_lower = {known.lower(): known for known in cells}
    close = [by_lower[match] for match in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.7)]
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "names are like 340M-20B-GLA-hybrid-6-1 or tiny-HGRN-pure."
    )
    raise ValueError(f"{name!r} is not a cell of the suite: {hint}")


def cell_config(name: str) -> HybridLinearConfig:
    """The configuration of the cell called ``name``; errors as in ``parse_cell``."""
    return parse_cell(name).config()


__all__ = ["Cell", "cell_config", "cell_names", "parse_cell"]
