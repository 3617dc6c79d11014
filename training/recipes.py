"""The recipes: how each cell of the suite is trained, as data, and how much of that is the paper's own word.

    python -m training.recipes                       # every field of one cell, its value and where it comes from
    python -m training.recipes --write               # model_cards/recipes.jsonl, one line per cell
    python -m training.recipes --check               # is that file what this one says?

    >>> from training.recipes import recipe
    >>> one = recipe("340M-20B-GatedDeltaNet-hybrid-6-1", learning_rate=1e-3)
    >>> one.steps, one.batch_tokens, one.learning_rate, one.config.layer_picture()
    (406901, 49152, 0.001, 'LLLLLALLLLLALLLLLALLLLLA')

The paper (arXiv 2507.06457) states data, optimiser, schedule, tokens, batch and context. Learning rate, betas, decay,
warm-up, clipping, seed, packing and the number of attention heads it does not: there the defaults of flame, the trainer it
used, as of March 2025 stand in, and every record says which is which. A learning rate here is therefore a guess, not a
reproduction; change it with ``--learning-rate``.

The nano suite is ours: the same 72 cells, 24 layers deep, narrow, on text that every machine has. At that depth a step is
bound by kernel launches, 60 to 100 ms on an H200 whatever the batch, so a step takes many tokens (65,536) and there are
few of them (300): 19.7 M tokens, meant to take 20 to 60 s. What is free to change here: a value in PAPER, NANO or TINY.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_models import HybridLinearConfig
from hybrid_models.results import write_atomically
from hybrid_models.suite import SIZES, Cell, cell_names, parse_cell

from .accounting import parameters

RECORDS = Path("model_cards/recipes.jsonl")
SUITES = {"paper": ("340M-20B", "1.3B-100B"), "nano": ("nano-7M", "nano-22M")}
STATED, ASSUMED = "stated", "assumed"


class Value(NamedTuple):
    """One choice: what, whether the paper states it, and where it stands."""

    value: Any
    source: str  # STATED or ASSUMED
    where: str


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes, apart from the machine it runs on."""

    cell: str
    config: HybridLinearConfig
    seed: int  # of the initial weights and of the order of the data
    tokens: int  # training tokens, all of the run
    sequence_length: int  # tokens per row
    batch_tokens: int  # tokens per optimiser step, over all devices; a multiple of sequence_length
    learning_rate: float  # the peak
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float  # of matrices; norms, biases and decay parameters have none
    warmup_steps: int  # linear
    min_lr_ratio: float  # the cosine ends at this share of the peak
    max_grad_norm: float
    dataset: str  # see training.data: "installed-python", a Hub repository "owner/name@subset", paths, "a:0.3 b:0.7"
    tokenizer: str  # a Hub id or path; "bpe": byte-level BPE of config.vocab_size, trained on the dataset
    boundaries: bool  # packed documents see only themselves; False: one stream, documents told apart by BOS and EOS
    lanes: int  # independent streams the data is dealt from; part of the order, and the world size must divide it
    bf16: bool  # autocast over float32 weights; needs no CUDA

    def __post_init__(self):
        for name in "tokens sequence_length batch_tokens lanes".split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} leaves nothing to predict: use 2 or more.")
        if self.batch_tokens % self.sequence_length:
            down = self.batch_tokens // self.sequence_length * self.sequence_length
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of sequence_length={self.sequence_length}: use "
                f"{down or self.sequence_length} or {down + self.sequence_length}."
            )
        for name, low, high in (
            ("learning_rate", 0, None),
            ("adam_beta1", 0, 1),
            ("adam_beta2", 0, 1),
            ("adam_epsilon", 0, None),
            ("weight_decay", 0, None),
            ("warmup_steps", 0, None),
            ("min_lr_ratio", 0, 1),
            ("max_grad_norm", 0, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{name}={value!r} must be {bounds}.")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, round(self.tokens / self.batch_tokens))

    @property
    def batch_rows(self) -> int:
        """Sequences per optimiser step, over all devices."""
        return self.batch_tokens // self.sequence_length


FLAME = "flame default (Mar 2025)"
OURS = "ours"

PAPER: dict[str, Value] = {
    "sequence_length": Value(2048, STATED, "paper v1, training setup (v2 says 4,096; published configs say 2,048)"),
    "learning_rate": Value(3e-4, ASSUMED, FLAME),
    "adam_beta1": Value(0.9, ASSUMED, FLAME),
    "adam_beta2": Value(0.95, ASSUMED, FLAME),
    "adam_epsilon": Value(1e-15, ASSUMED, FLAME),
    "weight_decay": Value(0.1, ASSUMED, FLAME),
    "warmup_steps": Value(1024, ASSUMED, FLAME),
    "min_lr_ratio": Value(0.1, ASSUMED, FLAME),
    "max_grad_norm": Value(1.0, ASSUMED, FLAME),
    "seed": Value(42, ASSUMED, FLAME),
    "dataset": Value(
        "HuggingFaceFW/fineweb-edu@sample-100BT", STATED, "paper v1, training setup; the subset: " + FLAME
    ),
    "tokenizer": Value("mistralai/Mistral-7B-v0.1", ASSUMED, "vocabulary and token ids of the published configs"),
    "boundaries": Value(False, ASSUMED, FLAME + ": varlen is an option, off"),
    "lanes": Value(8, ASSUMED, OURS),
    "bf16": Value(True, ASSUMED, FLAME),
}
PAPER_SIZES: dict[str, dict[str, Value]] = {
    "340M-20B": {
        "tokens": Value(20_000_000_000, STATED, "paper v1, training setup"),
        "batch_tokens": Value(24 * 2048, STATED, "paper v1, training setup: 50k tokens; 24 sequences are the nearest"),
    },
    "1.3B-100B": {
        "tokens": Value(100_000_000_000, STATED, "paper v1, training setup"),
        "batch_tokens": Value(512 * 2048, STATED, "paper v1, training setup: 1M tokens; 512 sequences"),
    },
}
NANO: dict[str, Value] = {
    **{name: Value(PAPER[name].value, ASSUMED, OURS) for name in PAPER},
    "sequence_length": Value(1024, ASSUMED, OURS),
    "tokens": Value(300 * 65_536, ASSUMED, OURS),
    "batch_tokens": Value(65_536, ASSUMED, OURS),
    "learning_rate": Value(3e-3, ASSUMED, OURS),
    "adam_epsilon": Value(1e-8, ASSUMED, OURS),
    "warmup_steps": Value(30, ASSUMED, OURS),
    "dataset": Value("installed-python", ASSUMED, OURS),
    "tokenizer": Value("bpe", ASSUMED, OURS),
}
# For tests, a few seconds on one core. Bytes alone are 256 tokens, so the vocabulary is larger than the tiny cell's own.
TINY: dict[str, Value] = {
    **NANO,
    "sequence_length": Value(32, ASSUMED, OURS),
    "tokens": Value(20 * 256, ASSUMED, OURS),
    "batch_tokens": Value(256, ASSUMED, OURS),
    "warmup_steps": Value(2, ASSUMED, OURS),
    "bf16": Value(False, ASSUMED, OURS),
}
TINY_VOCAB = 300


def values(cell: Cell) -> dict[str, Value]:
    """Every field of the cell's recipe but ``cell`` and ``config``, with its source."""
    if cell.size in PAPER_SIZES:
        found = {**PAPER, **PAPER_SIZES[cell.size]}
    else:
        found = dict(TINY if cell.size == "tiny" else NANO)
    if cell.seed is not None:
        found["seed"] = Value(cell.seed, ASSUMED, OURS + ": six seeds of the Transformer are the baseline's error bar")
    return found


def cell_with(cell: Cell, fields: dict[str, Any]) -> HybridLinearConfig:
    """The cell's configuration with some fields changed; what follows from them (depth, head widths) follows again."""
    config = cell.config()
    if cell.size == "tiny":
        fields = {"vocab_size": TINY_VOCAB, **fields}
    if not fields:
        return config
    given = {name: getattr(config, name) for name in (*SIZES[cell.size], "num_hidden_layers", "mixer")}
    if cell.mixer is None or cell.mixer == "HGRN":
        given.pop("linear_num_key_heads", None)
    if not {"ratio", "layer_types"} & fields.keys():
        given["ratio"] = cell.level
    return HybridLinearConfig(**{**given, **fields})


def recipe(cell_name: str, *, config_fields: dict[str, Any] | None = None, **overrides) -> Recipe:
    """The recipe of a cell.

    Args:
        cell_name: a name of the suite, "340M-20B-GLA-pure", "nano-7M-HGRN-hybrid-6-1", "tiny-RetNet-pure".
        config_fields: fields of HybridLinearConfig to change, {"hidden_size": 512}.
        overrides: fields of Recipe to change; None leaves the recipe's value.

    Raises:
        ValueError: no such cell or field, or a value that makes no sense; the message says what to use instead.
    """
    cell = parse_cell(cell_name)
    chosen = {name: value.value for name, value in values(cell).items()}
    for name, value in overrides.items():
        if name not in chosen:
            raise ValueError(f"{name}={value!r} is not a field of a recipe: use one of {', '.join(sorted(chosen))}.")
        if value is not None:
            chosen[name] = value
    return Recipe(cell=cell.name, config=cell_with(cell, config_fields or {}), **chosen)


def record(cell_name: str) -> dict:
    """One line of model_cards/recipes.jsonl: the cell, its sizes, and every choice with its source."""
    cell = parse_cell(cell_name)
    one = recipe(cell_name)
    choices = {
        **values(cell),
        "optimizer": Value("AdamW", STATED if _suite(cell) == "paper" else ASSUMED, _where(cell, "training setup")),
        "schedule": Value("cosine", STATED if _suite(cell) == "paper" else ASSUMED, _where(cell, "training setup")),
        "num_attention_heads": Value(one.config.num_attention_heads, ASSUMED, OURS + ": 64 channels a head"),
        "initializer_range": Value(one.config.initializer_range, ASSUMED, "a published config (GatedDeltaNet 340M)"),
    }
    return {
        "cell": cell.name,
        "suite": _suite(cell),
        "size": cell.size,
        "mixer": cell.mixer,
        "level": cell.level,
        "seed": one.seed,
        "parameters": parameters(one.config),
        "tokens": one.tokens,
        "sequence_length": one.sequence_length,
        "batch_tokens": one.batch_tokens,
        "steps": one.steps,
        "config": one.config.to_diff_dict(),
        "recipe": {name: value._asdict() for name, value in choices.items()},
        "dataset": one.dataset.partition("@")[0],
    }


def _suite(cell: Cell) -> str:
    return next(suite for suite, sizes in SUITES.items() if cell.size in sizes)


def _where(cell: Cell, section: str) -> str:
    return f"paper v1, {section}" if _suite(cell) == "paper" else OURS


def records() -> Iterator[dict]:
    """The 144 records: the paper's 72 cells, then the nano suite's."""
    for sizes in SUITES.values():
        for size in sizes:
            yield from map(record, cell_names(size))


def records_text() -> str:
    """What model_cards/recipes.jsonl holds."""
    return "".join(json.dumps(one, sort_keys=True) + "\n" for one in records())


def table(one: Recipe) -> str:
    """A recipe for reading: field, value, source; a value that is not the recipe's own is said to be so."""
    lines = [one.cell]
    for name, (value, source, where) in values(parse_cell(one.cell)).items():
        chosen = getattr(one, name)
        note = f"{source}: {where}" if chosen == value else f"changed from {value}"
        lines.append(f"  {name:<16} {chosen!s:<40} {note}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m training.recipes",
        description="Show how a cell is trained and where each choice comes from, or write all of them for the cards.",
        epilog="example:\n  python -m training.recipes --cell 1.3B-100B-HGRN2-hybrid-6-1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cell", default="340M-20B-GatedDeltaNet-hybrid-6-1", help="(default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {RECORDS}")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if {RECORDS} is not up to date")
    args = parser.parse_args(argv)
    if args.write:
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(RECORDS, records_text())
        print(f"wrote {RECORDS}")
    elif args.check:
        if not RECORDS.exists() or RECORDS.read_text(encoding="utf-8") != records_text():
            print(f"{RECORDS} is not what training/recipes.py says: run python -m training.recipes --write")
            return 1
    else:
        try:
            print(table(recipe(args.cell)))
        except ValueError as error:
            parser.error(str(error))
    return 0


__all__ = ["Recipe", "Value", "cell_with", "recipe", "record", "records", "records_text", "table", "values"]

if __name__ == "__main__":
    raise SystemExit(main())
