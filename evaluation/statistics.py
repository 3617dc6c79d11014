"""Tests and intervals for comparing models: few models, many contexts, and claims of both kinds, "rises" and "is flat".

The unit is a trained model; tokens of one context, or seeds that saw the same contexts, are not independent, and a
difference that is not significant is no proof of equality. So: Page's test where an order was predicted, two one-sided
tests (TOST) where flatness is claimed, bootstraps that resample seeds and contexts and never tokens, and Holm's
correction where several were asked at once. scipy has the ordinary tests; here is what it lacks, or gives only without
ties.

    >>> from evaluation.statistics import holm, page, tost
    >>> page([[1, 2, 3], [2, 3, 5], [1, 4, 2]]).p            # columns in the predicted order; rows are models
    0.032407407407407406
    >>> tost([0.001, -0.002, 0.0005, 0.001], margin=0.02).p < 0.001
    True
    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
from scipy import stats


class Trend(NamedTuple):
    """Page's L and the chance of one at least as large if the order within every row were random."""

    statistic: float
    p: float


class Equivalence(NamedTuple):
    """Two one-sided tests of a mean difference against a margin."""

    mean: float
    ci90: tuple[float, float]  # inside (-margin, margin) exactly where p < .05
    p: float
    margin: float


class Interval(NamedTuple):
    """An estimate with its 95 % percentile interval, in the units of the values."""

    value: float
    low: float
    high: float


def _matrix(values, name: str, least: tuple[int, int]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < least[0] or array.shape[1] < least[1] or not np.isfinite(array).all():
        raise ValueError(
            f"{name} has shape {list(array.shape)}: give at least {least[0]} rows of {least[1]} finite numbers each; "
            "leave out rows that were not measured whole."
        )
    return array


def page(blocks: Sequence[Sequence[float]]) -> Trend:
    """Page's test, exact also with ties: do values rise from the first column to the last?

    L is the sum over columns of column number times the column's sum of ranks (mid-ranks for ties). Its distribution
    under the null is the convolution of each row's over all orders of that row's own ranks, so ties need no
    approximation (``scipy.stats.page_trend_test`` is exact only without them).

    Args:
        blocks: [rows, columns], at least 2 rows of 3 columns; a row is one model family, a column one level.

    Raises:
        ValueError: too few values, or more than 8 columns (8! orders of a row are listed).
    """
    ranks = stats.rankdata(_matrix(blocks, "blocks", (2, 3)), axis=1)
    columns = np.arange(1, ranks.shape[1] + 1)
    if len(columns) > 8:
        raise ValueError(
            f"blocks has {len(columns)} columns, but the exact test takes at most 8: compare fewer levels."
        )
    orders = np.array(list(permutations(columns)))
    doubled = Counter({0: 1.0})  # 2 L, an integer, and its probability
    for row in ranks:
        values, counts = np.unique(np.rint(2 * orders @ row).astype(int), return_counts=True)
        step = Counter()
        for value, count in zip(values.tolist(), counts / len(orders)):
            for before, chance in doubled.items():
                step[before + value] += chance * count
        doubled = step
    observed = round(2 * float((ranks @ columns).sum()))
    return Trend(observed / 2, min(1.0, float(sum(chance for value, chance in doubled.items() if value >= observed))))


def tost(differences: Sequence[float], margin: float) -> Equivalence:
    """Is the mean of paired differences within +-margin? The larger p of two one-sided t tests (Schuirmann 1987).

    Args:
        differences: one per pair of models, at least 2.
        margin: what counts as no difference, in the same units; to be fixed before looking.

    Raises:
        ValueError: fewer than 2 differences, or a margin that is not positive.
    """
    d = _matrix([differences], "differences", (1, 2))[0]
    if not margin > 0:
        raise ValueError(f"margin={margin!r} must be positive: it is the largest difference that counts as none.")
    mean, error = float(d.mean()), float(d.std(ddof=1) / np.sqrt(len(d)))
    if error == 0.0:
        return Equivalence(mean, (mean, mean), float(abs(mean) >= margin), margin)
    t = stats.t(len(d) - 1)
    half = float(t.ppf(0.95)) * error
    p = max(t.sf((mean + margin) / error), t.sf((margin - mean) / error))
    return Equivalence(mean, (mean - half, mean + half), float(p), margin)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values, in the order given; they control the chance of any false rejection."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def paired_bootstrap(first: Sequence[float], second: Sequence[float], repeats: int = 10_000, seed: int = 0) -> Interval:
    """Mean of first - second over the contexts that both models were measured on.

    Args:
        first, second: one value per context (document, sequence, question), in the same order.

    Raises:
        ValueError: lengths differ, or there are fewer than 2 contexts.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} contexts, second {len(second)}: pairs must be of the same contexts.")
    return crossed_bootstrap([np.subtract(first, second)], repeats, seed)


def crossed_bootstrap(values: Sequence[Sequence[float]], repeats: int = 10_000, seed: int = 0) -> Interval:
    """Mean over seeds and contexts, with both resampled: seeds first, then the contexts that all seeds share.

    For a difference of two models pass the differences per seed and context. With few seeds the interval is too narrow
    by about sqrt((seeds - 1) / seeds), and with one it holds the variation of contexts only.

    Args:
        values: [seeds, contexts]; average the tokens or questions of a context before.

    Raises:
        ValueError: no seeds, fewer than 2 contexts, or numbers that are not finite.
    """
    table = _matrix(values, "values", (1, 2))
    seeds, contexts = table.shape
    rng = np.random.default_rng(seed)
    means = np.empty(repeats)
    for start in range(0, repeats, 500):  # 500 x contexts weights at a time
        count = min(500, repeats - start)
        rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        columns = rng.multinomial(contexts, np.full(contexts, 1 / contexts), size=count) / contexts
        means[start : start + count] = np.einsum("bs,sc,bc->b", rows, table, columns, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


def rank_probabilities(blocks: Sequence[Sequence[float]], repeats: int = 10_000, seed: int = 0) -> np.ndarray:
    """How often each column takes each place when the rows are resampled; [columns, places], place 0 is the highest mean.

    Rows are paired measurements (levels, seeds, contexts), columns the competitors. Ties share their places equally.
    """
    table = _matrix(blocks, "blocks", (2, 2))
    rows, columns = table.shape
    weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=repeats) / rows
    means = np.round(weights @ table, 12)  # equal means stay equal whatever the order of summation
    higher = (means[:, None, :] > means[:, :, None]).sum(-1)
    same = (means[:, None, :] == means[:, :, None]).sum(-1)
    place = np.arange(columns)
    shared = (higher[..., None] <= place) & (place < (higher + same)[..., None])
    return (shared / same[..., None]).mean(0)


def accuracy_stderr(accuracy: float, items: int) -> float:
    """Standard error of a share of ``items`` independent yes-or-no outcomes."""
    return float(np.sqrt(accuracy * (1 - accuracy) / items))


__all__ = [
    "Equivalence",
    "Interval",
    "Trend",
    "accuracy_stderr",
    "crossed_bootstrap",
    "holm",
    "page",
    "paired_bootstrap",
    "rank_probabilities",
    "tost",
]
