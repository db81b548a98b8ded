"""Intervals and paired tests over samples: percentile bootstrap, McNemar's exact test, Holm's correction.

Everything works on sums of per-sample statistics (metrics.py), so that corpus BLEU, F1 and CHAIR are resampled as
what they are and not as means of something else.

Shapes: N samples, S statistics, R resamples, C comparisons.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # per cent: a 95% interval
AT_ONCE = 2**24  # draws held in memory


Value = Callable[[np.ndarray], np.ndarray]


def resampled(value: Value, statistics_NS: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """`value`, a function of sums (R,S), of as many resamples of the samples: (R,)."""
    draws = _draws(len(statistics_NS), seed, resamples)
    return np.concatenate([value(weights_RN @ statistics_NS) for weights_RN in draws])


def interval(
    value: Value, statistics_NS: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The bootstrap interval of `value`; (nan, nan) where no resample has one."""
    return percentiles(resampled(value, statistics_NS, seed, resamples))


def paired(
    value: Value, ours_NS: np.ndarray, theirs_NS: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, float]:
    """
    The difference of two systems on the same samples: `difference`, `low`, `high` and the two-sided bootstrap `p`.

    `p` is twice the smaller share of resamples on one side of 0, one resample added, so that it is never 0: with 2000
    resamples it cannot fall below 0.001.

    Raises:
        ValueError: the two do not have the same samples.
    """
    _same_number(ours_NS, theirs_NS)
    # One seed draws the same samples for both.
    resampled_R = resampled(value, ours_NS, seed, resamples) - resampled(value, theirs_NS, seed, resamples)
    difference = float((value(ours_NS.sum(0, keepdims=True)) - value(theirs_NS.sum(0, keepdims=True)))[0])
    resampled_R = resampled_R[np.isfinite(resampled_R)]
    low, high = percentiles(resampled_R)
    if not len(resampled_R):
        return {"difference": difference, "low": low, "high": high, "p": float("nan")}
    sides = (int((resampled_R <= 0).sum()), int((resampled_R >= 0).sum()))
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (min(sides) + 1) / (len(resampled_R) + 1)),
    }


def mcnemar(ours_N: Sequence[float], theirs_N: Sequence[float]) -> float:
    """
    McNemar's exact test of two systems that are right (1) or wrong (0) on the same samples: the two-sided p.

    Raises:
        ValueError: the two do not have the same samples.
    """
    ours_N, theirs_N = np.asarray(ours_N), np.asarray(theirs_N)
    _same_number(ours_N, theirs_N)
    only_ours, only_theirs = int((ours_N > theirs_N).sum()), int((ours_N < theirs_N).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs, 0.5).pvalue)


def holm(p_C: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method; nan stays nan and does not count."""
    p_C = np.asarray(p_C, dtype=float)
    corrected_C = np.full(len(p_C), np.nan)
    tested = np.flatnonzero(np.isfinite(p_C))
    order = tested[np.argsort(p_C[tested], kind="stable")]
    steps = p_C[order] * np.arange(len(order), 0, -1)
    corrected_C[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return corrected_C.tolist()


def _draws(samples: int, seed: int, resamples: int):
    """How often each sample is taken, (R,N) in pieces that fit into memory."""
    if samples == 0:
        raise ValueError("there are no samples to resample; a metric needs at least one")
    random = np.random.default_rng(seed)
    piece = max(1, AT_ONCE // samples)
    for start in range(0, resamples, piece):
        yield random.multinomial(samples, np.full(samples, 1 / samples), min(piece, resamples - start)).astype(float)


def percentiles(resampled_R: np.ndarray) -> tuple[float, float]:
    """The 95% interval of what has a value; (nan, nan) where nothing has."""
    finite_R = resampled_R[np.isfinite(resampled_R)]
    return tuple(map(float, np.percentile(finite_R, INTERVAL))) if len(finite_R) else (float("nan"), float("nan"))


def _same_number(ours: np.ndarray, theirs: np.ndarray):
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} samples on one side and {len(theirs)} on the other; a paired test needs the same samples"
        )
