"""Language modelling: the paper's six zero-shot tasks through lm-eval, and loss on any held-out text.

    python -m evaluation.lm runs/demo --data-root data/lm                   # offline; says which files are missing
    python -m evaluation.lm 340M-dir --text book.txt --window 2048          # loss, perplexity, bits per byte
    python -m evaluation.lm 340M-dir --tasks piqa lambada_openai            # from the Hub

lm-eval makes the questions and judges them; data come from the Hub, or from ``ROOT/<task>/<split>.jsonl`` in the Hub's own
fields. The average is the plain mean of one accuracy per task: length-normalised (per character) for ARC-c, HellaSwag and
OpenBookQA, plain for ARC-e, LAMBADA and PIQA. So does flash-linear-attention; the paper (arXiv 2507.06457) does not say,
but the rows of its task tables average that way. Both accuracies are kept, and every item's, for paired tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_models import results

from .scoring import DTYPES, Encoder, add_model_arguments, load, loglikelihoods, mean_interval, protocol_of


class LMTask(NamedTuple):
    """One task of the six."""

    stock: str  # its definition, below lm_eval/tasks
    split: str  # of the data set, and the file's name
    metric: str  # that enters the average
    fields: str  # of every line of a local file


TASKS = {
    "arc_challenge": LMTask("arc/arc_challenge.yaml", "test", "acc_norm", "question choices answerKey"),
    "arc_easy": LMTask("arc/arc_easy.yaml", "test", "acc", "question choices answerKey"),
    "hellaswag": LMTask(
        "hellaswag/hellaswag.yaml", "validation", "acc_norm", "activity_label ctx_a ctx_b endings label"
    ),
    "lambada_openai": LMTask("lambada/lambada_openai.yaml", "test", "acc", "text"),
    "openbookqa": LMTask("openbookqa/openbookqa.yaml", "test", "acc_norm", "question_stem choices answerKey"),
    "piqa": LMTask("piqa/piqa.yaml", "validation", "acc", "goal sol1 sol2 label"),
}
SPLITS = ("training_split", "validation_split", "test_split")


def paper_average(accuracy: dict[str, float]) -> float:
    """The paper's "Avg" of its task tables: the plain mean over the six tasks.

    Raises:
        ValueError: a task is missing; a mean over fewer is another quantity.
    """
    if missing := TASKS.keys() - accuracy.keys():
        raise ValueError(f"the six-task average lacks {', '.join(sorted(missing))}: run all six.")
    return sum(accuracy[task] for task in TASKS) / len(TASKS)


def local_files(root: str | Path, tasks: Sequence[str]) -> dict[str, Path]:
    """Where the data of every task lie below ``root``.

    Raises:
        ValueError: some are missing, or their first line lacks a field; the message lists all of it.
    """
    paths = {task: Path(root) / task / f"{TASKS[task].split}.jsonl" for task in tasks}
    problems = []
    for task, path in paths.items():
        if not path.is_file():
            problems.append(f"{path} is missing (JSON lines with {TASKS[task].fields})")
            continue
        with open(path, encoding="utf-8") as file:
            first = file.readline()
        try:
            lacking = set(TASKS[task].fields.split()) - json.loads(first).keys()
        except (ValueError, AttributeError):
            lacking = {"JSON in its first line"}
        if lacking:
            problems.append(f"{path} lacks {', '.join(sorted(lacking))}")
    if problems:
        raise ValueError("data are not complete:\n  " + "\n  ".join(problems))
    return {task: path.resolve() for task, path in paths.items()}


def run_harness(
    model, tokenizer, stock: str, overrides: dict, *, max_length: int, batch_size: int, limit: int | None = None
) -> list[dict]:
    """One task of lm-eval, alone, with lm-eval's own model class and default seeds: its samples, with their scores.

    Args:
        stock: path of its YAML file below lm_eval/tasks, which is included; the index of all tasks takes 19 s to build.
        overrides: fields of the YAML file; must hold ``task``, the name.
    """
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(lm_eval.__file__).parent / "tasks" / stock
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, device=str(model.device)
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "task.yaml").write_text(yaml.safe_dump({"include": str(path), "tag": [], **overrides}))
        manager = TaskManager(include_path=folder, include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[overrides["task"]], task_manager=manager, limit=limit, bootstrap_iters=0
        )
    return sorted(found["samples"][overrides["task"]], key=lambda sample: sample["doc_id"])


def run_task(model, tokenizer, task: str, path: Path | None, *, max_length: int, batch_size: int, limit: int | None):
    """Metrics, per-item scores and data digest of one of TASKS.

    Args:
        path: JSON lines of its split; None: the Hub.

    Raises:
        ValueError: an item is longer than ``max_length``, which lm-eval would cut.
    """
    overrides: dict = {"task": task}
    if path is not None:
        split = TASKS[task].split
        own = {field: split if field == f"{split}_split" else None for field in SPLITS}
        data = {"data_files": {split: str(path)}}
        overrides |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data, **own}
    stock = TASKS[task].stock
    samples = run_harness(model, tokenizer, stock, overrides, max_length=max_length, batch_size=batch_size, limit=limit)
    encode = Encoder(tokenizer)
    for text in ("".join(pair) for sample in samples for pair in _arguments(sample)):
        # A token has at least one byte, so that only what has many bytes needs counting.
        if len(text.encode()) >= max_length and (tokens := len(encode(text))) > max_length:
            raise ValueError(
                f"max_length={max_length}, but an item of {task} takes {tokens} tokens and would be cut: raise it."
            )
    names = [name for name in ("acc", "acc_norm") if name in samples[0]]
    items = {name: [float(sample[name]) for sample in samples] for name in names}
    metrics = [
        results.metric(task, name, sum(scores) / len(scores), n=len(scores), ci95=mean_interval(scores), shots=0)
        for name, scores in items.items()
    ]
    if task == "lambada_openai":
        nats = [-float(sample["perplexity"]) for sample in samples]
        metrics.append(results.metric(task, "perplexity", math.exp(sum(nats) / len(nats)), n=len(nats), shots=0))
    documents = "\n".join(json.dumps(sample["doc"], sort_keys=True, ensure_ascii=False) for sample in samples)
    return metrics, items, hashlib.sha256(documents.encode()).hexdigest()[:12]


def _arguments(sample: dict) -> list[list[str]]:
    """The pairs of context and continuation that lm-eval sent for one sample."""
    return [[str(part) for part in arguments] for arguments in sample["arguments"]]


class TextLoss(NamedTuple):
    """Loss on one text; all sums are over its tokens."""

    nats: float
    tokens: int
    utf8_bytes: int
    window_nats: list[float]  # mean per token of every window

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as loss per token is not."""
        return self.nats / math.log(2) / self.utf8_bytes


def text_loss(model, encode: Encoder, text: str, *, window: int, stride: int, batch_size: int = 8) -> TextLoss:
    """Loss of a whole text, every token scored once, the first one after BOS (or EOS where there is none).

    Args:
        window: tokens that the model reads at once.
        stride: tokens scored of every window: each has at least ``window - stride`` tokens before it, where there are any.

    Raises:
        ValueError: the text is empty, the stride does not fit the window, or there is neither BOS nor EOS.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}.")
    first = encode.bos if encode.bos is not None else encode.tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS to begin a text with: its first token cannot be scored."
        )
    ids = [first, *encode(text, bos=False)]
    if len(ids) == 1:
        raise ValueError("the text is empty.")
    requests, start = [], 1
    while start < len(ids):
        end = min(len(ids), start + (window if start == 1 else stride))
        requests.append((ids[max(0, end - 1 - window) : start], ids[start:end]))
        start = end
    found = loglikelihoods(model, requests, batch_size=batch_size, max_length=window + 1, progress="held-out text")
    means = [-one.nats / len(one.token_nats) for one in found]
    return TextLoss(-sum(one.nats for one in found), len(ids) - 1, len(text.encode()), means)


def evaluate_text(model, tokenizer, paths: Sequence[str | Path], *, window: int, stride: int, batch_size: int):
    """Loss over all ``paths`` together, each a text of its own: metrics, protocol, details, mean loss of every window."""
    encode, texts = Encoder(tokenizer), [Path(path).read_text(encoding="utf-8") for path in paths]
    found = [text_loss(model, encode, text, window=window, stride=stride, batch_size=batch_size) for text in texts]
    total = TextLoss(
        sum(one.nats for one in found),
        sum(one.tokens for one in found),
        sum(one.utf8_bytes for one in found),
        [x for one in found for x in one.window_nats],
    )
    n, loss = len(total.window_nats), total.per_token
    # Windows, not tokens, are nearly independent.
    spread = sum((x - sum(total.window_nats) / n) ** 2 for x in total.window_nats)
    stderr = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    metrics = [
        results.metric("held-out", "loss_nats", loss, n=n, stderr=stderr),
        results.metric("held-out", "perplexity", math.exp(loss), n=n),
        results.metric("held-out", "bits_per_byte", total.bits_per_byte, n=n),
    ]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    details = {"tokens": total.tokens, "bytes": total.utf8_bytes, "files": [Path(path).name for path in paths]}
    return metrics, {"text_sha256": digest, "window": window, "stride": stride}, details, total.window_nats


def evaluate(
    target: str | Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    data_root: str | Path | None = None,
    text: Sequence[str | Path] = (),
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    command: str = "",
) -> dict:
    """Everything this command measures, as a result of ``hybrid_models.results``.

    Args:
        target: checkpoint directory or repo id.
        tasks: of TASKS; may be empty when ``text`` is given.
        data_root: where local data lie; None: the Hub.
        text: UTF-8 files to measure the loss on.
        window, stride: in tokens; default stride: the window.
        limit: so many items of every task, to try things out.

    Raises:
        ValueError: an unknown task, missing data, or see ``load``, ``run_task`` and ``text_loss``.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"task={unknown[0]!r} is not known: use some of {', '.join(TASKS)}.")
    start = time.perf_counter()
    files = local_files(data_root, tasks) if data_root is not None else {}
    model, loaded = load(target, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)
    protocol = {**protocol_of(model, Encoder(loaded)), "shots": 0, "max_length": max_length, "limit": limit}
    metrics, details = [], {"items": {}}
    for task in tasks:
        found, items, digest = run_task(
            model, loaded, task, files.get(task), max_length=max_length, batch_size=batch_size, limit=limit
        )
        metrics += found
        details["items"] |= {f"{task}/{name}": scores for name, scores in items.items()}
        protocol.setdefault("data_sha256", {})[task] = digest
    if set(tasks) == set(TASKS):
        accuracy = {m["task"]: m["value"] for m in metrics if m["metric"] == TASKS[m["task"]].metric}
        metrics.append(results.metric("mean", "accuracy", paper_average(accuracy), tasks=len(TASKS)))
    if text:
        found, text_protocol, details["text"], windows = evaluate_text(
            model, loaded, text, window=window, stride=stride or window, batch_size=batch_size
        )
        metrics += found
        protocol |= text_protocol
        details["items"]["held-out/loss_nats"] = windows
    return results.result(
        "lm",
        Path(target).resolve().name,
        command,
        metrics,
        weights=results.weights_sha256(target),
        protocol=protocol,
        seconds=round(time.perf_counter() - start, 1),
        details=details,
    )


def table(one: dict) -> str:
    """The metrics for a terminal."""
    lines = []
    for m in one["metrics"]:
        interval = f"  [{m['ci95'][0]:.4f}, {m['ci95'][1]:.4f}]" if "ci95" in m else ""
        interval = f"  +- {m['stderr']:.4f}" if "stderr" in m else interval
        mark = " *" if m["task"] in TASKS and m["metric"] == TASKS[m["task"]].metric else ""
        lines.append(f"{m['task']:<16} {m['metric']:<14} {m['value']:>10.4f}{interval}{mark}")
    if any(line.endswith("*") for line in lines):
        lines.append(
            "* enters the mean of the six"
            + ("" if "mean" in {m["task"] for m in one["metrics"]} else ", which needs all")
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evaluation.lm",
        description="Six zero-shot tasks through lm-eval, and loss on held-out text.",
        epilog="examples:\n"
        "  python -m evaluation.lm runs/demo --data-root data/lm --text held_out.txt\n"
        "  python -m evaluation.lm runs/demo --tasks --text held_out.txt          # the text alone",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="PATH", help="checkpoint directory or repo id")
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}; default all"
    )
    parser.add_argument("--data-root", help="read ROOT/<task>/<split>.jsonl, without network; default: the Hub")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 text to measure the loss on")
    parser.add_argument("--window", type=int, default=1024, help="tokens read at once (default %(default)s)")
    parser.add_argument("--stride", type=int, help="tokens scored of every window (default: all of it)")
    parser.add_argument("--limit", type=int, help="so many items of every task")
    parser.add_argument("--max-length", type=int, default=2048, help="of an item, in tokens (default %(default)s)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.data_root is not None:  # read by the libraries when they are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    folder = Path(args.output)
    options = {k: v for k, v in vars(args).items() if k not in ("output", "target")}
    try:
        one = evaluate(args.target, **options, command=results.this_command("evaluation.lm", argv))
    except ConnectionError as error:
        parser.error(
            f"{error}. Pass --data-root with a folder of the tasks' files, or a bare --tasks for --text alone."
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(one))
    print(f"written to {results.write(one, folder)}")


if __name__ == "__main__":
    main()
