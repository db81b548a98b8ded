"""Does it work? Trains encoder, language model and all arms on drawn scenes, and writes docs/study-results.md.

    python -m studies.run            within an hour on two cores; the protocol is docs/study.md

Every result has a file in the output folder, and those that exist are not made again.
"""

import argparse
import os
from pathlib import Path

import torch
from joblib import Parallel, delayed

from .arms import ARMS
from .report import arm_path, write_report
from .training import Scale, cached, features_of, run_arm, separations, train_start, train_text

QUICK = Scale(
    train_scenes=24, validation_scenes=12, test_scenes=6, encoder_steps=2, text_steps=2, start_steps=2,
    arm_steps=2, batch=4,
)  # fmt: skip
FIRST_SEED = 11  # 1 to 5 were those of the arms in an earlier world


def start_of(folder: Path, scale: Scale, seed: int):
    """Train the start of a seed."""
    _one_thread()
    cached(folder / f"start-{seed}.pt", lambda: train_start(folder, scale, seed))


def arm_of(folder: Path, scale: Scale, name: str, seed: int):
    """Train and evaluate an arm."""
    _one_thread()
    cached(arm_path(folder, ARMS[name], seed), lambda: run_arm(folder, scale, ARMS[name], seed))


def _one_thread():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def run(folder: Path, report: Path, scale: Scale, seeds: tuple[int, ...], workers: int):
    """The whole study."""
    for split in ("train", "validation", "test"):
        features_of(folder, scale, split)
    cached(folder / "text.pt", lambda: train_text(scale))
    pool = Parallel(n_jobs=workers)
    pool(delayed(start_of)(folder, scale, seed) for seed in seeds)
    pool(delayed(arm_of)(folder, scale, name, seed) for name in ARMS for seed in seeds)
    write_report(folder, seeds, separations(folder, scale), report)
    print(f"wrote {report}")


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for results (build/study)")
    parser.add_argument("--seeds", type=int, default=5, help="of every arm (5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each on one core (2)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; report in the output folder")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.workers < 1:
        parser.error("give at least one seed and one worker")
    output = options.output or Path("build/study-quick" if options.quick else "build/study")
    report = output / "results.md" if options.quick else Path("docs/study-results.md")
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + options.seeds))
    run(output, report, QUICK if options.quick else Scale(), seeds, options.workers)


if __name__ == "__main__":
    main()
