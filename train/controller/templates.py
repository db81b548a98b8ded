"""A granularity corpus made from templates, so that a controller can be trained without a network or an annotator.

Each kind of question in templates.yaml is written for one level: coarse asks for the gist of the whole, medium for
things and how they relate, fine for small details, text and counts of small parts. Nobody measured that; the rows say
source "template". A controller that learns from templates learns their words first of all, so three things are held
out:

    test_questions  templates of the train split, filled with other words
    test_phrasings  kinds of the train split, asked in other templates
    test_kinds      kinds that no other split knows

The validation split has templates of its own, so that early stopping watches something other than known wording.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import yaml

from .corpus import TEMPLATE, TRAIN, VALIDATION, corpus_row

LEVELS = ("coarse", "medium", "fine")
TEST_SPLITS = ("test_questions", "test_phrasings", "test_kinds")
CREATED = "2026-11-23T00:00:00+00:00"  # the rows are the same whenever they are made
# Questions made of one template, at most.
MOST = {TRAIN: 8, VALIDATION: 6, "test_questions": 2, "test_phrasings": 6, "test_kinds": 8}

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SLOTS = {name: tuple(fillers.split(", ")) for name, fillers in _DATA["slots"].items()}


@dataclass(frozen=True)
class Kind:
    """A kind of question: its level, and its templates by split; a kind that is held out has only "test_kinds"."""

    name: str
    level: str
    templates: dict[str, tuple[str, ...]]


def _known(name: str, level: str, templates: list[str]) -> Kind:
    """A kind of the train split: five templates for training, one for validation, the rest held out."""
    parts = {TRAIN: templates[:5], VALIDATION: templates[5:6], "test_phrasings": templates[6:]}
    return Kind(name, level, {split: tuple(part) for split, part in parts.items()})


KINDS = (
    *(_known(name, level, texts) for level in LEVELS for name, texts in _DATA["known"][level].items()),
    *(
        Kind(name, level, {"test_kinds": tuple(texts)})
        for level in LEVELS
        for name, texts in _DATA["held_out"][level].items()
    ),
)


def seed_corpus() -> list[dict]:
    """
    All rows of the seed corpus, the same at every call, in the form of corpus.py.

    Returns:
        list of dict: with `split`, `kind` and `phrasing` (the template) beside the corpus's columns; no question
        stands in two rows.
    """
    rows, asked = [], set()
    for kind in KINDS:
        for split, templates in kind.templates.items():
            for template in templates:
                for part, question in _questions(template, split):
                    if question not in asked:
                        asked.add(question)
                        rows.append(_row(kind, template, part, question))
    return rows


def _questions(template: str, split: str) -> list[tuple[str, str]]:
    """The template filled in several ways, each with its split; of training's some are kept for test_questions."""
    names = [name for name in SLOTS if f"{{{name}}}" in template]
    filled = [
        template.format(**dict(zip(names, words, strict=True))) for words in product(*(SLOTS[name] for name in names))
    ]
    Random(template).shuffle(filled)
    if split != TRAIN:
        return [(split, question) for question in filled[: MOST[split]]]
    parts = ["test_questions"] * MOST["test_questions"] + [TRAIN] * MOST[TRAIN]
    return list(zip(parts, filled, strict=False))


def _row(kind: Kind, template: str, split: str, question: str) -> dict:
    return corpus_row(
        question,
        {level: float(level == kind.level) for level in LEVELS},
        TEMPLATE,
        created_at=CREATED,
        kind=kind.name,
        phrasing=template,
        split=split,
    )
