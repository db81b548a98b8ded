"""How well granulon-small answers: exact match of greedy answers, beside what needs no image.

    python -m studies.small.measure --model build/train-small/model > build/train-small/measured.md

Sets are those of train/data/cutouts.py. "Other image" is the same question with the image of another row, "no image"
the language model alone, "commonest" the answer that training rows of this kind of question have most often.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from granulon.evaluation.statistics import interval
from granulon.hub.files import read_jsonl
from granulon.hub.inference import encode, generate, load_model, load_processor, open_image, question_about
from granulon.hub.text import markdown_table, with_interval
from granulon.train.data.cutouts import COLOURS, GROUNDS, KINDS, LEVEL_OF, NUMBERS, SIGNS, by_name
from granulon.train.vision_cache import VisionCache

SETS = {"scenes": "new scenes", "things": "new things", "phrasings": "new phrasings"}
LEVELS = ("coarse", "medium", "fine")
NAMING = ("place", "beside", "biggest", "single")
CHOICES = dict.fromkeys(("single", "place", "beside", "biggest", "tiny"), len(by_name())) | {  # answers to choose from
    "kinds": len(KINDS) * (len(KINDS) + 1) // 2, "ground": len(GROUNDS), "count": len(NUMBERS), "mostly": 2,
    "exists": 2, "letter": len(SIGNS), "colour": len(COLOURS),
}  # fmt: skip
BATCH, LONGEST = 32, 12  # rows at a time, tokens of an answer
VIEWS = ("semantic", "full", "pixel")


def sample(rows: list[dict], per_kind: int, seed: int = 0) -> list[dict]:
    """At most so many rows of each kind of question."""
    random, kept = np.random.default_rng(seed), []
    for kind in LEVEL_OF:
        own = [row for row in rows if row["kind"] == kind]
        kept += [own[place] for place in sorted(random.permutation(len(own))[:per_kind])]
    return kept


@torch.inference_mode()
def answers(model, processor, rows, folder: Path, granularity=None, view="auto", images="own") -> list[str]:
    """The greedy answers to rows, in order; `images` are each row's own, those of "other" rows, or "none"."""
    shift = len(rows) // 2 + 1 if images == "other" else 0
    pictures = [rows[(number + shift) % len(rows)]["image"] for number in range(len(rows))]
    found = []
    for start in tqdm(range(0, len(rows), BATCH), desc=f"{granularity or 'own level'}, {view}, {images}", leave=False):
        part = rows[start : start + BATCH]
        if images == "none":
            chats = [[{"role": "user", "content": row["question"]}] for row in part]
        else:
            opened = [open_image(str(folder / name)) for name in pictures[start : start + BATCH]]
            chats = [question_about(image, row["question"]) for image, row in zip(opened, part, strict=True)]
        levels = granularity[start : start + BATCH] if isinstance(granularity, list) else granularity
        prompt = encode(model, processor, chats, levels)
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
    return with_interval(
        values.mean(), *interval(lambda sums: sums[:, 0] / sums[:, 1], np.stack([values, np.ones_like(values)], 1))
    )


def commonest(train: list[dict]) -> dict[str, str]:
    by_kind = {}
    for row in train:
        by_kind.setdefault(row["kind"], Counter())[row["answer"]] += 1
    return {kind: counts.most_common(1)[0][0] for kind, counts in by_kind.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/train-small/model")
    parser.add_argument("--scenes", type=Path, default=Path("build/train-small/scenes"))
    parser.add_argument("--vision_cache", default="build/train-small/vision_cache")
    parser.add_argument("--per_kind", type=int, default=100, help="questions of each kind, at most")
    options = parser.parse_args()
    model = load_model(options.model)
    processor = load_processor(options.model, model.config)
    VisionCache(model.model, options.vision_cache).attach()
    usual = commonest(read_jsonl(options.scenes / "train.jsonl"))
    for name, title in SETS.items():
        rows = sample(read_jsonl(options.scenes / f"{name}.jsonl"), options.per_kind)
        kinds = np.array([row["kind"] for row in rows])
        own = right(rows, answers(model, processor, rows, options.scenes))
        other = right(rows, answers(model, processor, rows, options.scenes, images="other"))
        table = []
        groups = {kind: kinds == kind for kind in LEVEL_OF if (kinds == kind).any()}
        groups |= {f"*{level}*": np.array([LEVEL_OF[kind] == level for kind in kinds]) for level in LEVELS}
        groups |= {"*naming*": np.isin(kinds, NAMING)}
        guess = right(rows, [usual[kind] for kind in kinds])
        for group, chosen in groups.items():
            table.append([group, chosen.sum(), share(own[chosen]), share(other[chosen]), share(guess[chosen])])
        print(
            f"## {title}\n\n{markdown_table(['questions', 'n', 'right', 'other image', 'commonest'], table)}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
