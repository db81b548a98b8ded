"""Surgical frames: columns image, answer (the phase, or the instruments); a column question replaces the prompt."""

from granulon.evaluation.scoring import text_scores
from granulon.hub.inference import open_image


def visual(doc):
    return [open_image(doc["image"])]


def prompt(doc, options):
    return doc.get("question") or options["prompt"]


def score(doc, results):
    return text_scores(["bertscore", "recall", "exact_match"], results[0], [doc["answer"]])
