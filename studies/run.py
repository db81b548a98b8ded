"""Does it work? Trains one model a seed on all kinds of image tokens, compares them, and writes studies/results.md.

    python -m studies.run            an hour and a half on two cores; the protocol is docs/study.md

Every result has a file in the output folder, and those that exist are not made again.
"""

import argparse
from pathlib import Path

import torch
from joblib import Parallel, delayed

from .report import Results, write_report
from .training import Scale, Study, load_start, write_model

QUICK = Scale(
    train=24, validation=8, test=6, projector_scenes=8, projector_steps=2, steps=2, batch=2, pixel_batch=2,
    joint_tokens=0, measured=8,
)  # fmt: skip
FIRST_SEED = 31  # 0 was that of trials on validation scenes, 11 to 25 those of the study on drawn scenes


def run_seed(study: Study, seed: int) -> dict:
    """One process on one core: training and test of a seed."""
    torch.set_num_threads(1)
    return study.result(seed)


def run(study: Study, report: Path, seeds: tuple[int, ...], workers: int):
    """The whole study."""
    for split in ("train", "validation", "test"):
        study.scenes(split)
    study.projector()
    found = Parallel(n_jobs=workers)(delayed(run_seed)(study, seed) for seed in seeds)
    write_report(Results(found), report)
    print(f"wrote {report}")


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for results (build/study)")
    parser.add_argument("--seeds", type=int, default=5, help="models to train (5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each on one core (2)")
    parser.add_argument(
        "--export", type=Path, help="write the first seed's model, trained on all arms, as a checkpoint"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; report in the output folder")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.workers < 1:
        parser.error("give at least one seed and one worker")
    output = options.output or Path("build/study-quick" if options.quick else "build/study")
    report = output / "results.md" if options.quick else Path("studies/results.md")
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + options.seeds))
    study = Study(output, QUICK if options.quick else Scale())
    run(study, report, seeds, options.workers)
    if options.export:
        write_model(*load_start(study.base, study.projector(), seeds[0], study.adapters(seeds[0])), options.export)


if __name__ == "__main__":
    main()
