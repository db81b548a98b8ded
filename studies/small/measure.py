"""How well granulon-small answers: exact match of greedy answers, beside what needs no image.

    python -m studies.small.measure --model build/train-small/model > build/train-small/measured.md

Sets are those of train/data/cutouts.py. "Other image" is the same question with the image of another row, "commonest"
the answer that training rows of this kind of question have most often.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from granulon.evaluation.statistics import mean_and_interval
from granulon.hub.files import read_jsonl
from granulon.hub.inference import encode, generate, load_model, load_processor, open_image, question_about
from granulon.hub.text import markdown_table, with_interval
from granulon.train.controller.fit import controller_logits, question_states
from granulon.train.data import cutouts
from granulon.train.data.cutouts import COLOURS, GROUNDS, KINDS, LEVEL_OF, LEVELS, NUMBERS, SIGNS, by_name
from granulon.train.vision_cache import VisionCache

SETS = {"scenes": "new scenes", "things": "new things", "phrasings": "new phrasings"}
NAMING = ("place", "beside", "biggest", "single")
CHOICES = dict.fromkeys(("single", "place", "beside", "biggest", "tiny"), len(by_name())) | {  # answers to choose from
    "kinds": len(KINDS) * (len(KINDS) + 1) // 2, "ground": len(GROUNDS), "count": len(NUMBERS), "mostly": 2,
    "exists": 2, "letter": len(SIGNS), "colour": len(COLOURS),
}  # fmt: skip
BATCH, LONGEST = 32, 12  # rows at a time, tokens of an answer


def sample(rows: list[dict], per_kind: int, seed: int = 0) -> list[dict]:
    """At most so many rows of each kind of question."""
    random, kept = np.random.default_rng(seed), []
    for kind in LEVEL_OF:
        own = [row for row in rows if row["kind"] == kind]
        kept += [own[place] for place in sorted(random.permutation(len(own))[:per_kind])]
    return kept


@torch.inference_mode()
def answers(model, processor, rows, folder: Path, granularity=None, view="auto", images="own") -> list[str]:
    """The greedy answers to rows, in order; `images` are each row's own, or those of "other" rows."""
    shift = len(rows) // 2 + 1 if images == "other" else 0
    pictures = [rows[(number + shift) % len(rows)]["image"] for number in range(len(rows))]
    found = []
    for start in tqdm(range(0, len(rows), BATCH), desc=f"{granularity or 'own level'}, {view}, {images}", leave=False):
        part = rows[start : start + BATCH]
        opened = [open_image(str(folder / name)) for name in pictures[start : start + BATCH]]
        chats = [question_about(image, row["question"]) for image, row in zip(opened, part, strict=True)]
        prompt = encode(model, processor, chats, granularity)
        found += generate(model, processor, prompt, visual_view=view, max_new_tokens=LONGEST, do_sample=False)[0]
    return found


def right(rows: list[dict], said: list[str]) -> np.ndarray:
    """Which answers are right, to the letter but for case and a full stop."""

    def plain(text):
        return text.strip().rstrip(".").lower()

    return np.array([plain(a) == plain(row["answer"]) for row, a in zip(rows, said, strict=True)], float)


def share(values: np.ndarray) -> str:
    """A mean and its 95% bootstrap interval."""
    if not len(values):
        return "-"
    return with_interval(*mean_and_interval(values))


def commonest(train: list[dict]) -> dict[str, str]:
    """The answer that each kind of question has most often."""
    answers_of = {}
    for row in train:
        answers_of.setdefault(row["kind"], Counter())[row["answer"]] += 1
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers_of.items()}


def by_kind(model, processor, rows: list[dict], folder: Path, usual: dict[str, str]) -> str:
    """Accuracy by kind of question, by level and of all naming, beside what needs no image."""
    kinds = np.array([row["kind"] for row in rows])
    columns = [right(rows, answers(model, processor, rows, folder, images=images)) for images in ("own", "other")]
    columns.append(right(rows, [usual[kind] for kind in kinds]))
    groups = {kind: kinds == kind for kind in LEVEL_OF if (kinds == kind).any()}
    groups |= {f"*{level}*": np.array([LEVEL_OF[kind] == level for kind in kinds]) for level in LEVELS}
    groups |= {"*naming*": np.isin(kinds, NAMING)}
    lines = [[group, own.sum(), *(share(column[own]) for column in columns)] for group, own in groups.items()]
    return markdown_table(["questions", "n", "right", "other image", "commonest"], lines)


def by_policy(model, processor, rows: list[dict], folder: Path, view: str) -> str:
    """Accuracy in a view when the level is fixed, meant, drawn, the controller's, or the best of each question."""
    fixed_GN = np.stack([right(rows, answers(model, processor, rows, folder, level, view)) for level in LEVELS])
    states = question_states(model, processor, [row["question"] for row in rows])
    with torch.inference_mode():
        chosen_N = controller_logits(model.model.granularity_controller, states).argmax(-1).numpy()
    meant_N = np.array([LEVELS.index(LEVEL_OF[row["kind"]]) for row in rows])
    row_N = np.arange(len(rows))
    policies = {level: fixed_GN[number] for number, level in enumerate(LEVELS)} | {
        "as the question is meant": fixed_GN[meant_N, row_N],
        "at random": fixed_GN.mean(0),
        "the controller's": fixed_GN[chosen_N, row_N],
        "the best of each question (oracle)": fixed_GN.max(0),
    }
    patches = (cutouts.SIDE // cutouts.PATCH) ** 2
    keep = np.array([level["keep"] for level in model.config.granularities])
    read = {level: float(keep[number]) for number, level in enumerate(LEVELS)}
    read |= {"as the question is meant": keep[meant_N].mean(), "at random": keep.mean()}
    read |= {"the controller's": keep[chosen_N].mean()}
    lines = []
    for name, values in policies.items():
        tokens = read.get(name)
        tokens = "" if tokens is None else f"{tokens + (patches if view == 'full' else 0):.1f}"
        parts = [share(values[meant_N == number]) for number in range(len(LEVELS))]
        lines.append([name, tokens, share(values), *parts])
    return markdown_table(["level", "image tokens", "all", *(f"{level} questions" for level in LEVELS)], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/train-small/model")
    parser.add_argument("--scenes", type=Path, default=Path("build/train-small/scenes"))
    parser.add_argument("--vision_cache", default="build/train-small/vision_cache")
    parser.add_argument("--per_kind", type=int, default=100, help="questions of each kind, at most")
    parser.add_argument("--per_kind_in_full", type=int, default=20, help="the same for the full view, which is slower")
    options = parser.parse_args()
    model = load_model(options.model)
    processor = load_processor(options.model, model.config)
    VisionCache(model.model, options.vision_cache).attach()
    usual = commonest(read_jsonl(options.scenes / "train.jsonl"))
    for name, title in SETS.items():
        rows = sample(read_jsonl(options.scenes / f"{name}.jsonl"), options.per_kind)
        print(f"## {title}\n\n{by_kind(model, processor, rows, options.scenes, usual)}\n", flush=True)
    rows = read_jsonl(options.scenes / "scenes.jsonl")
    for view, count in (("semantic", options.per_kind), ("full", options.per_kind_in_full)):
        table = by_policy(model, processor, sample(rows, count), options.scenes, view)
        print(f"## Levels in the {view} view\n\n{table}\n", flush=True)
    few = sample(rows, options.per_kind_in_full)
    pixel = right(few, answers(model, processor, few, options.scenes, view="pixel"))
    print(f"Pixel tokens alone, {len(few)} questions: {share(pixel)}")


if __name__ == "__main__":
    main()
