"""`granulon-analyse`: what happens inside a Granulon, and what finished evaluations tell beside their scores.

    granulon-analyse alignment   --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse clusters    --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse speed       --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse calibration --model CHECKPOINT --corpus seed --output analyses
    granulon-analyse tokens      --results RESULTS --output analyses
    granulon-analyse levels      --results RESULTS --output analyses

Each writes its figures as JSON and Markdown and draws them as PNG and, but for the sheet of clusters, PDF.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from granulon.hub.ask import level_of, load_model
from granulon.train.controller.corpus import read_corpus
from granulon.train.controller.fit import SEED_CORPUS
from granulon.train.controller.templates import seed_corpus

from .alignment import alignment, alignment_markdown, draw_alignment
from .files import asked_of, one_image_each, read_questions, save, write_analysis
from .levels import (
    calibration,
    calibration_markdown,
    cluster_rows,
    clusters_markdown,
    clusters_report,
    draw_calibration,
    draw_clusters_sheet,
)
from .results import (
    accuracy_against_tokens,
    chosen_levels,
    draw_levels,
    draw_tokens,
    finished_cells,
    levels_markdown,
    tokens_markdown,
)
from .speed import draw_speed, measure_speed, speed_markdown

MODEL = {"help": "a Granulon: a folder, or a Hub id"}
ROWS = {
    "help": "rows with image, question and perhaps answer: a JSON list, JSON Lines, a folder of images or a dataset"
}
OUTPUT = {"help": "folder to write to"}
RESULTS = {"help": "output folder of granulon-evaluate"}
SEED = {"help": "of the bootstrap"}


@dataclass
class AlignmentArguments:
    """Cosines of text states and image states in every layer of the language model."""

    model: str = field(metadata=MODEL)
    rows: str = field(metadata=ROWS)
    output: str = field(metadata=OUTPUT)
    limit: int = field(default=200, metadata={"help": "take only so many rows"})
    granularity: str | None = field(default=None, metadata={"help": "a level, in place of the controller's choice"})
    batch_size: int = field(default=8, metadata={"help": "rows in one pass"})
    seed: int = field(default=0, metadata=SEED)


@dataclass
class ClustersArguments:
    """A sheet of pictures: a row per image, its clusters at each level."""

    model: str = field(metadata=MODEL)
    rows: str = field(metadata=ROWS)
    output: str = field(metadata=OUTPUT)
    limit: int = field(default=4, metadata={"help": "take only so many images"})


@dataclass
class SpeedArguments:
    """Time and memory of each view and level, measured side by side."""

    model: str = field(metadata=MODEL)
    rows: str = field(metadata=ROWS)
    output: str = field(metadata=OUTPUT)
    rounds: int = field(default=10, metadata={"help": "counted rounds; in each, all views answer one question"})
    warm_up: int = field(default=2, metadata={"help": "rounds before them"})
    new_tokens: int = field(default=32, metadata={"help": "tokens of every answer"})


@dataclass
class CalibrationArguments:
    """Reliability diagram and calibration error of the controller."""

    model: str = field(metadata=MODEL)
    output: str = field(metadata=OUTPUT)
    corpus: str = field(
        default=SEED_CORPUS,
        metadata={"help": "JSONL file or folder of such; 'seed' is the corpus made from templates"},
    )
    seed: int = field(default=0, metadata=SEED)


@dataclass
class TokensArguments:
    """Accuracy of finished cells against the visual tokens that were read."""

    results: str = field(metadata=RESULTS)
    output: str = field(metadata=OUTPUT)
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "figures to show, as task=figure; by default a task's first"}
    )
    seed: int = field(default=0, metadata=SEED)


@dataclass
class LevelsArguments:
    """Level chosen per benchmark and type of question, from finished cells."""

    results: str = field(metadata=RESULTS)
    output: str = field(metadata=OUTPUT)
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "rows of these names; of one alone, the picture shows the types of questions too"},
    )


def main(argv: list[str] | None = None):
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        prog="granulon-analyse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="analysis", parser_class=HfArgumentParser)
    for name, (kind, _) in ANALYSES.items():
        commands.add_parser(name, dataclass_types=kind, help=kind.__doc__, description=kind.__doc__)
    given = vars(parser.parse_args(argv))
    kind, run = ANALYSES[given["analysis"]]
    try:
        markdown, files = run(kind(**{entry.name: given[entry.name] for entry in fields(kind)}))
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-analyse {given['analysis']}: {error}")
    print(markdown, end="\n\n")
    for file in files:
        print(f"wrote {file}")


def run_alignment(asked: AlignmentArguments):
    model, processor = load_model(asked.model)
    report = alignment(
        model,
        processor,
        read_questions(asked.rows, asked.limit),
        granularity=level_of(model.config, asked.granularity),
        batch_size=asked.batch_size,
        seed=asked.seed,
    )
    markdown, figure = alignment_markdown(report), draw_alignment(report, asked.model)
    return _written(asked, "alignment", report, markdown, figure)


def run_clusters(asked: ClustersArguments):
    model, processor = load_model(asked.model)
    if asked.limit < 1:
        raise ValueError(f"limit is {asked.limit}; it must be at least 1")
    rows = one_image_each(read_questions(asked.rows))[: asked.limit]
    found = cluster_rows(model, processor, rows)
    markdown, files = _written(asked, "clusters", clusters_report(found), clusters_markdown(found), None)
    sheet = draw_clusters_sheet(found, model.config.granularities)
    return markdown, [*files, save(sheet, Path(asked.output) / "clusters.png")]


def run_speed(asked: SpeedArguments):
    model, processor = load_model(asked.model)
    report = measure_speed(
        model,
        processor,
        read_questions(asked.rows, asked.rounds + asked.warm_up),
        rounds=asked.rounds,
        warm_up=asked.warm_up,
        new_tokens=asked.new_tokens,
        folder=asked.model,
    )
    return _written(asked, "speed", report, speed_markdown(report), draw_speed(report))


def run_calibration(asked: CalibrationArguments):
    model, processor = load_model(asked.model)
    rows = seed_corpus() if asked.corpus == SEED_CORPUS else read_corpus(asked.corpus)
    report = calibration(model, processor, rows, asked.seed)
    return _written(asked, "calibration", report, calibration_markdown(report), draw_calibration(report))


def run_tokens(asked: TokensArguments):
    if wrong := [entry for entry in asked.metrics if not all(entry.partition("=")[::2])]:
        raise ValueError(f"metrics has {wrong}; write task=figure, such as pope=yes_no_f1")
    metrics = dict(entry.split("=", 1) for entry in asked.metrics)
    report = accuracy_against_tokens(finished_cells(asked.results), metrics, asked.seed)
    return _written(asked, "tokens", report, tokens_markdown(report), draw_tokens(report))


def run_levels(asked: LevelsArguments):
    report = chosen_levels(finished_cells(asked.results, asked.only))
    return _written(asked, "levels", report, levels_markdown(report), draw_levels(report))


def _written(asked, name: str, report: dict, markdown: str, figure):
    """The text to print, and the files that were written."""
    arguments = asdict(asked)
    told = asked_of(asked.model, arguments) if hasattr(asked, "model") else {"arguments": arguments}
    return markdown, write_analysis(asked.output, name, told | report, markdown, figure)


ANALYSES = {
    "alignment": (AlignmentArguments, run_alignment),
    "clusters": (ClustersArguments, run_clusters),
    "tokens": (TokensArguments, run_tokens),
    "speed": (SpeedArguments, run_speed),
    "levels": (LevelsArguments, run_levels),
    "calibration": (CalibrationArguments, run_calibration),
}


if __name__ == "__main__":
    main()
