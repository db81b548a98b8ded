"""A picture of an image's clusters: the image, the clusters by number, and a legend with their scores.

Shapes by suffix: H x W patch grid, h x w pixels.
"""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The palette of Okabe and Ito, for all kinds of colour vision; from the eighth cluster on they repeat striped, then
# checked. Each cluster has a number too.
COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
)
HEAT = np.array((213, 48, 0))
TINT = 0.55  # how much of the colour covers the image
SIDE = 480  # pixels of the longer side of a shown image
MARGIN, LEGEND_WIDTH, LINE = 20, 230, 22
INK, FAINT = (20, 20, 20), (110, 110, 110)


def draw_clusters(image, cluster_map, clusters, lines):
    """
    An RGB picture of the image, the same image under its clusters, and a legend, below some lines of text.

    Args:
        image (`PIL.Image.Image`): RGB.
        cluster_map (`array`): (H, W) int, number of the cluster of each patch, from 0.
        clusters (`list[dict]`): number (from 1), score (Eq. 6) and share of the patches of each, best first; where
            they have `nats`, a third picture shows how much each carried the answer.
        lines (`list[str]`): the text above, long ones are wrapped.
    """
    panels = 3 if "nats" in clusters[0] else 2
    scale = SIDE / max(image.size)
    shown = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)
    width = (panels + 2) * MARGIN + panels * shown.width + LEGEND_WIDTH
    text = [row for line in lines for row in textwrap.wrap(line, width // 9) or [""]]
    top = 2 * MARGIN + LINE * len(text)
    height = top + max(shown.height, LINE * (len(clusters) + 1)) + MARGIN

    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for index, row in enumerate(text):
        draw.text((MARGIN, MARGIN + LINE * index), row, INK, ImageFont.load_default(17))
    page.paste(shown, (MARGIN, top))
    page.paste(overlay_clusters(shown, np.asarray(cluster_map)), (2 * MARGIN + shown.width, top))
    if panels == 3:
        page.paste(overlay_evidence(shown, np.asarray(cluster_map), clusters), (3 * MARGIN + 2 * shown.width, top))
    _draw_legend(page, ((panels + 1) * MARGIN + panels * shown.width, top), clusters)
    return page


def overlay_evidence(image, cluster_map, clusters):
    """The image (RGB), grey where a cluster of its (H, W) map did not carry the answer, the redder the more it did.

    clusters (`list[dict]`): number (from 1) and nats of each.
    """
    nats_K = np.zeros(cluster_map.max() + 1)
    for entry in clusters:
        nats_K[entry["number"] - 1] = max(entry["nats"], 0)
    share_hw1 = _enlarged((nats_K / max(nats_K.max(), 1e-9))[cluster_map], image)[..., None]
    grey_hw3 = np.asarray(image.convert("L").convert("RGB"), dtype=float)
    pixels_hw3 = grey_hw3 * (1 - TINT * share_hw1) + HEAT * TINT * share_hw1
    return Image.fromarray(pixels_hw3.round().astype(np.uint8))


def _enlarged(values_HW, image):
    """Values of the patches as those of the image's pixels."""
    rows_h = np.arange(image.height) * values_HW.shape[0] // image.height
    columns_w = np.arange(image.width) * values_HW.shape[1] // image.width
    return values_HW[rows_h[:, None], columns_w]


def overlay_clusters(image, cluster_map):
    """The image (RGB) tinted by cluster of its (H, W) map, with borders and numbers."""
    grid_height, grid_width = cluster_map.shape
    map_hw = _enlarged(cluster_map, image)
    pixels_hw3 = _tinted(np.asarray(image, dtype=float), map_hw, TINT)
    pixels_hw3[_borders(map_hw)] = 255

    overlaid = Image.fromarray(pixels_hw3.round().astype(np.uint8))
    draw = ImageDraw.Draw(overlaid)
    for cluster, row, column in _label_places(cluster_map):
        centre = (column + 0.5) * image.width / grid_width, (row + 0.5) * image.height / grid_height
        font = ImageFont.load_default(18)
        draw.text(centre, str(cluster + 1), "white", font, anchor="mm", stroke_width=3, stroke_fill="black")
    return overlaid


def _tinted(pixels_hw3, map_hw, strength):
    """Pixels in the colour of their cluster: 1-7 plain, 8-14 striped, 15-21 checked, then from the start."""
    y_h1, x_w = np.arange(map_hw.shape[0])[:, None], np.arange(map_hw.shape[1])
    stripes_hw = 0.25 + 0.75 * ((x_w + y_h1) // 7 % 2)
    checks_hw = 1.0 * ((x_w // 6 + y_h1 // 6) % 2)
    kind_hw = map_hw // len(COLOURS) % 3
    cover_hw = np.select([kind_hw == 0, kind_hw == 1], [1.0, stripes_hw], checks_hw)
    cover_hw1 = strength * cover_hw[..., None]
    return pixels_hw3 * (1 - cover_hw1) + COLOURS[map_hw % len(COLOURS)] * cover_hw1


def _borders(map_hw):
    """Pixels next to one of another cluster."""
    padded = np.pad(map_hw, 1, mode="edge")
    neighbours_hw = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return np.any([neighbour_hw != map_hw for neighbour_hw in neighbours_hw], axis=0)


def _label_places(cluster_map):
    """(cluster, row, column) for a number in the largest region of a cluster and in others above 3 % of the image."""
    regions, free = {}, set(np.ndindex(cluster_map.shape))
    while free:
        region, edge = [], [free.pop()]
        while edge:
            row, column = edge.pop()
            region.append((row, column))
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in free and cluster_map[near] == cluster_map[row, column]:
                    free.remove(near)
                    edge.append(near)
        regions.setdefault(int(cluster_map[region[0]]), []).append(np.array(region))
    for cluster, found in sorted(regions.items()):
        found.sort(key=len, reverse=True)
        for region in found[:1] + [other for other in found[1:] if len(other) > 0.03 * cluster_map.size]:
            distance = ((region - region.mean(0)) ** 2).sum(-1)
            yield cluster, *region[distance.argmin()]


def _draw_legend(page, corner, clusters):
    x, y = corner
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(13)
    last = "nats" if "nats" in clusters[0] else "share"
    for text, offset in (("cluster", 0), ("score", 110), (last, 175)):
        draw.text((x + offset, y), text, FAINT, small)
    for entry in clusters:
        y += LINE
        cluster_HW = np.full((LINE - 6, 32), entry["number"] - 1)
        swatch_hw3 = _tinted(np.full((LINE - 6, 32, 3), 255.0), cluster_HW, 1)
        page.paste(Image.fromarray(swatch_hw3.round().astype(np.uint8)), (x, y + 2))
        draw.rectangle((x, y + 2, x + 31, y + LINE - 5), outline=FAINT)
        columns = (
            (f"{entry['number']}", 42),
            (f"{entry['score']:.2f}", 110),
            (format(entry[last], ".0%" if last == "share" else "+.1f"), 175),
        )
        for text, offset in columns:
            draw.text((x + offset, y), text, INK, font)
