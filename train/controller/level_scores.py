"""Scores of predicted levels: accuracy, macro-F1, Cohen's kappa and calibration, with 95% bootstrap intervals.

Questions from one template are similar, so the bootstrap draws whole groups of rows: intervals from single rows would
be too narrow. All scores are functions of sums over groups, so that all resamples are computed at once; scikit-learn's
functions give the same values (a test compares them) but would be called thousands of times.

Shapes: B rows, G levels, U groups of rows, S sums, R resamples, C bins of confidence.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

BINS = 10  # of confidence, for the calibration error
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # per cent: a 95% interval
MEASURES = ("accuracy", "macro_f1", "kappa", "ece")


def scores(probs_BG: np.ndarray, level_B: np.ndarray, groups: Sequence[str], seed: int = 0) -> dict:
    """
    Scores of predicted probabilities (B,G) against levels (B,).

    Args:
        groups: for each row the name of its group, the unit of the bootstrap.
        seed: of the resamples.

    Returns:
        dict: `accuracy`, `macro_f1`, `kappa` and `ece` (expected calibration error), each (value, low, high);
        `confusion`, counts of true level by predicted level; `groups`, their number.
    """
    levels = probs_BG.shape[1]
    predicted_B, confidence_B = probs_BG.argmax(1), probs_BG.max(1)
    bin_B = np.minimum((confidence_B * BINS).astype(int), BINS - 1)
    confusion_BGG = np.eye(levels * levels)[level_B * levels + predicted_B]
    bins_BC = np.eye(BINS)[bin_B] * (confidence_B - (predicted_B == level_B))[:, None]
    sums_US = _sums_by_group(np.concatenate([confusion_BGG, bins_BC], axis=1), groups)
    value, resampled = _measures(sums_US.sum(0, keepdims=True), levels), _measures(_resample(sums_US, seed), levels)
    return {
        **{name: (float(value[name][0]), *_percentiles(resampled[name])) for name in MEASURES},
        "confusion": sums_US[:, : levels * levels].sum(0).reshape(levels, levels).astype(int).tolist(),
        "groups": len(sums_US),
    }


def mean_interval(values_B: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float, float]:
    """The mean of values (B,) and its bootstrap interval over groups: (value, low, high)."""
    sums_RS = _resample(_sums_by_group(np.stack([values_B, np.ones(len(values_B))], axis=1), groups), seed)
    return (float(values_B.mean()), *_percentiles(sums_RS[:, 0] / sums_RS[:, 1]))


def _sums_by_group(values_BS: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    names, group_B = np.unique(np.asarray(groups), return_inverse=True)
    sums_US = np.zeros((len(names), values_BS.shape[1]))
    np.add.at(sums_US, group_B, values_BS)
    return sums_US


def _resample(sums_US: np.ndarray, seed: int) -> np.ndarray:
    """Sums (R,S) over as many groups drawn with replacement."""
    draws_RU = np.random.default_rng(seed).multinomial(
        len(sums_US), np.full(len(sums_US), 1 / len(sums_US)), RESAMPLES
    )
    return draws_RU @ sums_US


def _percentiles(values_R: np.ndarray) -> tuple[float, float]:
    return tuple(map(float, np.percentile(values_R, INTERVAL)))


def _measures(sums_RS: np.ndarray, levels: int) -> dict[str, np.ndarray]:
    """Each measure (R,) from sums: the confusion matrix, then confidence minus correctness by bin."""
    confusion_RGG = sums_RS[:, : levels * levels].reshape(-1, levels, levels)  # (R,G*G) -> (R,G,G)
    rows_R = confusion_RGG.sum((1, 2))
    true_RG, predicted_RG = confusion_RGG.sum(2), confusion_RGG.sum(1)
    correct_RG = np.diagonal(confusion_RGG, axis1=1, axis2=2)
    either_RG = true_RG + predicted_RG
    accuracy_R = correct_RG.sum(1) / rows_R
    chance_R = (true_RG * predicted_RG).sum(1) / rows_R**2
    return {
        "accuracy": accuracy_R,
        # A level that is neither true nor predicted anywhere has no F1.
        "macro_f1": (2 * correct_RG / np.maximum(either_RG, 1)).sum(1) / (either_RG > 0).sum(1),
        # 1 where both name a single level throughout.
        "kappa": np.where(chance_R < 1, (accuracy_R - chance_R) / np.where(chance_R < 1, 1 - chance_R, 1), 1.0),
        "ece": np.abs(sums_RS[:, levels * levels :]).sum(1) / rows_R,
    }


def draw_confusions(confusions: dict[str, Sequence], levels: list[str], path):
    """Write a PNG with one confusion matrix per name: the shares of each true level."""
    figure = Figure(figsize=(1.2 + 3.4 * len(confusions), 3.9), layout="constrained")
    for axes, (name, confusion) in zip(figure.subplots(1, len(confusions), squeeze=False)[0], confusions.items()):
        counts_GG = np.asarray(confusion)
        shares_GG = counts_GG / np.maximum(counts_GG.sum(1, keepdims=True), 1)
        display = ConfusionMatrixDisplay(shares_GG, display_labels=levels)
        display.plot(ax=axes, cmap="Blues", colorbar=False, values_format=".2f", im_kw={"vmin": 0, "vmax": 1})
        axes.set_title(f"{name} ({counts_GG.sum()} rows)", fontsize=10)
    figure.savefig(path, format="png", dpi=120)
