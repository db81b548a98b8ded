"""Clusters at each level, as a sheet of pictures, and calibration of the controller, as a reliability diagram.

Shapes: B rows, G levels, Q distinct questions.
"""

import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from granulon.hub.inference import describe, encode, open_image, question_about
from granulon.hub.text import markdown_table, with_interval
from granulon.hub.visualize import overlay_clusters
from granulon.train.controller.corpus import TEST, check_rows
from granulon.train.controller.fit import Labelled, bootstrap_group, controller_logits, question_states
from granulon.train.controller.level_scores import BINS, mean_interval, scores

from .files import COLOURS, FAINT, INK

SIDE, GAP, LINE = 200, 14, 19  # pixels: longer side of a shown image, space between panels, height of a line of text
CHOSEN = "#0072B2"
LEGEND = (
    "Clusters are numbered by quality (Eq. 6), 1 is the best; colours repeat with stripes from 8 and with checks "
    "from 15."
)


def cluster_rows(model, processor, rows: list[dict]) -> list[dict]:
    """
    The clusters of each image at every level, and the level that the controller chooses for its question.

    Returns:
        for each row `image` (PIL), `question`, `chosen` (a level's name) and `levels`: for each level name `clusters`
        (number, score, share) and `cluster_map` (H,W).

    Raises:
        ValueError: the model has no levels, there are no rows, or an image cannot be used.
    """
    names = model.config.granularity_names
    if not names:
        raise ValueError("the model has no levels of granularity, so there are no clusters to draw")
    if not rows:
        raise ValueError("there are no rows; give at least one image with its question")
    found = []
    for row in rows:
        image = open_image(row["image"])
        chat = [question_about(image, row["question"])]
        chosen, *levels = (describe(model, encode(model, processor, chat, name))[0] for name in (None, *names))
        seen = {name: level["images"][0] for name, level in zip(names, levels, strict=True)}
        chosen = chosen["granularity"]["name"]
        found.append({"image": image, "question": row["question"], "chosen": chosen, "levels": seen})
    return found


def clusters_markdown(found: list[dict]) -> str:
    """A table with the chosen level and the number of tokens at each level."""
    rows = [
        [number, row["question"], row["chosen"], *map(_tokens, row["levels"].values())]
        for number, row in enumerate(found, 1)
    ]
    return markdown_table(["row", "question", "level chosen", *found[0]["levels"]], rows, 3)


def draw_clusters_sheet(found: list[dict], levels: list[dict]) -> Image.Image:
    """
    A line per image: the image, then its clusters at each level, the chosen level in a frame.

    Args:
        found: of `cluster_rows`.
        levels: `config.granularities`.
    """
    titles = ["image and question"]
    titles += [f"{level['name']}: best {level['keep']} of {level['clusters']} clusters" for level in levels]
    shown = [_resized(row["image"]) for row in found]
    heights = [image.height + 2 * LINE + GAP for image in shown]
    width = GAP + len(titles) * (SIDE + GAP)
    legend = textwrap.wrap(LEGEND, width // 7)
    top = GAP + LINE + 6
    page = Image.new("RGB", (width, top + sum(heights) + LINE * len(legend) + GAP // 2), "white")
    draw = ImageDraw.Draw(page)
    bold, small = ImageFont.load_default(14), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (SIDE + GAP), GAP), _shortened(draw, title, bold), INK, bold)
    for row, image, height in zip(found, shown, heights):
        page.paste(image, (GAP, top))
        for line, text in enumerate(textwrap.wrap(row["question"], SIDE // 7)[:2]):
            draw.text((GAP, top + image.height + 3 + line * LINE), text, INK, small)
        for column, (name, seen) in enumerate(row["levels"].items(), 1):
            chosen = name == row["chosen"]
            _draw_panel(page, (GAP + column * (SIDE + GAP), top), image, seen, chosen, small)
        top += height
    for line, text in enumerate(legend):
        draw.text((GAP, top + line * LINE), text, FAINT, small)
    return page


def _draw_panel(page: Image.Image, corner: tuple[int, int], image: Image.Image, seen: dict, chosen: bool, font):
    """The clusters of an image at one level, and below them the number of tokens."""
    draw, (left, top) = ImageDraw.Draw(page), corner
    page.paste(overlay_clusters(image, seen["cluster_map"]), corner)
    if chosen:
        box = (left - 3, top - 3, left + image.width + 2, top + image.height + 2)
        draw.rectangle(box, outline=CHOSEN, width=3)
        draw.text((left, top + image.height + 2 + LINE), "chosen for this question", CHOSEN, font)
    draw.text((left, top + image.height + 4), _tokens(seen), CHOSEN if chosen else INK, font)


def _resized(image: Image.Image) -> Image.Image:
    """At the size of a panel; small images are enlarged without smoothing."""
    scale = SIDE / max(image.size)
    size = [max(round(side * scale), 1) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _shortened(draw, text: str, font) -> str:
    while draw.textlength(text, font) > SIDE and len(text) > 4:
        text = text[:-2].rstrip("… ") + "…"
    return text


def _tokens(seen: dict) -> str:
    kept = len(seen["clusters"])
    return f"{kept} token{'s' if kept != 1 else ''}"


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
    """A reliability diagram for each split, and below it the number of rows in each bin."""
    splits = report["splits"]
    figure = Figure(figsize=(0.9 + 2.9 * len(splits), 4.3), layout="constrained")
    panels = figure.subplots(2, len(splits), squeeze=False, sharex=True, height_ratios=(3.2, 1))
    for (axes, below), (split, part) in zip(panels.T, splits.items()):
        _draw_reliability(axes, part["bins"], chance=1 / len(report["levels"]))
        axes.set_title(f"{split} ({part['rows']} rows)\nECE {with_interval(*part['ece'])}", fontsize=9)
        middles = [(entry["low"] + entry["high"]) / 2 for entry in part["bins"]]
        below.bar(middles, [entry["rows"] for entry in part["bins"]], width=0.9 / BINS, color=COLOURS[0])
        below.set_xlabel("confidence of the controller", fontsize=8)
        for panel in (axes, below):
            panel.tick_params(labelsize=7.5)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("accuracy", fontsize=8)
    panels[1, 0].set_ylabel("rows", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    columns = 2 if len(splits) == 1 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle("Calibration of the controller", fontsize=10)
    return figure


def _draw_reliability(axes, bins: list[dict], chance: float):
    """Accuracy against confidence; a perfectly calibrated controller lies on the diagonal."""
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfectly calibrated")
    axes.axvspan(0, chance, color="#eeeeee", linewidth=0, label="below chance: impossible")
    for entry in bins:
        value, low, high = entry["accuracy"]
        confidence_2 = [entry["confidence"]] * 2
        axes.plot(confidence_2, [entry["confidence"], value], color=COLOURS[1], linewidth=3, alpha=0.5)
        axes.plot(confidence_2, [low, high], color=COLOURS[0], linewidth=1.2)
    confidences, accuracies = zip(*((entry["confidence"], entry["accuracy"][0]) for entry in bins))
    label = "accuracy, 95% interval"
    axes.plot(confidences, accuracies, "o-", color=COLOURS[0], markersize=4.5, linewidth=1, label=label)
    axes.plot([], [], color=COLOURS[1], linewidth=3, alpha=0.5, label="gap")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
