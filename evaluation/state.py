"""Recurrent states while a text is read: how full, how many directions, what is kept, what can be read back.

    python -m evaluation.state runs/demo --text book.txt --lengths 64,128,256,512

The text goes through the model in segments, and at each length the states of the cache are measured, per layer and head
(``state_measures`` has the formulas). Beside every figure stands its null value: the same gates and write strengths of the
same tokens, with keys and values of random direction (and the norms that the model's have). What a figure says is its
distance from that; where they agree, the model stores as one would by chance.

Written are a CSV file with a row per layer, head and length, a picture, and a result file with the means over heads.
Values are means over the documents.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from hybrid_models import results
from hybrid_models.recurrence import chunk

from .recall import read_documents
from .scoring import DTYPES, Encoder, add_device_arguments, comma_separated, load, protocol_of
from .state_measures import lagged_recall, norm_growth, retained_energy, spectrum_measures, vector_measures

LENGTHS = (64, 128, 256, 512, 1024, 2048)
LAGS = (16, 32, 64, 128)
WHERE = ("layer", "head", "mixer", "tokens")  # what a row is about; the other columns are measures


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Written:
    """What one layer has written so far: the law's inputs [1, T, ...] in float32 or wider, and the null's beside them."""

    def __init__(self, mixer: str, seed: int):
        self.mixer, self.generator = mixer, torch.Generator().manual_seed(seed)
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.null_state: torch.Tensor | None = None

    def extend(self, segment) -> None:
        """Take over what a forward wrote, a ``cache.Segment``, and write the same with random directions beside it."""
        new = {name: getattr(segment, name) for name in ("k", "v", "log_decay", "beta")}
        new = {name: _wide(x.detach().cpu()) for name, x in new.items() if x is not None}
        new["null_v"] = self._redirected(new["v"])
        if "k" in new:
            # HGRN2's key is one minus its decay, so that another key would need another decay: only values are drawn.
            new["null_k"] = new["k"] if self.mixer == "hgrn2" else self._redirected(new["k"])
        law = (new.get(name) for name in ("null_k", "null_v", "log_decay", "beta"))
        _, self.null_state = chunk(None, *(None if x is None else x.double() for x in law), self.null_state)
        for name, x in new.items():
            self.parts.setdefault(name, []).append(x)

    def _redirected(self, x: torch.Tensor) -> torch.Tensor:
        """Random directions, the same norms."""
        random = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return F.normalize(random, dim=-1) * x.norm(dim=-1, keepdim=True)

    def measure(self, state: torch.Tensor, lags: Sequence[int], null: bool = False) -> dict[str, torch.Tensor]:
        """All measures of one state [1, H, K, V] or [1, D]; [H] each, or [1] for a vector state."""
        names = ("null_k", "null_v") if null else ("k", "v")
        k, v, log_decay, beta = (
            torch.cat(self.parts[name], 1) if name in self.parts else None for name in (*names, "log_decay", "beta")
        )
        found = vector_measures(state) if k is None else {n: x[0] for n, x in spectrum_measures(state).items()}
        lags = [lag for lag in lags if lag < v.shape[1]]
        if not lags:
            return found
        by_lag = {"retained": retained_energy(k, v, log_decay, beta, lags), "recall": lagged_recall(state, k, v, lags)}
        if k is not None:
            by_lag["recall_least_squares"] = lagged_recall(state, k, v, lags, least_squares=True)
        return found | {f"{name}_{lag}": x[:, j] for name, x in by_lag.items() for j, lag in enumerate(lags)}


def probe(
    model, ids: torch.Tensor, lengths: Sequence[int] = LENGTHS, lags: Sequence[int] = LAGS, seed: int = 0
) -> list[dict]:
    """Measure every recurrent state at every length.

    Args:
        model: a HybridLinearForCausalLM.
        ids: [documents, T] token ids, without padding, T >= max(lengths).
        lengths: tokens at which to measure, increasing.
        lags: tokens back, for retained energy and recall; one that a length does not hold is left out there.
        seed: of the null's directions.

    Returns:
        One dict per layer, head and length: the keys of WHERE, then measures, means over documents; ``null_<measure>`` is
        the null value. ``norm_growth`` is fitted over the lengths so far.

    Raises:
        ValueError: the model has no recurrent layer, or the lengths do not fit.
    """
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    if not layers:
        raise ValueError("the model has no linear-attention layer, so there is no recurrent state to measure.")
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 2 or lengths[-1] > ids.shape[1]:
        raise ValueError(f"lengths={list(lengths)} must increase from at least 2 to at most {ids.shape[1]} tokens.")
    if not lags or min(lags) < 1:
        raise ValueError(f"lags={list(lags)} must be positive.")
    documents = [
        _probe_document(model, layers, row[None], lengths, lags, seed + 1000 * i)
        for i, row in enumerate(tqdm(ids, desc="documents", disable=None))
    ]
    rows, norms = [], {}
    for versions in zip(*documents):
        first = versions[0]
        row = {name: statistics.fmean(one[name] for one in versions) for name in first if name not in WHERE}
        for prefix in ("", "null_"):
            trace = norms.setdefault((prefix, first["layer"], first["head"]), [])
            trace.append(row[prefix + "norm"])
            if len(trace) > 1:
                row[prefix + "norm_growth"] = norm_growth(lengths[: len(trace)], trace)
        rows.append({name: first[name] for name in WHERE} | row)
    return rows


@torch.inference_mode()
def _probe_document(model, layers, ids: torch.Tensor, lengths, lags, seed: int) -> list[dict]:
    """The rows of one document [1, T]."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # so that the layers keep what the last forward wrote
    written = {i: _Written(model.config.mixers[i], seed + i) for i in layers}
    rows = []
    for start, length in zip((0, *lengths), lengths):
        model(ids[:, start:length].to(model.device), past_key_values=cache, logits_to_keep=1)
        for i in layers:
            layer, one = cache.layers[i], written[i]
            one.extend(layer.segments.pop())
            found = one.measure(layer.recurrent_states[0], lags)
            null = one.measure(one.null_state, lags, null=True)
            for head in range(len(found["norm"])):
                row = {"layer": i, "head": head, "mixer": one.mixer, "tokens": length}
                row |= {name: float(x[head]) for name, x in found.items()}
                rows.append(row | {f"null_{name}": float(x[head]) for name, x in null.items()})
    return rows


def metrics_of(rows: Sequence[dict]) -> list[dict]:
    """Means over layers and heads by length and measure, the null's beside them."""
    numbers = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        at = [row for row in rows if row["tokens"] == tokens]
        for name in dict.fromkeys(name for row in at for name in row if name not in WHERE):
            if name.startswith("null_"):
                continue
            having = [row for row in at if name in row]
            value, null = (statistics.fmean(row[prefix + name] for row in having) for prefix in ("", "null_"))
            numbers.append(results.metric("state", name, value, n=len(having), length=tokens, null=null))
    return numbers


def write_csv(rows: Sequence[dict], path: Path) -> None:
    """A row per layer, head and length; an empty cell where a measure does not exist."""
    columns = [*WHERE, *dict.fromkeys(name for row in reversed(rows) for name in row if name not in WHERE)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})


def plot(rows: Sequence[dict], path: Path, title: str) -> None:
    """A line per layer (mean over heads), light to dark with depth; the null's mean over layers is dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = sorted({row["layer"] for row in rows})
    lengths = sorted({row["tokens"] for row in rows})
    lags = sorted({int(name.rsplit("_", 1)[1]) for row in rows for name in row if name.startswith("retained_")})
    colours = plt.get_cmap("viridis_r")(torch.linspace(0.1, 1, len(layers)).tolist())

    def mean(name: str, tokens: int, layer: int | None = None) -> float:
        values = [
            row[name] for row in rows if name in row and row["tokens"] == tokens and layer in (None, row["layer"])
        ]
        return statistics.fmean(values) if values else float("nan")

    last = lengths[-1]
    panels = [  # title, x label, x values, name of the measure at x, length at x, limits of y
        ("Frobenius norm", "tokens read", lengths, lambda x: ("norm", x), None),
        ("effective rank", "tokens read", lengths, lambda x: ("effective_rank", x), None),
        ("participation ratio", "tokens read", lengths, lambda x: ("participation_ratio", x), None),
        (f"energy left of a write, at {last}", "tokens since", lags, lambda x: (f"retained_{x}", last), (-0.03, 1.03)),
        (f"recall by key, at {last}", "of the last keys", lags, lambda x: (f"recall_{x}", last), (-0.03, 1.03)),
        (
            f"recall by least squares, at {last}",
            "of the last keys",
            lags,
            lambda x: (f"recall_least_squares_{x}", last),
            (-0.03, 1.03),
        ),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (name, label, xs, at, limits) in zip(axes.flat, panels):
        drawn = False
        for layer, colour in zip(layers, colours):
            ys = [mean(*at(x), layer) for x in xs]
            drawn |= any(y == y for y in ys)
            axis.plot(xs, ys, "o-", color=colour, markersize=3, label=f"layer {layer}")
        if drawn:
            axis.plot(xs, [mean("null_" + at(x)[0], at(x)[1]) for x in xs], "k--", label="random directions")
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, map(str, xs))
        else:
            axis.text(0.5, 0.5, "not defined for\na vector state", ha="center", va="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
        if name == "Frobenius norm":
            axis.set_yscale("log")
        if limits and drawn:
            axis.set_ylim(limits)
        axis.set(title=name, xlabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def evaluate(
    target: str | Path,
    text: Sequence[str | Path],
    *,
    lengths: Sequence[int] = LENGTHS,
    lags: Sequence[int] = LAGS,
    documents: int = 4,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    command: str = "",
) -> tuple[dict, list[dict]]:
    """The states of one checkpoint, as a result of ``hybrid_models.results``, and the rows behind it.

    Args:
        target: checkpoint directory or repo id of a hybrid_linear model.
        text: files as ``recall.read_documents`` takes them; the first ``documents`` that are long enough are read.

    Raises:
        ValueError: another family of models, no document is long enough, or see ``probe``.
    """
    start = time.perf_counter()
    model, loaded = load(target, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)
    if model.config.model_type != "hybrid_linear":
        raise ValueError(
            f"{target} holds a {model.config.model_type!r} model: only hybrid_linear ones have these states."
        )
    if documents < 1:
        raise ValueError(f"documents={documents} must be at least 1.")
    encode = Encoder(loaded)
    rows_of_ids = [encode(document) for document in read_documents(text)]
    long = [ids[: lengths[-1]] for ids in rows_of_ids if len(ids) >= lengths[-1]][:documents]
    if not long:
        raise ValueError(
            f"no document has lengths[-1]={lengths[-1]} tokens, the longest has {max(map(len, rows_of_ids), default=0)}: "
            "give longer text or smaller --lengths."
        )
    ids = torch.tensor(long)
    rows = probe(model, ids, lengths, lags, seed)
    protocol = {
        **protocol_of(model, encode),
        "lengths": list(lengths),
        "lags": list(lags),
        "documents": len(long),
        "ids_sha256": hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()[:12],
    }
    one = results.result(
        "state",
        Path(target).resolve().name,
        command,
        metrics_of(rows),
        weights=results.weights_sha256(target),
        protocol=protocol,
        seeds=[seed],
        seconds=round(time.perf_counter() - start, 1),
        details={"per_head": "state.csv", "picture": "state.png"},
    )
    return one, rows


def table(one: dict) -> str:
    """Means over layers and heads at the greatest length, and the null's."""
    last = max(m["length"] for m in one["metrics"])
    lines = [f"{f'at {last} tokens':<26} {'model':>9} {'random':>9}"]
    lines += [f"{m['metric']:<26} {m['value']:>9.3f} {m['null']:>9.3f}" for m in one["metrics"] if m["length"] == last]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evaluation.state",
        description="Norm, rank, retained energy and recall of the recurrent states while a text is read.",
        epilog="example:\n  python -m evaluation.state runs/demo --text book.txt --lengths 64,128,256,512",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="PATH", help="checkpoint directory or repo id")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="UTF-8 files, or .jsonl with a text per line"
    )
    whole = ",".join(map(str, LENGTHS))
    parser.add_argument(
        "--lengths", type=comma_separated, default=LENGTHS, metavar="N,N", help=f"tokens (default {whole})"
    )
    parser.add_argument(
        "--lags", type=comma_separated, default=LAGS, metavar="N,N", help=f"(default {','.join(map(str, LAGS))})"
    )
    parser.add_argument("--documents", type=int, default=4, help="texts to read (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random directions (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="PATH", help="if it is not with the model")
    add_device_arguments(parser)
    options = vars(parser.parse_args(argv))
    folder = options.pop("output")
    try:
        one, rows = evaluate(**options, command=results.this_command("evaluation.state", argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    path = results.write(one, folder)
    write_csv(rows, path.with_suffix(".csv"))
    plot(rows, path.with_suffix(".png"), f"{one['model']}: recurrent states, a line per layer (mean over heads)")
    print(table(one))
    print(f"written to {path}, and {path.stem}.csv and {path.stem}.png beside it")


if __name__ == "__main__":
    main()
