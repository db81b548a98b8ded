"""`granulon-analyse`: what happens inside a Granulon, and further figures of finished evaluations.

    granulon-analyse alignment   --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse clusters    --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse speed       --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse budgets     --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse calibration --model CHECKPOINT --corpus seed --output analyses
    granulon-analyse tokens      --results RESULTS --output analyses
    granulon-analyse levels      --results RESULTS --output analyses

Each writes its figures as JSON and Markdown and draws them as PNG and, except for the sheet of clusters, PDF.
"""

import argparse
import sys

from transformers.utils import logging

from granulon.hub.inference import load_model, load_processor
from granulon.hub.text import first_line
from granulon.train.controller.replay import SEED_CORPUS, load_corpus

from . import alignment, budgets, levels, results, speed
from .files import describe_model, first_row_of_each_image, read_questions, write_analysis

OPTIONS = {
    "model": {"required": True, "help": "a Granulon: a folder or a Hub id"},
    "rows": {
        "required": True,
        "help": "questions about images: a JSON list, JSON Lines, a folder of images or a dataset",
    },
    "results": {"required": True, "help": "output folder of granulon-evaluate"},
    "output": {"required": True, "help": "folder to write to"},
    "corpus": {"default": SEED_CORPUS, "help": "JSONL file or folder of such; 'seed' is the corpus of templates"},
    "limit": {
        "type": int,
        "help": "use only the first rows or images (alignment and budgets 200, clusters 4, speed 10)",
    },
    "granularity": {"help": "a level by name or index, in place of the controller's choice"},
    "only": {"nargs": "+", "default": [], "help": "entries of the table with these names; all by default"},
}


def run_alignment(options, model, processor):
    """Cosines of text states and image states in every layer of the language model."""
    rows = read_questions(options.rows, options.limit or 200)
    level = None if options.granularity is None else model.config.granularity_index(options.granularity)
    report = alignment.alignment(model, processor, rows, granularity=level)
    return report, alignment.alignment_markdown(report), alignment.draw_alignment(report, options.model)


def run_clusters(options, model, processor):
    """A sheet of pictures: a line per image, its clusters at each level."""
    rows = first_row_of_each_image(read_questions(options.rows))[: options.limit or 4]
    found = levels.cluster_rows(model, processor, rows)
    report = {"rows": [{key: value for key, value in row.items() if key != "image"} for row in found]}
    sheet = levels.draw_clusters_sheet(found, model.config.granularities)
    return report, levels.clusters_markdown(found), sheet


def run_speed(options, model, processor):
    """Time and memory of each view and level, measured side by side, one round per row."""
    report = speed.measure_speed(model, processor, read_questions(options.rows, options.limit or 10))
    return report, speed.speed_markdown(report), speed.draw_speed(report)


def run_budgets(options, model, processor):
    """Accuracy and time against the image tokens that are read, beside other methods of token reduction."""
    report = budgets.accuracy_at_budgets(model, processor, read_questions(options.rows, options.limit or 200))
    return report, budgets.budgets_markdown(report), budgets.draw_budgets(report)


def run_calibration(options, model, processor):
    """Reliability diagram and calibration error of the controller."""
    report = levels.calibration(model, processor, load_corpus(options.corpus))
    return report, levels.calibration_markdown(report), levels.draw_calibration(report)


def run_tokens(options):
    """Score of finished evaluation runs against the visual tokens that were read."""
    report = results.accuracy_against_tokens(results.finished_runs(options.results))
    return report, results.tokens_markdown(report), results.draw_tokens(report)


def run_levels(options):
    """Level chosen per benchmark and type of question, from finished evaluation runs."""
    report = results.chosen_levels(results.finished_runs(options.results, options.only))
    return report, results.levels_markdown(report), results.draw_levels(report)


ANALYSES = {
    "alignment": (run_alignment, ("model", "rows", "limit", "granularity", "output")),
    "clusters": (run_clusters, ("model", "rows", "limit", "output")),
    "tokens": (run_tokens, ("results", "output")),
    "speed": (run_speed, ("model", "rows", "limit", "output")),
    "budgets": (run_budgets, ("model", "rows", "limit", "output")),
    "levels": (run_levels, ("results", "only", "output")),
    "calibration": (run_calibration, ("model", "corpus", "output")),
}


def main(argv: list[str] | None = None):
    """Run the analysis that the command line names; one line to stderr for what cannot be used."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        prog="granulon-analyse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="analysis")
    for name, (run, names) in ANALYSES.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for option in names:
            command.add_argument(f"--{option}", **OPTIONS[option])
    options = parser.parse_args(argv)
    name, run = options.analysis, ANALYSES[options.analysis][0]
    try:
        if getattr(options, "limit", None) is not None and options.limit < 1:
            raise ValueError(f"limit is {options.limit}; it must be at least 1")
        used = {"arguments": vars(options)}
        if "model" in options:
            model = load_model(options.model, device_map="auto")
            report, markdown, picture = run(options, model, load_processor(options.model, model.config))
            used["model"] = describe_model(options.model)
        else:
            report, markdown, picture = run(options)
        files = write_analysis(options.output, name, used | report, markdown, picture)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-analyse {name}: {first_line(error)}")
    print(markdown, "\n".join(f"wrote {file}" for file in files), sep="\n\n")


if __name__ == "__main__":
    main()
