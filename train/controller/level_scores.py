"""How well predicted levels fit the corpus's: accuracy, macro-F1 and calibration, each with a bootstrap interval.

Questions of one template are alike, so the bootstrap draws whole groups of rows and not single rows: an interval from
single rows would claim to know more than a handful of templates can tell.

Shapes: B rows, G levels, U groups of rows, R resamples, C bins of confidence.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

BINS = 10  # of confidence, for the calibration error
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # per cent: a 95% interval


def scores(probs_BG: np.ndarray, level_B: np.ndarray, groups: Sequence[str], seed: int = 0) -> dict:
    """
    Scores of predicted probabilities (B,G) against levels (B,).

    Args:
        groups: for each row the name of its group, the unit of the bootstrap.
        seed: of the resamples.

    Returns:
        dict: `accuracy`, `macro_f1` and `ece`, each (value, low, high); `confusion`, true level by predicted level;
        `groups`, how many there are.
    """
    confusion_UGG, bins_UC = _sums_by_group(probs_BG, level_B, groups)
    whole = np.ones((1, len(confusion_UGG)))
    random = np.random.default_rng(seed)
    draws_RU = random.multinomial(len(confusion_UGG), np.full(len(confusion_UGG), 1 / len(confusion_UGG)), RESAMPLES)
    value, resampled = (_measures(weights, confusion_UGG, bins_UC) for weights in (whole, draws_RU))
    return {
        **{
            name: (float(value[name][0]), *map(float, np.percentile(resampled[name], INTERVAL)))
            for name in ("accuracy", "macro_f1", "ece")
        },
        "confusion": confusion_UGG.sum(0).astype(int).tolist(),
        "groups": len(confusion_UGG),
    }


def mean_interval(values_B: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float, float]:
    """The mean of values (B,) and its bootstrap interval over groups: (value, low, high)."""
    _, group_B = np.unique(np.asarray(groups), return_inverse=True)
    count_U = np.bincount(group_B).astype(float)
    sum_U = np.bincount(group_B, weights=values_B)
    draws_RU = np.random.default_rng(seed).multinomial(
        len(count_U), np.full(len(count_U), 1 / len(count_U)), RESAMPLES
    )
    means_R = (draws_RU @ sum_U) / (draws_RU @ count_U)
    return (float(values_B.mean()), *map(float, np.percentile(means_R, INTERVAL)))


def _sums_by_group(probs_BG: np.ndarray, level_B: np.ndarray, groups: Sequence[str]):
    """What every measure is made of: confusion (U,G,G), and confidence minus correctness per bin (U,C)."""
    names, group_B = np.unique(np.asarray(groups), return_inverse=True)
    predicted_B, confidence_B = probs_BG.argmax(1), probs_BG.max(1)
    confusion_UGG = np.zeros((len(names), probs_BG.shape[1], probs_BG.shape[1]))
    np.add.at(confusion_UGG, (group_B, level_B, predicted_B), 1)
    bin_B = np.minimum((confidence_B * BINS).astype(int), BINS - 1)
    bins_UC = np.zeros((len(names), BINS))
    np.add.at(bins_UC, (group_B, bin_B), confidence_B - (predicted_B == level_B))
    return confusion_UGG, bins_UC


def _measures(weights_RU: np.ndarray, confusion_UGG: np.ndarray, bins_UC: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure (R,) of the groups taken as often as the weights say."""
    confusion_RGG = np.einsum("ru,ugh->rgh", weights_RU, confusion_UGG)
    rows_R = confusion_RGG.sum((1, 2))
    right_RG = np.diagonal(confusion_RGG, axis1=1, axis2=2)
    seen_RG = confusion_RGG.sum(1) + confusion_RGG.sum(2)
    f1_RG = 2 * right_RG / np.maximum(seen_RG, 1)
    return {
        "accuracy": right_RG.sum(1) / rows_R,
        # A level that neither is nor was predicted has no F1.
        "macro_f1": f1_RG.sum(1) / (seen_RG > 0).sum(1),
        "ece": np.abs(weights_RU @ bins_UC).sum(1) / rows_R,
    }


def draw_confusions(confusions: dict[str, Sequence], levels: list[str], path):
    """Write a picture (PNG) with one confusion matrix per name: shares of each true level, and the number of rows."""
    figure = Figure(figsize=(1.2 + 3.4 * len(confusions), 3.9), layout="constrained")
    for axes, (name, confusion) in zip(figure.subplots(1, len(confusions), squeeze=False)[0], confusions.items()):
        counts_GG = np.asarray(confusion)
        shares_GG = counts_GG / np.maximum(counts_GG.sum(1, keepdims=True), 1)
        axes.imshow(shares_GG, vmin=0, vmax=1, cmap="Blues")
        for true, predicted in np.ndindex(counts_GG.shape):
            share, count = shares_GG[true, predicted], counts_GG[true, predicted]
            colour = "white" if share > 0.5 else "black"
            axes.text(predicted, true, f"{share:.2f}\n{count}", ha="center", va="center", color=colour)
        axes.set_title(f"{name} ({counts_GG.sum()} rows)", fontsize=10)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_yticks(range(len(levels)), levels)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
    figure.savefig(path, format="png", dpi=120)
