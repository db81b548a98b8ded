"""Captions. CC12M: columns jpg, txt. ImageNet-21K recap: columns image, recaption."""

from granulon.evaluation.scoring import scored
from modeling_granulon import load_rgb

METRICS = ["bertscore", "bleu", "recall"]


def prompt(doc, options):
    return options["prompt"]


def cc12m_visual(doc):
    return [load_rgb(doc["jpg"])]


def cc12m_caption(doc):
    return doc["txt"]


def score_cc12m(doc, results):
    return scored(METRICS, results[0], [cc12m_caption(doc)])


def recap_visual(doc):
    return [load_rgb(doc["image"])]


def recap_caption(doc):
    caption = doc["recaption"]
    return caption if isinstance(caption, str) else (caption or [""])[0]


def score_recap(doc, results):
    return scored(METRICS, results[0], [recap_caption(doc)])
