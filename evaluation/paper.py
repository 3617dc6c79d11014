"""The tables of arXiv:2507.06457, tested: what its numbers show about language modelling, recall and memory.

The paper trained the suite that this package reproduces, and published averages by mixer and ratio of attention, with one
seed and no intervals. ``paper_tables.json`` has these figures as printed; this module asks of them what ``compare`` asks
of our own results, and checks that the tables agree with each other. Every figure on the page is computed here.

    python -m evaluation.compare --paper            # writes model_cards/paper/
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from hybrid_models.info import human_bytes
from hybrid_models.suite import cell_config

from . import plots
from .compare import (
    HYBRIDS,
    LEVEL_LABELS,
    cache_mib,
    flat,
    flat_table,
    grid_table,
    markdown_table,
    number,
    p_value,
    ranking,
    ranking_sentence,
    ranking_table,
    rising,
)
from .grid import LEVELS, Grid
from .statistics import Interval, accuracy_stderr

TABLES = Path(__file__).parent / "data/paper_tables.json"
MARGIN = 0.010  # of flatness, in accuracy: two standard errors of one cell's six-task mean
RULER_SAMPLES = 500  # per task, the harness' default; the paper does not say
CONTEXT = 4096  # tokens at which memory is counted: the harness' default length of RULER


class Finding(NamedTuple):
    """A claim, what the tables say of it, and the figures."""

    claim: str
    verdict: str
    why: str


class Row(NamedTuple):
    """A row of a table of tasks."""

    name: str
    values: list[float]
    printed: float
    recomputed: float  # the mean that the table's other rows follow
    stderr: float


def tables() -> dict:
    """The figures as printed, in thousandths, with their source."""
    return json.loads(TABLES.read_text(encoding="utf-8"))


def ratio_grid(table: dict, half: float = 0.0) -> Grid:
    """A table by ratio as shares of one; ``half`` is the half-width of every interval."""
    cells = {
        mixer: {level: Interval(v / 1000, v / 1000 - half, v / 1000 + half) for level, v in zip(table["levels"], row)}
        for mixer, row in table["rows"].items()
    }
    return Grid(cells)


def task_rows(table: dict, weights: list[int], items: list[int]) -> list[Row]:
    """A table of tasks with its means recomputed.

    Args:
        weights: tasks behind each column.
        items: questions behind each task of a column.
    """
    rows = []
    for row in table["rows"]:
        values = [value / 1000 for value in row["values"]]
        mean = float(np.average(values, weights=weights))
        errors = [w * accuracy_stderr(p, n) ** 2 for p, w, n in zip(values, weights, items)]
        name = f"{row['size']} {row['mixer']}" + (f" {row['level']}" if row["mixer"] != "Transformer" else "")
        rows.append(Row(name, values, row["printed_average"] / 1000, mean, math.sqrt(sum(errors)) / sum(weights)))
    return rows


def lm_rows(data: dict) -> list[Row]:
    table = data["lm_tasks"]
    return task_rows(table, [1] * len(table["items"]), table["items"])


def ruler_rows(data: dict) -> list[Row]:
    table = data["ruler_tasks"]
    return task_rows(table, table["tasks_in_group"], [RULER_SAMPLES] * len(table["columns"]))


def findings(data: dict) -> list[Finding]:
    """What holds and what does not, in the order of the page."""
    lm, ruler = ratio_grid(data["lm_by_ratio"]), ratio_grid(data["ruler_by_ratio"])
    lm_stderr = max(row.stderr for row in lm_rows(data))
    pairs = flat(lm, MARGIN)
    worst = max(pair.adjusted for pair in pairs)
    lm_all, lm_hybrids = rising(lm), rising(lm, levels=HYBRIDS)
    mixers, values = lm.complete(LEVELS)
    ranges = dict(zip(mixers, np.ptp(values[:, 1:], axis=1)))
    widest = max(ranges, key=ranges.get)
    pure_gap = {mixer: row[1:].mean() - row[0] for mixer, row in zip(mixers, values)}
    gains = [f"{mixer} {number(gap)}" for mixer, gap in pure_gap.items() if gap > 2 * lm_stderr]
    losses = [f"{mixer} {number(-gap)}" for mixer, gap in pure_gap.items() if gap < -2 * lm_stderr]

    up, up_hybrids = rising(ruler), rising(ruler, levels=HYBRIDS)
    means = ruler.means()
    transformer = next(row for row in ruler_rows(data) if "Transformer" in row.name)
    agree = all(_agrees(row) for row in ruler_rows(data) if row.name != transformer.name)
    tau_lm = stats.kendalltau(values[:, 0], values[:, 1:].mean(1))
    recall_mixers, recall = ruler.complete(LEVELS)
    tau_recall = stats.kendalltau(recall[:, 0], recall[:, 1:].mean(1))

    def at_least(bar: float) -> list[str]:
        return [
            f"{mixer} {level}" for mixer, row in ruler.cells.items() for level in HYBRIDS if row[level].value >= bar
        ]

    printed_bar, own_bar = at_least(transformer.printed), at_least(transformer.recomputed)
    recommended = [f"{mixer} {level}" for mixer in ("HGRN2", "GatedDeltaNet") for level in ("6-1", "3-1")]
    short = [name for name in recommended if name not in printed_bar]
    others = [name for name in own_bar if name not in recommended]
    drops = [
        f"{mixer} {number(a)} at {first} but {number(b)} at {second}"
        for mixer, row in ruler.cells.items()
        for first, second in zip(HYBRIDS, HYBRIDS[1:])
        if (a := row[first].value) - (b := row[second].value) > 0.03
    ]
    kv = {level: _kv_factor(level) for level in HYBRIDS}
    flat_verdict = "holds among hybrids" if worst < 0.05 else "not shown"
    return [
        Finding(
            "Language modelling is stable over the ratio of attention.",
            flat_verdict + ", not from pure to hybrid",
            f"Any two hybrid ratios are equal within {number(MARGIN)} of accuracy (largest p {p_value(worst)} after Holm's "
            f"correction), and more attention is not shown to be better (p {p_value(lm_hybrids.p)}). With the pure models there "
            f"is a trend (p {p_value(lm_all.p)}): from pure to the mean of the hybrids, {_words(gains)} are gained, by "
            f"{_words(losses)} lost.",
        ),
        Finding(
            "Each mixer has a best ratio for language modelling.",
            "not shown",
            f"Best and worst hybrid ratio of a mixer differ by at most {number(ranges[widest])} ({widest}). The choice of "
            f"test questions alone gives one cell a standard error of {number(lm_stderr)}, so two cells differ by up to "
            f"{number(1.96 * lm_stderr)} to {number(1.96 * math.sqrt(2) * lm_stderr)} by chance, and one seed was trained.",
        ),
        Finding(
            "Recall improves with more attention layers.",
            _verdict(max(up.p, up_hybrids.p) < 0.05),
            f"Page's trend test over pure, 24-1, 12-1, 6-1, 3-1: p {p_value(up.p)}; over the hybrids alone: p "
            f"{p_value(up_hybrids.p)}. It is a trend of the four mixers together, not a rule for each: "
            f"{'; '.join(drops)}.",
        ),
        Finding(
            "Recall nearly doubles from 24:1 to 3:1.",
            _verdict(means["3-1"] > 1.8 * means["24-1"]),
            f"The mean goes from {number(means['24-1'])} to {number(means['3-1'])}, {means['3-1'] / means['24-1'] - 1:+.0%}. "
            f"From pure ({number(means['pure'])}) to 3-1 it is {means['3-1'] / means['pure'] - 1:+.0%}.",
        ),
        Finding(
            "Recall improves particularly below 3:1.",
            "cannot be tested",
            "No model between 3-1 and the Transformer was trained. The Transformer itself, as recomputed, "
            f"({number(transformer.recomputed)}) is not above the mean at 3-1 ({number(means['3-1'])}).",
        ),
        Finding(
            f"The Transformer's RULER average is {number(transformer.printed)}.",
            _verdict(_agrees(transformer)),
            f"Its row averages **{number(transformer.recomputed)}** over the 13 tasks; the other rows "
            f"{'give' if agree else 'do not all give'} their printed averages by the same rule. So the line for Transformer-level recall is {number(transformer.printed - transformer.recomputed)} "
            f"lower than printed.",
        ),
        Finding(
            "HGRN2 or GatedDeltaNet at 3:1 to 6:1 reach the Transformer's recall.",
            _verdict(set(recommended) <= set(own_bar), "holds by the recomputed average"),
            f"{_words([name for name in recommended if name in own_bar])} reach {number(transformer.recomputed)}, and so do "
            f"cells that the recommendation leaves out: {_words(others)}. The printed {number(transformer.printed)} is not "
            f"reached by {_words(short)}.",
        ),
        Finding(
            "A mixer that is better alone is not always better in a hybrid.",
            "fits, but is not shown",
            f"Order alone against order in hybrids, Kendall's tau: {number(tau_lm.statistic, 2)} for language modelling "
            f"({len(mixers)} mixers, p {p_value(tau_lm.pvalue)}), {number(tau_recall.statistic, 2)} for recall "
            f"({len(recall_mixers)} mixers, p {p_value(tau_recall.pvalue)}). Too few mixers to tell either from none or from "
            "perfect agreement.",
        ),
        Finding(
            "6:1 to 3:1 hybrids need 7 to 4 times less key-value cache.",
            _verdict((kv["6-1"], kv["3-1"]) == (7, 4)),
            f"A model named 6-1 has one attention layer in every six, so its cache is {kv['6-1']:.0f} times smaller, and that "
            f"of 3-1 {kv['3-1']:.0f} times. The states of the linear layers come on top (last table).",
        ),
    ]


def _verdict(holds: bool, holding: str = "holds") -> str:
    return holding if holds else "does not hold"


def _kv_factor(level: str) -> float:
    """The Transformer's bytes per token over those of a hybrid level."""
    full = cell_config("1.3B-100B-Transformer-seed1").kv_bytes_per_token()
    return full / cell_config(f"1.3B-100B-GLA-hybrid-{level}").kv_bytes_per_token()


def _words(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "none"


def disagreements(data: dict) -> list[str]:
    """Where two of the paper's tables give different values of one thing."""
    said = []
    by_ratio = ratio_grid(data["ruler_by_ratio"])
    for row in data["ruler_tasks"]["rows"]:
        cell = by_ratio.cells.get(row["mixer"], {}).get(row["level"])
        if cell and round(1000 * cell.value) != row["printed_average"]:
            said.append(
                f"RULER of {row['mixer']} {row['level']}: {number(row['printed_average'] / 1000)} in the table of tasks, "
                f"{number(cell.value)} in the table by ratio."
            )
    lm = ratio_grid(data["lm_by_ratio"])
    printed: dict[tuple[str, str], list[int]] = {}
    for row in data["lm_tasks"]["rows"]:
        printed.setdefault((row["mixer"], row["level"]), []).append(row["printed_average"])
    for (mixer, level), averages in printed.items():
        if mixer in lm.cells and len(averages) == 2:
            mean, cell = sum(averages) / 2000, lm.cells[mixer][level].value
            said.append(
                f"Language modelling of {mixer} {level}, mean of both sizes: {number(mean, 4)} by the tables of tasks, "
                f"{number(cell)} in the table by ratio ({number(cell - mean, 4)}): the two average other tasks or metrics."
            )
    return said


def write(folder: str | Path) -> Path:
    """Write the page and its pictures into ``folder``; returns the page's path."""
    data, folder = tables(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw(data, folder)
    path = folder / "README.md"
    path.write_text(page(data), encoding="utf-8")
    return path


def draw(data: dict, folder: Path) -> None:
    """The page's five pictures."""
    lm, ruler = lm_rows(data), ruler_rows(data)
    for name, table, stderr, ylabel, baseline in (
        ("lm", data["lm_by_ratio"], max(row.stderr for row in lm), "mean accuracy, both sizes", []),
        ("ruler", data["ruler_by_ratio"], max(row.stderr for row in ruler), "RULER, 1.3B", [ruler[-1].recomputed]),
    ):
        grid = ratio_grid(table, 1.96 * stderr)
        lines = {mixer: [row[level] for level in LEVELS] for mixer, row in grid.cells.items()}
        title = {"lm": "Language modelling barely moves", "ruler": "Recall rises with attention"}[name]
        plots.score_by_level(LEVEL_LABELS, lines, baseline, folder / f"{name}.svg", ylabel=ylabel, title=title)

    def mib(mixer: str, level: str) -> float:
        return cache_mib(f"1.3B-100B-{mixer}-{level if level == 'pure' else 'hybrid-' + level}", CONTEXT)

    full = cache_mib("1.3B-100B-Transformer-seed1", CONTEXT)
    plots.recall_by_memory(
        {
            mixer: [(mib(mixer, level), cell.value, level) for level, cell in row.items()]
            for mixer, row in ratio_grid(data["ruler_by_ratio"]).cells.items()
        },
        [(full, ruler[-1].recomputed, "Transformer, recomputed"), (full, ruler[-1].printed, "as printed")],
        folder / "memory.svg",
        xlabel=f"cache of one sequence of {CONTEXT} tokens, MiB",
        ylabel="RULER, 1.3B",
        title="Recall against memory",
    )
    for name, rows, columns in (
        ("ruler_tasks", ruler, data["ruler_tasks"]["columns"]),
        ("lm_tasks", lm, data["lm_tasks"]["columns"]),
    ):
        table = [[*row.values, row.recomputed] for row in rows]
        names = [row.name for row in rows]
        sizes = [row.name.split()[0] for row in rows]
        plots.heat_map(names, [*columns, "mean"], table, folder / f"{name}.svg", groups=sizes)


def averages_table(rows: list[Row]) -> str:
    body = [
        [row.name, number(row.printed), number(row.recomputed, 4), "yes" if _agrees(row) else "**no**"] for row in rows
    ]
    return markdown_table(["row", "printed", "recomputed", "agrees"], body)


def _agrees(row: Row) -> bool:
    """Whether the printed mean is the recomputed one, rounded either way."""
    return abs(row.printed - row.recomputed) <= 0.0005 + 1e-9


def memory_table(tokens: int) -> str:
    """How many times less cache than the Transformer each 1.3B hybrid needs, states included."""
    full = cache_mib("1.3B-100B-Transformer-seed1", tokens)
    rows = []
    for mixer in ("HGRN", "HGRN2", "DeltaNet", "GLA", "GatedDeltaNet", "RetNet"):
        state = cell_config(f"1.3B-100B-{mixer}-pure").state_bytes() // 24
        factors = [f"{full / cache_mib(f'1.3B-100B-{mixer}-hybrid-{level}', tokens):.1f}" for level in HYBRIDS]
        rows.append([mixer, human_bytes(state), *factors])
    rows.append(["*keys and values alone*", "", *(f"*{_kv_factor(level):.0f}*" for level in HYBRIDS)])
    return markdown_table(["mixer", "state per layer", *HYBRIDS], rows)


def page(data: dict) -> str:
    """The whole page in Markdown."""
    source = data["source"]
    lm, ruler = ratio_grid(data["lm_by_ratio"]), ratio_grid(data["ruler_by_ratio"])
    lm_stderr, ruler_stderr = max(r.stderr for r in lm_rows(data)), max(r.stderr for r in ruler_rows(data))
    verdicts = "\n".join(
        f"| {i} | {one.claim} | **{one.verdict}** | {one.why} |" for i, one in enumerate(findings(data), 1)
    )
    ranked = ranking(lm)
    return f"""# What the published tables show

<!-- Generated by `python -m evaluation.compare --paper` from evaluation/data/paper_tables.json. Do not edit. -->

The models of this suite were first trained by [{source["paper"]}]({source["url"]}) ({source["versions"]}). It made two
claims: with a few attention layers among linear ones, **language modelling hardly changes**, while **recall**, looking up
what stands in the context, **improves with more attention layers**. Here its published figures are tested, before any
model is trained again. Nothing on this page was measured by us; it is arithmetic on what was printed.

## In short

| | claim | by the tables | why |
|--:|:--|:--|:--|
{verdicts}

## What the words mean

- **Mixer**: the kind of linear-attention layer (DeltaNet, GatedDeltaNet, GLA, HGRN, HGRN2, RetNet). It keeps a state of
  fixed size instead of the keys and values of every token.
- **Level**: how many of the 24 layers are attention layers: *pure* none, *24-1* one, *12-1* two, *6-1* four, *3-1* eight.
  "N-1" is one attention layer in every N, so a 3-1 model has two linear layers for each of attention.
- **Language modelling**: mean accuracy on six multiple-choice and completion tasks ({", ".join(data["lm_tasks"]["columns"])}).
- **Recall**: mean score on the 13 tasks of RULER: needles in a haystack, tracing variables, counting words, questions.
- **p**: the chance of figures at least as clear as these if there were nothing to find. Models, not questions, are what is
  counted: there is one training run per cell.

## Language modelling by level

{grid_table(lm)}

Bars: 95 % of what another draw of test questions would give (standard error at most {number(lm_stderr)}, from the sizes of
the test sets). Training seeds add to that, by how much is not known from one run. The mean of the mixers is the black line.

![Language modelling by level](lm.svg)

The equivalence test asks whether two levels differ by less than {number(MARGIN)} on the mean over mixers:

{flat_table(flat(lm, MARGIN))}

Is a mixer ahead? Over the four hybrid levels:

{ranking_table(ranked)}

{ranking_sentence(ranked)} The levels share nothing but the recipe, so they stand in for the seeds that were not run; of
sizes, seeds and tasks other than these the table says nothing.

![Language-modelling tasks](lm_tasks.svg)

Colours compare models of one size within a column.

## Recall by level

{grid_table(ruler)}

The paper leaves out HGRN, RetNet and the small models as insignificant, and does not say at which lengths RULER was run.
Bars: at most {number(1.96 * ruler_stderr)}, if {RULER_SAMPLES} samples per task were used, which is the harness' default.
Dashed: the Transformer, recomputed.

![Recall by level](ruler.svg)

![RULER tasks](ruler_tasks.svg)

## Recall against memory

What a sequence of {CONTEXT} tokens keeps in memory (bfloat16 keys and values, float32 states), from the configurations of
this suite. The number of attention heads does not matter for it, the sizes of the states do; for mixers other than
GatedDeltaNet these are the library's defaults of the time, since the paper does not state them. Grey: the best recall at
this much memory or less.

![Recall against memory](memory.svg)

How many times less than the Transformer, at 2048 tokens:

{memory_table(2048)}

## Do the tables agree with themselves?

The mean of the six tasks, and of the 13 tasks of RULER (a column stands for
{", ".join(map(str, data["ruler_tasks"]["tasks_in_group"]))} of them), against the printed average:

{averages_table(lm_rows(data))}

{averages_table(ruler_rows(data))}

{chr(10).join("- " + line for line in disagreements(data))}

## What cannot be said from this

{source["note"]} There are no scores per question, so questions that both models miss cannot be paired, and the intervals
above are wider than paired ones would be. Our own models are compared with the same tests, per question and over seeds:
`python -m evaluation.compare --help`.
"""


__all__ = ["disagreements", "findings", "lm_rows", "page", "ratio_grid", "ruler_rows", "tables", "write"]
