"""Answers during training: some rows of the evaluation data are answered as a user would see it, and compared."""

from itertools import islice

import numpy as np
import torch
from trl import prepare_multimodal_messages

from granulon.hub.inference import encode, generate
from granulon.hub.text import exact_match, words

from .meters import Meter

MARGIN = 8  # tokens by which an answer may be longer than the longest reference of its batch


def exact_matches(trainer, model, rows) -> dict[str, float]:
    """
    The share of up to `eval_answers` rows whose greedy answer has the words of their own, by all processes together.

    Images are read as `generate` does by default: at the controller's level (with `level_from_rows` the row's), in the
    view that the level names. Rows whose answer has no words are left out.

    Args:
        model: the trainer's, without wrappers: a `GranulonForConditionalGeneration`.
        rows: a data set, of which evenly spaced rows are taken and divided among the processes, or a stream, of which
            the first are taken.

    Returns:
        "exact_match", and "exact_match/LEVEL" of rows with images that were read at this level.
    """
    args, names = trainer.args, trainer.level_names
    meter = Meter(["exact_match", *(f"exact_match/{name}" for name in names)], args.device)
    size = args.per_device_eval_batch_size
    own = sorted(_own_rows(rows, args), key=lambda row: len(row["answer"]))  # batches of similar length
    for start in range(0, len(own), size):
        batch = own[start : start + size]
        for row, level, answer in zip(batch, *_answer(trainer, model, batch), strict=True):
            correct = exact_match(answer, row["answer"])
            for name in ("exact_match", *([f"exact_match/{names[level]}"] if row["images"] and names else [])):
                meter.add(name, correct, 1)
    return meter.read(trainer.accelerator)


def _own_rows(rows, args) -> list[dict]:
    """This process's rows, with the text of their answer."""
    if hasattr(rows, "__len__"):
        places = np.linspace(0, len(rows) - 1, min(args.eval_answers, len(rows))).round().astype(int).tolist()
        taken = [rows[place] for place in places[args.process_index :: args.world_size]]
    else:
        taken = islice(rows, -(-args.eval_answers // args.world_size))
    taken = [dict(row) | {"answer": _text(row["completion"])} for row in taken]
    return [row for row in taken if words(row["answer"])]


def _text(completion: list[dict]) -> str:
    """The first answer of a completion, which may go on with further questions."""
    content = completion[0]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)


def _shown(row: dict) -> list:
    """The images of a row's prompt; later ones stand between its answers."""
    parts = [part for message in row["prompt"] for part in message["content"] if not isinstance(part, str)]
    places = sum(part["type"] == "image" for part in parts)
    return row["images"][:places] if places else row["images"]


@torch.no_grad()
def _answer(trainer, model, rows: list[dict]) -> tuple[list[int], list[str]]:
    """The level that each row was read at (0 without images) and its answer."""
    processor = trainer.processing_class
    conversations = [prepare_multimodal_messages(row["prompt"], _shown(row)) for row in rows]
    named = None
    if trainer.args.level_from_rows and trainer.level_names:
        named = [level[0] if isinstance(level, list) else level for level in (row.get("granularity") for row in rows)]
    longest = max(map(len, processor.tokenizer([row["answer"] for row in rows])["input_ids"]))
    with trainer.accelerator.autocast():
        prompt = encode(model, processor, conversations, named)
        options = {"do_sample": False, "max_new_tokens": longest + MARGIN, "use_cache": True}
        answers, _ = generate(model, processor, prompt, **options)
    index_B = None if prompt.visual is None else prompt.visual.granularity_index
    return [0] * len(rows) if index_B is None else index_B.tolist(), answers
