"""SEED-Bench: columns image (a list), question, choice_a to choice_d, answer (a letter), data_type (image, video)."""

from granulon.evaluation import protocols
from granulon.evaluation.scoring import text_scores
from granulon.hub.inference import open_image

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
AUTHORS_FIRST_ROW = 500


def image_questions(rows):
    kinds = rows["data_type"]
    return rows.select([number for number, kind in enumerate(kinds) if kind == "image"])


def authors_rows(rows):
    return rows.select(range(AUTHORS_FIRST_ROW, len(rows)))


def visual(doc):
    return [open_image(image) for image in (doc["image"] if isinstance(doc["image"], list) else [doc["image"]])]


def question(doc, options):
    return doc["question"] + options["post_prompt"]


def question_with_options(doc):
    return protocols.question_with_options(doc["question"], [doc[name] for name in CHOICES])


def correct_choice(doc):
    return doc[f"choice_{doc['answer'].strip().lower()}"]


def score(doc, results):
    return text_scores(["recall", "exact_match"], results[0], [correct_choice(doc)])
