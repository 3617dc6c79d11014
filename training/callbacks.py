"""What a run says about itself while it trains: one line per step, the speed, and the health of the states.

    {"step": 10, "loss": 8.02, "grad_norm": 1.3, "learning_rate": 0.001, "tokens": 655360, "tokens_per_s": 812345.0, "mfu": 0.041}

``log.jsonl`` in the output directory has such a line for every optimiser step; speed stands in the last line of each
interval, states in that of every ``--probe-every``-th step. Losses are read from the device once per interval, so that
logging costs no time. After a restart the lines beyond the checkpoint are taken out and written again: the file is always
one curve, without gaps or doubles.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from pathlib import Path

import torch

from hybrid_models.results import write_atomically


class Diverged(RuntimeError):
    """The loss or the gradient of a step is not a finite number; ``row`` is its line of the log."""

    def __init__(self, row: dict, last_checkpoint: str | None):
        super().__init__(
            f"training diverged at step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
            f"{row['learning_rate']:.3g}. The last good checkpoint is {last_checkpoint or 'none, it was too early'}. Lower "
            "--learning-rate or --max-grad-norm, or raise --warmup-steps, and start anew with --restart."
        )


class StepLog:
    """The file with one line per step."""

    def __init__(self, path: Path):
        self.path = path

    def cut(self, step: int) -> None:
        """Remove what was written after ``step``, and a last line that a kill left incomplete.

        Raises:
            ValueError: the lines up to ``step`` are not there, one per step.
        """
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError):
                break
            kept.append(line)
        if [json.loads(line)["step"] for line in kept] != list(range(1, step + 1)):
            raise ValueError(f"{self.path} does not hold steps 1 to {step} of this run: start anew with --restart.")
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def append(self, rows: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


class Speed:
    """Tokens per second of all devices, and the share of their peak (MFU) that the model's true operations are.

    Args:
        flops_per_token: forward and backward, ``training.accounting.flops_per_token``.
        peak: operations per second of all devices together; None: not known, then there is no MFU.
    """

    def __init__(self, batch_tokens: int, flops_per_token: float, peak: float | None):
        self.batch_tokens, self.flops_per_token, self.peak = batch_tokens, flops_per_token, peak
        self.first_step_seconds: float | None = None
        self.intervals: list[tuple[int, float]] = []  # steps and seconds, the first step left out
        self.began: float | None = None

    def start(self) -> None:
        """An interval begins; whatever happened since the last one ended (saving, probing) is not training."""
        self.began = time.perf_counter()

    def stop(self, steps: int) -> dict[str, float]:
        """An interval of so many steps ends, the device having been waited for.

        Raises:
            RuntimeError: the MFU is above 1, which cannot be: the operations or the peak are wrong.
        """
        seconds = time.perf_counter() - self.began
        if self.first_step_seconds is None:
            self.first_step_seconds = seconds
            return {}
        self.intervals.append((steps, seconds))
        tokens_per_s = steps * self.batch_tokens / seconds
        return {"tokens_per_s": tokens_per_s, **self._mfu(tokens_per_s)}

    def _mfu(self, tokens_per_s: float) -> dict[str, float]:
        if self.peak is None:
            return {}
        mfu = tokens_per_s * self.flops_per_token / self.peak
        if mfu > 1:
            raise RuntimeError(
                f"MFU is {mfu:.3f}, above 1: training/accounting.py counts operations or the peak wrongly."
            )
        return {"mfu": mfu}

    def summary(self) -> dict[str, float]:
        """Medians over the intervals; empty where there was none."""
        if not self.intervals:
            return {}
        tokens_per_s = statistics.median(steps * self.batch_tokens / seconds for steps, seconds in self.intervals)
        return {"tokens_per_s": tokens_per_s, **self._mfu(tokens_per_s)}


def device_is_shared() -> bool:
    """Whether another process holds memory of this CUDA device: speeds are then not what the device can do."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() > 2**31  # this process's own context takes less than 1 GiB


@torch.no_grad()
def state_statistics(model, input_ids: torch.Tensor) -> dict[str, list[float | None]]:
    """Size and rank of every layer's recurrent state after ``input_ids`` [B, T], means over rows and heads.

    Returns:
        ``state_norm``, the Frobenius norm, and ``state_rank``, the participation ratio (sum s^2)^2 / sum s^4 of the
        singular values s (of the entries for HGRN's vector state): the number of directions in use, 1 to min(K, V).
        One entry per layer, None at attention layers and where a value is not finite.
    """
    training = model.training
    model.eval()
    try:
        cache = model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values
    finally:
        model.train(training)
    norms, ranks = [], []
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", None)
        norm, rank = (None, None) if not states else _norm_and_rank(states[0].double())
        norms.append(norm)
        ranks.append(rank)
    return {"state_norm": norms, "state_rank": ranks}


def _norm_and_rank(state: torch.Tensor) -> tuple[float | None, float | None]:
    if state.dim() == 2:  # [B, D]
        squares, fourths = state.square().sum(-1), state.pow(4).sum(-1)
    else:  # [B, H, K, V]: sum s^4 is the squared norm of S^T S
        squares, fourths = state.square().sum((-2, -1)), (state.mT @ state).square().sum((-2, -1))
    values = squares.sqrt().mean().item(), (squares.square() / fourths).mean().item()
    return tuple(value if math.isfinite(value) else None for value in values)


def first_non_finite(rows: list[dict]) -> int | None:
    """Index of the first step whose loss or gradient norm is not a finite number; None if all are."""
    bad = (i for i, row in enumerate(rows) if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])))
    return next(bad, None)


__all__ = ["Diverged", "Speed", "StepLog", "device_is_shared", "first_non_finite", "state_statistics"]
