"""Calibration of the controller: its confidence against its accuracy on a granularity corpus.

Shapes: B rows, G levels, Q distinct questions.
"""

import numpy as np
import torch
from matplotlib.figure import Figure

from granulon.hub.text import markdown_table, with_interval
from granulon.train.controller.corpus import TEST, check_rows
from granulon.train.controller.fit import Labelled, bootstrap_group, controller_logits, question_states
from granulon.train.controller.level_scores import BINS, mean_interval, scores

from .files import COLOURS, FAINT


def calibration(model, processor, rows: list[dict]) -> dict:
    """
    Confidence and accuracy of the controller on the test splits of a granularity corpus.

    Args:
        rows: of the corpus, see granulon.train.controller.corpus.

    Returns:
        dict: `levels` and `splits`; each split has the number of `rows` and the entries of `reliability`.

    Raises:
        ValueError: the model has no trained controller, rows without labels, or fewer than two rows in test splits.
    """
    controller, levels = model.model.granularity_controller, model.config.granularity_names
    if controller is None:
        raise ValueError(
            f"the model has no controller that learns (controller is {model.config.controller!r}, levels {levels}); "
            "take a checkpoint with controller='learned' and at least two levels"
        )
    rows = check_rows(rows, levels)
    tested = [row for row in rows if row["split"].startswith(TEST)]
    if len(tested) < 2:
        raise ValueError(
            f"the corpus has {len(tested)} rows in splits that begin with {TEST!r}, of {len(rows)} in all; at least "
            "two are needed"
        )
    data = Labelled.of(tested, levels, soft=False)
    with torch.no_grad():
        probs_QG = controller_logits(controller, question_states(model, processor, data.questions)).softmax(-1)
    probs_BG, level_B = probs_QG[data.question_B].numpy(), data.level_B.numpy()
    splits = {}
    for split in sorted({row["split"] for row in tested}):
        places = data.places(split).numpy()
        groups = [bootstrap_group(tested[place], split) for place in places]
        splits[split] = {"rows": len(places), **reliability(probs_BG[places], level_B[places], groups)}
    return {"levels": levels, "splits": splits}


def reliability(probs_BG: np.ndarray, level_B: np.ndarray, groups: list[str]) -> dict:
    """
    The scores of `granulon.train.controller.level_scores`, the mean `confidence`, and the `bins` of the ECE.

    Each bin with rows has `low`, `high`, `rows`, `confidence` and `accuracy` (value, low, high).
    """
    confidence_B, right_B = probs_BG.max(1), (probs_BG.argmax(1) == level_B).astype(float)
    bin_B = np.minimum((confidence_B * BINS).astype(int), BINS - 1)
    bins = []
    for number in sorted(set(bin_B.tolist())):
        inside = np.flatnonzero(bin_B == number)
        bins.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "rows": len(inside),
                "confidence": float(confidence_B[inside].mean()),
                "accuracy": mean_interval(right_B[inside], [groups[place] for place in inside]),
            }
        )
    return {
        **scores(probs_BG, level_B, groups), "confidence": mean_interval(confidence_B, groups), "bins": bins
    }  # fmt: skip


def calibration_markdown(report: dict) -> str:
    """Two tables: the scores of each split, and its bins."""
    splits, bins = [], []
    for split, part in report["splits"].items():
        intervals = (with_interval(*part[name], digits=3) for name in ("accuracy", "confidence", "ece"))
        splits.append([split, part["rows"], part["groups"], *intervals])
        for entry in part["bins"]:
            accuracy = with_interval(*entry["accuracy"], digits=3)
            limits = f"{entry['low']:.1f}–{entry['high']:.1f}"
            bins.append([split, limits, entry["rows"], f"{entry['confidence']:.3f}", accuracy])
    return "\n\n".join(
        [
            "95% bootstrap intervals over groups of questions (a template, or a kind where kinds are held out).",
            markdown_table(["split", "rows", "groups", "accuracy", "mean confidence", "ECE"], splits),
            markdown_table(["split", "confidence", "rows", "mean confidence", "accuracy"], bins, 2),
        ]
    )


def draw_calibration(report: dict) -> Figure:
    """A reliability diagram for each split: a perfectly calibrated controller lies on the diagonal."""
    splits = report["splits"]
    figure = Figure(figsize=(0.9 + 2.9 * len(splits), 3.6), layout="constrained")
    panels = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    for axes, (split, part) in zip(panels, splits.items()):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfectly calibrated")
        confidences = [entry["confidence"] for entry in part["bins"]]
        values, lows, highs = np.array([entry["accuracy"] for entry in part["bins"]], float).T
        axes.vlines(confidences, lows, highs, color=COLOURS[0], linewidth=1.2)
        axes.plot(
            confidences, values, "o-", color=COLOURS[0], markersize=4.5, linewidth=1, label="accuracy, 95% interval"
        )
        for entry, confidence, value in zip(part["bins"], confidences, values):
            axes.annotate(
                entry["rows"], (confidence, value), (3, 3), textcoords="offset points", fontsize=7, color=FAINT
            )
        axes.set_title(f"{split} ({part['rows']} rows)\nECE {with_interval(*part['ece'])}", fontsize=9)
        axes.set_xlabel("confidence of the controller", fontsize=8)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (numbers of rows beside)", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(splits), fontsize=8, frameon=False)
    figure.suptitle("Calibration of the controller", fontsize=10)
    return figure
