"""Eight generated rows for every task, in the columns of its data set, so that each task can be tested offline.

The rows are drawn scenes and questions about them. Figures computed on them say nothing about a model.
"""

import os
import shutil
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict

from granulon.train.data.scenes import ANSWERS, Question, make_questions, make_scene

from .metrics import LETTERS

ROWS = 8
FIRST_SCENE = 9_000_000  # far from the scenes of all training data
MAX_NEW_TOKENS = 16
# The demo's model knows the questions alone, without an instruction.
WITHOUT_INSTRUCTION = ("granulon_aokvqa_direct", "granulon_seedbench_recall", "gqa")
# By task: the split that is evaluated.
SPLITS = {
    **dict.fromkeys(("granulon_aokvqa_direct", "granulon_aokvqa_choice"), "validation"),
    **dict.fromkeys(("granulon_cc12m", "granulon_imagenet21k_recap", "granulon_flux_reason"), "test"),
    **dict.fromkeys(("granulon_surgvlm_phase", "granulon_surgvlm_instrument"), "test"),
    **dict.fromkeys(("granulon_seedbench_recall", "seedbench", "pope", "cv_bench", "coco_cap_chair"), "test"),
    **dict.fromkeys(("mmvp", "amber_g"), "train"),
    "gqa": "testdev",
    "hallusion_bench_image": "image",
}


def write_rows(task: str, config: dict, output: Path) -> dict:
    """
    Write the rows of a task to `output/rows`.

    Returns:
        dict: entries that replace those of the task's configuration, so that lmms-eval reads the rows.

    Raises:
        ValueError: there are no sample rows for this task.
    """
    if task not in SPLITS:
        raise ValueError(f"there are no sample rows for {task}; use its data, or one of {', '.join(SPLITS)}")
    folder = output / "rows" / task
    if not folder.exists():
        rows = Dataset.from_list([_row(task, number) for number in range(ROWS)])
        draft = folder.with_name(f"{task}.{os.getpid()}.tmp")
        DatasetDict({SPLITS[task]: rows}).save_to_disk(draft)
        try:
            draft.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    options = config.get("generation_kwargs") or {}
    limit = min(options.get("max_new_tokens") or MAX_NEW_TOKENS, MAX_NEW_TOKENS)
    instruction = {"default": {"pre_prompt": "", "post_prompt": ""}}
    has_instruction = task in WITHOUT_INSTRUCTION and config.get("lmms_eval_specific_kwargs") is not None
    return {
        "dataset_path": str(folder),
        "dataset_name": None,
        "dataset_kwargs": {"load_from_disk": True},
        "generation_kwargs": {**options, "max_new_tokens": limit},
        # GQA's joins images from the Hub; SEED-Bench's leaves out videos, and in the authors' protocol the first rows
        **({"process_docs": None} if task in ("gqa", "granulon_seedbench_recall") else {}),
        **({"lmms_eval_specific_kwargs": instruction} if has_instruction else {}),
    }


def _row(task: str, number: int) -> dict:
    """A row with the columns of all tasks, in the form of one task where they differ."""
    pair = task == "mmvp"  # two questions each, with two choices
    scene = make_scene(FIRST_SCENE + number)
    questions = make_questions(scene)
    question = questions[(number // 2 if pair else number) % len(questions)]
    choices, correct = _choices(question, number, count=2 if pair else 4)
    letter, image = LETTERS[correct], scene.draw()
    caption = "A picture with " + ", ".join(f"{kind} {fact}" for kind, fact in scene.facts().items()) + "."
    things = list(dict.fromkeys(scene.facts().values()))
    row = {
        "image": image, "question": question.text, "question_id": str(number), "answer": question.answer,
        "choices": choices, "correct_choice_idx": correct, "caption_detail": caption, "recaption": caption,
        "direct_answers": str([question.answer] * 7 + [choices[correct - 1]] * 3),
        "gt_object": ["bird", "boat"][: 1 + number % 2], "truth": things, "hallu": ["tree", "person"],
    }  # fmt: skip
    if task == "granulon_cc12m":
        row |= {"jpg": image, "txt": caption}
    elif task in ("granulon_seedbench_recall", "seedbench"):
        row |= {"image": [image], "answer": letter, "data_type": "image"}
        row |= {f"choice_{name.lower()}": choice for name, choice in zip(LETTERS, choices)}
    elif task in ("pope", "hallusion_bench_image"):
        absent = [answer for answers in ANSWERS.values() for answer in answers if answer not in things]
        thing = Random(number).choice(things if number % 2 else absent)
        row |= {"question": f"Is there a {thing} in the image?", "answer": "yes" if number % 2 else "no"}
        row |= {"category": "random", "subcategory": "", "gt_answer": str(number % 2), "gt_answer_details": caption}
        if task == "hallusion_bench_image":
            row |= {"set_id": str(number // 4), "figure_id": str(number % 2), "question_id": str(number // 2 % 2)}
    elif task == "mmvp":
        row |= {"Index": number + 1, "Question": question.text, "Correct Answer": f"({letter.lower()})"}
        row["Options"] = _options(choices, LETTERS.lower(), " ")
    elif task == "cv_bench":
        row |= {"idx": number, "type": "2D", "task": question.kind, "source": ("ADE20K", "COCO")[number % 2]}
        row["prompt"] = f"{question.text} Select from the following choices.\n{_options(choices, LETTERS)}"
        row["answer"] = f"({letter})"
    return row


def _choices(question: Question, seed: int, count: int) -> tuple[list[str], int]:
    """`count` choices, from answers of the question's kind or, if too few, of other kinds; the index of its answer."""
    random = Random(seed)
    others = [answer for answer in ANSWERS[question.kind] if answer != question.answer]
    more = [answer for kind, answers in ANSWERS.items() if kind != question.kind for answer in answers]
    random.shuffle(others)
    choices = list(dict.fromkeys([question.answer, *others, *more]))[:count]
    random.shuffle(choices)
    return choices, choices.index(question.answer)


def _options(choices: list[str], letters: str, separator: str = "\n") -> str:
    return separator.join(f"({letter}) {choice}" for letter, choice in zip(letters, choices))
