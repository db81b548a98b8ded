"""The study's results as Markdown: tables with intervals, planned comparisons, Holm's correction over all of them.

Every interval and test resamples scenes, with all questions about them, and seeds: what is claimed is about other
scenes and other trainings alike.

Shapes by suffix: A seeds, S scenes, Q questions of a scene, G levels, R resamples.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from granulon.evaluation.matrix import used_versions
from granulon.evaluation.statistics import holm, interval, paired
from granulon.hub.files import write_atomically

from . import world
from .arms import (
    ARMS,
    BASE,
    BUDGET_ARMS,
    BUDGETS,
    ENCODER_ARMS,
    JOINT_ARMS,
    LEVEL_ARMS,
    PART_ARMS,
    PIXELS,
    VIEW_ARMS,
    Arm,
    K,
)
from .encoders import CONTRASTIVE, ENCODERS, MASKED, PROBED_BY
from .jobs import arm_path, numbers
from .levels import LABELS, template_level

RESAMPLES = 20_000  # so that p may fall below what Holm's correction for some 40 comparisons asks


@dataclass
class Result:
    """What all seeds of an arm said: kinds of the Q questions, and right answers by view and level, (A,G,S,Q)."""

    arm: Arm
    kinds: list[str]
    files: list[dict]

    @classmethod
    def read(cls, folder: Path, name: str, seeds: tuple[int, ...]) -> "Result":
        files = [json.loads(arm_path(folder, name, seed).read_text()) for seed in seeds]
        return cls(ARMS[name], files[0]["kinds"], files)

    def told(self, what: str, view: str | None = None) -> np.ndarray:
        """`right`, `yes` or, where there are levels, `nll`, by level: (A,G,S,Q)."""
        levels = [file["answers"][view or self.arm.view] for file in self.files]
        read = np.array if what == "nll" else numbers
        return np.stack([np.stack([read(level[what]) for level in row]) for row in levels])

    def right(self, view: str | None = None) -> np.ndarray:
        """(A,S,Q) of an arm with one level; with several, of the middle one."""
        right_AGSQ = self.told("right", view)
        return right_AGSQ[:, right_AGSQ.shape[1] // 2]

    def each(self, name: str) -> np.ndarray:
        """(A,S,Q) of what is there once for each seed."""
        return np.stack([numbers(file[name]) for file in self.files])

    def of(self, kinds) -> np.ndarray:
        return np.array([kind in kinds for kind in self.kinds])


def statistics(values_ASQ: np.ndarray, counted_SQ: np.ndarray | None = None) -> np.ndarray:
    """For each scene the sums of every seed, and the number of questions: (S,A+1)."""
    counted_SQ = np.ones(values_ASQ.shape[1:]) if counted_SQ is None else counted_SQ
    sums_SA = (values_ASQ * counted_SQ).sum(-1).T
    return np.concatenate([sums_SA, counted_SQ.sum(-1, keepdims=True)], axis=1).astype(float)


def mean_over_seeds(sums_RS: np.ndarray) -> np.ndarray:
    """The mean over questions and seeds; in each resample of scenes, seeds are drawn anew. (R,A+1) -> (R,)."""
    resamples, seeds = len(sums_RS), sums_RS.shape[1] - 1
    shares_RA = np.full((resamples, seeds), 1 / seeds)
    if resamples > 1:  # a single row is the estimate itself
        shares_RA = np.random.default_rng(1).multinomial(seeds, shares_RA[0], resamples) / seeds
    count_R = sums_RS[:, -1]
    total_R = (sums_RS[:, :-1] * shares_RA).sum(1)
    return np.divide(total_R, count_R, out=np.full(resamples, np.nan), where=count_R > 0)


def with_interval(values_ASQ: np.ndarray, counted_SQ: np.ndarray | None = None) -> str:
    if not values_ASQ.size:
        return "-"
    rows = statistics(values_ASQ, counted_SQ)
    low, high = interval(mean_over_seeds, rows)
    return f"{mean_over_seeds(rows.sum(0, keepdims=True))[0]:.3f} [{low:.3f}, {high:.3f}]"


@dataclass
class Comparison:
    """Two sides on the same questions: `ours` and `theirs` (A,S,Q), both in the same order of seeds."""

    part: str
    name: str
    ours: np.ndarray
    theirs: np.ndarray
    counted: np.ndarray | None = None


def write_report(folder: Path, seeds: tuple[int, ...], path: Path):
    """Everything under the folder as one Markdown file."""
    results = {name: Result.read(folder, name, seeds) for name in ARMS}
    gate = json.loads((folder / "gate.json").read_text())
    parts = [
        "# What the study measured",
        "",
        "Written by `python -m studies.run`; the protocol, and what follows from these figures, is in "
        "[study.md](study.md). In brackets stand 95 % bootstrap intervals over scenes and seeds. "
        f"{len(seeds)} seeds, {gate['scale']['test_scenes']} test scenes, {len(gate['kinds'])} questions about each; "
        f"{gate['scale']['recipe']['steps']} steps of {gate['scale']['recipe']['batch']} scenes for every arm.",
        *encoders_section(folder, gate["kinds"]),
        *separation_section(folder),
        *budget_section(results),
        *arms_section("(b) Beside the pixel tokens", results, VIEW_ARMS),
        *levels_section(results),
        *joint_section(results),
        *arms_section("(e) Encoders", results, (PIXELS, BASE, ARMS[f"grid {K}"], *ENCODER_ARMS)),
        *hallucination_section(results),
        *arms_section("(g) Parts of the aggregation", results, (BASE, *PART_ARMS)),
        *kinds_section(results),
        *comparisons_section(comparisons(results)),
        *time_section(folder),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(parts) + "\n")


def encoders_section(folder: Path, kept: list[str]) -> list[str]:
    probes = {name: json.loads((folder / f"probes-{name}.json").read_text())["kinds"] for name in ENCODERS}
    rows = []
    for kind in world.ANSWERS:
        if kind in PROBED_BY:
            rows.append([kind, "", "", "", "", "yes" if kind in kept else "no", ", ".join(PROBED_BY[kind])])
            continue
        both = [probes[name][kind] for name in (MASKED, CONTRASTIVE)]
        figures = [both[0]["chance"], both[0]["colour"], both[0]["features"], both[1]["features"]]
        rows.append([kind, *(f"{figure:.2f}" for figure in figures), "yes" if kind in kept else "no", ""])
    head = ["kind", "chance", "mean colour", "masked", "contrastive", "kept", "needs"]
    return section("Encoders: linear probes on validation scenes", table(head, rows))


def separation_section(folder: Path) -> list[str]:
    found = {name: json.loads((folder / f"probes-{name}.json").read_text())["separation"] for name in ENCODERS}
    sources = list(found[MASKED])
    rows = [[name, *(f"{found[name][source]:.3f}" for source in sources)] for name in ENCODERS]
    note = (
        f"Adjusted mutual information of {K} groups of a validation scene's patches with what each patch shows: 0 is "
        "chance, 1 would be the things themselves. Only semantic groups depend on the encoder."
    )
    return section("Do groups of patches follow things?", [note, "", *table(["encoder", *sources], rows)])


def budget_section(results: dict[str, Result]) -> list[str]:
    sources = [arm.source for arm in BUDGET_ARMS[: len(BUDGET_ARMS) // len(BUDGETS)]]
    rows = [
        [str(tokens), *(with_interval(results[f"{source} {tokens}"].right()) for source in sources)]
        for tokens in BUDGETS
    ]
    short = table(["K", *sources], rows)
    return [*section("(a) Token budget: K tokens and nothing else", short), "", *arms_table(results, BUDGET_ARMS)]


def arms_section(title: str, results: dict[str, Result], arms: tuple[Arm, ...]) -> list[str]:
    return section(title, arms_table(results, arms))


def arms_table(results: dict[str, Result], arms: tuple[Arm, ...]) -> list[str]:
    head = ["arm", "accuracy", *world.LEVELS, "other image", "steps to threshold", "image tokens", "training, s"]
    rows = []
    for arm in arms:
        result = results[arm.name]
        right_ASQ = result.right()
        rows.append(
            [
                arm.name,
                with_interval(right_ASQ),
                *(mean(right_ASQ[..., result.of(kinds_of_level(level))]) for level in world.LEVELS),
                mean(result.each("shuffled")),
                steps_to_threshold(result),
                f"{np.mean([file['image_tokens'] for file in result.files]):.1f}",
                f"{np.mean([file['seconds'] for file in result.files]):.0f}",
            ]
        )
    return table(head, rows)


def steps_to_threshold(result: Result) -> str:
    """The median over seeds of the first watched step at which validation accuracy reached the threshold."""
    reached = [file["steps_to_threshold"] for file in result.files]
    there = sorted(step for step in reached if step is not None)
    if len(there) <= len(reached) / 2:
        return f"not reached ({len(there)} of {len(reached)} seeds)"
    return f"{there[len(reached) // 2]:g}" + ("" if len(there) == len(reached) else f" ({len(there)} seeds)")


def policies(result: Result) -> dict[str, np.ndarray]:
    """The level (A,S,Q) that each policy chooses for each question. Only the oracle knows the right answers."""
    nll_AGSQ = result.told("nll")
    shape, levels = nll_AGSQ[:, 0].shape, nll_AGSQ.shape[1]
    names = ("coarse", "medium", "fine")
    best = np.array([np.argmin(file["chosen"]["validation_nll"]) for file in result.files])
    of_kind = [[file["chosen"]["best_of_kind"][kind] for kind in result.kinds] for file in result.files]
    template_Q = np.array([names.index(template_level(kind)) for kind in result.kinds])
    return {
        **{f"fixed, {names[level]}": np.full(shape, level) for level in range(levels)},
        "fixed, best on validation": np.broadcast_to(best[:, None, None], shape),
        "random": np.random.default_rng(0).integers(levels, size=shape),
        "template label itself": np.broadcast_to(template_Q, shape),
        "best of the kind on validation": np.broadcast_to(np.array(of_kind)[:, None, :], shape),
        **{
            f"controller, {source} labels": np.stack([numbers(file["chosen"][source]) for file in result.files])
            for source in LABELS
        },
        "oracle, likeliest right answer": nll_AGSQ.argmin(1),
    }


def at_levels(values_AGSQ: np.ndarray, level_ASQ: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_AGSQ, level_ASQ[:, None], axis=1)[:, 0]


def levels_section(results: dict[str, Result]) -> list[str]:
    lines = section("(c) Levels: one model trained with random levels, asked under each policy", [])
    for arm in LEVEL_ARMS:
        result = results[arm.name]
        right_AGSQ, nll_AGSQ = result.told("right"), result.told("nll")
        tokens_AG = np.array([file["image_tokens"] for file in result.files])
        rows = []
        for name, level_ASQ in policies(result).items():
            right_ASQ = at_levels(right_AGSQ, level_ASQ)
            shares = [(level_ASQ == level).mean() for level in range(right_AGSQ.shape[1])]
            used = np.mean([tokens_G[level_SQ].mean() for tokens_G, level_SQ in zip(tokens_AG, level_ASQ)])
            rows.append(
                [
                    name,
                    with_interval(right_ASQ),
                    *(mean(right_ASQ[..., result.of(kinds_of_level(level))]) for level in world.LEVELS),
                    f"{at_levels(nll_AGSQ, level_ASQ).mean():.3f}",
                    f"{used:.1f}",
                    " / ".join(f"{share:.2f}" for share in shares),
                ]
            )
        head = ["policy", "accuracy", *world.LEVELS, "nats per answer", "image tokens", "coarse / medium / fine"]
        settings = ", ".join(f"stride {s}: {c} clusters, {k} kept" for s, c, k in arm.levels)
        lines += ["", f"**{arm.name}** ({settings})", "", *table(head, rows)]
    return [*lines, "", "As trained, and read at the middle level:", "", *arms_table(results, LEVEL_ARMS)]


def joint_section(results: dict[str, Result]) -> list[str]:
    rows = []
    for arm in (VIEW_ARMS[1], *JOINT_ARMS):
        result = results[arm.name]
        for view in arm.views:
            right_ASQ = result.right(view)
            by_level = [mean(right_ASQ[..., result.of(kinds_of_level(level))]) for level in world.LEVELS]
            rows.append([arm.name, view, with_interval(right_ASQ), *by_level])
    whole = arms_table(results, (VIEW_ARMS[1], *JOINT_ARMS))
    return section("(d) Joint losses", [*table(["arm", "view", "accuracy", *world.LEVELS], rows), "", *whole])


def hallucination_section(results: dict[str, Result]) -> list[str]:
    """Yes to what is not there, no to what is, and how often an arm says yes at all; half of the things are there."""
    rows = []
    for name, result in results.items():
        if len(result.arm.levels) > 1:
            continue
        asked_Q = result.of(world.PRESENCE)
        if not asked_Q.any():
            return section("(f) Hallucination", ["No question about what is present passed the gate."])
        yes_ASQ, right_ASQ = result.told("yes")[:, 0][..., asked_Q], result.right()[..., asked_Q]
        there_SQ = numbers(result.files[0]["truth_yes"])[:, asked_Q]
        rows.append(
            [
                name,
                with_interval(yes_ASQ, 1 - there_SQ),
                with_interval(1 - right_ASQ, there_SQ),
                with_interval(right_ASQ),
                mean(yes_ASQ),
                mean(there_SQ),
            ]
        )
    head = ["arm", "yes to absent things", "wrong about present things", "accuracy", "says yes", "yes is right"]
    return section("(f) Hallucination: yes/no questions about things", table(head, rows))


def kinds_section(results: dict[str, Result]) -> list[str]:
    kinds = next(iter(results.values())).kinds
    rows = [["chance", *(f"{1 / len(world.ANSWERS[kind]):.2f}" for kind in kinds)]]
    rows += [[name, *(mean(result.right()[..., q], 2) for q in range(len(kinds)))] for name, result in results.items()]
    note = "Arms with several levels are shown at the middle one."
    return section("Accuracy by kind of question", [*table(["arm", *kinds], rows), "", note])


def comparisons(results: dict[str, Result]) -> list[Comparison]:
    """Those that the protocol plans, and no others."""

    def pair(part: str, ours: str, theirs: str, view: str | None = None) -> Comparison:
        name = f"{ours} - {theirs}" + (f", {view} view" if view else "")
        return Comparison(part, name, results[ours].right(view), results[theirs].right(view))

    planned = [
        pair("a", f"{BASE.source} {tokens}", f"{source} {tokens}")
        for tokens in BUDGETS
        for source in ("grid", "random", "colour")
    ]
    beside = VIEW_ARMS[1].name
    planned += [pair("b", beside, arm.name) for arm in VIEW_ARMS if arm.name != beside]
    for arm in LEVEL_ARMS:
        planned += level_comparisons(results[arm.name])
    planned += [pair("d", JOINT_ARMS[0].name, beside, view) for view in JOINT_ARMS[0].views]
    planned += [pair("e", arm.name, arm.name.removesuffix(f", {CONTRASTIVE}")) for arm in ENCODER_ARMS]
    planned.append(pair("e", ENCODER_ARMS[1].name, ENCODER_ARMS[2].name))
    for ours, theirs in ((BASE.name, f"grid {K}"), (beside, PIXELS.name)):
        result = results[ours]
        asked_Q = result.of(world.PRESENCE)
        if asked_Q.any():
            absent_SQ = 1 - numbers(result.files[0]["truth_yes"])[:, asked_Q]
            sides = [results[name].told("yes")[:, 0][..., asked_Q] for name in (ours, theirs)]
            planned.append(Comparison("f", f"yes to absent things: {ours} - {theirs}", *sides, absent_SQ))
    planned += [pair("g", arm.name, BASE.name) for arm in PART_ARMS]
    return planned


def level_comparisons(result: Result) -> list[Comparison]:
    right_AGSQ = result.told("right")
    right = {name: at_levels(right_AGSQ, level_ASQ) for name, level_ASQ in policies(result).items()}
    template, measured = (f"controller, {source} labels" for source in LABELS)
    fixed = "fixed, best on validation"
    pairs = ((template, fixed), (measured, fixed), (measured, template), (template, "random"), (measured, "random"))
    return [
        Comparison("c", f"{result.arm.name}: {ours} - {theirs}", right[ours], right[theirs]) for ours, theirs in pairs
    ]


def comparisons_section(planned: list[Comparison]) -> list[str]:
    tests = [
        paired(
            mean_over_seeds, statistics(one.ours, one.counted), statistics(one.theirs, one.counted),
            resamples=RESAMPLES,
        )
        for one in planned
    ]  # fmt: skip
    corrected = holm([test["p"] for test in tests])
    rows = []
    for one, test, p in zip(planned, tests, corrected, strict=True):
        counted = np.ones(one.ours.shape[1:]) if one.counted is None else one.counted
        by_seed_A = ((one.ours - one.theirs) * counted).sum((1, 2))
        low, difference, high = (100 * test[key] for key in ("low", "difference", "high"))
        rows.append(
            [
                one.part,
                one.name,
                f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{test['p']:.4f}",
                f"{p:.4f}",
                f"{(by_seed_A > 0).sum()} / {(by_seed_A < 0).sum()} of {len(by_seed_A)}",
                "yes" if p < 0.05 else "no",
            ]
        )
    head = ["part", "comparison", "points", "p", "p, Holm", "seeds above / below", "below 0.05"]
    note = (
        f"{len(planned)} comparisons, all planned in the protocol, corrected together by Holm's method; two-sided "
        f"paired bootstrap over scenes and seeds, {RESAMPLES} resamples."
    )
    return section("Planned comparisons", [note, "", *table(head, rows)])


def time_section(folder: Path) -> list[str]:
    """Seconds of one process for each stage."""
    seconds = {}
    for file in sorted(folder.glob("*.json")):
        name = file.name.removesuffix(".json").removesuffix(".time").split("-")[0]
        seconds[name] = seconds.get(name, 0) + json.loads(file.read_text())["job_seconds"]
    arms = [json.loads(file.read_text())["job_seconds"] for file in sorted((folder / "arms").glob("*.json"))]
    rows = [[name, f"{value:.0f}"] for name, value in seconds.items()] + [[f"{len(arms)} arms", f"{sum(arms):.0f}"]]
    used = ", ".join(f"{name} {version}" for name, version in used_versions().items() if version)
    return section("Time of one core, seconds", [*table(["stage", "seconds"], rows), "", f"Versions: {used}."])


def kinds_of_level(level: str) -> list[str]:
    return [kind for kind, own in world.KIND_LEVEL.items() if own == level]


def mean(values: np.ndarray, digits: int = 3) -> str:
    return f"{values.mean():.{digits}f}" if values.size else "-"


def section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else ["", f"## {title}"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
