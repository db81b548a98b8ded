"""The picture of the clusters: distinct for all kinds of colour vision, with legend, at any image size."""

import numpy as np
import pytest
from PIL import Image

from granulon.hub.visualize import COLOURS, MARGIN, SIDE, draw_clusters

# Machado, Oliveira and Fernandes 2009, severity 1: what a colour looks like without one kind of cone (linear RGB).
COLOUR_BLIND = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
QUADRANTS = np.kron(np.array([[0, 1], [2, 3]]), np.ones((3, 3), dtype=int))


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_colours_differ_for_every_kind_of_colour_vision(eyes):
    linear = ((COLOURS / 255 + 0.055) / 1.055) ** 2.4
    seen = np.clip(linear @ np.array(COLOUR_BLIND[eyes]).T, 0, 1) ** (1 / 2.4)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen))
    assert distance.min() > 0.08


def drawn(image, cluster_map=QUADRANTS, clusters=4, lines=("What is it?",)):
    """The page, and of it the plain and the overlaid image."""
    entries = [
        {"number": cluster + 1, "score": 2 - cluster / 10, "share": float((cluster_map == cluster).mean())}
        for cluster in range(clusters)
    ]
    page = draw_clusters(image, cluster_map, entries, list(lines))
    height = round(image.height * SIDE / max(image.size))
    width = round(image.width * SIDE / max(image.size))
    pixels = np.asarray(page)
    top = next(row for row in range(len(pixels)) if (pixels[row, MARGIN : MARGIN + width] != 255).all())
    plain = pixels[top : top + height, MARGIN : MARGIN + width]
    overlaid = pixels[top : top + height, 2 * MARGIN + width : 2 * MARGIN + 2 * width]
    return page, plain.astype(int), overlaid.astype(int)


def test_each_cluster_has_its_colour():
    _, plain, overlaid = drawn(Image.new("RGB", (60, 60), (90, 90, 90)))
    corners = overlaid[[20, 20, -20, -20], [20, -20, 20, -20]]
    for corner, colour in zip(corners, COLOURS[:4], strict=True):
        assert np.abs(corner - (0.45 * 90 + 0.55 * colour)).max() <= 1
    assert (plain == 90).all()


@pytest.mark.parametrize("size", [(60, 30), (30, 60), (2000, 10), (1, 1)])
def test_images_keep_their_shape(size):
    page, plain, overlaid = drawn(Image.new("RGB", size, (10, 120, 60)))
    assert plain.shape == overlaid.shape and max(plain.shape[:2]) == SIDE


def test_twenty_clusters_and_a_long_text_fit_on_the_page():
    cluster_map = np.arange(400).reshape(20, 20) // 20
    image = Image.new("RGB", (64, 64), "navy")
    page, _, _ = drawn(image, cluster_map, 20, ["word " * 100, "", "answer"])
    pixels = np.asarray(page)
    assert (pixels[-5:] == 255).all() and (pixels[:, -5:] == 255).all(), "something is cut off"


def test_clusters_of_one_colour_differ_by_pattern():
    swatches = []
    for cluster in (0, 7, 14):
        _, _, overlaid = drawn(Image.new("RGB", (60, 60)), np.full((3, 3), cluster), cluster + 1)
        swatches.append(overlaid[:60, :60])
    assert all((a != b).any(-1).mean() > 0.2 for a, b in zip(swatches, [*swatches[1:], swatches[0]]))


def test_the_legend_and_the_numbers_are_there():
    image = Image.new("RGB", (60, 60), (90, 90, 90))
    few, _, labelled = drawn(image, QUADRANTS)
    assert (labelled == 0).all(-1).sum() > 100, "no black-rimmed numbers on the image"
    legend = np.asarray(few)[:, 3 * MARGIN + 2 * SIDE :]
    for colour in COLOURS[:4]:
        assert (legend == colour).all(-1).sum() > 200
    assert not (legend == COLOURS[4]).all(-1).any()
