"""Tests and intervals against slow definitions: every order, every resample, scipy where it has the same thing."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import (
    accuracy_stderr,
    crossed_bootstrap,
    holm,
    page,
    paired_bootstrap,
    rank_probabilities,
    tost,
)


@pytest.mark.parametrize("blocks", [[[1, 2, 3], [2, 3, 1]], [[1, 1, 2], [0, 5, 5]], [[2, 2, 2], [3, 1, 2]]])
def test_page_counts_every_joint_order_of_the_ranks(blocks):
    ranks = stats.rankdata(blocks, axis=1)
    weights = np.arange(1, 4)
    orders = [list(permutations(row)) for row in ranks]
    all_l = [sum(np.dot(weights, row) for row in rows) for rows in product(*orders)]
    observed = float((ranks @ weights).sum())
    found = page(blocks)
    assert found.statistic == observed
    assert found.p == pytest.approx(np.mean(np.array(all_l) >= observed - 1e-9), abs=1e-12)


def test_page_is_scipys_where_there_are_no_ties():
    blocks = np.random.default_rng(0).random((5, 5))
    expected = stats.page_trend_test(blocks, method="exact")
    assert page(blocks) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-10)


def test_tost_is_the_larger_of_two_one_sided_tests():
    d = np.array([0.004, -0.001, 0.002, 0.0005])
    found = tost(d, margin=0.01)
    sides = [stats.ttest_1samp(d, -0.01, alternative="greater"), stats.ttest_1samp(d, 0.01, alternative="less")]
    assert found.p == pytest.approx(max(side.pvalue for side in sides), rel=1e-9)
    assert found.mean == pytest.approx(d.mean())


@pytest.mark.parametrize("shift", [0.0, 0.004, 0.008, 0.02, -0.008])
def test_tost_and_its_interval_say_the_same(shift):
    found = tost(np.array([0.004, -0.001, 0.002, 0.0005]) + shift, margin=0.01)
    assert (found.p < 0.05) == (-0.01 < found.ci90[0] and found.ci90[1] < 0.01)


def test_tost_does_not_take_noise_for_flatness():
    assert tost([0.1, -0.1, 0.12, -0.11], margin=0.02).p > 0.05
    assert tost([0.03, 0.03, 0.03], margin=0.02).p == 1.0 and tost([0.01, 0.01], margin=0.02).p == 0.0


def test_holm_is_the_step_down_rule():
    p = [0.03, 0.001, 0.04, 0.5, 0.012]
    adjusted = holm(p)
    for alpha in np.linspace(0.001, 0.999, 97):
        rejected = set()
        for i, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (len(p) - i):
                break
            rejected.add(int(index))
        assert rejected == set(np.flatnonzero(adjusted <= alpha).tolist())


def test_bootstrap_over_contexts_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(1).normal(0.5, 2.0, 400)
    found = paired_bootstrap(values, np.zeros(400))
    error = values.std() / math.sqrt(400)
    # Percentiles of 10,000 resamples are known to about 2 % of the standard error.
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.05)
    assert found.value == pytest.approx(values.mean())


def test_bootstrap_sees_that_seeds_differ_and_that_contexts_are_shared():
    rng = np.random.default_rng(2)
    seeds, contexts = rng.normal(0, 1, (4, 1)), rng.normal(0, 1, (1, 300))
    found = crossed_bootstrap(seeds + 0 * contexts)
    error = seeds.std() / 2  # of a mean over 4; 256 resamples make its percentiles coarse
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.15)
    found = crossed_bootstrap(0 * seeds + contexts)  # four times the same contexts are not four times as many
    assert (found.high - found.low) / (2 * 1.96 * contexts.std() / math.sqrt(300)) == pytest.approx(1.0, abs=0.05)


def test_bootstrap_is_the_same_for_the_same_seed():
    values = np.random.default_rng(3).random((2, 30))
    assert crossed_bootstrap(values, 600) == crossed_bootstrap(values, 600) != crossed_bootstrap(values, 600, seed=1)


def test_rank_probabilities_are_those_of_all_resamples():
    blocks = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    expected = np.zeros((3, 3))
    for rows in product(range(3), repeat=3):
        means = blocks[list(rows)].mean(0).round(9)
        for column, mean in enumerate(means):
            first, ties = (means > mean).sum(), (means == mean).sum()
            expected[column, first : first + ties] += 1 / ties / 27
    # Of 20,000 resamples a share is known to .0035; three times that.
    np.testing.assert_allclose(rank_probabilities(blocks, repeats=20_000), expected, atol=0.011)


def test_accuracy_stderr_is_that_of_yes_and_no():
    outcomes = np.array([1] * 30 + [0] * 70)
    assert accuracy_stderr(0.3, 100) == pytest.approx(outcomes.std() / 10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: page([[1, 2, 3]]), "at least 2 rows"),
        (lambda: page([[1, 2, math.nan], [1, 2, 3]]), "finite"),
        (lambda: page(np.ones((2, 9))), "at most 8"),
        (lambda: tost([0.1], 0.1), "at least 1 rows of 2"),
        (lambda: tost([0.1, 0.2], 0.0), "margin=0.0"),
        (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "same contexts"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
