"""Intervals and paired tests over samples: percentile bootstrap, sign flips, McNemar's exact test, Holm's correction.

Everything is computed from sums of per-sample statistics (metrics.py), so that corpus BLEU, F1 and CHAIR are resampled
as they are defined, and not as means over samples.

Shapes: N samples, S statistics, R resamples, C comparisons.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # per cent: a 95% interval
FLIPS = 9999  # of the signs of differences, at least
FEWEST = 20  # samples of a test: fewer say nothing
MAX_DRAWS = 2**24  # numbers held in memory at a time

Value = Callable[[np.ndarray], np.ndarray]


def resampled(value: Value, statistics_NS: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """`value`, a function of sums (R,S), of bootstrap resamples of the samples: (R,)."""
    draws = _draws(len(statistics_NS), seed, resamples)
    return np.concatenate([value(weights_RN @ statistics_NS) for weights_RN in draws])


def interval(
    value: Value, statistics_NS: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95% bootstrap interval of `value`; (nan, nan) if it is undefined for all resamples."""
    return percentiles(resampled(value, statistics_NS, seed, resamples))


def mean_and_interval(values_N: np.ndarray) -> tuple[float, float, float]:
    """The mean over samples, and its interval as `interval` gives it."""
    sums_N2 = np.stack([values_N, np.ones_like(values_N)], 1)
    return float(values_N.mean()), *interval(lambda sums: sums[:, 0] / sums[:, 1], sums_N2)


def percentiles(resampled_R: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the finite values; (nan, nan) if there are none."""
    finite_R = resampled_R[np.isfinite(resampled_R)]
    return tuple(map(float, np.percentile(finite_R, INTERVAL))) if len(finite_R) else (float("nan"), float("nan"))


def paired(
    value: Value,
    ours_NS: np.ndarray,
    theirs_NS: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    comparisons: int = 1,
) -> dict[str, float]:
    """
    The difference of two systems on the same samples: `difference`, its bootstrap interval `low` and `high`, and the
    two-sided `p` of the test that flips signs.

    If the systems do not differ, the two figures of a sample could be swapped. `p` is the share of random swaps of
    samples that give a difference as large; the swap that was observed counts too, so that it is never 0. There are
    enough swaps that after a correction for `comparisons` tests p can fall below .01.

    Raises:
        ValueError: the two do not have the same number of samples.
    """
    _check_same_length(ours_NS, theirs_NS)
    # The same seed draws the same samples for both.
    difference_R = resampled(value, ours_NS, seed, resamples) - resampled(value, theirs_NS, seed, resamples)
    low, high = percentiles(difference_R)
    difference = float((value(ours_NS.sum(0, keepdims=True)) - value(theirs_NS.sum(0, keepdims=True)))[0])
    return {"difference": difference, "low": low, "high": high} | {
        "p": _flip_signs(value, ours_NS, theirs_NS, difference, max(FLIPS, 200 * comparisons), seed)
    }


def _flip_signs(value: Value, ours_NS, theirs_NS, difference: float, flips: int, seed: int) -> float:
    """The share of random swaps of samples with a difference at least as large; nan if there is no difference."""
    if not np.isfinite(difference):
        return float("nan")
    random, larger, counted = np.random.default_rng(seed), 1, 1
    part = max(1, MAX_DRAWS // len(ours_NS))
    total_S, change_NS = ours_NS.sum(0) + theirs_NS.sum(0), theirs_NS - ours_NS
    for start in range(0, flips, part):
        swap_RN = random.integers(0, 2, (min(part, flips - start), len(ours_NS))).astype(float)
        ours_RS = ours_NS.sum(0) + swap_RN @ change_NS
        found_R = value(ours_RS) - value(total_S - ours_RS)
        found_R = found_R[np.isfinite(found_R)]
        larger += int((np.abs(found_R) >= abs(difference) - 1e-9).sum())
        counted += len(found_R)
    return larger / counted


def mcnemar(ours_N: Sequence[float], theirs_N: Sequence[float]) -> float:
    """
    The two-sided p of McNemar's exact test, for systems that are right (1) or wrong (0) on the same samples.

    Raises:
        ValueError: the two do not have the same number of samples.
    """
    ours_N, theirs_N = np.asarray(ours_N), np.asarray(theirs_N)
    _check_same_length(ours_N, theirs_N)
    only_ours, only_theirs = int((ours_N > theirs_N).sum()), int((ours_N < theirs_N).sum())
    discordant = only_ours + only_theirs
    return float(binomtest(only_ours, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_C: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method; nan stays nan and does not count."""
    p_C = np.asarray(p_C, dtype=float)
    corrected_C = np.full(len(p_C), np.nan)
    order = np.argsort(p_C, kind="stable")[: np.isfinite(p_C).sum()]  # nan is sorted to the end
    corrected_C[order] = np.minimum(1.0, np.maximum.accumulate(p_C[order] * np.arange(len(order), 0, -1)))
    return corrected_C.tolist()


def _draws(samples: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each sample is drawn, (R,N), in parts that fit into memory."""
    if samples == 0:
        raise ValueError("there are no samples to resample; a metric needs at least one")
    random = np.random.default_rng(seed)
    part = max(1, MAX_DRAWS // samples)
    for start in range(0, resamples, part):
        yield random.multinomial(samples, np.full(samples, 1 / samples), min(part, resamples - start)).astype(float)


def _check_same_length(ours: np.ndarray, theirs: np.ndarray):
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} samples on one side and {len(theirs)} on the other; a paired test needs the same"
        )
