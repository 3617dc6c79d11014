"""Result files as the words and tables of a card: every number with its conditions and its uncertainty.

A card shows what its record holds and decides nothing: which evaluations exist, in which order and under which name is a
row of EVALUATIONS; one that no file measured is listed as not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .suite import WEIGHT_FREE

KNOWN = ("task", "metric", "value", "n", "stderr", "ci95")  # of a metric
# Numbers that stand beside a value; whatever else a metric has is a condition that it was measured under.
COMPANIONS = {
    "closed_form": "formula",
    "transformer": "Transformer",
    "quartiles": "quartiles",
    "null": "random keys",
    "share": "of tokens",
    "tasks": "tasks",
}
FOLDED = 14  # rows from which a table is folded


class Evaluation(NamedTuple):
    """How results of one kind are shown."""

    title: str
    note: str = ""
    metrics: tuple[str, ...] | None = None  # shown ones; None: all
    indexed: tuple[str, ...] = ()  # metrics of the model that go to the front matter


EVALUATIONS = {
    "training": Evaluation("Held-out loss and speed", indexed=("loss_nats",)),
    "lm": Evaluation(
        "Language modelling",
        "Zero-shot, by lm-evaluation-harness.",
        indexed=("acc", "acc_norm", "accuracy", "perplexity", "loss_nats", "bits_per_byte"),
    ),
    "ruler": Evaluation(
        "Recall by RULER",
        "*official* is RULER's score of a greedy answer, *strict* one that printing everything does not win, *forced* comes "
        "from one pass over prompt and answer; *shortcut* is the official score of printing everything, without a model.",
        metrics=("official", "strict", "forced", "shortcut"),
        indexed=("official", "strict", "forced"),
    ),
    "recall": Evaluation("Recall on real text", indexed=("loss_nats",)),
    "mqar": Evaluation("Recall by MQAR", indexed=("accuracy",)),
    "state": Evaluation("State capacity"),
    "cost": Evaluation("Measured memory and time"),
}
# (evaluation, task, metric, label): the columns of the table of a family.
HEADLINES = (
    ("training", "held-out", "loss_nats", "held-out loss, nats per token"),
    ("lm", "mean", "accuracy", "mean of six LM tasks"),
    ("ruler", "mean", "strict", "RULER, strict"),
)


def conditions(metric: dict) -> dict:
    """What tells a metric from its neighbours: length, shots, ..."""
    return {name: value for name, value in metric.items() if name not in KNOWN and name not in COMPANIONS}


def value_text(metric: dict) -> str:
    """A number, its 95 % interval, and what stands beside it: ``2.314 [2.301, 2.327]``, ``1,024 (formula 1,024)``."""
    shown, ends = number(metric["value"]), metric.get("ci95")
    if ends is None and metric.get("stderr") is not None:
        ends = [metric["value"] - 1.96 * metric["stderr"], metric["value"] + 1.96 * metric["stderr"]]
    if ends is not None:
        shown += f" [{', '.join(map(number, ends))}]"
    beside = [f"{label} {_listed(metric[name])}" for name, label in COMPANIONS.items() if name in metric]
    return shown + (f" ({', '.join(beside)})" if beside else "")


def _listed(value) -> str:
    return " to ".join(map(number, value)) if isinstance(value, list) else number(value)


def number(value: float) -> str:
    """Three decimals, or as many digits as a small number needs; a whole number with thousands separated."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table with ``left`` left-aligned columns; the others hold numbers and stand on the right."""
    marks = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, marks, *rows])


def section(name: str, found: list[dict]) -> dict:
    """The text of one evaluation's results, from all its files.

    Args:
        name: of the evaluation.
        found: entries of a record's ``results`` with links.
    """
    shown = EVALUATIONS.get(name, Evaluation(name))
    parts = [shown.note] if shown.note else []
    for one in found:
        metrics = [m for m in one["metrics"] if shown.metrics is None or m["metric"] in shown.metrics]
        rows = metric_rows(metrics)
        text = table(*rows, left=2)
        if len(rows[1]) > FOLDED:
            text = f"<details><summary>{len(rows[1])} rows</summary>\n\n{text}\n\n</details>"
        source = f"[{one['link'].rsplit('/', 1)[1]}]({one['link']}): `{one['command']}`, {one['date']}, {one['device']}"
        parts += [text, f"{source}."]
    return {"title": shown.title, "text": "\n\n".join(parts)}


def metric_rows(metrics: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. Where one condition alone varies, as RULER's length does, its values become the columns."""
    keys = list(dict.fromkeys(key for m in metrics for key in conditions(m)))
    varying = [key for key in keys if all(key in m for m in metrics) and len({m[key] for m in metrics}) > 1]
    fixed = [key for key in keys if key not in varying]
    if len(varying) == 1:
        [key] = varying
        columns = sorted({m[key] for m in metrics})
        rows: dict[tuple, dict] = {}
        for m in metrics:
            rows.setdefault((m["task"], m["metric"], *(m.get(k, "") for k in fixed)), {})[m[key]] = m
        body = [
            [*map(str, row), *(value_text(cells[c]) if c in cells else "not run" for c in columns)]
            for row, cells in rows.items()
        ]
        return ["task", "metric", *fixed, *(f"{key} {c}" for c in columns)], body
    counted = any("n" in m for m in metrics)
    body = [
        [m["task"], m["metric"], *(str(m.get(k, "")) for k in keys), value_text(m)]
        + ([f"{m['n']:,}" if "n" in m else ""] if counted else [])
        for m in metrics
    ]
    return ["task", "metric", *keys, "value", *(["n"] if counted else [])], body


def headline(record: dict, evaluation: str, task: str, name: str) -> dict | None:
    """A record's number for a column of the family's table; of several lengths the longest. None: not evaluated."""
    found = [
        metric
        for one in own_results(record)
        if one["evaluation"] == evaluation
        for metric in one["metrics"]
        if (metric["task"], metric["metric"]) == (task, name)
    ]
    return max(found, key=lambda metric: metric.get("length", 0), default=None)


def own_results(record: dict) -> list[dict]:
    """Results of the weights that the card is about, and those that do not depend on weights."""
    own = record["provenance"].get("weights_sha256")
    return [one for one in record["results"] if one["weights_sha256"] == own or one["evaluation"] in WEIGHT_FREE]


def model_index(record: dict, dataset: str) -> list[dict]:
    """The front matter's ``model-index`` results; every condition stands in the dataset's config, or the Hub merges them."""
    grouped: dict[tuple, dict] = {}
    for one in own_results(record):
        wanted = EVALUATIONS.get(one["evaluation"], Evaluation("")).indexed
        for metric in one["metrics"]:
            if metric["metric"] not in wanted:
                continue
            config = ",".join(f"{key}={value}" for key, value in sorted(conditions(metric).items())) or "default"
            held_out = metric["task"] in ("held-out", "train")
            entry = grouped.setdefault(
                (one["evaluation"], one["file"], metric["task"], config),
                {
                    "task": {"type": "text-generation"},
                    "dataset": {
                        "type": f"{one['evaluation']}/{metric['task']}",
                        "name": f"{dataset} ({metric['task']})" if held_out else metric["task"],
                        "config": config,
                    },
                    "metrics": [],
                },
            )
            entry["metrics"].append({"type": metric["metric"], "name": metric["metric"], "value": metric["value"]})
    return list(grouped.values())


__all__ = ["EVALUATIONS", "HEADLINES", "headline", "model_index", "own_results", "section", "table", "value_text"]
