"""The level that the controller chose in finished runs of granulon-evaluate, by benchmark and type of question."""

import re
from collections import Counter, defaultdict

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import entropy

from granulon.hub.text import markdown_table
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES

from .files import left_out_notes, run_name, settings_of

KNOWN_LEVELS = [level["name"] for level in DEFAULT_GRANULARITIES]
# Columns of data sets that hold the type of a question, the most specific first.
TYPE_COLUMNS = (
    "question_type", "question_type_id", "kind", "task", "category", "subcategory", "type", "task_type",
)  # fmt: skip
MOST_TYPES = 8  # of one benchmark; the others are counted together
OTHER, ALL = "other", "all"


def chosen_levels(runs: list[dict]) -> dict:
    """
    How often each level was chosen, by entry, benchmark and type of question.

    A type is what the data set says (`TYPE_COLUMNS`), else the first two words of the question. Entries whose level
    was fixed or random are left out.

    Args:
        runs: of `files.finished_runs`.

    Returns:
        dict: `levels`, from coarse to fine; `counts`, each with group, entry, task, type ("all" for all of them),
        `types_from`, samples, `count` and `share` by level, and `entropy` in bits; `left_out`, the reason for each
        run that was left out.

    Raises:
        ValueError: no run has a level that the model chose.
    """
    counts, left_out, tokens = [], {}, defaultdict(list)
    for run in runs:
        samples = [sample for sample in run["samples_read"] if sample.get("granularity")]
        level = settings_of(run)["granularity"]
        if not samples or level not in (None, "learned"):
            reason = f"its level is set ({level})" if samples else "its samples have no level: no image, or no levels"
            left_out[run_name(run)] = reason
            continue
        for sample in samples:
            tokens[sample["granularity"]].append(sample.get("semantic_tokens") or 0)
        counts += _count_levels(run, samples)
    if not counts:
        raise ValueError(f"no run has a level that the model chose: {left_out}")

    def from_coarse_to_fine(name):
        known = KNOWN_LEVELS.index(name) if name in KNOWN_LEVELS else len(KNOWN_LEVELS)
        return known, np.mean(tokens[name]), name

    levels = sorted(tokens, key=from_coarse_to_fine)
    return {"levels": levels, "counts": [_with_shares(entry, levels) for entry in counts], "left_out": left_out}


def _count_levels(run: dict, samples: list[dict]) -> list[dict]:
    """One entry for all samples of a run, and one for each type of question, the most frequent first."""
    source, types = question_types(samples)
    common = [name for name, _ in Counter(types).most_common(MOST_TYPES)]
    types = [name if name in common else OTHER for name in types]
    names = list(dict.fromkeys([*common, *([OTHER] if OTHER in types else [])]))
    return [
        {
            **settings_of(run),
            "task": run["task"]["name"],
            "type": name,
            "types_from": source,
            "count": Counter(sample["granularity"] for sample, own in zip(samples, types) if name in (ALL, own)),
        }
        for name in ([ALL, *names] if len(names) > 1 else [ALL])
    ]


def question_types(samples: list[dict]) -> tuple[str, list[str]]:
    """The column that types were read from (or "first words"), and the type of each sample's question."""
    docs = [sample.get("doc") or {} for sample in samples]
    for column in TYPE_COLUMNS:
        values = [doc.get(column) for doc in docs]
        if all(isinstance(value, (str, int)) and value != "" for value in values) and len(set(values)) > 1:
            return column, [str(value) for value in values]
    types = []
    for doc, sample in zip(docs, samples):
        questions = [doc.get("question"), doc.get("Question"), sample.get("question"), ""]
        question = next(question for question in questions if isinstance(question, str))
        types.append(" ".join(re.findall(r"\w+", question.lower())[:2]) or "(none)")
    return "first words", types


def _with_shares(entry: dict, levels: list[str]) -> dict:
    count = {level: entry["count"][level] for level in levels}
    total = sum(count.values())
    shares = {level: number / total for level, number in count.items()}
    bits = float(entropy(list(count.values()), base=2))
    return entry | {"samples": total, "count": count, "share": shares, "entropy": bits}


def levels_markdown(report: dict) -> str:
    """A table with a row for each entry, benchmark and type of question."""
    header = ["model", "entry", "view", "task", "questions", "samples", *report["levels"], "entropy (bits)"]
    rows = [
        [
            *(entry["group"], entry["entry"], entry["view"], entry["task"], entry["type"]),
            entry["samples"],
            *(f"{entry['count'][level]} ({entry['share'][level]:.0%})" for level in report["levels"]),
            f"{entry['entropy']:.2f}",
        ]
        for entry in report["counts"]
    ]
    sources = {entry["task"]: entry["types_from"] for entry in report["counts"]}
    sources = "; ".join(f"{task}: {source}" for task, source in sources.items())
    note = f"Types of questions come from: {sources}. "
    note += f"The entropy is {np.log2(len(report['levels'])):.2f} bits where all levels are chosen equally often."
    return "\n\n".join([note, markdown_table(header, rows, 5), *left_out_notes(report["left_out"])])


def draw_levels(report: dict) -> Figure:
    """
    Stacked bars with the levels' shares, one for each benchmark.

    For a single entry, a bar for each type of question is below its benchmark's; for several there is no room.
    """
    several = len({run_name(entry) for entry in report["counts"]}) > 1
    counts = [entry for entry in report["counts"] if entry["type"] == ALL or not several]
    bars = [
        f"{entry['task']} ({run_name(entry)})"
        if several
        else entry["task"]
        if entry["type"] == ALL
        else entry["type"][:40]
        for entry in counts
    ]
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(counts)), layout="constrained")
    axes = figure.subplots()
    left_N = np.zeros(len(counts))
    # From light for coarse to dark for fine, readable without colour too.
    for level, colour in zip(report["levels"], colormaps["Blues"](np.linspace(0.2, 0.95, len(report["levels"])))):
        share_N = np.array([entry["share"][level] for entry in counts])
        drawn = axes.barh(range(len(counts)), share_N, left=left_N, height=0.78, color=colour, label=level)
        numbers = [f"{share:.0%}" if share > 0.06 else "" for share in share_N]
        axes.bar_label(drawn, numbers, label_type="center", fontsize=7, color="white" if colour[0] < 0.4 else "black")
        left_N += share_N
    axes.set_yticks(range(len(counts)), bars, fontsize=8)
    for label, entry in zip(axes.get_yticklabels(), counts):
        label.set_fontweight("bold" if entry["type"] == ALL else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the questions", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(report["levels"]), fontsize=8, frameon=False)
    figure.suptitle("Level chosen, by benchmark and type of question", fontsize=10)
    return figure
