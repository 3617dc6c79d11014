"""What a finished run leaves behind: the trained model, and the numbers of its result file.

Held-out loss is measured once, by the run itself, in the precision that it was trained in; evaluation measures again, from
the saved checkpoint, and the two must agree.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from hybrid_models.results import metric

from .recipes import Recipe
from .trainer import STAGING, HybridTrainer

CURVE_POINTS = 200  # of the loss curve in the result


def measured(one: Recipe, trainer: HybridTrainer, held_out: torch.Tensor) -> list[dict]:
    """The result's metrics: held-out loss, training loss, speed, memory. Every process takes part, one reads the log."""
    metrics = []
    if len(held_out):
        losses = row_losses(trainer, held_out)
        metrics.append(
            metric(
                "held-out",
                "loss_nats",
                losses.mean().item(),
                n=len(losses) * (one.sequence_length - 1),
                **({"stderr": losses.std().item() / len(losses) ** 0.5} if len(losses) > 1 else {}),
            )
        )
    speed = trainer.speed.summary()
    on_device, devices = trainer.args.device.type == "cuda", trainer.args.world_size
    here = torch.cuda.max_memory_allocated() if on_device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = trainer.accelerator.gather(torch.tensor([here], device=trainer.args.device))
    if trainer.is_world_process_zero():
        rows = trainer.step_log.rows()
        tail = [row["loss"] for row in rows[-max(1, len(rows) // 10) :]]
        metrics.append(metric("train", "loss_nats", sum(tail) / len(tail), n=len(tail) * one.batch_tokens))
        shared = {"device": "shared"} if trainer.shared_device else {}
        for name, value in speed.items():
            metrics.append(metric("training", name, value, n=len(trainer.speed.intervals), devices=devices, **shared))
        if trainer.speed.first_step_seconds is not None:
            metrics.append(metric("training", "first_step_s", trainer.speed.first_step_seconds))
        metrics.append(metric("training", "peak_bytes", peaks.max().item(), of="device" if on_device else "process"))
    return metrics


@torch.no_grad()
def row_losses(trainer: HybridTrainer, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss [rows] in nats per token of every held-out row [rows, T], in the precision of training."""
    trainer.model.eval()
    losses = []
    for part in rows.split(trainer.args.per_device_train_batch_size):
        ids = part.to(trainer.args.device)
        with trainer.accelerator.autocast():
            logits = trainer.model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(each.double().mean(1).cpu())
    return torch.cat(losses)


def save(trainer: HybridTrainer, output_dir: Path) -> None:
    """The trained model into the output directory, file by file whole."""
    staging = output_dir / STAGING
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in staging.iterdir():
            os.replace(path, output_dir / path.name)
        staging.rmdir()


def thinned(rows: list[dict]) -> list[list]:
    """[step, loss] of at most CURVE_POINTS steps, evenly spaced, the last one among them."""
    every = -(-len(rows) // CURVE_POINTS)
    return [[row["step"], row["loss"]] for row in rows if (len(rows) - row["step"]) % every == 0]


__all__ = ["measured", "row_losses", "save", "thinned"]
