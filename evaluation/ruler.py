"""RULER: recall from a context of a given length, 13 tasks, on any checkpoint.

    python -m evaluation.ruler runs/demo --lengths 512,1024,2048 --samples 100
    python -m evaluation.ruler 1.3B-dir --lengths 4096 --device cuda --dtype bfloat16 \\
        --squad dev-v2.0.json --hotpot hotpot_dev_distractor_v1.json
    python -m evaluation.ruler 1.3B-dir --lengths 4096 --compat lm-eval    # lm-eval's own tasks, to compare with others

Four numbers of every task and length, each with a 95 % interval: ``official``, RULER's score of a greedy answer;
``strict``, which printing everything does not win; ``shortcut``, the official score of printing everything (no model: what
an official score must beat to mean recall); and where the answer's form is fixed ``forced``, from one forward pass with
the answer given. A cell that cannot be built is named with the reason and enters no mean; a mean says over how many tasks
it is. A result's protocol id tells whether two numbers may be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from hybrid_models import results

from .ruler_data import QUESTIONS
from .ruler_scoring import average_interval, forced_request, forced_scores, scores, shortcut_answer
from .ruler_tasks import TASKS, CannotBuild, Ruler, Sample
from .scoring import (
    DTYPES,
    Encoder,
    add_model_arguments,
    comma_separated,
    generate,
    load,
    loglikelihoods,
    mean_interval,
    protocol_of,
)

SCORER = 1  # raise it with any change to ruler_scoring.py or to how answers are generated
SCORINGS = ("generated", "forced")
COLUMNS = ("official", "strict", "shortcut", "forced")


@dataclass
class Cell:
    """One task at one length."""

    task: str
    length: int
    scores: dict[str, list[float]] = field(default_factory=dict)  # by metric, one entry per sample
    data_sha256: str = ""
    depth: list[float] = field(default_factory=list)  # of the first gold answer
    refused: str = ""  # why there is none of it
    disagreements: int = 0  # samples in which teacher forcing and generation differ on whether greedy writes the gold


def run_cell(
    model, ruler: Ruler, task: str, length: int, count: int, *, scoring: Sequence[str], batch_size: int
) -> Cell:
    """Generate, answer and judge ``count`` samples of a task at a length."""
    cell = Cell(task, length)
    try:
        samples = ruler.samples(task, length, count)
    except CannotBuild as error:
        cell.refused = str(error)
        return cell
    lines = "\n".join(sample.to_json() for sample in samples)
    cell.data_sha256 = hashlib.sha256(lines.encode()).hexdigest()[:12]
    cell.depth = [sample.depth[0] for sample in samples]
    options = dict(batch_size=batch_size, max_length=length, progress=f"{task} {length}")
    written = None
    if "generated" in scoring:
        prompts, eos = [ruler.encode(sample.prompt) for sample in samples], ruler.encode.tokenizer.eos_token_id
        written = generate(model, prompts, TASKS[task].budget, eos=eos, **options)
        judged = [scores(sample, ruler.encode.decode(ids)) for sample, ids in zip(samples, written, strict=True)]
        cell.scores |= {name: [one[name] for one in judged] for name in ("official", "strict")}
    if "forced" in scoring and TASKS[task].ordered:
        requests = [forced_request(sample, ruler.encode) for sample in samples]
        found = loglikelihoods(model, [(context, answer) for context, answer, _ in requests], **options)
        judged = [forced_scores(one, spans) for one, (_, _, spans) in zip(found, requests, strict=True)]
        cell.scores |= {name: [one[name] for one in judged] for name in ("forced", "gold_nats")}
        if written is not None:
            starts = [ids[: len(answer)] == answer for ids, (_, answer, _) in zip(written, requests, strict=True)]
            cell.disagreements = sum(one.greedy != start for one, start in zip(found, starts, strict=True))
    if TASKS[task].match == "all":
        cell.scores["shortcut"] = shortcut_scores(samples, ruler.encode)
    return cell


def shortcut_scores(samples: Sequence[Sample], encode: Encoder) -> list[float]:
    """Official scores of printing everything in the prompt that has an answer's shape, within the budget."""
    return [scores(sample, shortcut_answer(sample, encode))["official"] for sample in samples]


def protocol(fields: dict) -> dict:
    """``fields`` with their digest as ``id``: equal ids, comparable numbers."""
    text = json.dumps(fields, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:12], **fields}


def cell_metrics(cells: Sequence[Cell]) -> list[dict]:
    """Metrics of every cell, and of every length's mean over the tasks that are there."""
    metrics = []
    for cell in cells:
        for name, values in cell.scores.items():
            ci95 = mean_interval(values) if name in COLUMNS else None
            mean = sum(values) / len(values)
            metrics.append(results.metric(cell.task, name, mean, n=len(values), ci95=ci95, length=cell.length))
    for length in sorted({cell.length for cell in cells}):
        for name in COLUMNS:
            rows = [cell.scores[name] for cell in cells if cell.length == length and name in cell.scores]
            if rows:
                mean = sum(sum(row) / len(row) for row in rows) / len(rows)
                ci95 = average_interval(rows)
                metrics.append(results.metric("mean", name, mean, ci95=ci95, length=length, tasks=len(rows)))
    return metrics


def evaluate(
    target: str | Path,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    tasks: Sequence[str] = tuple(TASKS),
    samples: int = 500,
    scoring: Sequence[str] = SCORINGS,
    haystack: str | Path | None = None,
    questions: dict[str, str | Path] | None = None,
    seed: int = 0,
    compat: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    batch_size: int = 8,
    command: str = "",
) -> dict:
    """All cells of a checkpoint, as a result of ``hybrid_models.results``.

    Args:
        target: checkpoint directory or repo id.
        lengths: in tokens, with BOS and room for the answer.
        samples: of every task and length; RULER takes 500.
        scoring: of SCORINGS.
        haystack: text file instead of the shipped one.
        questions: path of the data set of every QA task that is to be run.
        compat: "lm-eval" for its own tasks instead of ours.

    Raises:
        ValueError: an unknown task, a length below 64, no samples, or see ``load`` and ``Ruler``.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"task={unknown[0]!r} is not known: use some of {', '.join(TASKS)}.")
    if min(lengths, default=0) < 64 or samples < 1:
        raise ValueError(f"lengths={list(lengths)} must be 64 tokens or more, and samples={samples} at least 1.")
    if not scoring or set(scoring) - set(SCORINGS):
        raise ValueError(f"scoring={list(scoring)} must be some of {', '.join(SCORINGS)}.")
    if compat not in (None, "lm-eval"):
        raise ValueError(f"compat={compat!r} is not known: use 'lm-eval' or leave it out.")
    start = time.perf_counter()
    model, loaded = load(target, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)
    pairs = tqdm([(task, length) for length in sorted(lengths) for task in tasks], desc="cells")
    if compat:
        from .ruler_compat import Compat, describe

        fields = {"profile": compat, **describe(), **protocol_of(model, Encoder(loaded)), "samples": samples}
        theirs = Compat(model, loaded, str(tokenizer or target), batch_size)
        cells = [theirs.cell(task, length, samples) for task, length in pairs]
    else:
        ruler = Ruler(loaded, haystack, questions, seed)
        fields = {"profile": "ruler", "scorer": SCORER, **ruler.describe(), **protocol_of(model, ruler.encode)}
        fields |= {"samples": samples, "scoring": sorted(scoring), "max_length": "the cell's; nothing is cut"}
        cells = [
            run_cell(model, ruler, task, length, samples, scoring=scoring, batch_size=batch_size)
            for task, length in pairs
        ]
    run = [cell for cell in cells if not cell.refused]
    return results.result(
        "ruler",
        Path(target).resolve().name,
        command,
        cell_metrics(run),
        weights=results.weights_sha256(target),
        protocol=protocol(fields),
        seeds=[seed],
        seconds=round(time.perf_counter() - start, 1),
        details={
            "not_run": {f"{cell.task}/{cell.length}": cell.refused for cell in cells if cell.refused},
            "data_sha256": {f"{cell.task}/{cell.length}": cell.data_sha256 for cell in run},
            "depth": {f"{cell.task}/{cell.length}": cell.depth for cell in run if cell.depth},
            "forced_unlike_generated": sum(cell.disagreements for cell in run),
            "items": {f"{cell.task}/{name}/{cell.length}": row for cell in run for name, row in cell.scores.items()},
        },
    )


def table(one: dict) -> str:
    """The metrics for a terminal, one line a cell; every mean says over how many tasks it is."""
    found: dict[tuple[int, str], dict[str, dict]] = {}
    for m in one["metrics"]:
        found.setdefault((m["length"], m["task"]), {})[m["metric"]] = m
    lines = []
    for length in sorted({length for length, _ in found}):
        lines.append(f"\n{f'{length} tokens':<22}" + "".join(f"{name:<27}" for name in COLUMNS).rstrip())
        for task in [*TASKS, "mean"]:
            row = found.get((length, task))
            if row is None:
                continue
            entries = []
            for name in COLUMNS:
                m = row.get(name)
                if m is None:
                    entries.append("-")
                    continue
                count = f" /{m['tasks']}" if task == "mean" else ""
                entries.append(f"{m['value']:.3f} [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]{count}")
            lines.append((f"{task:<22}" + "".join(f"{entry:<27}" for entry in entries)).rstrip())
        tasks = max((m.get("tasks", 0) for m in found[length, "mean"].values()), default=0)
        if tasks < len(TASKS):
            lines.append(f"the mean is over {tasks} tasks: the {len(TASKS)}-task mean of RULER is not given")
    if one["details"]["not_run"]:
        lines += ["", "not run:"]
        lines += [f"  {cell:<24} {reason}" for cell, reason in _without_repeats(one["details"]["not_run"]).items()]
    if unlike := one["details"]["forced_unlike_generated"]:
        lines += ["", f"in {unlike} samples teacher forcing and generation disagree on whether the gold is written"]
    return "\n".join([*lines, "", f"protocol {one['protocol']['id']}"])


def _without_repeats(not_run: dict[str, str]) -> dict[str, str]:
    """A reason that is the same at every length, once."""
    by_task: dict[tuple[str, str], list[str]] = {}
    for cell, reason in not_run.items():
        task, length = cell.split("/")
        by_task.setdefault((task, reason), []).append(length)
    return {f"{task}/{','.join(lengths)}": reason for (task, reason), lengths in by_task.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evaluation.ruler",
        description="RULER's 13 tasks at any length from 64 tokens, with scores that mean something at short ones.",
        epilog="example:\n  python -m evaluation.ruler runs/demo --lengths 512,1024 --samples 100 --tasks niah_single_1 ruler_vt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="PATH", help="checkpoint directory or repo id")
    parser.add_argument(
        "--lengths",
        type=comma_separated,
        default=[512, 1024, 2048, 4096],
        metavar="N,N",
        help="in tokens, answer included (default 512,1024,2048,4096)",
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--samples", type=int, default=500, help="of every task and length (default %(default)s)")
    parser.add_argument("--scoring", nargs="+", choices=SCORINGS, default=list(SCORINGS), help="default: both")
    parser.add_argument("--haystack", metavar="FILE", help="prose for the essay tasks (default: the shipped one)")
    parser.add_argument("--squad", metavar="FILE", help=f"{QUESTIONS['ruler_qa_squad'].file}, for ruler_qa_squad")
    parser.add_argument("--hotpot", metavar="FILE", help=f"{QUESTIONS['ruler_qa_hotpot'].file}, for ruler_qa_hotpot")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default %(default)s)")
    parser.add_argument(
        "--compat", choices=["lm-eval"], help="run lm-eval's tasks with their defects, to compare with others"
    )
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k not in ("output", "target", "squad", "hotpot")}
    files = {"ruler_qa_squad": args.squad, "ruler_qa_hotpot": args.hotpot}
    options["questions"] = {task: path for task, path in files.items() if path is not None}
    try:
        one = evaluate(args.target, **options, command=results.this_command("evaluation.ruler", argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(one))
    print(f"written to {results.write(one, args.output, label=args.compat)}")


if __name__ == "__main__":
    main()
