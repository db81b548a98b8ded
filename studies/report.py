"""The study's results as Markdown: tables with intervals, planned comparisons, Holm's correction within a part.

Every interval and test resamples scenes, with all questions about them, and seeds.

Shapes by suffix: A seeds, S scenes, Q questions of a scene, G levels, R resamples.
"""

from pathlib import Path

import numpy as np

from granulon.evaluation.matrix import used_versions
from granulon.evaluation.statistics import holm, interval, paired
from granulon.hub.files import write_atomically
from granulon.hub.text import markdown_table, with_interval
from granulon.train.data.cutouts import LEVEL_OF
from granulon.train.data.scenes import LEVELS
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC

from .arms import ADATA, BUDGET_ARMS, BUDGETS, LEVEL_ARMS, PART_ARMS, PIXEL_ARMS, SOURCES, Arm
from .training import LABELS

RESAMPLES = 20_000
VIEWS = (FULL, PIXEL, SEMANTIC)  # of the models with and without joint losses


class Results:
    """The results of all seeds on one split (see `training.Study.result`), seeds first."""

    def __init__(self, seeds: list[dict]):
        self.seeds, self.arms = seeds, seeds[0]["arms"]
        self.level_SQ = np.array([[LEVELS.index(LEVEL_OF[kind]) for kind in row] for row in seeds[0]["kinds"]])

    def right(self, arm: Arm) -> np.ndarray:
        """(A,S,Q) whether an arm's answers are right."""
        return self._stack("right", arm)

    def nll(self, arm: Arm) -> np.ndarray:
        """(A,S,Q) nats of the right answers."""
        return self._stack("nll", arm)

    def joint(self, joint: bool, view: str) -> np.ndarray:
        """(A,S,Q) right answers of the models trained with or without joint losses, in a view."""
        return np.stack([seed["joint"][joint][VIEWS.index(view)].numpy() for seed in self.seeds]).astype(float)

    def other_image(self) -> np.ndarray:
        return np.stack([seed["other_image"].numpy() for seed in self.seeds]).astype(float)

    def by_level(self, values_ASQ: np.ndarray) -> list[str]:
        """The mean over the questions of each level."""
        return [f"{values_ASQ[:, self.level_SQ == level].mean():.3f}" for level in range(len(LEVELS))]

    def _stack(self, name: str, arm: Arm) -> np.ndarray:
        place = self.arms.index(arm.name)
        return np.stack([seed[name][place].numpy() for seed in self.seeds]).astype(float)


def write_report(results: Results, path: Path):
    """Write everything as one Markdown file."""
    asked = results.level_SQ
    parts = [
        "# What the study measured",
        "Written by `python -m studies.run`; the protocol is in [docs/study.md](../docs/study.md). Brackets are 95 % "
        f"bootstrap intervals over scenes and seeds. {len(results.seeds)} seeds, {len(asked)} test scenes, "
        f"{asked.shape[1]} questions about each. Scale: {results.seeds[0]['scale']}.",
        "## (a) The source of the tokens, at equal numbers",
        budgets_table(results),
        "## (b) Beside the pixel tokens",
        arms_table(results, (*PIXEL_ARMS, LEVEL_ARMS[1])),
        "## (c) The level: one model under each policy",
        policies_table(results),
        "## (d) Joint losses, at equal numbers of tokens read in training",
        joint_table(results),
        "## (e) Parts of the aggregation, 10 tokens",
        arms_table(results, (LEVEL_ARMS[1], *PART_ARMS)),
        "## Planned comparisons",
        comparisons_table(comparisons(results)),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in used_versions().items() if version) + ".",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n\n".join(parts) + "\n")


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


def budgets_table(results: Results) -> str:
    """Accuracy of every source at every number of tokens."""
    rows = [
        [source, *(mean_with_interval(results.right(Arm(source, tokens))) for tokens in BUDGETS)] for source in SOURCES
    ]
    other = f"With the image of another scene, {ADATA} of {LEVEL_ARMS[1].tokens} tokens: "
    header = ["source", *(f"{tokens} tokens" for tokens in BUDGETS)]
    return f"{markdown_table(header, rows)}\n\n{other}{mean_with_interval(results.other_image())}."


def arms_table(results: Results, arms: tuple[Arm, ...]) -> str:
    """Accuracy of arms, overall and by level of the question, and the likelihood of the right answers."""
    rows = []
    for arm in arms:
        right_ASQ = results.right(arm)
        own = [arm.name, mean_with_interval(right_ASQ), *results.by_level(right_ASQ)]
        rows.append([*own, f"{results.nll(arm).mean():.3f}"])
    return markdown_table(["tokens", "accuracy", *LEVELS, "nats per answer"], rows)


def joint_table(results: Results) -> str:
    """Accuracy of the models with and without joint losses in each view."""
    rows = [
        ["with" if joint else "without", view, mean_with_interval(results.joint(joint, view))]
        for joint in (False, True)
        for view in VIEWS
    ]
    return markdown_table(["joint losses", "view", "accuracy"], rows, 2)


def policies(results: Results) -> dict[str, np.ndarray]:
    """The level (A,S,Q) that each policy chooses for each question; the oracles know the right answers."""
    nll_AGSQ, right_AGSQ = levels(results)
    shape = nll_AGSQ[:, 0].shape
    validation_AG = np.stack([seed["chosen"]["validation"].numpy() for seed in results.seeds])
    return {
        **{f"fixed, {name}": np.full(shape, level) for level, name in enumerate(LEVELS)},
        "fixed, likeliest on validation": np.broadcast_to(validation_AG.argmin(1)[:, None, None], shape),
        "random": np.random.default_rng(0).integers(len(LEVELS), size=shape),
        "level of the question's kind": np.broadcast_to(results.level_SQ, shape),
        **{
            f"controller, {source} labels": np.stack([seed["chosen"][source].numpy() for seed in results.seeds])
            for source in LABELS
        },
        "oracle, likeliest right answer": nll_AGSQ.argmin(1),
        "oracle, right at any level": right_AGSQ.argmax(1),
    }


def levels(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Nats and right answers (A,G,S,Q) at each level."""
    return tuple(np.stack([read(arm) for arm in LEVEL_ARMS], axis=1) for read in (results.nll, results.right))


def at_levels(values_AGSQ: np.ndarray, level_ASQ: np.ndarray) -> np.ndarray:
    """(A,S,Q) of the chosen levels."""
    return np.take_along_axis(values_AGSQ, level_ASQ[:, None], axis=1)[:, 0]


def policies_table(results: Results) -> str:
    """Accuracy, likelihood and tokens of one model under each policy."""
    nll_AGSQ, right_AGSQ = levels(results)
    rows = []
    for name, level_ASQ in policies(results).items():
        right_ASQ = at_levels(right_AGSQ, level_ASQ)
        shares = [f"{(level_ASQ == level).mean():.2f}" for level in range(len(LEVELS))]
        row = [name, mean_with_interval(right_ASQ), *results.by_level(right_ASQ)]
        tokens = np.array(BUDGETS)[level_ASQ].mean()
        rows.append([*row, f"{at_levels(nll_AGSQ, level_ASQ).mean():.3f}", f"{tokens:.1f}", " / ".join(shares)])
    header = ["policy", "accuracy", *LEVELS, "nats per answer", "image tokens", "coarse / medium / fine"]
    return markdown_table(header, rows)


def comparisons(results: Results) -> list[tuple]:
    """The planned comparisons: part, name, and right answers of both sides (A,S,Q) in the same order of seeds."""
    planned = [
        ("a", f"{arm.name} - {other.name}", results.right(arm), results.right(other))
        for arm in LEVEL_ARMS
        for other in BUDGET_ARMS
        if other.tokens == arm.tokens and other != arm
    ]
    pixels, semantic, grid = PIXEL_ARMS
    pairs = ((semantic, pixels), (semantic, grid), (LEVEL_ARMS[1], pixels))
    planned += [("b", f"{ours.name} - {theirs.name}", *map(results.right, (ours, theirs))) for ours, theirs in pairs]
    right_AGSQ, chosen = levels(results)[1], policies(results)
    template, measured = (f"controller, {source} labels" for source in LABELS)
    fixed = "fixed, likeliest on validation"
    for names in (
        (template, fixed),
        (measured, fixed),
        (measured, template),
        (template, "random"),
        (measured, "random"),
    ):
        sides = (at_levels(right_AGSQ, chosen[name]) for name in names)
        planned.append(("c", " - ".join(names), *sides))
    planned += [
        ("d", f"with - without, {view} view", results.joint(True, view), results.joint(False, view)) for view in VIEWS
    ]
    return planned + [
        ("e", f"{LEVEL_ARMS[1].name} - {arm.name}", results.right(LEVEL_ARMS[1]), results.right(arm))
        for arm in PART_ARMS
    ]


def comparisons_table(planned: list[tuple]) -> str:
    """Differences in points with two-sided p of random swaps of scenes, and p after Holm's correction in its part."""
    counts = {part: sum(own == part for own, *_ in planned) for part, *_ in planned}
    tests = [
        paired(mean_over_seeds, *map(statistics, sides), resamples=RESAMPLES, comparisons=counts[part])
        for part, _, *sides in planned
    ]
    corrected = []
    for part in counts:
        corrected += holm([test["p"] for test, (own, *_) in zip(tests, planned) if own == part])
    rows = []
    for (part, name, ours, theirs), test, p in zip(planned, tests, corrected, strict=True):
        seed_A = (ours - theirs).sum((1, 2))
        low, difference, high = (100 * test[key] for key in ("low", "difference", "high"))
        points = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        seeds = f"{(seed_A > 0).sum()} / {(seed_A < 0).sum()} of {len(seed_A)}"
        rows.append([part, name, points, f"{test['p']:.4f}", f"{p:.4f}", seeds, "yes" if p < 0.05 else "no"])
    header = ["part", "comparison", "points", "p", "p, Holm", "seeds above / below", "below 0.05"]
    note = "Paired tests over scenes; the p of a part are corrected together.\n\n"
    return note + markdown_table(header, rows, 2)
