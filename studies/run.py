"""`make study`: does it work? Granulon's parts against their plain counterparts, on drawn scenes.

The protocol is docs/study.md, the results are written to docs/study-results.md. Every job leaves one file under the
output folder; what is there is not made again, so that an interrupted study goes on where it was.

    python -m studies.run            the short form: two processes, within an hour on two cores
    python -m studies.run --full     everything longer, for a GPU
    python -m studies.run --choose   compare recipes on validation data; opens no test scene
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

from .arms import ARMS, BASE, PIXELS, Recipe
from .encoders import CONTRASTIVE, ENCODERS, MASKED
from .jobs import (
    Scale,
    arm_job,
    arm_path,
    encoder_job,
    features_job,
    gate_job,
    numbers,
    open_test_split,
    start_job,
    text_job,
)
from .report import write_report

SHORT = Scale(
    train_scenes=4000, validation_scenes=400, test_scenes=400, probe_scenes=2000, watch_scenes=60,
    encoder_steps=600, text_steps=1200, align_steps=600, shared_steps=600, recipe=Recipe(steps=160, watch_every=40),
)  # fmt: skip
FULL = Scale(
    train_scenes=20_000, validation_scenes=1000, test_scenes=2000, probe_scenes=4000, watch_scenes=200,
    encoder_steps=10_000, text_steps=6000, align_steps=2000, shared_steps=4000,
    recipe=Recipe(steps=2000, watch_every=200), encoder_batch=128,
)  # fmt: skip
QUICK = Scale(
    train_scenes=24, validation_scenes=12, test_scenes=6, probe_scenes=24, watch_scenes=4, encoder_steps=2,
    text_steps=2, align_steps=2, shared_steps=2, recipe=Recipe(steps=2, batch=4, watch_every=2), encoder_batch=4,
    text_batch=4, gate_margin=-10.0,
)  # fmt: skip
CHOOSING_SEED, FIRST_SEED = 1000, 11  # 1 to 5 were those of the arms in an earlier world
NEEDED = "start", "test"  # of its encoder, for an arm
CANDIDATES = {"lr 5e-4": {"lr": 5e-4}, "lr 1e-3": {"lr": 1e-3}, "lr 2e-3": {"lr": 2e-3}}


@dataclass
class StudyArguments:
    output: str = field(
        default="", metadata={"help": "folder for all that is made; by default build/study, with -full or -quick"}
    )
    report: str = field(
        default="",
        metadata={
            "help": "file for the results; by default docs/study-results.md for the short form, "
            "results.md in the folder for the others"
        },
    )
    seeds: int = field(default=5, metadata={"help": "of every arm"})
    workers: int = field(default=2, metadata={"help": "processes; each takes one core"})
    full: bool = field(default=False, metadata={"help": "everything longer, for a GPU"})
    quick: bool = field(default=False, metadata={"help": "a few steps of everything: checks the way, learns nothing"})
    choose: bool = field(default=False, metadata={"help": "compare recipes on validation data, and stop"})


@dataclass(frozen=True)
class Job:
    """A call of one of jobs.py, once the jobs that it needs are done."""

    name: str
    call: Callable
    arguments: tuple
    needs: tuple[str, ...] = ()


def preparation(folder: Path, scale: Scale, seeds: tuple[int, ...]) -> list[Job]:
    """Up to the gate and the starts of the arms: nothing here draws a test scene."""
    encoders = {name: Job(f"encoder {name}", encoder_job, (folder, scale, name)) for name in ENCODERS}
    jobs = [encoders.pop(MASKED), Job("text", text_job, (folder, scale)), *encoders.values()]
    for name in ENCODERS:
        jobs.append(Job(f"features {name}", features_job, (folder, scale, name), (f"encoder {name}",)))
    jobs.append(Job("gate", gate_job, (folder, scale), (f"features {MASKED}",)))
    for name in ENCODERS:
        needs = ("text", "gate", f"features {name}")
        jobs.append(Job(f"start {name}", start_job, (folder, scale, name, seeds), needs))
    return jobs


def comparison(folder: Path, scale: Scale, seeds: tuple[int, ...]) -> list[Job]:
    """The final stage: the test split is opened, every arm is trained and asked. The longest arms come first."""
    tests = [
        Job(f"test {name}", open_test_split, (folder, scale, name), ("gate", f"features {name}")) for name in ENCODERS
    ]
    arms = sorted(ARMS.values(), key=lambda arm: -len(arm.views) - (arm.view != "semantic") - arm.joint)
    return tests + [
        Job(f"arm {arm.name}", arm_job, (folder, scale, arm.name, seeds), tuple(f"{x} {arm.encoder}" for x in NEEDED))
        for arm in arms
    ]


def choosing(folder: Path, scale: Scale) -> list[Job]:
    """A pixel arm and a semantic arm with each candidate recipe, asked about validation scenes."""
    return [
        Job(
            f"choose {candidate} {arm.name}",
            arm_job,
            (folder, replace(scale, recipe=replace(scale.recipe, **changes)), arm.name, (CHOOSING_SEED,), "validation",
             folder / "choose" / candidate.replace(" ", "-")),
            (f"start {arm.encoder}",),
        )
        for candidate, changes in CANDIDATES.items()
        for arm in (PIXELS, BASE)
    ]  # fmt: skip


def run_jobs(jobs: list[Job], workers: int):
    """Each job as soon as what it needs is done, in the given order where there is a choice.

    Raises:
        whatever a job raises, once those that run beside it have ended.
    """
    if workers < 2:
        one_thread()
        for job in jobs:
            job.call(*job.arguments)
        return
    waiting, running, done = list(jobs), {}, set()
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        while waiting or running:
            ready = [job for job in waiting if done.issuperset(job.needs)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(job.call, *job.arguments)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future).name)
                if future.exception():
                    waiting.clear()
                    raise future.exception()


def one_thread():
    """A process takes one core; on a GPU threads do not matter."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def chosen_table(folder: Path) -> str:
    lines = ["candidate       pixels  semantic   pixels, other image   semantic, other       s"]
    for candidate in CANDIDATES:
        output = folder / "choose" / candidate.replace(" ", "-")
        results = [json.loads(arm_path(output, arm.name, CHOOSING_SEED).read_text()) for arm in (PIXELS, BASE)]
        accuracies = [numbers(r["answers"][a.view][0]["right"]).mean() for r, a in zip(results, (PIXELS, BASE))]
        shuffled = [numbers(r["shuffled"]).mean() for r in results]
        seconds = sum(r["seconds"] for r in results)
        lines.append(
            f"{candidate:12}{accuracies[0]:10.3f}{accuracies[1]:10.3f}{shuffled[0]:22.3f}{shuffled[1]:18.3f}"
            f"{seconds:8.0f}"
        )
        for arm, result in zip((PIXELS, BASE), results):
            by_kind = np.mean(numbers(result["answers"][arm.view][0]["right"]), axis=0)
            lines.append(f"  {arm.name}: " + ", ".join(f"{k} {a:.2f}" for k, a in zip(result["kinds"], by_kind)))
            lines.append(f"  history: {[(step, round(a, 3)) for step, a in result['history']]}")
    return "\n".join(lines)


def main():
    (arguments,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()
    if arguments.seeds < 1 or arguments.workers < 1 or (arguments.full and arguments.quick):
        sys.exit("study: give at least one seed and one worker, and not both --full and --quick")
    scale, form = (FULL, "-full") if arguments.full else (QUICK, "-quick") if arguments.quick else (SHORT, "")
    folder = Path(arguments.output or f"build/study{form}")
    report = Path(arguments.report or (folder / "results.md" if form else "docs/study-results.md"))
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.choose:
        jobs = preparation(folder, scale, (CHOOSING_SEED,)) + choosing(folder, scale)
        run_jobs([job for job in jobs if CONTRASTIVE not in job.name], arguments.workers)
        print(chosen_table(folder))
        return
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + arguments.seeds))
    run_jobs(preparation(folder, scale, seeds) + comparison(folder, scale, seeds), arguments.workers)
    write_report(folder, seeds, report)
    print(f"wrote {report}")


if __name__ == "__main__":
    main()
