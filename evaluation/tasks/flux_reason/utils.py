"""FLUX-Reason-6M: columns image, caption_detail (the reasoning), caption_composition where that is empty."""

from granulon.evaluation.scoring import scored
from modeling_granulon import load_rgb


def visual(doc):
    return [load_rgb(doc["image"])]


def prompt(doc, options):
    return options["prompt"]


def reasoning(doc):
    return doc["caption_detail"] or doc["caption_composition"] or ""


def score(doc, results):
    return scored(["bertscore", "bleu", "recall"], results[0], [reasoning(doc)])
