"""Clusters of each level, and calibration of the controller: a sheet of pictures, and a reliability diagram.

Shapes: B rows, G levels, Q distinct questions, C bins of confidence.
"""

import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from granulon.hub.ask import question_inputs
from granulon.hub.visualize import overlay_clusters
from granulon.train.controller.corpus import TEST, check_rows
from granulon.train.controller.fit import Labelled, bootstrap_group, controller_logits, question_states
from granulon.train.controller.level_scores import BINS, mean_interval, scores

from .files import COLOURS, FAINT, INK, opened, ranged, table

SIDE, GAP, LINE = 200, 14, 19  # pixels: of a shown image's longer side, between panels, of a line of text
CHOSEN = "#0072B2"
LEGEND = (
    "Numbers order the clusters of an image by quality (Eq. 6), 1 is the best; colours return striped from 8 and "
    "checked from 15."
)


@torch.no_grad()
def cluster_rows(model, processor, rows: list[dict]) -> list[dict]:
    """
    What the model sees of each row's image at every level, and which level its question asks for.

    Returns:
        for each row `image` (PIL), `question`, `chosen` (a level's name) and `levels`: for each level name `clusters`
        (number, score, share) and `cluster_map` (H,W).

    Raises:
        ValueError: the model has no levels, there are no rows, or an image cannot be used.
    """
    names = model.config.granularity_names
    if not names:
        raise ValueError("the model has no levels of granularity, so that there are no clusters to draw")
    if not rows:
        raise ValueError("there are no rows; give at least one image with its question")
    found = []
    for row in rows:
        image = opened(row)
        inputs = question_inputs(model, processor, image, row["question"])
        visuals = [model.encode(**inputs, granularity=name) for name in (None, *names)]
        free, *levels = (visual.describe()[0] for visual in visuals)
        seen = {name: level["images"][0] for name, level in zip(names, levels, strict=True)}
        chosen = free["granularity"]["name"]
        found.append({"image": image, "question": row["question"], "chosen": chosen, "levels": seen})
    return found


def clusters_report(found: list[dict]) -> dict:
    """What of the sheet can be written down: everything but the pixels."""
    return {
        "rows": [
            {
                "question": row["question"],
                "chosen": row["chosen"],
                "levels": {
                    name: {**seen, "cluster_map": seen["cluster_map"].tolist()} for name, seen in row["levels"].items()
                },
            }
            for row in found
        ]
    }


def clusters_markdown(found: list[dict]) -> str:
    names = list(found[0]["levels"])
    lines = [
        [number, row["question"], row["chosen"], *(_panel_caption(row["levels"][name]) for name in names)]
        for number, row in enumerate(found, 1)
    ]
    return table(["row", "question", "level chosen", *names], lines, 3)


def draw_clusters_sheet(found: list[dict], candidates: list[dict]) -> Image.Image:
    """A row per image, the image first, then its clusters at each level; the level that was chosen has a frame."""
    titles = ["image and question"] + [
        f"{entry['name']}: best {entry['keep']} of {entry['clusters']} clusters" for entry in candidates
    ]
    shown = [_resized(row["image"]) for row in found]
    column, heights = SIDE + GAP, [image.height + 2 * LINE + GAP for image in shown]
    width = GAP + len(titles) * column
    legend = textwrap.wrap(LEGEND, width // 7)
    top = GAP + LINE + 6
    page = Image.new("RGB", (width, top + sum(heights) + LINE * len(legend) + GAP // 2), "white")
    draw = ImageDraw.Draw(page)
    bold, small = ImageFont.load_default(14), ImageFont.load_default(13)
    for place, title in enumerate(titles):
        draw.text((GAP + place * column, GAP), _fitted(draw, title, bold), INK, bold)
    for row, image, height in zip(found, shown, heights):
        page.paste(image, (GAP, top))
        question = textwrap.wrap(row["question"], SIDE // 7) or [""]
        for line, text in enumerate(question[:2]):
            draw.text((GAP, top + image.height + 3 + line * LINE), text, INK, small)
        for place, (name, seen) in enumerate(row["levels"].items(), 1):
            left = GAP + place * column
            page.paste(overlay_clusters(image, seen["cluster_map"]), (left, top))
            chosen = name == row["chosen"]
            if chosen:
                box = (left - 3, top - 3, left + image.width + 2, top + image.height + 2)
                draw.rectangle(box, outline=CHOSEN, width=3)
            caption = _panel_caption(seen)
            draw.text((left, top + image.height + 4), caption, CHOSEN if chosen else INK, small)
            if chosen:
                draw.text((left, top + image.height + 2 + LINE), "chosen for this question", CHOSEN, small)
        top += height
    for line, text in enumerate(legend):
        draw.text((GAP, top + line * LINE), text, FAINT, small)
    return page


def _resized(image: Image.Image) -> Image.Image:
    """To the sheet's size; a small picture keeps its pixels' edges."""
    scale = SIDE / max(image.size)
    size = [max(round(side * scale), 1) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _fitted(draw, text: str, font) -> str:
    while draw.textlength(text, font) > SIDE and len(text) > 4:
        text = text[:-2].rstrip("… ") + "…"
    return text


def _panel_caption(seen: dict) -> str:
    kept = len(seen["clusters"])
    return f"{kept} token{'s' if kept != 1 else ''}"


def calibration(model, processor, rows: list[dict], seed: int = 0) -> dict:
    """
    How far the controller's confidence is its accuracy, on the test splits of a granularity corpus.

    Args:
        rows: of the corpus, see granulon.train.controller.corpus.
        seed: of the bootstrap.

    Returns:
        dict: `levels` and `splits`; each split has its rows, the scores of granulon.train.controller.level_scores
        (accuracy, macro-F1 and ECE with intervals, confusion), mean `confidence`, and `bins`, those of the ECE that
        hold rows: `low`, `high`, `rows`, `confidence` and `accuracy` (value, low, high).

    Raises:
        ValueError: the model has no controller, the corpus no labels or no test split of two rows.
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
            f"the corpus has {len(tested)} rows in splits that begin with {TEST!r}, of {len(rows)} in all; two are "
            "needed at least"
        )
    data = Labelled.of(tested, levels, soft=False)
    with torch.no_grad():
        probs_QG = controller_logits(controller, question_states(model, processor, data.questions)).softmax(-1)
    probs_BG, level_B = probs_QG[data.question_B].numpy(), data.level_B.numpy()
    splits = {}
    for split in sorted({row["split"] for row in tested}):
        places = data.places(split).numpy()
        groups = [bootstrap_group(tested[place], split) for place in places]
        splits[split] = {"rows": len(places), **reliability(probs_BG[places], level_B[places], groups, seed)}
    return {"levels": levels, "splits": splits}


def reliability(probs_BG: np.ndarray, level_B: np.ndarray, groups: list[str], seed: int = 0) -> dict:
    """The scores of `granulon.train.controller.level_scores`, and the bins that its ECE is made of."""
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
                "accuracy": mean_interval(right_B[inside], [groups[place] for place in inside], seed),
            }
        )
    found = scores(probs_BG, level_B, groups, seed)
    return {**found, "confidence": mean_interval(confidence_B, groups, seed), "bins": bins}


def calibration_markdown(report: dict) -> str:
    lines = [
        [
            *(split, part["rows"], part["groups"]),
            *(ranged(*part[name], digits=3) for name in ("accuracy", "confidence", "ece")),
        ]
        for split, part in report["splits"].items()
    ]
    bins = [
        [
            *(split, f"{entry['low']:.1f}–{entry['high']:.1f}", entry["rows"]),
            f"{entry['confidence']:.3f}",
            ranged(*entry["accuracy"], digits=3),
        ]
        for split, part in report["splits"].items()
        for entry in part["bins"]
    ]
    return "\n\n".join(
        [
            "95% bootstrap intervals over groups of questions (a template, or a kind where kinds are held out).",
            table(["split", "rows", "groups", "accuracy", "mean confidence", "ECE"], lines),
            table(["split", "confidence", "rows", "mean confidence", "accuracy"], bins, 2),
        ]
    )


def draw_calibration(report: dict) -> Figure:
    """A reliability diagram for each split, and below it how many rows each bin holds."""
    splits = report["splits"]
    figure = Figure(figsize=(0.9 + 2.9 * len(splits), 4.3), layout="constrained")
    panels = figure.subplots(2, len(splits), squeeze=False, sharex=True, height_ratios=(3.2, 1))
    chance = 1 / len(report["levels"])
    for place, (split, part) in enumerate(splits.items()):
        axes, below = panels[:, place]
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfectly calibrated")
        axes.axvspan(0, chance, color="#eeeeee", linewidth=0, label="below chance: impossible")
        for entry in part["bins"]:
            value, low, high = entry["accuracy"]
            confidence_2 = [entry["confidence"]] * 2
            axes.plot(confidence_2, [entry["confidence"], value], color=COLOURS[1], linewidth=3, alpha=0.5)
            axes.plot(confidence_2, [low, high], color=COLOURS[0], linewidth=1.2)
        axes.plot(
            [entry["confidence"] for entry in part["bins"]],
            [entry["accuracy"][0] for entry in part["bins"]],
            "o-",
            color=COLOURS[0],
            markersize=4.5,
            linewidth=1,
            label="accuracy, 95% interval",
        )
        axes.plot([], [], color=COLOURS[1], linewidth=3, alpha=0.5, label="gap")
        axes.set_title(f"{split} ({part['rows']} rows)\nECE {ranged(*part['ece'])}", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        middles = [(entry["low"] + entry["high"]) / 2 for entry in part["bins"]]
        below.bar(middles, [entry["rows"] for entry in part["bins"]], width=0.9 / BINS, color=COLOURS[0])
        below.set_xlabel("confidence of the controller", fontsize=8)
        for panel in (axes, below):
            panel.tick_params(labelsize=7.5)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("share read at the labelled level", fontsize=8)
    panels[1, 0].set_ylabel("rows", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if len(splits) == 1 else 4, fontsize=8, frameon=False
    )
    figure.suptitle("Calibration of the controller", fontsize=10)
    return figure
