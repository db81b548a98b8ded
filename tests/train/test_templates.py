"""The seed corpus: the same every time, in the corpus's form, and nothing of its test splits is seen in training."""

import json
from collections import Counter

import pytest

from granulon.hub.files import write_jsonl
from granulon.train.controller.corpus import (
    TRAIN,
    VALIDATION,
    check_rows,
    corpus_row,
    read_corpus,
    split_of,
)
from granulon.train.controller.templates import KINDS, LEVELS, SLOTS, TEST_SPLITS, seed_corpus

ROWS = seed_corpus()
COLUMNS = {
    "id", "question", "level", "level_probs", "confidence", "source", "annotator", "usage", "created_at", "kind",
    "phrasing", "split",
}  # fmt: skip


def column(name, split):
    return {row[name] for row in ROWS if row["split"] == split}


def test_the_corpus_is_the_same_every_time_and_marked_as_made_from_templates():
    assert seed_corpus() == ROWS
    assert all(set(row) == COLUMNS and row["source"] == "template" for row in ROWS)
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert 4000 < len(ROWS) <= 6000


def test_no_question_stands_twice_whatever_its_case():
    questions = Counter(row["question"].lower() for row in ROWS)
    assert max(questions.values()) == 1


def test_every_template_is_filled_and_every_slot_is_used():
    assert not any("{" in row["question"] for row in ROWS)
    templates = [text for kind in KINDS for texts in kind.templates.values() for text in texts]
    assert len(set(templates)) == len(templates)
    assert all(any(f"{{{name}}}" in text for text in templates) for name in SLOTS)
    assert all(len(set(fillers)) == len(fillers) for fillers in SLOTS.values())


def test_held_out_phrasings_and_kinds_are_not_in_training():
    trained = column("phrasing", TRAIN)
    assert column("phrasing", "test_questions") <= trained
    for split in (VALIDATION, "test_phrasings", "test_kinds"):
        assert not column("phrasing", split) & trained, split
    known = column("kind", TRAIN) | column("kind", VALIDATION)
    assert column("kind", "test_phrasings") == known
    assert not column("kind", "test_kinds") & known


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_thirty_kinds_of_which_eight_are_held_out(level):
    kinds = [kind for kind in KINDS if kind.level == level]
    assert len({kind.name for kind in kinds}) == len(kinds) >= 30
    assert sum("test_kinds" in kind.templates for kind in kinds) >= 8


def test_a_kind_stands_for_one_level_only():
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("words", ["how many", "what colour", "where", "is there", "in this photo"])
def test_no_level_has_a_turn_of_phrase_to_itself(words):
    levels = {row["level"] for row in ROWS if words in row["question"].lower()}
    assert len(levels) > 1


@pytest.mark.parametrize("split", (TRAIN, VALIDATION, *TEST_SPLITS))
def test_levels_are_about_equally_common_in_every_split(split):
    counts = Counter(row["level"] for row in ROWS if row["split"] == split)
    assert set(counts) == set(LEVELS)
    assert max(counts.values()) <= 1.12 * min(counts.values())


def test_every_kind_has_all_that_its_split_needs():
    for kind in KINDS:
        sizes = {split: len(templates) for split, templates in kind.templates.items()}
        assert sizes in ({TRAIN: 5, VALIDATION: 1, "test_phrasings": 2}, {"test_kinds": 4}), kind.name


def test_rows_pass_the_check_unchanged_and_come_back_from_a_file(tmp_path):
    assert check_rows(ROWS, list(LEVELS)) == ROWS
    write_jsonl(tmp_path / "corpus.jsonl", ROWS)
    assert read_corpus(tmp_path / "corpus.jsonl") == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_folder_of_files_gives_its_rows_their_split(tmp_path):
    (tmp_path / "validation.jsonl").write_text('{"question": "a?", "level": "fine"}\n\n')
    (tmp_path / "rest.jsonl").write_text('{"question": "b?", "level": "fine"}\n')
    rows = {row["question"]: row for row in read_corpus(tmp_path)}
    assert rows["a?"]["split"] == "validation" and "split" not in rows["b?"]


def test_what_a_row_leaves_out_follows_from_the_rest():
    rows = [
        {"question": "a?", "level": "fine"},
        {"question": "b?", "level_probs": {"coarse": 0.7, "fine": 0.3}},
        {"question": "a?", "level": "coarse", "level_probs": None},
    ]
    first, second, third = check_rows(rows, list(LEVELS))
    assert first["level_probs"] == {"coarse": 0, "medium": 0, "fine": 1}
    assert second["level"] == "coarse" and second["level_probs"]["medium"] == 0
    assert first["split"] == third["split"] == split_of("a?")
    assert "split" not in rows[0]


def test_rows_without_split_are_divided_in_the_same_shares_every_time():
    splits = Counter(split_of(str(number)) for number in range(3000))
    assert 0.76 < splits["train"] / 3000 < 0.84
    assert 0.08 < splits["validation"] / 3000 < 0.12


def test_rows_of_one_question_with_other_keys_have_other_ids():
    ids = {corpus_row("a?", {"fine": 1.0}, "measured", key=key)["id"] for key in ("x", "y", "x")}
    assert len(ids) == 2


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "the corpus is empty"),
        ([{"question": "a?"}], "row 0 .* expected question, and level"),
        ([{"level": "fine"}], "row 0 .* expected question"),
        ([{"question": " ", "level": "fine"}], "expected text"),
        ([{"question": "a?", "level": "huge", "id": "x1"}], r"row 0 .*x1.*\['huge'\]; the model has \['coarse'"),
        ([{"question": "a?", "level_probs": {"tiny": 1.0}}], r"\['tiny'\]; the model has"),
        ([{"question": "a?", "level_probs": {"fine": 0.5}}], "whose sum is 1"),
        ([{"question": "a?", "level_probs": {"fine": float("nan"), "coarse": 1}}], "whose sum is 1"),
        ([{"question": "a?", "level_probs": {"fine": 1.5, "coarse": -0.5}}], "whose sum is 1"),
        ([{"question": "a?", "level_probs": [0, 0, 1]}], "expected a mapping"),
        ([{"question": "a?", "level": "fine", "split": "dev"}], "split 'dev'; expected train"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        check_rows(rows, list(LEVELS))


@pytest.mark.parametrize(
    "line, message",
    [("{", "corpus.jsonl:2: the line is not JSON"), ("[1]", "corpus.jsonl:2: the line is a JSON list")],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "corpus.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path / "corpus.jsonl")


def test_a_corpus_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(ValueError, match="is not a corpus"):
            read_corpus(path)
