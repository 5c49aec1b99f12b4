"""Whether two methods answer equally well: paired statistics over the same problems, by scipy."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.95
_RESAMPLES = 9999


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's confidence interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(right, total).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Paired:
    """Two methods on the same problems."""

    difference: float  # of the accuracies, theirs minus the reference's
    low: float  # its confidence interval, by bootstrap over problems
    high: float
    lost: int  # answers right with the reference only
    won: int  # answers right with the other only
    p: float  # McNemar's exact test: how likely so uneven a split is if both are equally good


def paired(reference: list[list[bool]], other: list[list[bool]], seed: int = 0) -> Paired:
    """Compare rights and wrongs, [problem][sample].

    The j-th samples of a problem are one pair. Samples are independent and, if both methods draw from the same
    distribution, equally likely to be right, so that McNemar's test holds over all pairs; the bootstrap resamples
    problems, whose answers belong together.
    """
    import numpy as np
    from scipy.stats import binomtest, bootstrap

    pairs = [(a, b) for x, y in zip(reference, other, strict=True) for a, b in zip(x, y, strict=True)]
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    differences = np.array([np.mean(y) - np.mean(x) for x, y in zip(reference, other, strict=True)])
    if lost + won == 0 or len(differences) < 2:  # nothing to resample: what n pairs alike say of the share unlike
        bound = 1 - (1 - LEVEL) ** (1 / len(pairs))
        return Paired(float(differences.mean()), -bound, bound, lost, won, p)
    found = bootstrap(
        (differences,), np.mean, confidence_level=LEVEL, n_resamples=_RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Paired(float(differences.mean()), float(found.low), float(found.high), lost, won, p)
