"""`granulon-analyse`: what happens inside a Granulon, and further figures of finished evaluations.

    granulon-analyse alignment   --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse budgets     --model CHECKPOINT --rows questions.json --output analyses
    granulon-analyse calibration --model CHECKPOINT --corpus seed --output analyses
    granulon-analyse tokens      --results RESULTS --output analyses
    granulon-analyse levels      --results RESULTS --output analyses

Each writes its figures as JSON and Markdown and draws them as PNG and PDF.
"""

import argparse
import sys

from transformers.utils import logging

from granulon.hub.inference import load_model, load_processor
from granulon.hub.text import first_line
from granulon.train.controller.replay import SEED_CORPUS, load_corpus

from . import alignment, budgets, calibration, levels, tokens
from .files import describe_model, finished_runs, read_questions, write_analysis

MOST_ROWS = 200

OPTIONS = {
    "model": {"required": True, "help": "a Granulon: a folder or a Hub id"},
    "rows": {
        "required": True,
        "help": "questions about images: a JSON list, JSON Lines, a folder of images or a dataset",
    },
    "results": {"required": True, "help": "output folder of granulon-evaluate"},
    "output": {"required": True, "help": "folder to write to"},
    "corpus": {"default": SEED_CORPUS, "help": "JSONL file or folder of such; 'seed' is the corpus of templates"},
    "limit": {"type": int, "default": MOST_ROWS, "help": f"use only the first rows ({MOST_ROWS})"},
    "definition": {
        "choices": alignment.DEFINITIONS,
        "default": "parts",
        "help": "what is compared: words with image tokens (parts), or whole prompts as the authors do (authors)",
    },
    "granularity": {"help": "a level by name or index, in place of the controller's choice"},
    "only": {"nargs": "+", "default": [], "help": "entries of the table with these names; all by default"},
}


def run_alignment(options, model, processor):
    """Cosines of text states and image states in every layer of the language model."""
    rows = read_questions(options.rows, options.limit)
    level = None if options.granularity is None else model.config.granularity_index(options.granularity)
    report = alignment.alignment(model, processor, rows, definition=options.definition, granularity=level)
    return report, alignment.alignment_markdown(report), alignment.draw_alignment(report)


def run_budgets(options, model, processor):
    """Accuracy and time against the image tokens that are read, beside other methods of token reduction."""
    report = budgets.accuracy_at_budgets(model, processor, read_questions(options.rows, options.limit))
    return report, budgets.budgets_markdown(report), budgets.draw_budgets(report)


def run_calibration(options, model, processor):
    """Reliability diagram and calibration error of the controller."""
    report = calibration.calibration(model, processor, load_corpus(options.corpus))
    return report, calibration.calibration_markdown(report), calibration.draw_calibration(report)


def run_tokens(options):
    """Score of finished evaluation runs against the visual tokens that were read."""
    report = tokens.accuracy_against_tokens(finished_runs(options.results))
    return report, tokens.tokens_markdown(report), tokens.draw_tokens(report)


def run_levels(options):
    """Level chosen per benchmark and type of question, from finished evaluation runs."""
    report = levels.chosen_levels(finished_runs(options.results, options.only))
    return report, levels.levels_markdown(report), levels.draw_levels(report)


ANALYSES = {
    "alignment": (run_alignment, ("model", "rows", "limit", "definition", "granularity", "output")),
    "tokens": (run_tokens, ("results", "output")),
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
        if getattr(options, "limit", 1) < 1:
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
