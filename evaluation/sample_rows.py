"""Eight generated rows for every task, in the columns of its data set, so that each task can be tested offline.

The rows are drawn scenes and questions about them. Figures computed on them say nothing about a model.
"""

import os
import shutil
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict

from granulon.train.data.scenes import ANSWERS, Scene, make_questions, make_scene

from .metrics import LETTERS

ROWS = 8
FIRST_SCENE = 9_000_000  # far from the scenes of all training data
MAX_NEW_TOKENS = 16
# The demo's model knows the questions alone, without an instruction.
WITHOUT_INSTRUCTION = ("granulon_aokvqa_direct", "granulon_seedbench_recall", "gqa")


def write_rows(task: str, config: dict, output: Path) -> dict:
    """
    Write the rows of a task to `output/rows`.

    Returns:
        dict: entries that replace those of the task's configuration, so that lmms-eval reads the rows.

    Raises:
        ValueError: there are no sample rows for this task.
    """
    if task not in MAKERS:
        raise ValueError(f"there are no sample rows for {task}; use its data, or one of {', '.join(MAKERS)}")
    split, make = MAKERS[task]
    folder = output / "rows" / task
    if not folder.exists():
        rows = Dataset.from_list([make(number, make_scene(FIRST_SCENE + number)) for number in range(ROWS)])
        draft = folder.with_name(f"{task}.{os.getpid()}.tmp")
        DatasetDict({split: rows}).save_to_disk(draft)
        try:
            draft.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    options = config.get("generation_kwargs") or {}
    limit = min(options.get("max_new_tokens") or MAX_NEW_TOKENS, MAX_NEW_TOKENS)
    instruction = {"default": {"pre_prompt": "", "post_prompt": ""}}
    return {
        "dataset_path": str(folder),
        "dataset_name": None,
        "dataset_kwargs": {"load_from_disk": True},
        "generation_kwargs": {**options, "max_new_tokens": limit},
        **({"process_docs": None} if task == "gqa" else {}),  # joins images from the Hub
        **({"lmms_eval_specific_kwargs": instruction} if task in WITHOUT_INSTRUCTION else {}),
    }


def _question(number: int, scene: Scene, count: int = 4) -> dict:
    """A question with image, answer, and `count` choices, from answers of its kind or, if too few, of other kinds."""
    questions = make_questions(scene)
    question, random = questions[number % len(questions)], Random(number)
    others = [answer for answer in ANSWERS[question.kind] if answer != question.answer]
    more = [answer for kind, answers in ANSWERS.items() if kind != question.kind for answer in answers]
    random.shuffle(others)
    choices = list(dict.fromkeys([question.answer, *others, *more]))[:count]
    random.shuffle(choices)
    return {
        "image": scene.draw(),
        "question": question.text,
        "answer": question.answer,
        "choices": choices,
        "correct": choices.index(question.answer),
    }


def _options(choices: list[str], separator: str, letters: str = LETTERS) -> str:
    return separator.join(f"({letter}) {choice}" for letter, choice in zip(letters, choices))


def _things(scene: Scene) -> list[str]:
    return list(dict.fromkeys(scene.facts().values()))


def _caption(scene: Scene) -> str:
    return "A picture with " + ", ".join(f"{kind} {fact}" for kind, fact in scene.facts().items()) + "."


def _aokvqa(number: int, scene: Scene) -> dict:
    row = _question(number, scene)
    answers = [row["answer"]] * 7 + [row["choices"][row["correct"] - 1]] * 3
    return row | {"correct_choice_idx": row["correct"], "direct_answers": str(answers)}


def _seedbench(number: int, scene: Scene) -> dict:
    row = _question(number, scene)
    choices = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, row["choices"])}
    return choices | {
        "image": [row["image"]],
        "question": row["question"],
        "question_id": str(number),
        "data_type": "image",
        "answer": LETTERS[row["correct"]],
    }


def _pope(number: int, scene: Scene) -> dict:
    absent = [answer for answers in ANSWERS.values() for answer in answers if answer not in _things(scene)]
    thing = Random(number).choice(_things(scene) if number % 2 else absent)
    return {
        "question_id": str(number),
        "question": f"Is there a {thing} in the image?",
        "answer": "yes" if number % 2 else "no",
        "image": scene.draw(),
        "category": "random",
    }


def _mmvp(number: int, scene: Scene) -> dict:
    row = _question(number // 2, scene, count=2)
    return {
        "image": row["image"],
        "Index": number + 1,
        "Question": row["question"],
        "Options": _options(row["choices"], " ", LETTERS.lower()),
        "Correct Answer": f"({LETTERS[row['correct']].lower()})",
    }


def _cv_bench(number: int, scene: Scene) -> dict:
    row = _question(number, scene)
    return row | {
        "idx": number,
        "type": "2D",
        "task": "Count",
        "source": "COCO" if number % 2 else "ADE20K",
        "answer": f"({LETTERS[row['correct']]})",
        "prompt": f"{row['question']} Select from the following choices.\n" + _options(row["choices"], "\n"),
    }


def _hallusion(number: int, scene: Scene) -> dict:
    row = _pope(number, scene)
    return row | {
        "category": "VD",
        "subcategory": "figure",
        "set_id": str(number // 4),
        "figure_id": str(number % 2),
        "question_id": str(number // 2 % 2),
        "gt_answer": str(number % 2),
        "gt_answer_details": _caption(scene),
    }


def _amber(number: int, scene: Scene) -> dict:
    return {
        "question_id": number,
        "image": scene.draw(),
        "task_type": "generative",
        "truth": _things(scene),
        "hallu": ["tree", "person"],
        "text": "Describe this image",
    }


# By task: the split that is evaluated, and a function of number and scene that makes a row.
MAKERS = {
    "granulon_aokvqa_direct": ("validation", _aokvqa),
    "granulon_aokvqa_choice": ("validation", _aokvqa),
    "granulon_cc12m": ("test", lambda number, scene: {"jpg": scene.draw(), "txt": _caption(scene)}),
    "granulon_imagenet21k_recap": (
        "test",
        lambda number, scene: {"image": scene.draw(), "recaption": _caption(scene)},
    ),
    "granulon_flux_reason": (
        "test",
        lambda number, scene: {"image": scene.draw(), "caption_detail": _caption(scene), "caption_composition": ""},
    ),
    "granulon_surgvlm_phase": ("test", _question),
    "granulon_surgvlm_instrument": ("test", _question),
    "granulon_seedbench_recall": ("test", _seedbench),
    "seedbench": ("test", _seedbench),
    "pope": ("test", _pope),
    "gqa": ("testdev", _question),
    "mmvp": ("train", _mmvp),
    "cv_bench": ("test", _cv_bench),
    "hallusion_bench_image": ("image", _hallusion),
    "coco_cap_chair": (
        "test",
        lambda number, scene: {
            "question_id": str(number), "image": scene.draw(), "gt_object": ["bird", "boat"][: 1 + number % 2]
        },
    ),
    "amber_g": ("train", _amber),
}  # fmt: skip
