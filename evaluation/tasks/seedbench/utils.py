"""SEED-Bench: columns image (a list), question, choice_a to choice_d, answer (a letter), data_type (image, video)."""

from granulon.evaluation.scoring import text_scores
from modeling_granulon import load_rgb


def image_questions(rows):
    kinds = rows["data_type"]
    return rows.select([number for number, kind in enumerate(kinds) if kind == "image"])


def visual(doc):
    return [load_rgb(image) for image in doc["image"]]


def question(doc, options):
    return doc["question"] + options["post_prompt"]


def correct_choice(doc):
    return doc[f"choice_{doc['answer'].strip().lower()}"]


def score(doc, results):
    return text_scores(["recall"], results[0], [correct_choice(doc)])
