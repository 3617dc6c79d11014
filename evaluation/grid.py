"""One number of every cell of a suite, read from result files: what a comparison is made of.

A number is named as ``EVALUATION/TASK/METRIC``, with conditions where several remain: ``ruler/mean/strict,length=1024``. Only
what was measured alike is read together; a cell that was trained several times counts with its mean.

    >>> from evaluation.grid import Selector, read_grid
    >>> grid = read_grid("model_cards/results", "nano-7M", Selector.parse("training/held-out/loss_nats"))  # doctest: +SKIP
    >>> grid.cells["GLA"]["3-1"].value                                                                    # doctest: +SKIP
    2.31
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_models import results
from hybrid_models.suite import cell_names, parse_cell

from .statistics import Interval

LEVELS = ("pure", "24-1", "12-1", "6-1", "3-1")  # least attention first
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
# Fields of a training protocol that may differ between cells; a learning rate is chosen per mixer.
OF_THE_CELL = {"cell", "config", "seed", "learning_rate", "num_attention_heads"}


class Selector(NamedTuple):
    """Which number of the result files is meant."""

    evaluation: str
    task: str
    metric: str
    conditions: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selector:
        """From ``EVALUATION/TASK/METRIC[,condition=value...]``, for example ``ruler/mean/strict,length=2048``.

        Raises:
            ValueError: it is not of that form.
        """
        path, *conditions = text.split(",")
        parts = path.split("/")
        if len(parts) < 3 or not all(parts) or not all("=" in one for one in conditions):
            raise ValueError(f"{text!r} does not name a number: write EVALUATION/TASK/METRIC[,condition=value].")
        pairs = tuple((name, value) for name, _, value in (one.partition("=") for one in conditions))
        return cls(parts[0], "/".join(parts[1:-1]), parts[-1], pairs)

    def matches(self, metric: dict) -> bool:
        return (metric["task"], metric["metric"]) == (self.task, self.metric) and all(
            str(metric.get(name)) == value for name, value in self.conditions
        )

    @property
    def rises(self) -> bool:
        """Whether larger is better."""
        return not any(word in self.metric for word in LOWER_IS_BETTER)

    def __str__(self) -> str:
        return ",".join([f"{self.evaluation}/{self.task}/{self.metric}", *(f"{k}={v}" for k, v in self.conditions)])


@dataclass
class Grid:
    """One number over the mixers and levels of a size."""

    cells: dict[str, dict[str, Interval]]  # by mixer, then level; only what was measured
    transformers: list[float] = field(default_factory=list)  # one per seed
    sources: list[str] = field(default_factory=list)

    def complete(self, levels: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """The mixers that were measured at all these levels, and their values [mixers, levels]."""
        rows = {mixer: row for mixer, row in self.cells.items() if all(level in row for level in levels)}
        return list(rows), np.array([[row[level].value for level in levels] for row in rows.values()])

    def means(self) -> dict[str, float]:
        """Mean over mixers per level, of those measured at all levels where there are any."""
        _, values = self.complete(LEVELS)
        if len(values):
            return dict(zip(LEVELS, values.mean(0).tolist()))
        by_level = {level: [row[level].value for row in self.cells.values() if level in row] for level in LEVELS}
        return {level: float(np.mean(found)) for level, found in by_level.items() if found}


def read_grid(folder: str | Path, size: str, selector: Selector) -> Grid:
    """One number of every cell of ``size`` that has it; of a cell that was trained several times the mean and range.

    Raises:
        ValueError: no cell has it (the message lists what there is), a file has several, or protocols differ.
    """
    grid, protocol, offered = Grid({}), None, set()
    names, by_cell = cell_names(size), {}
    for path, one in results.read_all(folder):
        if one["model"] not in names:
            continue
        offered.update(f"{one['evaluation']}/{m['task']}/{m['metric']}" for m in one["metrics"])
        found = [m for m in one["metrics"] if selector.matches(m)] if one["evaluation"] == selector.evaluation else []
        if not found:
            continue
        if len(found) > 1:
            known = {"task", "metric", "value", "n", "stderr", "ci95"}
            choices = sorted({f"{key}={m[key]}" for m in found for key in m.keys() - known})
            raise ValueError(f"{path} has {len(found)} numbers for {selector}: add one of {', '.join(choices)}.")
        agree(protocol, one["protocol"], path)
        protocol = one["protocol"]
        runs = by_cell.setdefault(one["model"], {})
        if one["weights_sha256"] in runs:
            raise ValueError(f"{path} is a second file with {selector} of the same weights: keep one of them.")
        runs[one["weights_sha256"]] = _interval(found[0])
        grid.sources.append(str(path))
    if not grid.sources:
        has = f"there are {', '.join(sorted(offered))}" if offered else f"no cell of {size} has a result there"
        raise ValueError(f"No result below {folder} holds {selector}: {has}.")
    for name in names:
        runs, cell = list(by_cell.get(name, {}).values()), parse_cell(name)
        if runs and cell.mixer:
            grid.cells.setdefault(cell.mixer, {})[cell.level] = _over_runs(runs)
        elif runs:
            grid.transformers.append(_over_runs(runs).value)
    return grid


def _over_runs(runs: list[Interval]) -> Interval:
    """Mean and range of several seeds; a single one keeps its own interval."""
    values = [run.value for run in runs]
    return runs[0] if len(runs) == 1 else Interval(float(np.mean(values)), min(values), max(values))


def _interval(metric: dict) -> Interval:
    value, half = metric["value"], 1.96 * metric.get("stderr", 0.0)
    return Interval(value, *metric.get("ci95", (value - half, value + half)))


def agree(first: dict | None, second: dict, path: Path) -> None:
    """Refuse numbers that were not measured alike; what a protocol holds must be equal, but for what makes the cell."""
    keys = (first or second).keys() | second.keys()
    differ = sorted(key for key in keys - OF_THE_CELL if first is not None and first.get(key) != second.get(key))
    if not differ:
        return
    shown = "; ".join(f"{key}: {first.get(key)!r} and {second.get(key)!r}" for key in differ)
    raise ValueError(f"{path} was measured by another protocol than the files before it ({shown}): measure again.")


__all__ = ["LEVELS", "Grid", "Selector", "agree", "read_grid"]
