"""Recall on real text, without synthetic data: does the model use what stands in its context?

    python -m evaluation.recall runs/demo --text held_out/*.py --counts train/*.py

A token is a *hit* when the pair of it and the token before it stood earlier in the same context: whoever remembers the
context can copy it. Where the pair is also rare in training text, knowledge does not help, and where its last occurrence
is far back, attention does and a small state may not. So the mean loss is given apart for tokens that are new, for rare
hits that are near and for rare hits that are far (the associative-recall slice of Zoology, arXiv 2312.04927, section 3,
with distances). Hits of frequent pairs are given too: language modelling at large.

Which pairs are rare is read off a count table of training text (``--counts``); models are comparable only on the same
table, text and tokenizer, so the digests of all three are in the result's protocol. Intervals are bootstrapped over
documents, as tokens of one document are not independent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_models import results

from .scoring import DTYPES, Encoder, add_model_arguments, load, loglikelihoods, protocol_of

GAP_BINS = (1, 9, 33, 129, 513)  # first gap of each bin in the table by distance
DRAWS = 10_000


class CountTable(NamedTuple):
    """How often each pair of neighbouring tokens stands in a training text."""

    pairs: np.ndarray  # int64, sorted: previous token * 2^32 + token
    counts: np.ndarray  # int64
    tokens: int  # read in all

    def __getitem__(self, pairs: np.ndarray) -> np.ndarray:
        """Counts of ``pairs``, 0 where one never came."""
        if not len(self.pairs):
            return np.zeros(pairs.shape, np.int64)
        place = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        return np.where(self.pairs[place] == pairs, self.counts[place], 0)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for array in (self.pairs, self.counts):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()[:12]


def pair_ids(ids: np.ndarray) -> np.ndarray:
    """One number per pair of neighbours: [T] -> [T - 1], entry t - 1 for the pair that ends at token t."""
    return ids[:-1].astype(np.int64) << 32 | ids[1:].astype(np.int64)


def count_pairs(documents: Iterable[Sequence[int]]) -> CountTable:
    """Count the pairs of all documents, token ids; no pair reaches over a document's end."""
    rows = [np.asarray(document, dtype=np.int64) for document in documents]
    found = [pair_ids(row) for row in rows if len(row) > 1]
    pairs, counts = np.unique(np.concatenate(found) if found else np.zeros(0, np.int64), return_counts=True)
    return CountTable(pairs, counts.astype(np.int64), sum(map(len, rows)))


def gaps(ids: np.ndarray) -> np.ndarray:
    """How many tokens ago the pair that ends at each token ended last, 0 where it did not: [T] -> [T], int64."""
    pairs = pair_ids(ids)
    order = np.argsort(pairs, kind="stable")
    ordered = pairs[order]
    found = np.zeros(len(ids), np.int64)
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    found[1 + order[again]] = order[again] - order[again - 1]
    return found


class Contexts(NamedTuple):
    """Scored tokens of all documents, one entry each."""

    nats: np.ndarray  # loss
    gap: np.ndarray  # 0: new
    rare: np.ndarray  # bool: the pair is rare in the count table
    document: np.ndarray  # index


def cut(ids: Sequence[int], context: int, bos: int | None) -> list[list[int]]:
    """A document in contexts of at most ``context`` tokens, each with BOS in front where the tokenizer puts one."""
    room = context - (bos is not None)
    front = [] if bos is None else [bos]
    return [front + list(ids[start : start + room]) for start in range(0, len(ids), room)]


def measure(
    model,
    documents: Sequence[Sequence[int]],
    counts: CountTable,
    *,
    context: int = 1024,
    rare: int = 16,
    bos: int | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> Contexts:
    """Loss, gap and rarity of every token that has a pair and a context to be predicted from.

    Args:
        documents: token ids, without BOS.
        context: tokens that the model reads at once, BOS counted; gaps do not reach beyond it.
        rare: a pair is rare if it stands at most so often in the table.

    Raises:
        ValueError: a context of less than 3 tokens, or no document has two tokens.
    """
    if context < 3:
        raise ValueError(f"context={context} must be at least 3: a hit needs a pair and a token before it.")
    rows, document = [], []
    for i, ids in enumerate(documents):
        pieces = [piece for piece in cut(ids, context, bos) if len(piece) > 1 + (bos is not None)]
        rows += pieces
        document += [i] * len(pieces)
    if not rows:
        raise ValueError("the text has no document of at least two tokens.")
    # The pair of BOS and the first token is none of the text's: that token is context only.
    first = 1 if bos is None else 2
    requests = [(row[:first], row[first:]) for row in rows]
    scored = loglikelihoods(model, requests, batch_size=batch_size, progress=progress)
    arrays = [np.asarray(row) for row in rows]
    return Contexts(
        -np.concatenate([one.token_nats for one in scored]),
        np.concatenate([gaps(row)[first:] for row in arrays]),
        np.concatenate([counts[pair_ids(row)[first - 1 :]] <= rare for row in arrays]),
        np.repeat(document, [len(row) - first for row in rows]),
    )


def slices(contexts: Contexts, far: int = 128) -> dict[str, np.ndarray]:
    """The tokens of each slice, as masks. A hit is far if its gap is larger than ``far``."""
    new, rare, far_back = contexts.gap == 0, contexts.rare, contexts.gap > far
    return {
        "all": np.ones_like(new),
        "new": new,
        "new_rare": new & rare,
        "hit": ~new,
        "near_rare": ~new & rare & ~far_back,
        "far_rare": ~new & rare & far_back,
    }


def distance_bins(contexts: Contexts) -> dict[tuple[int, int | None], np.ndarray]:
    """Rare hits by gap: {(first gap, last gap or None): mask}."""
    edges = [*GAP_BINS, None]
    hit = contexts.rare & (contexts.gap > 0)
    return {
        (low, high and high - 1): hit & (contexts.gap >= low) & (high is None or contexts.gap < high)
        for low, high in zip(edges, edges[1:])
    }


class Mean(NamedTuple):
    """Mean loss of a slice."""

    nats: float
    tokens: int
    documents: int
    stderr: float | None  # None where fewer than two documents have such a token
    ci95: tuple[float, float] | None
    per_document: list[float]


def mean_loss(contexts: Contexts, mask: np.ndarray, seed: int = 0) -> Mean | None:
    """Mean over the tokens of ``mask``, with a bootstrap over documents; None without tokens."""
    if not mask.any():
        return None
    documents, place = np.unique(contexts.document[mask], return_inverse=True)
    sums = np.bincount(place, contexts.nats[mask])
    sizes = np.bincount(place)
    stderr = ci95 = None
    n = len(documents)
    if n > 1:
        draws = np.empty(DRAWS)
        random = np.random.RandomState(seed)
        for i in range(0, DRAWS, 500):  # some at a time: a weight per document and draw
            weights = random.multinomial(n, np.full(n, 1 / n), size=min(500, DRAWS - i))
            draws[i : i + 500] = (weights @ sums) / (weights @ sizes)
        stderr, ci95 = float(draws.std(ddof=1)), tuple(float(x) for x in np.percentile(draws, [2.5, 97.5]))
    return Mean(float(sums.sum() / sizes.sum()), int(sizes.sum()), n, stderr, ci95, (sums / sizes).tolist())


def read_documents(paths: Sequence[str | Path]) -> list[str]:
    """Texts of files: every line's "text" of a .jsonl file, any other file as one document.

    Raises:
        ValueError: a line of a .jsonl file has no "text".
        OSError: a file cannot be read.
    """
    texts = []
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            texts.append(text)
            continue
        for number, line in enumerate(text.splitlines(), 1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: not an object with a "text".') from None
    return texts


def evaluate(
    target: str | Path,
    text: Sequence[str | Path],
    counts: Sequence[str | Path],
    *,
    context: int = 1024,
    rare: int = 16,
    far: int = 128,
    batch_size: int = 8,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    command: str = "",
) -> dict:
    """The slices of one checkpoint, as a result of ``hybrid_models.results``.

    Args:
        target: checkpoint directory or repo id of any causal model.
        text, counts: held-out and training text, files as ``read_documents`` takes them.
        context, rare, far: see ``measure`` and ``slices``.

    Raises:
        ValueError: the two texts share a document, or see ``measure``, ``read_documents`` and ``scoring.load``.
    """
    start = time.perf_counter()
    held_out, training = read_documents(text), read_documents(counts)
    if shared := set(filter(None, held_out)) & set(training):
        raise ValueError(
            f"--text and --counts share {len(shared)} documents, the first {next(iter(shared))[:40]!r}: rarity must be "
            "counted on other text than it is measured on."
        )
    model, loaded = load(target, tokenizer=tokenizer, dtype=DTYPES[dtype], device=device)
    encode = Encoder(loaded)
    table_of_counts = count_pairs(encode(document, bos=False) for document in training)
    contexts = measure(
        model,
        [encode(document, bos=False) for document in held_out],
        table_of_counts,
        context=context,
        rare=rare,
        bos=encode.bos,
        batch_size=batch_size,
        progress="held-out text",
    )
    numbers, items = [], {}
    for name, mask in slices(contexts, far).items():
        if (found := mean_loss(contexts, mask)) is not None:
            numbers.append(_metric(name, found, share=found.tokens / len(contexts.nats)))
            items[name] = found.per_document  # of the documents that have such a token
    for (low, high), mask in distance_bins(contexts).items():
        if (found := mean_loss(contexts, mask)) is not None:
            numbers.append(_metric("rare_hit", found, gap=f"{low}-{high or context - 1}"))
    protocol = {
        **protocol_of(model, encode),
        "context": context,
        "rare": rare,
        "far": far,
        "text_sha256": hashlib.sha256("\0".join(held_out).encode()).hexdigest()[:12],
        "count_table_sha256": table_of_counts.sha256(),
        "count_table_tokens": table_of_counts.tokens,
    }
    return results.result(
        "recall",
        Path(target).resolve().name,
        command,
        numbers,
        weights=results.weights_sha256(target),
        protocol=protocol,
        seeds=[0],
        seconds=round(time.perf_counter() - start, 1),
        details={"documents": len(held_out), "tokens": len(contexts.nats), "items": items},
    )


def _metric(task: str, found: Mean, **conditions) -> dict:
    return results.metric(
        task,
        "loss_nats",
        found.nats,
        n=found.documents,
        stderr=found.stderr,
        ci95=found.ci95,
        tokens=found.tokens,
        **conditions,
    )


def table(one: dict) -> str:
    """The metrics for a terminal."""
    lines = [f"{'slice':<18} {'tokens':>9} {'share':>7}  {'loss':>7}  95 % over documents"]
    for m in one["metrics"]:
        name = f"{m['task']} {m['gap']}" if "gap" in m else m["task"]
        share = f"{m['share']:7.1%}" if "share" in m else " " * 7
        interval = "[{:.3f}, {:.3f}]".format(*m["ci95"]) if "ci95" in m else "one document"
        lines.append(f"{name:<18} {m['tokens']:>9,} {share}  {m['value']:7.3f}  {interval}")
    p = one["protocol"]
    lines.append(
        f"rare: at most {p['rare']} times in {p['count_table_tokens']:,} tokens of training text; far: more than "
        f"{p['far']} tokens back"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m evaluation.recall",
        description="Loss on tokens that repeat what stands in the context, by rarity and distance, and on those that do not.",
        epilog="example:\n  python -m evaluation.recall runs/demo --text held_out/*.py --counts train/*.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="PATH", help="checkpoint directory or repo id of any causal model")
    kinds = "UTF-8 files, a document each, or .jsonl with a text per line"
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help=f"held-out text: {kinds}")
    parser.add_argument("--counts", nargs="+", required=True, metavar="FILE", help="training text, to count pairs in")
    parser.add_argument("--context", type=int, default=1024, help="tokens read at once (default %(default)s)")
    parser.add_argument("--rare", type=int, default=16, help="a rare pair's largest count (default %(default)s)")
    parser.add_argument("--far", type=int, default=128, help="a near pair's largest gap (default %(default)s)")
    add_model_arguments(parser)
    options = vars(parser.parse_args(argv))
    folder = options.pop("output")
    try:
        one = evaluate(**options, command=results.this_command("evaluation.recall", argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(one))
    print(f"written to {results.write(one, folder)}")


if __name__ == "__main__":
    main()
