"""Surgical frames: columns image, answer (the phase, or the instruments); a column question replaces the prompt."""

from granulon.evaluation.scoring import text_scores
from modeling_granulon import load_rgb


def visual(doc):
    return [load_rgb(doc["image"])]


def prompt(doc, options):
    return doc.get("question") or options["prompt"]


def score(doc, results):
    return text_scores(["bertscore", "recall"], results[0], [doc["answer"]])
