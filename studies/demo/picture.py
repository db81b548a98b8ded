"""The demo's picture: a scene, its clusters at each granularity, and a question of each level with its answer."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from granulon.hub.visualize import overlay_clusters
from granulon.train.data.scenes import LEVELS

SIDE, GAP, LINE = 300, 16, 26
INK, RIGHT, WRONG = (20, 20, 20), (0, 95, 60), (165, 60, 0)


def draw_answers(model, processor, results: list[dict], path: Path):
    """Write the picture of the first scene of `results`, rows of question, answer, truth, level, chosen and image."""
    image = Image.open(results[0]["image"]).convert("RGB")
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    shown = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    panels = [("the scene", shown)]
    for name in model.config.granularity_names:
        (seen,) = model.explain(pixel_values, granularity=name).describe()
        title = f"{name}: {seen['tokens']['semantic']} semantic tokens"
        panels.append((title, overlay_clusters(shown, seen["images"][0]["cluster_map"])))

    page = Image.new("RGB", (GAP + len(panels) * (SIDE + GAP), 4 * GAP + SIDE + LINE * (1 + len(LEVELS))), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(17)
    for number, (title, panel) in enumerate(panels):
        left = GAP + number * (SIDE + GAP)
        draw.text((left, GAP), title, INK, font)
        page.paste(panel, (left, GAP + LINE))
    for number, level in enumerate(LEVELS):
        entry = next(row for row in results if row["level"] == level)
        verdict = "right" if entry["answer"] == entry["truth"] else f"wrong, it is {entry['truth']}"
        text = f"{level} question: {entry['question']}   {entry['answer']}   ({verdict}; read as {entry['chosen']})"
        top = 2 * GAP + SIDE + LINE * (1 + number)
        draw.text((GAP, top), text, RIGHT if verdict == "right" else WRONG, font)
    page.save(path)
