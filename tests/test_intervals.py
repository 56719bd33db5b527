"""Intervals over documents cover the truth about as often as they say, for few documents too."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from engram.runtime.intervals import LEAST_DOCUMENTS, over_documents


def misses(count: int, trials: int = 400) -> float:
    """How often the interval of sum(part) / sum(whole) over `count` documents does not hold the truth."""
    generator = np.random.default_rng(count)
    missed = 0
    for trial in range(trials):
        whole = generator.uniform(50, 500, size=count)
        part = whole * generator.normal(0.1, 0.1, size=count)
        low, high = over_documents(part, whole, trial, 1000)
        missed += not low <= 0.1 <= high
    return missed / trials


@pytest.mark.parametrize("count", [LEAST_DOCUMENTS, 12, 40])
def test_an_interval_misses_the_truth_about_as_often_as_it_says(count: int) -> None:
    assert 0.02 <= misses(count) <= 0.085, "5 % (the plain percentile interval misses 12 % of 8 documents)"


def test_two_documents_are_too_few_and_that_is_why_a_verdict_wants_more() -> None:
    assert misses(2) > 0.3


def test_of_many_documents_it_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = over_documents(values, np.ones(400), 0, 20_000)
    half = NormalDist().inv_cdf(0.975) * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_the_same_seed_gives_the_same_interval_and_no_share_gives_none() -> None:
    sums = (np.arange(9.0), np.ones(9))
    assert over_documents(*sums, 4) == over_documents(*sums, 4)
    assert all(map(math.isnan, over_documents(np.zeros(9), np.zeros(9), 0)))
