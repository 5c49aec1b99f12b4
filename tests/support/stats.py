"""Chi-square tests for sampled decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2


class ChiSquare(NamedTuple):
    """The outcome of a test; reject equality at level alpha where pvalue < alpha."""

    statistic: float
    dof: int
    pvalue: float


def chi_square(observed: Sequence, probabilities: Sequence, min_expected: float = 5) -> ChiSquare:
    """Pearson's test that counts were drawn from `probabilities` (same shape, any; need not be normalised).

    Bins that expect fewer than `min_expected` counts are pooled into one; if the pool expects fewer too, the smallest
    of the other bins joins it. A count where the probability is 0 is impossible: pvalue 0.
    """
    return _result(*_pearson(np.ravel(observed), np.ravel(probabilities), min_expected))


def chi_square_rows(observed: Sequence, probabilities: Sequence, min_expected: float = 5) -> ChiSquare:
    """`chi_square` of a table [N, V] row by row, each row's total as observed, summed to one test.

    For counts given a condition (the token before, say): how often a condition came up is not tested.
    """
    pairs = zip(np.asarray(observed), np.asarray(probabilities), strict=True)
    parts = [_pearson(counts, row, min_expected) for counts, row in pairs if counts.sum()]
    return _result(sum(part[0] for part in parts), sum(part[1] for part in parts))


def _pearson(observed: np.ndarray, probabilities: np.ndarray, min_expected: float) -> tuple[float, int]:
    """The statistic of one row of counts and its degrees of freedom."""
    counts = np.asarray(observed, dtype=float)
    expected = np.asarray(probabilities, dtype=float) / np.sum(probabilities, dtype=float) * counts.sum()
    groups = _pool(expected, min_expected)
    if counts[expected == 0].any():
        return float("inf"), int(groups.max()) + 1
    counts, expected = _sums(counts, groups), _sums(expected, groups)
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def chi_square_two(a: Sequence, b: Sequence, min_expected: float = 5) -> ChiSquare:
    """Homogeneity test that two arrays of counts (same shape) were drawn from one distribution, pooled alike."""
    table = np.stack([np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel()])
    share = table.sum(1) / table.sum()
    table = table[:, table.sum(0) > 0]
    groups = _pool(table.sum(0) * share.min(), min_expected)
    table = np.stack([_sums(row, groups) for row in table])
    expected = np.outer(share, table.sum(0))
    return _result(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)


def _pool(expected: np.ndarray, least: float) -> np.ndarray:
    """The group of each bin: bins expecting less than `least` share group 0."""
    order = np.argsort(expected, kind="stable")
    small = int((expected < least).sum())
    while 0 < small < len(order) and expected[order[:small]].sum() < least:
        small += 1
    groups = np.empty(len(order), dtype=int)
    groups[order[:small]] = 0
    groups[order[small:]] = np.arange(len(order) - small) + bool(small)
    return groups


def _sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.bincount(groups, weights=values)


def _result(statistic: float, dof: int) -> ChiSquare:
    if dof < 1:
        raise ValueError("fewer than two bins are left after pooling: use more samples or fewer outcomes.")
    return ChiSquare(statistic, dof, float(chi2.sf(statistic, dof)))
