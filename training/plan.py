"""The plan of a training run: what it will compute, whether it fits, and how long it takes; nothing is allocated.

    python -m training.plan 340M-20B-GatedDeltaNet-hybrid-6-1 --gpus 8
    python -m training.plan nano-7M-HGRN-pure --json

``python -m training.train --cell ... --dry-run`` prints the same, with the first batch. Hours come from a measured speed
(a result file of this cell, or the benchmark of the training step) or are not given: an assumed utilisation would be a
guess, and the share of time that a new machine loses is what nobody knows beforehand.

    >>> from training.recipes import recipe
    >>> one = make_plan(recipe("nano-7M-GLA-pure"))
    >>> one.parameters, one.steps, one.speed
    (7424640, 300, None)
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_models.info import human_bytes
from hybrid_models.results import FOLDER, read_all

from .accounting import flops_per_token, parameters, peak_flops
from .memory import WEIGHT_BYTES, TrainingMemory, training_memory
from .recipes import Recipe, recipe

BENCHMARK = Path("benchmarks/results/train_step.json")
SPEED = "tokens_per_s"


class Speed(NamedTuple):
    """A measured speed of this cell."""

    tokens_per_s: float  # of one device
    device: str
    source: str  # the file


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. Bytes and rows are per GPU; operations are the true ones (see ``accounting``)."""

    cell: str
    gpus: int
    parameters: int
    tokens: int
    steps: int
    rows: int  # sequences of one forward on one GPU
    accumulation: int  # forwards per optimiser step
    checkpointing: bool
    flops_per_token: float  # forward and backward
    flops: float  # the whole run
    ddp: TrainingMemory
    fsdp2: TrainingMemory | None  # None for one GPU
    speed: Speed | None
    hours: float | None
    mfu: float | None

    def __str__(self) -> str:
        per_step = f"{self.steps:,} steps"
        accumulated = "" if self.accumulation == 1 else f", {self.accumulation} times per step"
        kind = "checkpointed" if self.checkpointing else "no checkpointing"
        lines = [
            f"{self.cell} on {self.gpus} GPU{'s' if self.gpus > 1 else ''}",
            f"  parameters   {self.parameters:,}",
            f"  tokens       {self.tokens:,} in {per_step}, {self.rows} sequences per GPU at a time{accumulated}",
            f"  operations   {self.flops_per_token:.3e} per token (6 N: {6 * self.parameters:.3e}), {self.flops:.3e} in all",
            _memory_line("memory", "DDP" if self.gpus > 1 else "one GPU", self.ddp, kind),
        ]
        if self.fsdp2 is not None:
            lines.append(_memory_line("", f"FSDP2 over {self.gpus}", self.fsdp2, kind))
        if self.speed is None:
            lines.append(f"  time         not measured: no {SPEED} of this cell in {FOLDER} or {BENCHMARK}")
        else:
            share = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
            scaling = "" if self.gpus == 1 else f", if {self.gpus} GPUs lose nothing"
            lines.append(
                f"  time         {_duration(self.hours)} at {self.speed.tokens_per_s:,.0f} tokens/s per GPU{scaling} "
                f"({self.speed.device}{share}; {self.speed.source})"
            )
        return "\n".join(lines)


def _memory_line(label: str, how: str, one: TrainingMemory, kind: str) -> str:
    return (
        f"  {label:<12} {how}: {human_bytes(one.peak)} at the peak = weights {human_bytes(one.parameters)}, AdamW "
        f"{human_bytes(one.optimizer)}, activations {human_bytes(one.activations)} ({kind}), the rest head, loss and gradients"
    )


def _duration(hours: float) -> str:
    if hours < 0.1:
        return f"{3600 * hours:.0f} s"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.1f} days"


def make_plan(
    one: Recipe,
    gpus: int = 1,
    *,
    rows: int | None = None,
    checkpointing: bool = False,
    results: str | Path = FOLDER,
    benchmark: str | Path = BENCHMARK,
) -> Plan:
    """Work out a recipe's numbers.

    Args:
        rows: sequences of one forward on one GPU. Default: all of a GPU's share of a step.
        checkpointing: layers are computed again in the backward pass.
        results, benchmark: where a measured speed is looked for.

    Raises:
        ValueError: a step's sequences cannot be shared out so.
    """
    if gpus < 1 or one.batch_rows % gpus:
        raise ValueError(
            f"gpus={gpus}: a step has {one.batch_rows} sequences (batch_tokens={one.batch_tokens}), which {gpus} GPUs "
            "cannot share evenly. Choose a divisor, or another batch_tokens."
        )
    share = one.batch_rows // gpus
    rows = share if rows is None else rows
    if rows < 1 or share % rows:
        raise ValueError(f"rows={rows} does not divide the {share} sequences of a GPU's step: choose a divisor.")
    accumulation = share // rows
    options = dict(precision="bf16" if one.bf16 else "float32", checkpointing=checkpointing, skip_logits=True)
    arguments = (one.config, rows, one.sequence_length)
    # DDP's buckets hold all gradients from the start, and the parameters' own gradients come on top.
    ddp = training_memory(*arguments, **options, accumulated=accumulation > 1 or gpus > 1)
    if gpus > 1:
        buckets = WEIGHT_BYTES * parameters(one.config)
        ddp = TrainingMemory(**{**asdict(ddp), "peak": ddp.peak + buckets, "gradients": ddp.gradients + buckets})
    fsdp2 = None
    if gpus > 1:
        fsdp2 = training_memory(*arguments, **options, accumulated=accumulation > 1, shards=gpus)
    per_token = flops_per_token(one.config, one.sequence_length)
    speed = measured_speed(one.cell, results, benchmark)
    mfu = None
    if speed is not None and (peak := peak_flops(speed.device, torch.bfloat16 if one.bf16 else torch.float32)):
        mfu = per_token * speed.tokens_per_s / peak
    tokens = one.steps * one.batch_tokens
    return Plan(
        cell=one.cell,
        gpus=gpus,
        parameters=parameters(one.config),
        tokens=tokens,
        steps=one.steps,
        rows=rows,
        accumulation=accumulation,
        checkpointing=checkpointing,
        flops_per_token=per_token,
        flops=per_token * tokens,
        ddp=ddp,
        fsdp2=fsdp2,
        speed=speed,
        hours=None if speed is None else tokens / (gpus * speed.tokens_per_s) / 3600,
        mfu=mfu,
    )


def plan(one: Recipe, gpus: int = 1, **options) -> str:
    """``make_plan`` as text."""
    return str(make_plan(one, gpus, **options))


def measured_speed(cell: str, results: str | Path = FOLDER, benchmark: str | Path = BENCHMARK) -> Speed | None:
    """Tokens per second and GPU of this cell: from its own training on a GPU, else from the benchmark, else None.

    A run on a CPU says nothing about a GPU's time and is passed over, and so is one that shared its GPU. The benchmark (``benchmarks.train_step``) times
    forward and backward in bfloat16, without an optimiser's step.
    """
    for path, found in read_all(results) if (Path(results) / cell).is_dir() else ():
        if found["model"] == cell and found["evaluation"] == "training" and peak_flops(found["device"], torch.bfloat16):
            for metric in found["metrics"]:
                if metric["metric"] == SPEED and metric.get("device") != "shared":
                    devices = metric.get("devices", found["protocol"].get("devices", 1))
                    return Speed(metric["value"] / devices, found["device"], str(path))
    if Path(benchmark).exists():
        found = json.loads(Path(benchmark).read_text(encoding="utf-8"))
        row = found["models"].get(cell, {}).get("ours", {})
        if SPEED in row:
            return Speed(row[SPEED], found["device"], f"{benchmark}, without optimiser")
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.plan",
        description="What a cell's training computes, whether it fits, and how long it takes.",
        epilog="example:\n  python -m training.plan 1.3B-100B-GLA-hybrid-3-1 --gpus 8 --rows 4 --checkpointing",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cell", nargs="+", help="names of hybrid_models/suite.py")
    parser.add_argument("--gpus", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--rows", type=int, help="sequences of one forward on one GPU; default: all of its share")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--json", action="store_true", help="numbers instead of text, one JSON object per line")
    options = parser.parse_args(argv)
    try:
        for cell in options.cell:
            found = make_plan(recipe(cell), options.gpus, rows=options.rows, checkpointing=options.checkpointing)
            print(json.dumps(asdict(found)) if options.json else found, flush=True)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
