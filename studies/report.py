"""The study's results as Markdown: tables with intervals, planned comparisons, Holm's correction over all of them.

Every interval and test resamples scenes, with all questions about them, and seeds.

Shapes by suffix: A seeds, V views, S scenes, Q questions of a scene, G levels, R resamples.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from granulon.evaluation.matrix import used_versions
from granulon.evaluation.statistics import holm, interval, paired
from granulon.hub.files import write_atomically
from granulon.hub.text import markdown_table, with_interval

from . import world
from .arms import ARMS, BASE, BUDGET_ARMS, BUDGETS, JOINT_ARM, LEVEL_ARMS, PART_ARMS, VIEW_ARMS, Arm, K
from .tokens import COLOUR, GRID, RANDOM
from .training import LABELS

RESAMPLES = 20_000  # so that p can fall below what Holm's correction of some 30 comparisons requires
BESIDE_PIXELS = VIEW_ARMS[1]
LEVEL_OF_KIND = np.array(list(world.KIND_LEVEL.values()))


@dataclass
class Result:
    """The results of all seeds of an arm, see `training.run_arm`."""

    arm: Arm
    seeds: list[dict]

    def stack(self, name: str, view: str | None = None) -> np.ndarray:
        """An entry of a view at all levels, (A,G,S,Q)."""
        place = self.arm.views.index(view or self.arm.view)
        return np.stack([seed[name][place].numpy() for seed in self.seeds]).astype(float)

    def right(self, view: str | None = None) -> np.ndarray:
        """(A,S,Q) right answers, at the middle level of several."""
        right_AGSQ = self.stack("right", view)
        return right_AGSQ[:, right_AGSQ.shape[1] // 2]


def write_report(folder: Path, seeds: tuple[int, ...], separations: dict[str, float], path: Path):
    """Write all results under a folder as one Markdown file."""
    results = {
        name: Result(arm, [torch.load(arm_path(folder, arm, seed)) for seed in seeds]) for name, arm in ARMS.items()
    }
    scenes = results["pixels"].right().shape[1]
    parts = [
        "# What the study measured",
        "Written by `python -m studies.run`; protocol and conclusions are in [docs/study.md](../docs/study.md). "
        f"Brackets are 95 % bootstrap intervals over scenes and seeds. {len(seeds)} seeds, {scenes} test scenes, "
        f"{len(world.KINDS)} questions about each.",
        "## Do groups of patches follow things?",
        f"Adjusted mutual information of {K} groups of a validation scene's patches with what each patch shows: 0 is "
        "chance, 1 would be the things themselves.",
        markdown_table(["groups", *separations], [["information", *(f"{x:.3f}" for x in separations.values())]]),
        "## (a) Token budget: K tokens and nothing else",
        arms_table(results, BUDGET_ARMS),
        "## (b) Beside the pixel tokens",
        arms_table(results, VIEW_ARMS),
        "## (c) Levels: one model trained with random levels, asked under each policy",
        *(part for arm in LEVEL_ARMS for part in (f"**{arm.name}**", policies_table(results[arm.name]))),
        "## (d) Joint losses",
        arms_table(results, (BESIDE_PIXELS, JOINT_ARM), every_view=True),
        "## (g) Parts of the aggregation",
        arms_table(results, (BASE, *PART_ARMS)),
        "## Planned comparisons",
        comparisons_table(comparisons(results)),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in used_versions().items() if version) + ".",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n\n".join(parts) + "\n")


def arm_path(folder: Path, arm: Arm, seed: int) -> Path:
    """The file of an arm's results for a seed."""
    return folder / "arms" / f"{arm.name.replace(' ', '_').replace(',', '')}-{seed}.pt"


def statistics(values_ASQ: np.ndarray) -> np.ndarray:
    """For each scene the sums of every seed over the questions, and their number: (S,A+1)."""
    count_S1 = np.full((values_ASQ.shape[1], 1), values_ASQ.shape[2])
    return np.concatenate([values_ASQ.sum(-1).T, count_S1], axis=1).astype(float)


def mean_over_seeds(sums_RS: np.ndarray) -> np.ndarray:
    """The mean over questions and seeds (R,); in each resample of scenes (R,A+1) seeds are resampled too."""
    resamples, seeds = len(sums_RS), sums_RS.shape[1] - 1
    shares_RA = np.full((resamples, seeds), 1 / seeds)
    if resamples > 1:  # a single row is the estimate itself
        shares_RA = np.random.default_rng(1).multinomial(seeds, shares_RA[0], resamples) / seeds
    return (sums_RS[:, :-1] * shares_RA).sum(1) / sums_RS[:, -1]


def mean_with_interval(values_ASQ: np.ndarray) -> str:
    """The mean of values, with its interval over scenes and seeds."""
    rows = statistics(values_ASQ)
    value = mean_over_seeds(rows.sum(0, keepdims=True))[0]
    return with_interval(value, *interval(mean_over_seeds, rows), digits=3)


def by_level(values_ASQ: np.ndarray) -> list[str]:
    """The mean over the questions of each level."""
    return [f"{values_ASQ[..., LEVEL_OF_KIND == level].mean():.3f}" for level in world.LEVELS]


def arms_table(results: dict[str, Result], arms: tuple[Arm, ...], every_view: bool = False) -> str:
    """Accuracy of arms, overall and by level, in their own or in every view."""
    header = ["arm", "view", "accuracy", *world.LEVELS, "other image", "image tokens", "training, s"]
    rows = []
    for result in (results[arm.name] for arm in arms):
        other = np.mean([seed["other_image"].float().mean() for seed in result.seeds])
        tokens, seconds = (np.mean([seed[name] for seed in result.seeds]) for name in ("image_tokens", "seconds"))
        for view in result.arm.views if every_view else (result.arm.view,):
            right_ASQ = result.right(view)
            row = [result.arm.name, view, mean_with_interval(right_ASQ), *by_level(right_ASQ)]
            rows.append([*row, f"{other:.3f}", f"{tokens:.1f}", f"{seconds:.0f}"])
    return markdown_table(header, rows, 2)


def policies(result: Result) -> dict[str, np.ndarray]:
    """The level (A,S,Q) that each policy chooses for each question; the oracle knows the right answers."""
    nll_AGSQ = result.stack("nll")
    levels, shape = nll_AGSQ.shape[1], nll_AGSQ[:, 0].shape
    validation_AGQ = np.stack([seed["chosen"]["nll"].numpy() for seed in result.seeds])
    names = world.LEVELS[:levels]
    return {
        **{f"fixed, {name}": np.full(shape, level) for level, name in enumerate(names)},
        "fixed, best on validation": np.broadcast_to(validation_AGQ.mean(2).argmin(1)[:, None, None], shape),
        RANDOM: np.random.default_rng(0).integers(levels, size=shape),
        "best of the kind on validation": np.broadcast_to(validation_AGQ.argmin(1)[:, None], shape),
        **{
            f"controller, {source} labels": np.stack([seed["chosen"][source].numpy() for seed in result.seeds])
            for source in LABELS
        },
        "oracle, likeliest right answer": nll_AGSQ.argmin(1),
    }


def at_levels(values_AGSQ: np.ndarray, level_ASQ: np.ndarray) -> np.ndarray:
    """(A,S,Q) of the chosen levels."""
    return np.take_along_axis(values_AGSQ, level_ASQ[:, None], axis=1)[:, 0]


def policies_table(result: Result) -> str:
    """Accuracy, likelihood and tokens of one model under each policy."""
    right_AGSQ, nll_AGSQ = result.stack("right"), result.stack("nll")
    tokens_AG = np.array([seed["image_tokens"] for seed in result.seeds])
    rows = []
    for name, level_ASQ in policies(result).items():
        right_ASQ = at_levels(right_AGSQ, level_ASQ)
        shares = [f"{(level_ASQ == level).mean():.2f}" for level in range(right_AGSQ.shape[1])]
        tokens = np.mean([tokens_G[level_SQ].mean() for tokens_G, level_SQ in zip(tokens_AG, level_ASQ)])
        row = [name, mean_with_interval(right_ASQ), *by_level(right_ASQ)]
        rows.append([*row, f"{at_levels(nll_AGSQ, level_ASQ).mean():.3f}", f"{tokens:.1f}", " / ".join(shares)])
    header = ["policy", "accuracy", *world.LEVELS, "nats per answer", "image tokens", "coarse / medium / fine"]
    return markdown_table(header, rows)


def comparisons(results: dict[str, Result]) -> list[tuple]:
    """The planned comparisons: part, name, and right answers of both sides (A,S,Q) in the same order of seeds."""

    def pair(part: str, ours: str, theirs: str, view: str | None = None) -> tuple:
        name = f"{ours} - {theirs}" + (f", {view} view" if view else "")
        return part, name, results[ours].right(view), results[theirs].right(view)

    beside = BESIDE_PIXELS.name
    others = [(k, source) for k in BUDGETS for source in (GRID, RANDOM, COLOUR)]
    planned = [pair("a", f"{BASE.source} {k}", f"{source} {k}") for k, source in others]
    planned += [pair("b", beside, arm.name) for arm in VIEW_ARMS if arm.name != beside]
    template, measured = (f"controller, {source} labels" for source in LABELS)
    fixed = "fixed, best on validation"
    for arm in LEVEL_ARMS:
        right_AGSQ, chosen = results[arm.name].stack("right"), policies(results[arm.name])
        pairs = ((template, fixed), (measured, fixed), (measured, template), (template, RANDOM), (measured, RANDOM))
        for names in pairs:
            sides = (at_levels(right_AGSQ, chosen[name]) for name in names)
            planned.append(("c", f"{arm.name}: {' - '.join(names)}", *sides))
    planned += [pair("d", JOINT_ARM.name, beside, view) for view in JOINT_ARM.views]
    return planned + [pair("g", arm.name, BASE.name) for arm in PART_ARMS]


def comparisons_table(planned: list[tuple]) -> str:
    """Differences in points with two-sided p from a paired bootstrap, and p after Holm's correction."""
    tests = [paired(mean_over_seeds, *map(statistics, sides), resamples=RESAMPLES) for _, _, *sides in planned]
    rows = []
    for (part, name, ours, theirs), test, p in zip(planned, tests, holm([test["p"] for test in tests]), strict=True):
        seed_A = (ours - theirs).sum((1, 2))
        low, difference, high = (100 * test[key] for key in ("low", "difference", "high"))
        points = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        seeds = f"{(seed_A > 0).sum()} / {(seed_A < 0).sum()} of {len(seed_A)}"
        rows.append([part, name, points, f"{test['p']:.4f}", f"{p:.4f}", seeds, "yes" if p < 0.05 else "no"])
    header = ["part", "comparison", "points", "p", "p, Holm", "seeds above / below", "below 0.05"]
    note = f"{len(planned)} comparisons, corrected together; paired bootstrap with {RESAMPLES} resamples.\n\n"
    return note + markdown_table(header, rows, 2)
