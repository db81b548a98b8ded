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
from settings import command_line, parse, parser
from training import make_processor

from granulon.evaluation.timing import machine, with_quartiles
from granulon.hub.text import markdown_table
from granulon.train.data import load_rows

CONVERSATIONS, PROCESSES = 665_298, 16  # of LLaVA-1.5's mix, and of the recipes
GOAL, RESTART = 15, 1  # minutes
SIDES = (640, 480)  # pixels, as most images of the mix have (COCO)
TURNS, WORDS = 5, 12  # answers of a conversation, words of a question and of an answer


def write_source(folder: Path, count: int, seed: int) -> Path:
    """A LLaVA file of so many conversations with as many images; COCO's have some 100 to 200 kB too."""
    random, noise, rows = Random(seed), np.random.default_rng(seed), []
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
    made = parser(__doc__, rounds=3)
    made.add_argument("--count", type=int, default=1000, help="conversations to write and check in a round (1000)")
    options = parse(made)
    if options.quick:
        options.count, options.rounds = 40, 1
    datasets.disable_progress_bars()
    processor, seconds = make_processor(224, 20), []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
            source = write_source(Path(folder), options.count, number)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.jpg")) / options.count
            seconds.append([seconds_of(source, processor) for _ in ("first", "again")])
    print(
        f"# Loading\n\n`{command_line()}`: {machine()}; one process, medians and quartiles of {options.rounds} "
        f"rounds of {options.count:,} conversations of {TURNS} answers, JPEG files of {SIDES[0]} x {SIDES[1]} pixels "
        f"and {size / 1e3:.0f} kB.\n\nExtrapolated to {CONVERSATIONS:,} conversations and {PROCESSES} processes: "
        "evenly shared, disks and memory as fast as here for each. A restart finds the checks in the cache of "
        "`datasets`; its fixed part is extrapolated too.\n"
    )
    first_R, again_R = np.array(seconds).T / options.count  # of a conversation
    rows = [
        [
            name,
            with_quartiles(seconds_R),
            with_quartiles(seconds_R * CONVERSATIONS / 60 / processes, "{:.1f}".format),
            goal,
        ]
        for name, seconds_R, processes, goal in (
            (f"first time, {PROCESSES} processes", first_R, PROCESSES, GOAL),
            ("restart", again_R, 1, RESTART),
        )
    ]
    print(markdown_table(["", "ms a conversation", "minutes, extrapolated", "goal"], rows))


if __name__ == "__main__":
    main()
