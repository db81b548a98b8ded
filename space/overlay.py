"""HTML of an answer: the image with its clusters, a legend, bars of the levels, numbers.

Shapes by suffix: H x W patch grid. All text of users and of the model is escaped here.
"""

import base64
import io
from html import escape
from itertools import count

import numpy as np

SIDE = 720  # pixels of the longer side of a shown image
# The palette of Okabe and Ito, for all kinds of colour vision; from the eighth cluster on they repeat with another
# filling. Each cluster has a number and a name as well.
COLOURS = {
    "orange": "#e69f00",
    "sky blue": "#56b4e9",
    "green": "#009e73",
    "yellow": "#f0e442",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "purple": "#cc79a7",
}
FILLINGS = ("plain", "striped", "dotted")
NUMBERS = count()  # of the figures, since ids of svg patterns must be unique on the page
HINT = "Point at a cluster, or tab through the legend, to read its score and share."


def cluster_name(cluster):
    """The name of a cluster, counted from 0: its colour, and its filling unless that is plain."""
    colour, filling = _look(cluster)
    return colour if filling == "plain" else f"{colour}, {filling}"


def figure(image, cluster_map, clusters, title):
    """
    The image under its clusters, with a legend; pointing at either, or focus on the legend, shows details (script.js).

    Args:
        image (`PIL.Image.Image`): RGB.
        cluster_map (`array`): (H, W) int, number of the cluster of each patch, from 0.
        clusters (`list[dict]`): number (from 1), score (Eq. 6) and share of the patches of each, best first; where
            they have `nats`, the figure can also show how much each carried the answer.
        title (`str`): caption of the figure.

    Returns:
        `str`: HTML.
    """
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE))
    if max(shown.size) < SIDE // 2:  # a small picture is shown large, with its pixels
        scale = SIDE // max(shown.size)
        shown = shown.resize((shown.width * scale, shown.height * scale), 0)
    key = f"f{next(NUMBERS)}"
    description = f"{len(clusters)} clusters over the image; the legend lists them with score and share"
    legend = "".join(_legend_entry(entry, f"{key}l{entry['number'] - 1}", clusters) for entry in clusters)
    why = '<label class="why"><input type="checkbox">what carried the answer</label>' if _has_nats(clusters) else ""
    return (
        f'<figure class="clusters"><figcaption><span>{escape(title)}</span><span class="switches">{why}'
        '<label class="shown"><input type="checkbox" checked>show clusters</label></span></figcaption>'
        f'<div class="picture"><img src="{_data_uri(shown)}" alt="{description}">'
        f"{_overlay(np.asarray(cluster_map), shown.size, key, clusters)}</div>"
        f'<p class="detail" role="status" data-hint="{HINT}">{HINT}</p><ul class="legend">{legend}</ul></figure>'
    )


def level_bars(probabilities, chosen, chosen_by):
    """Bars of the controller's probabilities by level, the chosen one with a mark, as HTML."""
    if not probabilities:
        return f'<p class="hint">The level is {escape(chosen)}, set by the {escape(chosen_by)}.</p>' if chosen else ""
    mark = "chosen" if chosen_by == "controller" else "your choice"
    rows = "".join(
        f'<li class="{"chosen" if name == chosen else ""}" aria-label="{escape(name)}: {share:.1%}'
        f'{", " + mark if name == chosen else ""}"><span class="name">{escape(name)}</span>'
        f'<span class="track"><span class="bar" style="width:{share:.1%}"></span></span>'
        f'<span class="value">{share:.0%}</span>'
        f'<span class="mark">{"&#10003; " + mark if name == chosen else ""}</span></li>'
        for name, share in probabilities.items()
    )
    return f'<div class="card"><h3>What the question asks for</h3><ul class="bars">{rows}</ul></div>'


def tiles(entries):
    """Numbers with their names, (name, value, note) each, as HTML."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="tiles">{items}</dl>'


def heading(text):
    return f"<h3>{escape(text)}</h3>"


def answer_box(text, note=""):
    """An answer, or a note if it is empty, as HTML."""
    return f'<div class="answer">{escape(text) if text.strip() else escape(note)}</div>'


def status(text, done=False):
    """What is going on; screen readers read it once `done`, as HTML."""
    busy = str(not done).lower()
    return f'<div class="status" role="status" aria-live="polite" aria-busy="{busy}">{escape(text)}</div>'


def problem(text):
    """What went wrong and what to do, in the place of the status, as HTML."""
    return f'<div class="status problem" role="alert" aria-busy="false">{escape(text)}</div>'


def columns(panels):
    """Panels of HTML side by side, or below one another on a narrow page."""
    return '<div class="columns">' + "".join(f'<section class="card">{panel}</section>' for panel in panels) + "</div>"


def _look(cluster):
    return list(COLOURS)[cluster % len(COLOURS)], FILLINGS[cluster // len(COLOURS) % len(FILLINGS)]


def _has_nats(clusters):
    return bool(clusters) and "nats" in clusters[0]


def _heat(entry, clusters):
    """How much a cluster carried the answer, from 0 to 1, and its place among all, from 0."""
    most = max(max(other["nats"] for other in clusters), 1e-9)
    rank = sum(other["nats"] > entry["nats"] for other in clusters)
    return max(entry["nats"], 0) / most, rank


def _legend_entry(entry, pattern, clusters):
    number, score, share = entry["number"], entry["score"], entry["share"]
    cluster, name = number - 1, cluster_name(number - 1)
    label = f"Cluster {number}, {name}: score {score:.2f}, {share:.0%} of the image"
    order, nats = "", ""
    if _has_nats(clusters):
        label += f"; without it the answer loses {entry['nats']:.2f} nats"
        order, nats = f' style="--rank: {_heat(entry, clusters)[1]}"', f'<i class="nats">{entry["nats"]:+.2f}</i>'
    return (
        f'<li{order}><button type="button" data-cluster="{cluster}" data-label="{label}" aria-label="{label}">'
        f'<svg viewBox="0 0 26 18" aria-hidden="true">{_filling(cluster, pattern)}'
        f'<rect width="26" height="18" fill="url(#{pattern})"/></svg>'
        f"<b>{number}</b><span>{name}</span>{nats}<i>{score:.2f}</i><i>{share:.0%}</i></button></li>"
    )


def _overlay(cluster_map, size, key, clusters):
    """An svg over the image, one group for each cluster: filling, outline and number."""
    height, width = cluster_map.shape
    patch = size[0] / width, size[1] / height  # pixels of one patch
    heat = {entry["number"] - 1: _heat(entry, clusters)[0] for entry in clusters} if _has_nats(clusters) else {}
    parts = []
    for cluster in range(int(cluster_map.max()) + 1):
        member_HW = cluster_map == cluster
        if not member_HW.any():
            continue
        row, column = _middle(member_HW)
        x, y = (column + 0.5) * patch[0], (row + 0.5) * patch[1]
        parts.append(
            f'<g data-cluster="{cluster}" style="--heat: {heat.get(cluster, 0):.3f}">'
            f"{_filling(cluster, f'{key}c{cluster}')}"
            f'<path class="fill" fill="url(#{key}c{cluster})" d="{_patches(member_HW, patch)}"/>'
            f'<path class="line" d="{_outline(member_HW, patch)}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}">{cluster + 1}</text></g>'
        )
    # Font and lines are in pixels of the shown image, which is scaled with it.
    font = max(min(max(size) / 24, min(size) / 6), 9)  # of a wide picture, by its height
    view = f'viewBox="0 0 {size[0]} {size[1]}" style="font-size:{font:.0f}px"'
    return f'<svg {view} preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def _filling(cluster, name):
    """An svg pattern in the cluster's colour."""
    colour, filling = _look(cluster)
    marks = {
        "plain": "",
        "striped": '<path d="M0 0h14v14z" fill="none"/><path d="M-2 16L16-2M-9 9L9-9M5 23L23 5" stroke="#000" '
        'stroke-opacity=".55" stroke-width="3"/>',
        "dotted": '<circle cx="7" cy="7" r="3" fill="#000" fill-opacity=".55"/>',
    }[filling]
    return (
        f'<pattern id="{name}" width="14" height="14" patternUnits="userSpaceOnUse">'
        f'<rect width="14" height="14" fill="{COLOURS[colour]}"/>{marks}</pattern>'
    )


def _patches(member_HW, patch):
    """A path over all patches that are True, one rectangle for each run in a row."""
    edges = np.diff(np.pad(member_HW.astype(int), ((0, 0), (1, 1))))
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return "".join(
        f"M{start * patch[0]:.1f} {row * patch[1]:.1f}h{(end - start) * patch[0]:.1f}v{patch[1]:.1f}"
        f"h{(start - end) * patch[0]:.1f}z"
        for (row, start), (_, end) in zip(starts, ends)
    )


def _outline(member_HW, patch):
    """A path along the border between True and the rest."""
    upright = np.argwhere(np.diff(np.pad(member_HW.astype(int), ((0, 0), (1, 1)))) != 0)
    level = np.argwhere(np.diff(np.pad(member_HW.astype(int), ((1, 1), (0, 0))), axis=0) != 0)
    return "".join(
        [f"M{x * patch[0]:.1f} {y * patch[1]:.1f}v{patch[1]:.1f}" for y, x in upright]
        + [f"M{x * patch[0]:.1f} {y * patch[1]:.1f}h{patch[0]:.1f}" for y, x in level]
    )


def _middle(member_HW):
    """(row, column) of the True patch that is farthest from the border, for the number."""
    depth_HW, inner_HW = member_HW.astype(int), member_HW
    while inner_HW.any():
        framed = np.pad(inner_HW, 1)
        inner_HW = inner_HW & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
        depth_HW = depth_HW + inner_HW
    deepest = np.argwhere(depth_HW == depth_HW.max())
    return deepest[((deepest - deepest.mean(0)) ** 2).sum(-1).argmin()]


def _data_uri(image):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
