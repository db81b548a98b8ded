"""A granularity corpus made from templates, so that a controller can be trained without a network or an annotator.

Each kind of question in templates.yaml is written for one level: coarse asks for the gist of the whole, medium for
things and how they relate, fine for small details, text and counts of small parts. These labels are not measured; the
rows say source "template". A controller trained on templates learns their words first of all, so three things are held
out:

    test_questions  templates of the train split, filled with other words
    test_phrasings  kinds of the train split, asked in other templates
    test_kinds      kinds that are in no other split

The validation split has its own templates, so that early stopping does not depend on known wording.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import yaml

from .corpus import TEMPLATE, TRAIN, VALIDATION, corpus_row

LEVELS = ("coarse", "medium", "fine")
TEST_SPLITS = ("test_questions", "test_phrasings", "test_kinds")
CREATED = "2026-11-23T00:00:00+00:00"  # fixed, so that the rows are the same at every call
# Maximum number of questions from one template.
MAX_QUESTIONS = {TRAIN: 8, VALIDATION: 6, "test_questions": 2, "test_phrasings": 6, "test_kinds": 8}

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SLOTS = {name: tuple(fillers.split(", ")) for name, fillers in _DATA["slots"].items()}


@dataclass(frozen=True)
class Kind:
    """A kind of question: its level, and its templates by split; a held-out kind has only "test_kinds"."""

    name: str
    level: str
    templates: dict[str, tuple[str, ...]]


def _kinds() -> tuple[Kind, ...]:
    """Known kinds have five templates for training and one for validation; the rest and some kinds are held out."""
    kinds = []
    for level in LEVELS:
        for name, texts in _DATA["known"][level].items():
            parts = {TRAIN: texts[:5], VALIDATION: texts[5:6], "test_phrasings": texts[6:]}
            kinds.append(Kind(name, level, {split: tuple(part) for split, part in parts.items()}))
    for level in LEVELS:
        for name, texts in _DATA["held_out"][level].items():
            kinds.append(Kind(name, level, {"test_kinds": tuple(texts)}))
    return tuple(kinds)


KINDS = _kinds()


def seed_corpus() -> list[dict]:
    """
    All rows of the seed corpus, the same at every call, in the form of corpus.py.

    Returns:
        list of dict: with `split`, `kind` and `phrasing` (the template) beside the corpus's columns; no two rows have
        the same question.
    """
    rows = {}
    for kind in KINDS:
        for split, templates in kind.templates.items():
            for template in templates:
                for part, question in _questions(template, split):
                    rows.setdefault(question, (kind, template, part))
    return [
        corpus_row(
            question,
            {level: float(level == kind.level) for level in LEVELS},
            TEMPLATE,
            created_at=CREATED,
            kind=kind.name,
            phrasing=template,
            split=part,
        )
        for question, (kind, template, part) in rows.items()
    ]


def _questions(template: str, split: str) -> list[tuple[str, str]]:
    """(split, question) for several fillings of a template; some of training's are kept for test_questions."""
    names = [name for name in SLOTS if f"{{{name}}}" in template]
    filled = [
        template.format(**dict(zip(names, words, strict=True))) for words in product(*(SLOTS[name] for name in names))
    ]
    Random(template).shuffle(filled)
    parts = ["test_questions", TRAIN] if split == TRAIN else [split]
    splits = [part for part in parts for _ in range(MAX_QUESTIONS[part])]
    return list(zip(splits, filled, strict=False))
