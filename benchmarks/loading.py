"""How long a run's data takes to be checked: conversations with an image each, as JPEG files.

    python benchmarks/loading.py > benchmarks/results/loading.md

Every image is decoded once, since a file that is cut short must not stop a training in its tenth hour. One process is
measured; `dataset_num_proc` processes share the rows evenly, so that the time of the whole mix is extrapolated.
"""

import json
import tempfile
from pathlib import Path
from random import Random
from time import perf_counter

import datasets
import numpy as np
from PIL import Image, ImageFilter
from settings import parse, parser
from training import make_processor

from granulon.evaluation.timing import machine
from granulon.hub.text import markdown_table
from granulon.train.data import load_rows

CONVERSATIONS, PROCESSES = 665_298, 16  # of LLaVA-1.5's mix, and of the recipes
GOAL, RESTART = 15, 1  # minutes
SIDES = (640, 480)  # pixels, as most images of the mix have (COCO)
TURNS, WORDS = 5, 12  # answers of a conversation, words of a question and of an answer


def write_source(folder: Path, count: int) -> Path:
    """A LLaVA file of so many conversations with as many images; COCO's have some 100 to 200 kB too."""
    random, noise, rows = Random(0), np.random.default_rng(0), []
    text = lambda: " ".join(random.choices(("what", "is", "left", "of", "the", "small", "table"), k=WORDS))  # noqa: E731
    for number in range(count):
        pixels = noise.integers(0, 255, (SIDES[1], SIDES[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1)).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": who, "value": text()} for _ in range(TURNS) for who in ("human", "gpt")]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"conversations": turns, "image": f"{number}.jpg"})
    (folder / "mix.json").write_text(json.dumps(rows))
    return folder / "mix.json"


def seconds_of(source: Path, processor) -> float:
    """Of loading and checking a source."""
    start = perf_counter()
    load_rows([str(source)], processor, seed=0, quarantine=source.parent / "bad.jsonl", answers_per_row=None)
    return perf_counter() - start


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--count", type=int, default=2000, help="conversations to write and check (2000)")
    options = parse(made)
    options.count = 40 if options.quick else options.count
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        source, processor = write_source(Path(folder), options.count), make_processor(224, 20)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.jpg")) / options.count
        first, again = seconds_of(source, processor), seconds_of(source, processor)
    print(
        f"# Loading\n\n`python benchmarks/loading.py --count {options.count}`: {machine()}; one process, "
        f"{options.count:,} conversations of {TURNS} answers, JPEG files of {SIDES[0]} x {SIDES[1]} pixels and "
        f"{size / 1e3:.0f} kB.\n\nExtrapolated to {CONVERSATIONS:,} conversations and {PROCESSES} processes: evenly "
        "shared, disks and memory as fast as here for each. A restart finds the checks in the cache of `datasets`; "
        "its fixed part is extrapolated too.\n"
    )
    mix = CONVERSATIONS / options.count / 60
    rows = [
        [
            f"first time, {PROCESSES} processes",
            f"{1000 * first / options.count:.1f}",
            f"{first * mix / PROCESSES:.1f}",
            GOAL,
        ],
        ["restart", f"{1000 * again / options.count:.1f}", f"{again * mix:.1f}", RESTART],
    ]
    print(markdown_table(["", "ms a conversation", "minutes, extrapolated", "goal"], rows))


if __name__ == "__main__":
    main()
