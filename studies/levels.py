"""Which level a controller chooses for each question of the study, from template labels and from measured ones.

The model was trained with random levels, so that every policy is tried on the same weights. Controllers are trained
as `granulon-train-controller` trains them, on questions about validation scenes, with the arm's language model.

Shapes by suffix: S scenes, Q questions of a scene, G levels.
"""

import numpy as np
import torch

from granulon.train.controller.corpus import MEASURED, TEMPLATE, TRAIN, VALIDATION, corpus_row
from granulon.train.controller.fit import controller_logits, question_states, train_controller

from . import world
from .arms import Arm, ImageTokens, Questions, ask, make_processor

LABELS = TEMPLATE, MEASURED
EPOCHS = 20
HELD_OUT = 0.1  # of the scenes, to stop the controller's training


def level_answers(
    model,
    arm: Arm,
    tokenizer,
    tokens: ImageTokens,
    questions: Questions,
    scenes: list[world.Scene],
    asked_scenes: list[world.Scene],
) -> dict:
    """
    For both kinds of labels, the level of each question about `asked_scenes`, and what the labels were.

    tokens, questions, scenes: those on which levels are measured and controllers trained; not those asked.

    Returns:
        dict: for "template" and "measured", `level` (words of digits, one for each scene); `best_of_kind`, for each
        kind the level at which answers about the measured scenes are likeliest; `validation_nll` of each level on
        those scenes; `label_shares`, how often each level is the likeliest there.
    """
    nll_GSQ = np.stack([ask(model, tokens, questions, arm.view, level)[1] for level in range(len(arm.levels))])
    processor = make_processor(tokenizer, arm)
    texts_SQ = question_texts(asked_scenes, questions.kinds)
    distinct = sorted({text for row in texts_SQ for text in row})
    result = {
        "best_of_kind": dict(zip(questions.kinds, nll_GSQ.mean(1).argmin(0).tolist())),
        "validation_nll": nll_GSQ.mean((1, 2)).tolist(),
        "label_shares": np.bincount(nll_GSQ.argmin(0).ravel(), minlength=len(arm.levels)).tolist(),
    }
    for source in LABELS:
        rows = label_rows(source, model.config.granularity_names, scenes, questions.kinds, nll_GSQ)
        train_controller(model, processor, rows, epochs=EPOCHS, patience=5)
        level_of = dict(zip(distinct, chosen_levels(model, processor, distinct)))
        result[source] = ["".join(str(level_of[text]) for text in row) for row in texts_SQ]
    return result


def question_texts(scenes: list[world.Scene], kinds: tuple[str, ...]) -> list[list[str]]:
    return [[q.text for q in world.make_questions(scene) if q.kind in kinds] for scene in scenes]


def label_rows(source: str, names: list[str], scenes, kinds: tuple[str, ...], nll_GSQ: np.ndarray) -> list[dict]:
    """A granularity corpus of the questions about scenes."""
    probs_SQG = torch.from_numpy(-nll_GSQ).softmax(0).permute(1, 2, 0).tolist()
    rows = []
    for number, (scene, texts) in enumerate(zip(scenes, question_texts(scenes, kinds), strict=True)):
        split = VALIDATION if number < max(1, HELD_OUT * len(scenes)) else TRAIN
        for kind, text, measured in zip(kinds, texts, probs_SQG[number], strict=True):
            probs = measured if source == MEASURED else [float(name == template_level(kind)) for name in names]
            labels = dict(zip(names, probs, strict=True))
            rows.append(corpus_row(text, labels, source, key=str(scene.seed), split=split, kind=kind))
    return rows


def template_level(kind: str) -> str:
    """What a person would write: the kind's own level, the finest for what only pixels show."""
    level = world.KIND_LEVEL[kind]
    return "fine" if level == "pixel" else level


@torch.no_grad()
def chosen_levels(model, processor, texts: list[str]) -> list[int]:
    states_QE = question_states(model, processor, texts)
    return controller_logits(model.model.granularity_controller, states_QE).argmax(-1).tolist()
