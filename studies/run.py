"""Does it work? Trains encoder, language model and all arms on drawn scenes, and writes studies/results.md.

    python -m studies.run            within an hour on two cores; the protocol is docs/study.md

Every result has a file in the output folder, and those that exist are not made again.
"""

import argparse
from functools import partial
from pathlib import Path

from joblib import Parallel, delayed

from .arms import ARMS
from .report import arm_path, write_report
from .training import Scale, cached, features_of, run_arm, separations, start_path, train_start, train_text

QUICK = Scale(
    train_scenes=24, validation_scenes=12, test_scenes=6, encoder_steps=2, text_steps=2, start_steps=2,
    arm_steps=2, batch=4,
)  # fmt: skip
FIRST_SEED = 11  # 1 to 5 were those of the arms in an earlier world


def run(folder: Path, report: Path, scale: Scale, seeds: tuple[int, ...], workers: int):
    """The whole study."""
    for split in ("train", "validation", "test"):
        features_of(folder, scale, split)
    cached(folder / "text.pt", lambda: train_text(scale))
    pool = Parallel(n_jobs=workers)
    pool(delayed(cached)(start_path(folder, seed), partial(train_start, folder, scale, seed)) for seed in seeds)
    pool(
        delayed(cached)(arm_path(folder, arm, seed), partial(run_arm, folder, scale, arm, seed))
        for arm in ARMS.values()
        for seed in seeds
    )
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
    report = output / "results.md" if options.quick else Path("studies/results.md")
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + options.seeds))
    run(output, report, QUICK if options.quick else Scale(), seeds, options.workers)


if __name__ == "__main__":
    main()
