"""Compare the cells of a suite: is language modelling flat over the ratio of attention, does recall rise, who is ahead?

These are the two claims that hybrids are chosen by, and each needs its own test: flatness an equivalence test with a
margin fixed beforehand, a rise a trend test over levels in their order (``statistics.py``). The command reads result
files only, refuses to mix protocols, and writes a page with tables and pictures:

    python -m evaluation.compare --size nano-7M --loss training/held-out/loss_nats --recall mqar/mean/accuracy
    python -m evaluation.compare --pair nano-7M-GLA-pure nano-7M-GLA-hybrid-3-1 --items recall/far_rare
    python -m evaluation.compare --paper             # the same tests on the tables of arXiv:2507.06457 (paper.py)
    python -m evaluation.compare --paper --check     # fails where the committed page or a picture differs

In a program: ``read_grid`` for the numbers, ``flat``, ``rising`` and ``ranking`` for the tests, ``compare`` for the page.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from hybrid_models import results
from hybrid_models.info import expected_cache_bytes
from hybrid_models.suite import SIZES, cell_config, cell_names, parse_cell

from . import plots
from .grid import LEVELS, Grid, Selector, agree, read_grid
from .statistics import Equivalence, Interval, Trend, holm, page, paired_bootstrap, rank_probabilities, tost

HYBRIDS = LEVELS[1:]
LEVEL_LABELS = ("pure\nno attention", "24-1\n1 of 24", "12-1\n2 of 24", "6-1\n4 of 24", "3-1\n8 of 24")


class Pair(NamedTuple):
    """Two levels held to be equal."""

    levels: tuple[str, str]
    test: Equivalence
    adjusted: float  # p after Holm's correction over all pairs


def flat(grid: Grid, margin: float, levels: Sequence[str] = HYBRIDS) -> list[Pair]:
    """Equivalence of every two levels, paired by mixer. Fewer than two complete mixers: no pairs."""
    mixers, values = grid.complete(levels)
    if len(mixers) < 2:
        return []
    pairs = list(combinations(range(len(levels)), 2))
    tests = [tost(values[:, j] - values[:, i], margin) for i, j in pairs]
    adjusted = holm([test.p for test in tests])
    return [Pair((levels[i], levels[j]), test, float(p)) for (i, j), test, p in zip(pairs, tests, adjusted)]


def rising(grid: Grid, rises: bool = True, levels: Sequence[str] = LEVELS) -> Trend | None:
    """Page's test that more attention is better, one row per mixer; None with fewer than two complete mixers."""
    mixers, values = grid.complete(levels)
    return page(values if rises else -values) if len(mixers) > 1 else None


class Ranking(NamedTuple):
    """Who is ahead, over the levels as repetitions."""

    mixers: list[str]  # best mean first
    means: list[float]
    p: float  # Friedman's test that there is no order at all
    first: list[float]  # how often each has the best mean when levels are resampled
    last: list[float]
    separated: list[tuple[str, str, float]]  # better, worse, Holm's p of the paired t test, where it is below .05


def ranking(grid: Grid, rises: bool = True, levels: Sequence[str] = HYBRIDS) -> Ranking | None:
    """Order of the mixers over ``levels``; None with fewer than three complete mixers, which Friedman's test needs."""
    mixers, values = grid.complete(levels)
    if len(mixers) < 3:
        return None
    better = values if rises else -values
    order = np.argsort(-better.mean(1), kind="stable")
    places = rank_probabilities(better.T)
    pairs = list(combinations(order.tolist(), 2))
    adjusted = holm([float(stats.ttest_rel(better[i], better[j]).pvalue) for i, j in pairs])
    return Ranking(
        [mixers[i] for i in order],
        [float(values[i].mean()) for i in order],
        float(stats.friedmanchisquare(*better).pvalue),
        [float(places[i, 0]) for i in order],
        [float(places[i, -1]) for i in order],
        [(mixers[i], mixers[j], float(p)) for (i, j), p in zip(pairs, adjusted) if p < 0.05],
    )


def cache_mib(cell: str, tokens: int) -> float:
    """Mebibytes that one sequence of ``tokens`` tokens keeps in a bfloat16 model: keys, values and float32 states."""
    return expected_cache_bytes(cell_config(cell), tokens, torch.bfloat16).total / 2**20


# ----------------------------------------------------------------------------------------------------- words and tables


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, numbers stand on the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Fixed digits, without the zero before the point: .390, 2.314, -.004; never -.000."""
    text = f"{value:.{digits}f}"
    if float(text) == 0.0:
        text = text.lstrip("-")
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def p_value(p: float) -> str:
    return "< .0001" if p < 1e-4 else f"= {number(p, 4 if p < 0.001 else 3 if p < 0.1 else 2)}"


def grid_table(grid: Grid) -> str:
    """Mixers by levels, with the mean of the mixers, and the Transformer's mean."""
    rows = [
        [mixer, *(number(row[level].value) if level in row else "not evaluated" for level in LEVELS)]
        for mixer, row in grid.cells.items()
    ]
    means = grid.means()
    rows.append(["**mean**", *(f"**{number(means[level])}**" if level in means else "" for level in LEVELS)])
    return markdown_table(["mixer", *LEVELS], rows)


def flat_table(pairs: Sequence[Pair]) -> str:
    rows = [
        [
            " and ".join(pair.levels),
            number(pair.test.mean, 4),
            f"{number(pair.test.ci90[0], 4)} to {number(pair.test.ci90[1], 4)}",
            p_value(pair.adjusted).removeprefix("= "),
            "equal" if pair.adjusted < 0.05 else "not shown",
        ]
        for pair in pairs
    ]
    return markdown_table(["levels", "mean difference", "90 % interval", "p (TOST, Holm)", "within the margin"], rows)


def ranking_table(found: Ranking) -> str:
    rows = [
        [mixer, number(mean), f"{first:.0%}", f"{last:.0%}"]
        for mixer, mean, first, last in zip(found.mixers, found.means, found.first, found.last)
    ]
    return markdown_table(["mixer", "mean of hybrids", "first", "last"], rows)


def ranking_sentence(found: Ranking) -> str:
    """What the tests of a ranking allow to say."""
    apart = ", ".join(f"{better} over {worse} (p {p_value(p)})" for better, worse, p in found.separated)
    return (
        f"Friedman's test that the mixers have no order: p {p_value(found.p)}. Pairs that stay apart after Holm's "
        f"correction over {math.comb(len(found.mixers), 2)} pairs: {apart or 'none'}. *First* and *last* say how often a "
        "mixer has that place when the levels are resampled."
    )


# ------------------------------------------------------------------------------------------------------------ the page


def compare(
    folder: str | Path,
    size: str,
    out: str | Path,
    *,
    loss: Selector | None = None,
    recall: Selector | None = None,
    margin: float = 0.02,
    tokens: int = 2048,
) -> Path:
    """Write ``out/README.md`` and its pictures from the result files below ``folder``; returns the page's path.

    Args:
        loss: the number held to be flat over the hybrid levels.
        recall: the number held to rise with attention.
        margin: of the equivalence test, in the units of ``loss``; .02 nats was fixed before any training.
        tokens: context at which a cell's cache is counted for the picture of recall against memory.

    Raises:
        ValueError: as ``read_grid``, or neither number was asked for.
    """
    if loss is None and recall is None:
        raise ValueError("Nothing to compare: name a number by --loss, --recall, or both.")
    grids = {name: read_grid(folder, size, chosen) for name, chosen in (("loss", loss), ("recall", recall)) if chosen}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Comparison of the {size} cells", "Generated by `python -m evaluation.compare`; do not edit."]
    for name, grid in grids.items():
        chosen = loss if name == "loss" else recall
        parts += [f"## {chosen}", grid_table(grid)]
        if grid.transformers:
            shown = ", ".join(number(value) for value in sorted(grid.transformers))
            parts.append(f"Transformer, {len(grid.transformers)} seeds: {shown}.")
        lines = {
            mixer: [row.get(level, Interval(math.nan, math.nan, math.nan)) for level in LEVELS]
            for mixer, row in grid.cells.items()
        }
        plots.score_by_level(
            LEVEL_LABELS, lines, grid.transformers, out / f"{name}.svg", ylabel=chosen.metric, title=str(chosen)
        )
        parts.append(f"![{chosen} by level]({name}.svg)")
        parts += _verdicts(grid, chosen, margin if name == "loss" else None)
    if recall is not None:
        _memory_picture(grids["recall"], recall, size, tokens, out)
        parts.append(f"![recall against cache bytes at {tokens} tokens](memory.svg)")
        parts += _task_picture(folder, size, recall, out)
    files = sorted({source for grid in grids.values() for source in grid.sources})
    parts += [f"## Sources\n\n{len(files)} result files:", "\n".join(f"- `{path}`" for path in files)]
    path = out / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _verdicts(grid: Grid, chosen: Selector, margin: float | None) -> list[str]:
    """The tests of one grid in words; ``margin`` where flatness is the claim."""
    parts = []
    if margin is not None and (pairs := flat(grid, margin)):
        worst = max(pair.adjusted for pair in pairs)
        said = "is flat" if worst < 0.05 else "is **not shown to be flat**"
        parts += [
            f"Over the hybrid levels it {said} within {margin:g} (largest p {p_value(worst)}).",
            flat_table(pairs),
        ]
    tests = [(rising(grid, chosen.rises), "all levels"), (rising(grid, chosen.rises, HYBRIDS), "hybrids only")]
    said = [f"{words} p {p_value(test.p)}" for test, words in tests if test is not None]
    parts.append(f"More attention is better (Page's test): {', '.join(said) or 'not tested, too few complete mixers'}.")
    if found := ranking(grid, chosen.rises):
        parts += [ranking_table(found), ranking_sentence(found)]
    return parts


def _memory_picture(grid: Grid, recall: Selector, size: str, tokens: int, out: Path) -> None:
    def point(cell: str, value: float, label: str) -> tuple[float, float, str]:
        return cache_mib(cell, tokens), value if recall.rises else -value, label

    lines: dict[str, list] = {}
    for name in cell_names(size):
        cell = parse_cell(name)
        if cell.mixer and cell.level in grid.cells.get(cell.mixer, {}):
            lines.setdefault(cell.mixer, []).append(point(name, grid.cells[cell.mixer][cell.level].value, cell.level))
    full = [point(f"{size}-Transformer-seed1", value, "Transformer") for value in grid.transformers[:1]]
    plots.recall_by_memory(
        lines,
        full,
        out / "memory.svg",
        ylabel=f"{'' if recall.rises else '- '}{recall.metric}",
        xlabel=f"cache of one sequence of {tokens} tokens, MiB (bfloat16, float32 states)",
        title=str(recall),
    )


def _task_picture(folder: str | Path, size: str, recall: Selector, out: Path) -> list[str]:
    """The heat map of every task that the recall evaluation has under the same metric and conditions."""
    names, table = cell_names(size), {}
    for _, one in results.read_all(folder):
        if one["model"] in names and one["evaluation"] == recall.evaluation:
            for metric in one["metrics"]:
                if recall._replace(task=metric["task"]).matches(metric):
                    table.setdefault(one["model"], {})[metric["task"]] = metric["value"]
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    if len(tasks) < 2:
        return []
    rows = [name for name in names if name in table]
    values = [[table[name].get(task, math.nan) for task in tasks] for name in rows]
    plots.heat_map([name.removeprefix(f"{size}-") for name in rows], tasks, values, out / "tasks.svg")
    return ["![tasks](tasks.svg)"]


def items_difference(folder: str | Path, first: str, second: str, evaluation: str, task: str) -> Interval:
    """Mean difference first - second over the contexts both were measured on, from ``details["items"][task]``.

    Raises:
        ValueError: a model has no such items, or the two were measured by different protocols.
    """
    found: dict[str, tuple[dict, list[float]]] = {}
    for path, one in results.read_all(folder):
        if one["model"] in (first, second) and one["evaluation"] == evaluation:
            if task in one["details"].get("items", {}):
                if found:
                    agree(next(iter(found.values()))[0], one["protocol"], path)
                found[one["model"]] = one["protocol"], one["details"]["items"][task]
    for name in (first, second):
        if name not in found:
            raise ValueError(f"{name} has no result {evaluation!r} with per-item scores of {task!r} below {folder}.")
    return paired_bootstrap(found[first][1], found[second][1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare",
        description="Compare the cells of a suite by their result files, or re-analyse the paper's tables.",
        epilog="examples:\n"
        "  python -m evaluation.compare --paper\n"
        "  python -m evaluation.compare --size nano-7M --loss training/held-out/loss_nats --recall ruler/mean/strict,length=1024\n"
        "  python -m evaluation.compare --pair nano-7M-GLA-pure nano-7M-GLA-hybrid-3-1 --items recall/far_rare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--paper", action="store_true", help="the tables of arXiv:2507.06457")
    what.add_argument("--size", choices=[size for size in SIZES if size != "tiny"], help="the cells of this size")
    what.add_argument("--pair", nargs=2, metavar="MODEL", help="two models, item by item")
    parser.add_argument("--loss", metavar="SELECTOR", help="number held to be flat: EVALUATION/TASK/METRIC[,length=N]")
    parser.add_argument("--recall", metavar="SELECTOR", help="number held to rise with attention")
    parser.add_argument("--items", metavar="EVALUATION/TASK", help="with --pair: which per-item scores")
    parser.add_argument("--margin", type=float, default=0.02, help="of flatness (default 0.02)")
    parser.add_argument("--tokens", type=int, default=2048, help="context at which memory is counted (default 2048)")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the page (default: model_cards/paper, or .../compare/SIZE)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the folder differs")
    args = parser.parse_args(argv)
    try:
        if args.pair:
            evaluation, _, task = (args.items or "").partition("/")
            if not task:
                raise ValueError("--pair needs --items EVALUATION/TASK.")
            value, low, high = items_difference(args.results, *args.pair, evaluation, task)
            print(f"{args.items}: {args.pair[0]} - {args.pair[1]} = {value:.4f}, 95 % interval {low:.4f} to {high:.4f}")
            return 0
        if args.paper:
            from .paper import write as write_page

            out = args.out or Path("model_cards/paper")
        else:
            out = args.out or Path("model_cards/compare") / args.size
            loss, recall = (Selector.parse(text) if text else None for text in (args.loss, args.recall))

            def write_page(folder):
                return compare(
                    args.results, args.size, folder, loss=loss, recall=recall, margin=args.margin, tokens=args.tokens
                )

        if not args.check:
            print(f"wrote {write_page(out)}")
            return 0
        with tempfile.TemporaryDirectory() as fresh:
            write_page(fresh)
            names = {path.name for folder in (Path(fresh), out) if folder.is_dir() for path in folder.iterdir()}
            differ = sorted(name for name in names if not _same(Path(fresh, name), out / name))
        if differ:
            print(f"{out} differs from what this command writes: {', '.join(differ)}. Run it without --check.")
        return 1 if differ else 0
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _same(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
