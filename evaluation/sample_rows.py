"""A few rows for every task, in the columns of its data set, made of drawn scenes: so that all of it runs offline.

They check that a task works from end to end. A figure computed on them says nothing about a model.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from granulon.train.data.scenes import ANSWERS, Question, Scene, make_questions, make_scene

from .metrics import LETTERS

ROWS = 8
FIRST_SCENE = 9_000_000  # far from the scenes that anything is trained on
ASKED_PLAINLY = (
    "granulon_aokvqa_direct",
    "granulon_seedbench_recall",
    "gqa",
)  # the demo's model knows questions alone
NO_PROMPT = {"pre_prompt": "", "post_prompt": ""}
TEXT, NUMBER = Value("string"), Value("int64")
TEXTS = List(TEXT)


def write_rows(task: str, folder: Path) -> dict:
    """
    Write the rows of a task and say how lmms-eval is to read them.

    Returns:
        dict: entries of the task's configuration that replace its own.

    Raises:
        ValueError: a task that no rows are made for.
    """
    if task not in MAKERS:
        raise ValueError(f"no rows are made for the task {task}; run it on its data, or one of {', '.join(MAKERS)}")
    split, features, make = MAKERS[task]
    rows = [make(number, make_scene(FIRST_SCENE + number)) for number in range(ROWS)]
    target = folder / task
    if not target.exists():
        draft = folder / f"{task}.{os.getpid()}.tmp"
        DatasetDict({split: Dataset.from_list(rows, features=Features(features))}).save_to_disk(draft)
        try:
            draft.replace(target)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return {
        "dataset_path": str(target),
        "dataset_name": None,
        "dataset_kwargs": {"load_from_disk": True},
        **({"process_docs": None} if task == "gqa" else {}),  # it would join images from the Hub
        **({"lmms_eval_specific_kwargs": {"default": NO_PROMPT}} if task in ASKED_PLAINLY else {}),
    }


def _asked(number: int, scene: Scene) -> Question:
    questions = make_questions(scene)
    return questions[number % len(questions)]


def _choices(number: int, question: Question, wanted: int = 4) -> tuple[list[str], int]:
    """The right answer among others of its kind, and of other kinds where those are too few; its place."""
    random = Random(number)
    others = [answer for answer in ANSWERS[question.kind] if answer != question.answer]
    more = [answer for kind, answers in ANSWERS.items() if kind != question.kind for answer in answers]
    random.shuffle(others)
    choices = [question.answer, *dict.fromkeys([*others, *more])][:wanted]
    choices = list(dict.fromkeys(choices))
    random.shuffle(choices)
    return choices, choices.index(question.answer)


def _in_words(scene: Scene) -> str:
    return "A picture with " + ", ".join(f"{kind} {fact}" for kind, fact in scene.facts().items()) + "."


def _things(scene: Scene) -> list[str]:
    return list(dict.fromkeys(scene.facts().values()))


def _aokvqa(number: int, scene: Scene) -> dict:
    question = _asked(number, scene)
    choices, right = _choices(number, question)
    return {
        "image": scene.draw(),
        "question_id": f"scene-{number}",
        "question": question.text,
        "choices": choices,
        "correct_choice_idx": right,
        "direct_answers": str([question.answer] * 7 + [choices[right - 1]] * 3),
        "difficult_direct_answer": False,
        "rationales": [f"It is {question.answer}."],
    }


def _cc12m(number: int, scene: Scene) -> dict:
    return {
        "__key__": str(number),
        "__url__": "",
        "jpg": scene.draw(),
        "txt": _in_words(scene),
        "json": {"key": str(number)},
    }


def _recap(number: int, scene: Scene) -> dict:
    return {"image": scene.draw(), "recaption": _in_words(scene), "recaption_short": _things(scene)[0]}


def _flux(number: int, scene: Scene) -> dict:
    reasons = [f"{question.text} It is {question.answer}." for question in make_questions(scene)]
    return {"image": scene.draw(), "caption_composition": _in_words(scene), "caption_detail": " ".join(reasons)}


def _surgical(number: int, scene: Scene) -> dict:
    question = _asked(number, scene)
    return {"image": scene.draw(), "question": question.text, "answer": question.answer}


def _seedbench(number: int, scene: Scene) -> dict:
    question = _asked(number, scene)
    choices, right = _choices(number, question)
    return {
        "image": [scene.draw()],
        "question": question.text,
        "question_id": str(number),
        "data_type": "image",
        "answer": LETTERS[right],
        **{f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, choices)},
    }


def _pope(number: int, scene: Scene) -> dict:
    absent = [answer for answers in ANSWERS.values() for answer in answers if answer not in _things(scene)]
    thing = Random(number).choice(_things(scene) if number % 2 else absent)
    return {
        "id": str(number),
        "question_id": str(number),
        "question": f"Is there a {thing} in the image?",
        "answer": "yes" if number % 2 else "no",
        "image_source": f"scene-{number}",
        "image": scene.draw(),
        "category": "random",
    }


def _gqa(number: int, scene: Scene) -> dict:
    question = _asked(number, scene)
    return {
        "id": str(number),
        "imageId": f"scene-{number}",
        "image": scene.draw(),
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": f"It is {question.answer}.",
    }


def _mmvp(number: int, scene: Scene) -> dict:
    choices, right = _choices(number, _asked(number // 2, scene), wanted=2)
    return {
        "image": scene.draw(),
        "Index": number + 1,
        "Question": _asked(number // 2, scene).text,
        "Options": " ".join(f"({letter.lower()}) {choice}" for letter, choice in zip(LETTERS, choices)),
        "Correct Answer": f"({LETTERS[right].lower()})",
    }


def _cv_bench(number: int, scene: Scene) -> dict:
    question = _asked(number, scene)
    choices, right = _choices(number, question)
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return {
        "idx": number,
        "type": "2D",
        "task": question.kind,
        "source": "COCO" if number % 2 else "ADE20K",
        "image": scene.draw(),
        "question": question.text,
        "choices": choices,
        "answer": f"({LETTERS[right]})",
        "prompt": f"{question.text} Select from the following choices.\n{listed}",
    }


def _hallusion(number: int, scene: Scene) -> dict:
    row = _pope(number, scene)
    return {
        "category": "VD",
        "subcategory": "figure",
        "visual_input": "1",
        "set_id": str(number // 4),
        "figure_id": str(number % 2),
        "question_id": str(number // 2 % 2),
        "sample_note": "",
        "question": row["question"],
        "gt_answer": "1" if row["answer"] == "yes" else "0",
        "gt_answer_details": json.dumps(scene.facts()),
        "filename": row["image_source"],
        "image": row["image"],
    }


def _chair(number: int, scene: Scene) -> dict:
    return {"question_id": str(number), "image": scene.draw(), "gt_object": ["bird", "boat"][: 1 + number % 2]}


def _amber(number: int, scene: Scene) -> dict:
    return {
        "question_id": number,
        "image": scene.draw(),
        "task_type": "generative",
        "truth": _things(scene),
        "hallu": ["tree", "person"],
        "text": "Describe this image",
    }


AOKVQA = {
    "image": Image(), "question_id": TEXT, "question": TEXT, "choices": TEXTS, "correct_choice_idx": NUMBER,
    "direct_answers": TEXT, "difficult_direct_answer": Value("bool"), "rationales": TEXTS,
}  # fmt: skip
SURGICAL = {"image": Image(), "question": TEXT, "answer": TEXT}
SEEDBENCH = {
    "image": List(Image()), "question": TEXT, "question_id": TEXT, "data_type": TEXT, "answer": TEXT,
    **{f"choice_{letter}": TEXT for letter in "abcd"},
}  # fmt: skip
POPE = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), TEXT)
GQA = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT)
HALLUSION = dict.fromkeys(
    (
        "category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "sample_note", "question",
        "gt_answer", "gt_answer_details", "filename",
    ),
    TEXT,
)  # fmt: skip
Maker = Callable[[int, Scene], dict]
MAKERS: dict[str, tuple[str, dict, Maker]] = {
    "granulon_aokvqa_direct": ("validation", AOKVQA, _aokvqa),
    "granulon_aokvqa_choice": ("validation", AOKVQA, _aokvqa),
    "granulon_cc12m": (
        "test",
        {"__key__": TEXT, "__url__": TEXT, "jpg": Image(), "txt": TEXT, "json": {"key": TEXT}},
        _cc12m,
    ),
    "granulon_imagenet21k_recap": (
        "test",
        {"image": Image(), "recaption": TEXT, "recaption_short": TEXT},
        _recap,
    ),
    "granulon_flux_reason": (
        "test",
        {"image": Image(), "caption_composition": TEXT, "caption_detail": TEXT},
        _flux,
    ),
    "granulon_surgvlm_phase": ("test", SURGICAL, _surgical),
    "granulon_surgvlm_instrument": ("test", SURGICAL, _surgical),
    "granulon_seedbench_recall": ("test", SEEDBENCH, _seedbench),
    "seedbench": ("test", SEEDBENCH, _seedbench),
    "pope": ("test", {**POPE, "image": Image()}, _pope),
    "gqa": ("testdev", {**GQA, "image": Image()}, _gqa),
    "mmvp": (
        "train",
        {"image": Image(), "Index": NUMBER, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT},
        _mmvp,
    ),
    "cv_bench": (
        "test",
        {
            "idx": NUMBER,
            "type": TEXT,
            "task": TEXT,
            "source": TEXT,
            "image": Image(),
            "question": TEXT,
            "choices": TEXTS,
            "answer": TEXT,
            "prompt": TEXT,
        },  # fmt: skip
        _cv_bench,
    ),
    "hallusion_bench_image": ("image", {**HALLUSION, "image": Image()}, _hallusion),
    "coco_cap_chair": ("test", {"question_id": TEXT, "image": Image(), "gt_object": TEXTS}, _chair),
    "amber_g": (
        "train",
        {
            "question_id": NUMBER,
            "image": Image(),
            "task_type": TEXT,
            "truth": TEXTS,
            "hallu": TEXTS,
            "text": TEXT,
        },  # fmt: skip
        _amber,
    ),
}
