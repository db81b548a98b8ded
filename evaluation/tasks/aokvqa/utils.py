"""A-OKVQA: columns image, question, choices, correct_choice_idx, direct_answers (the text of a list of ten)."""

import ast

from granulon.evaluation import protocols
from granulon.evaluation.metrics import LETTERS
from granulon.evaluation.scoring import choice_scores, text_scores
from granulon.hub.inference import open_image


def visual(doc):
    return [open_image(doc["image"])]


def direct_question(doc, options):
    return doc["question"] + options["post_prompt"]


def direct_answers(doc):
    answers = doc["direct_answers"]
    return ast.literal_eval(answers) if isinstance(answers, str) else list(answers or [])


def score_direct(doc, results):
    return text_scores(["recall", "exact_match", "vqa_accuracy"], results[0], direct_answers(doc))


def question_with_options(doc):
    return protocols.question_with_options(doc["question"], doc["choices"])


def correct_choice(doc):
    return doc["choices"][doc["correct_choice_idx"]]


def score_correct_choice(doc, results):
    return text_scores(["recall"], results[0], [correct_choice(doc)])


def choice_question(doc, options):
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, doc["choices"]))
    return f"{doc['question']}\n{choices}{options['post_prompt']}"


def correct_letter(doc):
    return LETTERS[doc["correct_choice_idx"]]


def score_choice(doc, results):
    return choice_scores(results[0], doc["choices"], doc["correct_choice_idx"])
