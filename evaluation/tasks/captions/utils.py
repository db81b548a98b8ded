"""Captions: an image in column jpg or image, and the reference in the first of `REFERENCES` that is not empty."""

from granulon.evaluation.scoring import text_scores
from granulon.hub.inference import open_image

REFERENCES = ("txt", "recaption", "caption_detail", "caption_composition")


def visual(doc):
    return [open_image(doc["jpg"] if "jpg" in doc else doc["image"])]


def prompt(doc, options):
    return options["prompt"]


def reference(doc):
    found = [doc[name] for name in REFERENCES if name in doc]
    if not found:
        raise KeyError(" or ".join(REFERENCES))
    texts = [value if isinstance(value, str) else (value or [""])[0] for value in found]
    return next(filter(None, texts), "")


def score(doc, results):
    return text_scores(["bertscore", "bleu", "recall"], results[0], [reference(doc)])
