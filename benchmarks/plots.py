"""Draw the results: what a context costs at each level of attention, how fast each mixer trains, and what it learns.

    python -m benchmarks.plots      # results/{context,train_step}.json and the nano suite's runs to docs/*.svg

The pictures hold nothing that the JSON files do not; README shows them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS
from evaluation.plots import STYLES
from hybrid_models.results import FOLDER, read_all
from hybrid_models.suite import parse_cell

DOCS = Path(__file__).parent.parent / "docs"
# From no attention to nothing else, light to dark; the Transformer stands apart.
COLOURS = {
    "pure": "#c6dbef",
    "24-1": "#9ecae1",
    "12-1": "#6baed6",
    "6-1": "#3182bd",
    "3-1": "#08519c",
    "full": "#d95f02",
}
LABELS = {"pure": "no attention", "full": "Transformer"}
PEERS = {"fla": ("6-1", "fla's 6-1"), "llama": ("full", "transformers' Llama")}  # the level that each is, and its name
STYLE = {
    "svg.hashsalt": "hybrid_models",  # the same numbers give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


def context(result: dict, path: Path) -> None:
    """Decoding, prefill and cache against the context, one line per level, dotted ones for the peers."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (
        ("decode_ms", 1.0, "decoding, ms a token"),
        ("prefill_s", 1.0, "prefill, s"),
        ("cache_bytes", 2**-30, "cache, GiB"),
    )
    for axis, (field, unit, title) in zip(axes, panels):
        for level, rows in result["levels"].items():
            tokens = [int(n) for n in rows]
            axis.plot(
                tokens,
                [row[field] * unit for row in rows.values()],
                "o-",
                ms=3,
                lw=1.5,
                color=COLOURS[level],
                label=LABELS.get(level, level),
            )
        for who, rows in result.get("peers", {}).items():
            level, label = PEERS[who]
            points = [(int(n), row[field] * unit) for n, row in rows.items() if field in row]
            if points:
                axis.plot(*zip(*points), ":", lw=1.5, color=COLOURS[level], label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens])
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_title(title)
        axis.set_xlabel("tokens in context")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.suptitle(
        f"{result['size'].split('-')[0]} {result['mixer']}, {result['dtype']}, batch 1, {result['device']}", fontsize=9
    )
    save(figure, path)


def training(result: dict, path: Path) -> None:
    """Training tokens per second of each mixer, ours and fla's, with the Transformer as a line."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    models = {cell.split("-")[-2]: rows for cell, rows in result["models"].items() if "ours" in rows}
    for offset, who, colour, label in (
        (-0.2, "fla", "#bdbdbd", "flash-linear-attention's model"),
        (0.2, "ours", "#3182bd", "hybrid_models"),
    ):
        speeds = [rows.get(who, {}).get("tokens_per_s", 0) / 1e3 for rows in models.values()]
        bars = axis.bar([i + offset for i in range(len(models))], speeds, 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    llama = next(
        (
            rows["llama"]["tokens_per_s"] / 1e3
            for rows in result["models"].values()
            if "tokens_per_s" in rows.get("llama", {})
        ),
        None,
    )
    if llama:
        axis.axhline(llama, color="#d95f02", lw=1, label="transformers' Llama")
    axis.set_xticks(range(len(models)), list(models))
    axis.set_ylabel("thousand tokens a second")
    axis.grid(axis="x", visible=False)
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    axis.set_xlabel(
        f"340M, forward and backward, {result['batch'][0]} x {result['batch'][1]} tokens, {result['dtype']}, {result['device']}"
    )
    save(figure, path)


def nano_runs(size: str) -> dict[tuple[str, str], list[dict]]:
    """Results of training cells of ``size``: {(mixer or "Transformer", level): [of each seed]}."""
    runs = {}
    for _, found in read_all(FOLDER):
        if found["evaluation"] == "training" and found["model"].startswith(f"{size}-"):
            cell = parse_cell(found["model"])
            runs.setdefault((cell.mixer or "Transformer", cell.level), []).append(found)
    return runs


def nano(runs: dict[tuple[str, str], list[dict]], size: str, path: Path) -> None:
    """Loss while training, held-out loss at the end, and speed, of the cells that were trained."""
    figure, (curves, ends, speeds) = plt.subplots(
        1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(2, 1.4, 1)
    )
    order = sorted(runs, key=lambda key: (key[0] == "Transformer", key[0].lower(), key[1] != "pure"))
    labels, any_shared = [], False
    for place, key in enumerate(order):
        mixer, level = key
        colour, marker = STYLES.get(mixer, ("#000000", "X"))
        steps, smooth = [], []
        for one in runs[key]:
            points = one["details"]["loss_curve"]
            losses = [loss for _, loss in points]
            steps = [step for step, _ in points[4:]]
            smooth.append([sum(losses[i - 4 : i + 1]) / 5 for i in range(4, len(losses))])
        mean = [sum(values) / len(values) for values in zip(*smooth)]
        curves.plot(steps, mean, color=colour, lw=1.2, ls="--" if level == "pure" else "-")
        labels.append(mixer if level == "full" else f"{mixer} {level}")
        held_out = [metric_of(one, "held-out", "loss_nats") for one in runs[key]]
        ends.plot([m["value"] for m in held_out], [place] * len(held_out), marker, color=colour, ms=5, ls="none")
        alone = [m for one in runs[key] if "device" not in (m := metric_of(one, "training", "tokens_per_s"))]
        share = [metric_of(one, "training", "mfu") for one in runs[key]]
        if alone:
            mfu = max(m["value"] for m in share if "device" not in m)
            [bar] = speeds.barh(place, max(m["value"] for m in alone) / 1e3, color=colour)
            speeds.bar_label(
                speeds.containers[-1], labels=[f"{bar.get_width():.0f}k, {mfu:.1%}"], fontsize=7, padding=2
            )
        any_shared |= len(alone) < len(runs[key])
    curves.set_title("training loss, nats a token (pure dashed)")
    curves.set_xlabel("step")
    curves.set_ylim(top=6.5)
    ends.set_title("held-out loss, every seed")
    ends.set_yticks(range(len(order)), labels, fontsize=8)
    speeds.set_title("thousand tokens/s, MFU")
    speeds.set_yticks(range(len(order)), [])
    speeds.set_xlim(right=speeds.get_xlim()[1] * 1.45)
    for axis in (ends, speeds):
        axis.invert_yaxis()
    one = next(iter(runs.values()))[0]
    tokens = one["protocol"]["tokens"] / 1e6
    note = "; speeds of runs that had the card to themselves" if any_shared else ""
    figure.suptitle(f"{size}, {tokens:.1f} M tokens of Python source, {one['device']}{note}", fontsize=9)
    save(figure, path)


def metric_of(found: dict, task: str, name: str) -> dict:
    return next(m for m in found["metrics"] if (m["task"], m["metric"]) == (task, name))


def save(figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pictures (default docs)")
    args = parser.parse_args()
    with plt.rc_context(STYLE):
        for name, draw in (("context", context), ("train_step", training)):
            source = RESULTS / f"{name}.json"
            if source.exists():
                draw(json.loads(source.read_text()), args.docs / f"{name}.svg")
            else:
                print(f"{source} is not there yet: python -m benchmarks.{name}")
        for size in ("nano-7M", "nano-22M"):
            if runs := nano_runs(size):
                nano(runs, size, args.docs / f"{size}.svg")


if __name__ == "__main__":
    main()
