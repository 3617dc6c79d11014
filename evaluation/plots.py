"""The three pictures of a comparison: score by share of attention, recall against memory, and tasks as a heat map.

Each takes plain numbers and writes one SVG, the same bytes for the same numbers and the same matplotlib, so that a
committed picture can be checked against its data. Colours tell mixers apart for colour-blind readers too, and every
mixer has a marker of its own.

    from evaluation.plots import recall_by_memory
    recall_by_memory({"GLA": [(49.0, .144, "pure"), (77.0, .288, "12-1")]}, [(384.0, .39, "Transformer")], "pareto.svg")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  (the back end is chosen first)

# Okabe and Ito's palette; one marker each, for print without colour.
STYLES = {
    "DeltaNet": ("#0072B2", "o"),
    "GatedDeltaNet": ("#D55E00", "s"),
    "GLA": ("#009E73", "^"),
    "HGRN": ("#E69F00", "v"),
    "HGRN2": ("#CC79A7", "D"),
    "RetNet": ("#56B4E9", "P"),
}
SETTINGS = {
    "svg.hashsalt": "hybrid_models",
    "svg.fonttype": "none",  # text stays text: small files, and the reader's own sans-serif
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _save(figure, path: str | Path) -> None:
    # White behind it: the page may be dark.
    figure.savefig(path, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def score_by_level(
    levels: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    baseline: Sequence[float],
    path: str | Path,
    *,
    ylabel: str,
    title: str,
) -> None:
    """One line per mixer over the levels of attention, with intervals; the mean of all mixers in black.

    Args:
        levels: labels of the x axis, least attention first.
        lines: by mixer, (value, low, high) per level; NaN where a cell was not measured.
        baseline: the Transformer's values, one per seed; drawn dashed, with their range.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        x = np.arange(len(levels))
        width = 0.5 / max(1, len(lines) - 1)
        for i, (mixer, values) in enumerate(lines.items()):
            value, low, high = np.array(values, dtype=float).T
            color, marker = STYLES[mixer]
            at = x + (i - (len(lines) - 1) / 2) * width * 0.5
            axes.errorbar(
                at,
                value,
                yerr=np.maximum([value - low, high - value], 0),
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                elinewidth=0.7,
                alpha=0.9,
                label=mixer,
            )
        values = np.array([np.array(line, dtype=float)[:, 0] for line in lines.values()])
        measured = np.isfinite(values).any(0)
        if measured.any():
            axes.plot(x[measured], np.nanmean(values[:, measured], 0), color="black", linewidth=2.4, label="mean")
        if len(baseline):
            axes.axhline(np.mean(baseline), color="#555555", linestyle="--", linewidth=1.2, label="Transformer")
            axes.axhspan(min(baseline), max(baseline), color="#555555", alpha=0.15, linewidth=0)
        axes.set_xticks(x, levels)
        axes.set(xlabel="share of attention layers", ylabel=ylabel, title=title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _save(figure, path)


def recall_by_memory(
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    transformers: Sequence[tuple[float, float, str]],
    path: str | Path,
    *,
    xlabel: str = "cache of one sequence, MiB",
    ylabel: str = "recall",
    title: str = "",
) -> None:
    """Recall against cache bytes on a logarithmic axis, with the Pareto front: what no smaller cache reaches.

    Args:
        lines: by mixer, (mebibytes, recall, label) of its cells.
        transformers: the same of the all-attention models; their labels go to the picture too.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7.2, 4.6))
        front = sorted({(x, y) for points in [*lines.values(), transformers] for x, y, _ in points})
        steps = [(x, y) for i, (x, y) in enumerate(front) if all(y > other for _, other in front[:i])]
        axes.step(*zip(*steps), where="post", color="#bbbbbb", linewidth=5, alpha=0.6, label="best at this memory")
        for mixer, points in lines.items():
            color, marker = STYLES[mixer]
            x, y, labels = zip(*sorted(points))
            axes.plot(x, y, color=color, marker=marker, linewidth=0.8, alpha=0.95, label=mixer)
            for at, value, label in zip(x, y, labels):
                axes.annotate(label, (at, value), textcoords="offset points", xytext=(5, 4), fontsize=7.5, color=color)
        for i, (x, y, label) in enumerate(transformers):
            axes.plot([x], [y], marker="*", markersize=12, color="black", fillstyle="full" if i == 0 else "none", ls="")
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, -14), fontsize=8, ha="right")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _save(figure, path)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    path: str | Path,
    *,
    groups: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Scores of models (rows) on tasks (columns), written in the cells; coloured from each column's least to its largest.

    Tasks differ in difficulty far more than models do, so a common colour scale would show the tasks only; where rows are
    of several ``groups`` (model sizes), each group has its own scale for the same reason.
    """
    table = np.array(values, dtype=float)
    scaled = np.empty_like(table)
    of_row = np.array(groups if groups is not None else [""] * len(rows))
    for group in np.unique(of_row):
        part = np.ma.masked_invalid(table[of_row == group])
        low, high = part.min(0), part.max(0)
        scaled[of_row == group] = ((part - low) / np.ma.maximum(high - low, 1e-12)).filled(np.nan)
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(0.95 * len(columns) + 2.2, 0.36 * len(rows) + 1.0))
        axes.pcolormesh(np.ma.masked_invalid(scaled), cmap="YlGnBu", vmin=0, vmax=1.25, edgecolors="white", linewidth=1)
        for i, j in np.ndindex(table.shape):
            text = "not run" if np.isnan(table[i, j]) else f"{table[i, j]:.3f}".removeprefix("0")
            color = "white" if scaled[i, j] > 0.75 else "#222222"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color=color)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8.5)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8.5)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        axes.set_title(title, pad=22)
        _save(figure, path)


__all__ = ["heat_map", "recall_by_memory", "score_by_level"]
