"""transformers' Trainer with what a long pre-training run needs besides: exact data resume and checkpoints that are whole.

Only what the stock Trainer does differently is overridden here:

- **Data.** Batches come from ``training.data.Stream`` and carry their place; it is saved with every checkpoint. The
  Trainer's own way to resume, reading everything again up to the place, takes hours at 20B tokens.
- **Checkpoints.** The Trainer writes checkpoint-N in place, and a kill while it does leaves a directory that looks like
  one. Here it writes into ``.incomplete/``, the files are flushed to the disk, and the directory is renamed: a checkpoint
  that can be seen is whole.
- **Precision and weight decay.** Weights are float32 under FSDP as well. No decay for vectors (norms, biases, ``A_log``,
  ``dt_bias``) and for what the model itself exempts.
- **Loss.** Without logits (``hybrid_models.loss``): they would be the largest tensor of a step by far.
- **Logging.** Every step's loss, in one line each (``training.callbacks``), and a stop where one is not finite, before
  anything is saved. The Trainer replaces such a loss by the average of the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.checkpoint import flush

from .callbacks import Diverged, Speed, StepLog, device_is_shared, first_non_finite, state_statistics
from .data import Stream, merge_states

STAGING = ".incomplete"
# What writing raises on a full disk: Python's own files, torch.save, safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class SaveFailed(RuntimeError):
    """Something of a run could not be written."""

    def __init__(self, path: Path, error: Exception, output_dir: Path):
        super().__init__(
            f"{path} could not be written: {str(error).strip().splitlines()[0]}. The last good checkpoint is "
            f"{get_last_checkpoint(str(output_dir)) or 'none'}. Make room on the disk and run the same command again."
        )


class Batches:
    """The batches of a stream, without their places; ``place`` is the one after the last batch that was taken.

    Args:
        workers: 1 reads and tokenises in a process of its own, 0 in this one; the batches are the same.
    """

    def __init__(self, stream: Stream, workers: int, pin_memory: bool):
        self.place: dict | None = None
        self.loader = DataLoader(
            stream,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            # A forked process would inherit the tokenizer's threads, without the threads.
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=8 if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or it would draw from the generator that the model uses
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            self.place = batch.pop("state")
            yield batch


def _as_it_is(batch):
    return batch


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run; whatever an interrupted save left behind is removed."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    return None if found is None else Path(found)


def read_place(checkpoint: Path) -> dict:
    """Where the data of a run stood when ``checkpoint`` was saved, for ``Stream``."""
    return merge_states([json.loads(path.read_text()) for path in sorted(checkpoint.glob("data-*.json"))])


class HybridTrainer(Trainer):
    """See the module's docstring.

    Args:
        stream: the training data of this process.
        workers: see ``Batches``.
        log, speed: of the run; only the main process writes the log.
        log_every: steps between two looks at the device.
        probe_every: steps between two measurements of the states, 0 for none; on ``probe`` [B, T].
    """

    def __init__(
        self,
        *args,
        stream: Stream,
        workers: int,
        log: StepLog,
        speed: Speed,
        log_every: int,
        probe_every: int,
        probe: torch.Tensor,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            # FSDP's own 16 bits would round A_log, dt_bias and lower_bounds too. Left alone, it gathers float32 weights,
            # and autocast does what it does on one device.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.batches = Batches(stream, workers, self.args.device.type == "cuda")
        self.step_log, self.speed = log, speed
        self.log_every, self.probe_every, self.probe = log_every, probe_every, probe
        self.recorded: list[tuple] = []  # step, loss, gradient norm, learning rate of steps not logged yet
        self.step_loss: torch.Tensor | float = 0.0  # of the step at hand, over its accumulated batches
        self.shared_device = False  # whether another process was seen on it
        self.saving = False

    # ------------------------------------------------------------------------------------------------ what is trained on

    def get_train_dataloader(self) -> Batches:
        return self.batches

    def get_decay_parameter_names(self, model) -> list[str]:
        exempt = getattr(self.accelerator.unwrap_model(model), "no_weight_decay", ())
        return [name for name, p in model.named_parameters() if p.dim() > 1 and name.rsplit(".", 1)[-1] not in exempt]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if isinstance(self.accelerator.unwrap_model(model), HybridLinearForCausalLM):
            inputs = inputs | {"skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------ what is said

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.speed.began is None:
            self.speed.start()
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, learning_rate=None, **kwargs) -> None:
        step, control = self.state.global_step, self.control
        if self._globalstep_last_logged < step:
            self._globalstep_last_logged = step
            norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self.args.device)
            self.recorded.append((step, torch.as_tensor(self.step_loss).float(), norm, learning_rate))
            self.step_loss = 0.0
            due = step % self.log_every == 0 or (self.probe_every and step % self.probe_every == 0)
            first = self.speed.first_step_seconds is None
            if due or first or control.should_save or control.should_training_stop:
                self._flush()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, learning_rate=learning_rate, **kwargs)
        if not self.recorded:
            self.speed.start()

    def _flush(self) -> None:
        """Log the steps since the last time; the one place where training waits for the device."""
        steps, losses, norms, rates = zip(*self.recorded)
        numbers = self.accelerator.reduce(torch.stack((torch.stack(losses), torch.stack(norms))), "mean").tolist()
        tokens = self.speed.batch_tokens
        rows = [
            {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": step * tokens}
            for step, loss, norm, rate in zip(steps, *numbers, rates)
        ]
        rows[-1] |= self.speed.stop(len(rows))
        self.shared_device |= self.args.device.type == "cuda" and device_is_shared()
        self.recorded = []
        bad = first_non_finite(rows)
        if bad is None and self.probe_every and steps[-1] % self.probe_every == 0:
            rows[-1] |= self.measure_states()
        if self.is_world_process_zero():
            try:
                self.step_log.append(rows[:bad])
            except OSError as error:
                raise SaveFailed(self.step_log.path, error, Path(self.args.output_dir)) from error
        if bad is not None:
            raise Diverged(rows[bad], get_last_checkpoint(self.args.output_dir))
        self.log({name: value for name, value in rows[-1].items() if not isinstance(value, list) and name != "step"})

    def measure_states(self) -> dict:
        """``state_statistics`` of the model as it is; every process takes part, as a sharded model needs all of them."""
        with self.accelerator.autocast():
            return state_statistics(self.model, self.probe.to(self.args.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the progress bar and to what ``report_to`` names; not kept in the state, which would grow with every step."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ------------------------------------------------------------------------------------------------------ what is kept

    def _get_output_dir(self, trial=None) -> str:
        return os.path.join(self.args.output_dir, STAGING) if self.saving else self.args.output_dir

    def _save_checkpoint(self, model, trial) -> None:
        name = f"checkpoint-{self.state.global_step}"
        output_dir = Path(self.args.output_dir)
        staging = output_dir / STAGING
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
            place = staging / name / f"data-{self.args.process_index}.json"
            place.write_text(json.dumps(self.batches.place))
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                for path in [*(p for p in (staging / name).rglob("*") if p.is_file()), staging / name]:
                    flush(path)  # all of it, before a name is given that says it is whole
                shutil.rmtree(output_dir / name, ignore_errors=True)
                (staging / name).rename(output_dir / name)
                staging.rmdir()
                rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        except WRITE_ERRORS as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise SaveFailed(output_dir / name, error, output_dir) from error
        finally:
            self.saving = False
        self.accelerator.wait_for_everyone()


__all__ = [
    "STAGING",
    "WRITE_ERRORS",
    "Batches",
    "HybridTrainer",
    "SaveFailed",
    "last_checkpoint",
    "read_place",
]
