"""Train a cell of the suite, or a change of one, through transformers' Trainer and accelerate.

    python -m training.train --cell 340M-20B-GatedDeltaNet-hybrid-6-1 --dry-run
    python -m training.train --cell nano-7M-GLA-pure --seed 7
    python -m training.train --cell nano-22M-HGRN2-hybrid-3-1 --dataset "code.jsonl:0.3 text/:0.7" --set hidden_size=192
    accelerate launch --config_file training/accelerate/ddp.yaml -m training.train --cell 1.3B-100B-RetNet-pure

A run is its recipe (``training.recipes``) and its output directory. Killed at any moment, the same command goes on from the
last whole checkpoint, and its loss curve is that of a run that was never killed, to the bit on one CPU; another recipe in
the same directory is refused. At the end the directory is a complete checkpoint, weights in float32, tokenizer and code
included, beside ``log.jsonl`` (one line per step) and ``training.json`` (the result; cards read a copy of it).

16-bit training here is autocast: weights, optimiser and the decay parameters stay in float32, matrix products are bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.results import FOLDER, result, this_command, weights_sha256, write, write_atomically

from .accounting import flops_per_token, peak_flops
from .callbacks import Diverged, Speed, StepLog
from .corpus import default_cache
from .data import Stream
from .demo import LossOnBar
from .outcome import measured, save, thinned
from .plan import plan
from .recipes import Recipe, recipe
from .sources import MappedSource, Source, held_out_rows, open_sources, open_tokenizer, tokenizer_digest
from .trainer import STAGING, WRITE_ERRORS, HybridTrainer, SaveFailed, last_checkpoint, read_place

PROBE_ROWS = 4  # held-out rows whose states are measured


@dataclass(frozen=True)
class Options:
    """What does not change the result, up to rounding: where a run writes, how it is cut into pieces, what it says."""

    output_dir: Path | None = None  # default runs/<cell>
    cache_dir: Path = dataclasses.field(default_factory=default_cache)
    rows_per_device: int | None = None  # sequences per forward pass; default: as many as 2^24 / hidden_size tokens
    streaming: bool | None = None  # see sources.open_sources
    workers: int | None = None  # processes that read and tokenise: 0 or 1; default: 1 for streams
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu: bool = False
    save_steps: int | None = None  # default: a fifth of the run, at most 1000
    keep: int = 2  # checkpoints
    log_every: int = 10
    probe_every: int = 100
    held_out_rows: int = 256
    report_to: str = "none"
    restart: bool = False
    results: Path | None = None  # folder of results; None: the output directory only
    label: str | None = None  # of the result's file


def identity(one: Recipe, tokenizer: PreTrainedTokenizerBase, sources: list[Source]) -> dict:
    """All that a run's numbers depend on, as kept in run.json: a directory is resumed only by the same run."""
    fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "config"}
    corpora = [{k: v for k, v in vars(c).items() if k != "directory"} for s in sources if (c := s.files.corpus)]
    config = {k: v for k, v in one.config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
    return {
        **fields,
        "config": config,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "files": sum(len(source.files.paths) for source in sources),
        "corpus": corpora,
    }


def rows_per_device(one: Recipe, chosen: int | None, world: int) -> int:
    """Sequences per forward pass of each device.

    Raises:
        ValueError: the batch does not divide into such pieces.
    """
    if one.batch_rows % world:
        raise ValueError(
            f"batch_tokens={one.batch_tokens} are {one.batch_rows} sequences, which {world} processes cannot share evenly: "
            f"use --batch-tokens {-(-one.batch_rows // world) * world * one.sequence_length}."
        )
    share = one.batch_rows // world
    if chosen is not None:
        if chosen < 1 or share % chosen:
            raise ValueError(f"rows_per_device={chosen} does not divide the {share} sequences of each device's batch.")
        return chosen
    most = max(1, 2**24 // (one.config.hidden_size * one.sequence_length))
    return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= most)


def arguments(one: Recipe, options: Options, output_dir: Path) -> TrainingArguments:
    """A recipe in the Trainer's words.

    Raises:
        ValueError: the batch does not divide by the processes, or something is asked for that is not here.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro = rows_per_device(one, options.rows_per_device, world)
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise ValueError(f"report_to={options.report_to!r} is not installed: pip install {options.report_to}.")
    cpu = options.cpu or not torch.cuda.is_available()
    if cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("FSDP on a CPU would silently be DDP: use torchrun or training/accelerate/ddp.yaml there.")
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=one.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=one.batch_rows // world // micro,
        learning_rate=one.learning_rate,
        adam_beta1=one.adam_beta1,
        adam_beta2=one.adam_beta2,
        adam_epsilon=one.adam_epsilon,
        weight_decay=one.weight_decay,
        max_grad_norm=one.max_grad_norm,
        warmup_steps=one.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": one.min_lr_ratio},
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        bf16=one.bf16,
        use_cpu=cpu,
        activation_checkpointing=options.gradient_checkpointing,
        torch_compile=options.compile,
        save_steps=options.save_steps or min(1000, -(-one.steps // 5)),
        save_total_limit=options.keep,
        logging_strategy="no",  # HybridTrainer says everything itself
        logging_nan_inf_filter=False,  # it would hide what must stop the run
        report_to=options.report_to,
        disable_tqdm=False,
        ignore_data_skip=True,  # the stream goes on by itself
        ddp_find_unused_parameters=False,  # every parameter gets a gradient, in every mixer
        remove_unused_columns=False,
        log_level_replica="error",
        seed=one.seed,
    )
    if args.n_gpu > 1:  # a process drives one GPU; left alone, the Trainer would split each batch over all it sees
        args._n_gpu = 1
    return args


def train(
    one: Recipe, options: Options = Options(), command: str | None = None, build: Callable = HybridLinearForCausalLM
) -> dict | None:
    """Run a recipe to its end, from wherever its output directory stands.

    Args:
        command: what the result names as its origin; default: the command line of this process.
        build: makes the model from the recipe's configuration; a benchmark's peers are trained by the same code.

    Returns:
        the result (``hybrid_models.results``), as written to training.json; None in processes other than the first.

    Raises:
        ValueError: settings, data (DataError, which names the file) or an output directory that do not go together.
        Diverged: a loss or gradient is not finite; the last good checkpoint stays.
        SaveFailed: something could not be written; the last good checkpoint stays.
    """
    began = time.perf_counter()
    output_dir = options.output_dir or Path("runs") / one.cell
    args = arguments(one, options, output_dir)
    main = args.process_index == 0
    cache = options.cache_dir
    with args.main_process_first(local=True, desc="data"):
        tokenizer = open_tokenizer(one.tokenizer, one.config, one.dataset, cache)
        sources = open_sources(one.dataset, tokenizer, cache, options.streaming)
        held_out = held_out_rows(one.dataset, tokenizer, cache, one.sequence_length, options.held_out_rows)
    run = identity(one, tokenizer, sources)
    if main:
        prepare(output_dir, run, options.restart)
    args.distributed_state.wait_for_everyone()
    finished = output_dir / "training.json"
    if finished.exists():
        if main:
            print(f"{output_dir} holds this run already, complete; --restart trains it anew.")
        return json.loads(finished.read_text()) if main else None
    checkpoint = last_checkpoint(output_dir)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    log = StepLog(output_dir / "log.jsonl")
    if main:
        rotate_checkpoints(str(output_dir), options.keep)  # a kill may have come between a save and this
        log.cut(done)
        print(f"{one.cell}: " + (f"going on after step {done} of {one.steps}" if done else f"{one.steps} steps"))

    set_seed(one.seed)
    model = build(one.config)
    stream = Stream(
        sources,
        sequence_length=one.sequence_length,
        seed=one.seed,
        lanes=one.lanes,
        rows=args.per_device_train_batch_size,
        boundaries=one.boundaries,
        rank=args.process_index,
        world=args.world_size,
        place=None if checkpoint is None else read_place(checkpoint),
    )
    dtype = torch.bfloat16 if one.bf16 else torch.float32
    peak = peak_flops(torch.cuda.get_device_name(), dtype) if args.device.type == "cuda" else None
    streams = int(any(not isinstance(source, MappedSource) for source in sources))
    trainer = HybridTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        stream=stream,
        workers=streams if options.workers is None else options.workers,
        log=log,
        speed=Speed(
            one.batch_tokens, flops_per_token(one.config, one.sequence_length), peak and peak * args.world_size
        ),
        log_every=options.log_every,
        probe_every=options.probe_every if len(held_out) and "linear_attention" in one.config.layer_types else 0,
        probe=held_out[:PROBE_ROWS],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bar := LossOnBar())
    if done < one.steps:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            if bar.training_bar is not None:
                bar.training_bar.close()  # what is printed next begins a line
    elif trainer.is_fsdp_enabled:
        raise ValueError(f"{checkpoint} is the last step, but has no result yet: run the same command without FSDP.")
    else:  # stopped between the last step and the result
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    metrics = measured(one, trainer, held_out)
    try:
        save(trainer, output_dir)
        if not main:
            return None
        found = result(
            "training",
            one.cell,
            command or this_command("training.train"),
            metrics,
            weights=weights_sha256(output_dir),
            protocol={**run, "streaming": options.streaming, "devices": args.world_size},
            seeds=[one.seed],
            seconds=time.perf_counter() - began,
            details={
                "parameters": model.num_parameters(),
                "loss_curve": thinned(log.rows()),
                "resumed_after_step": done or None,
                "rows_per_device": args.per_device_train_batch_size,
                "gradient_checkpointing": options.gradient_checkpointing,
                "compile": options.compile,
            },
        )
        if options.results is not None:
            print(f"result: {write(found, options.results, options.label)}")
        write_atomically(finished, json.dumps(found, indent=1, allow_nan=False) + "\n")
    except WRITE_ERRORS as error:
        raise SaveFailed(output_dir, error, output_dir) from error
    return found


def prepare(output_dir: Path, run: dict, restart: bool) -> None:
    """Make the output directory this run's.

    Raises:
        ValueError: it holds another run.
    """
    identity_file = output_dir / "run.json"
    if restart and identity_file.exists():
        for path in [*output_dir.glob("checkpoint-*"), output_dir / STAGING]:
            shutil.rmtree(path, ignore_errors=True)
        for name in ("training.json", "log.jsonl", "run.json"):
            (output_dir / name).unlink(missing_ok=True)
    run = json.loads(json.dumps(run))
    if identity_file.exists():
        held = json.loads(identity_file.read_text())
        changed = sorted(name for name in held.keys() | run.keys() if held.get(name) != run.get(name))
        if changed:
            differences = "; ".join(f"{name} was {held.get(name)!r:.80}, is {run.get(name)!r:.80}" for name in changed)
            raise ValueError(
                f"{output_dir} holds another run: {differences}. Use another --output-dir, or --restart to replace it."
            )
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(identity_file, json.dumps(run, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------- command


def dry_run(one: Recipe, options: Options, gpus: int) -> str:
    """The plan, and the first batch as text, or why it cannot be read here."""
    micro = rows_per_device(one, options.rows_per_device, gpus)
    lines = [plan(one, gpus, rows=micro, checkpointing=options.gradient_checkpointing), ""]
    try:
        tokenizer = open_tokenizer(one.tokenizer, one.config, one.dataset, options.cache_dir)
        sources = open_sources(one.dataset, tokenizer, options.cache_dir, streaming=True)
        stream = Stream(sources, sequence_length=one.sequence_length, seed=one.seed, lanes=one.lanes)
        rows = [batch["input_ids"][0] for batch in islice(stream, min(3, one.batch_rows))]
    except (ValueError, OSError) as error:
        return "\n".join([*lines, f"The first batch cannot be read here: {error}"])
    lines += ["The first rows of the first batch begin:"]
    return "\n".join(lines + ["  " + json.dumps(tokenizer.decode(row)[:100], ensure_ascii=False) for row in rows])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "python -m training.train",
        description="Train a cell of the suite. Run the same command again after an interruption: it goes on.",
        epilog="examples:\n"
        "  python -m training.train --cell nano-7M-GatedDeltaNet-hybrid-6-1\n"
        "  python -m training.train --cell 340M-20B-GLA-pure --dry-run --gpus 8\n"
        "  accelerate launch --config_file training/accelerate/ddp.yaml -m training.train --cell 340M-20B-GLA-pure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--cell", required=True, help="a name of the suite, as in 340M-20B-GatedDeltaNet-hybrid-6-1")
    out.add_argument("--dry-run", action="store_true", help="print the plan and the first batch, train nothing")
    out.add_argument("--gpus", type=int, default=1, help="of the plan that --dry-run prints (default 1)")

    group = out.add_argument_group("recipe (defaults are the cell's: python -m training.recipes --cell CELL)")
    for field in dataclasses.fields(Recipe):
        if field.name in ("cell", "config"):
            continue
        name = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            kind = {"int": int, "float": float, "str": str}[field.type]
            group.add_argument(name, type=kind, metavar=kind.__name__.upper())
    group.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model's configuration"
    )

    group = out.add_argument_group("run")
    group.add_argument("--output-dir", type=Path, help="(default runs/CELL)")
    group.add_argument("--restart", action="store_true", help="throw away what the output directory holds of a run")
    group.add_argument(
        "--rows-per-device", type=int, metavar="N", help="sequences per forward pass; lower it to save memory"
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    group.add_argument(
        "--streaming", action=argparse.BooleanOptionalAction, default=None, help="(default: what is remote)"
    )
    group.add_argument("--workers", type=int, choices=(0, 1), help="read in a process of its own (default: streams)")
    group.add_argument("--save-steps", type=int, metavar="N", help="(default: a fifth of the run, at most 1000)")
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints to keep (default 2)")
    group.add_argument(
        "--log-every", type=int, default=10, metavar="N", help="steps between looks at the loss (default 10)"
    )
    group.add_argument(
        "--probe-every", type=int, default=100, metavar="N", help="steps between looks at the states; 0: none"
    )
    group.add_argument("--held-out-rows", type=int, default=256, metavar="N", help="(default 256)")
    group.add_argument("--report-to", default="none", choices=("none", "tensorboard", "trackio", "wandb"))
    group.add_argument("--cache-dir", type=Path, default=default_cache(), help="(default %(default)s)")
    group.add_argument(
        "--results", type=Path, help=f"where the result goes too (default {FOLDER} for a cell's own recipe)"
    )
    group.add_argument("--label", help="of the result's file (default: none, or the seed if it is not the recipe's)")
    return out


def config_fields(settings: list[str]) -> dict:
    """--set FIELD=VALUE as a dictionary; values are JSON, or else text."""
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write it as FIELD=VALUE, as in --set hidden_size=512.")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def main(argv: list[str] | None = None) -> int:
    front = parser()
    given = vars(front.parse_args(argv))
    names = {field.name for field in dataclasses.fields(Recipe)} - {"cell", "config"}
    chosen = {name: given.pop(name) for name in names}
    cell, settings, dry, gpus = (given.pop(name) for name in ("cell", "set", "dry_run", "gpus"))
    set_verbosity_error()
    disable_progress_bar()  # of loading and saving; the Trainer's stays
    try:
        one = recipe(cell, config_fields=config_fields(settings), **chosen)
        own = dataclasses.replace(recipe(cell), seed=one.seed)
        if given["results"] is None and one == own and not cell.startswith("tiny-"):
            given["results"] = FOLDER
        if given["label"] is None and one.seed != recipe(cell).seed:
            given["label"] = f"seed{one.seed}"
        options = Options(**given)
        if dry:
            print(dry_run(one, options, gpus))
            return 0
        found = train(one, options, this_command("training.train", argv))
    except (Diverged, SaveFailed) as error:
        return stop(error, 1)
    except torch.OutOfMemoryError as error:
        return stop(f"{str(error).splitlines()[0]} Lower --rows-per-device, or pass --gradient-checkpointing.", 1)
    except (ValueError, OSError) as error:
        return stop(error, 2)
    if found is not None:
        for one_metric in found["metrics"]:
            stderr = f" +- {one_metric['stderr']:.4f}" if "stderr" in one_metric else ""
            print(f"{one_metric['task']:>9} {one_metric['metric']:<13} {one_metric['value']:,.6g}{stderr}")
    return 0


def stop(error, status: int) -> int:
    """Say in one line why the command ends; processes that wait for this one are not waited for."""
    print(f"training.train: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        if torch.distributed.is_initialized():
            os._exit(status)
    return status


__all__ = ["Options", "dry_run", "main", "rows_per_device", "train"]

if __name__ == "__main__":
    raise SystemExit(main())
