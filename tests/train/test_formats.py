"""Data as it is on the Hub: every format loads by its columns, and what cannot be used says why."""

import io

import datasets
import pytest
from conftest import make_image
from datasets import Dataset, Features, Value

from granulon.hub.files import read_jsonl
from granulon.train.data import load_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png() -> bytes:
    file = io.BytesIO()
    make_image(0).save(file, "PNG")
    return file.getvalue()


IMAGE = {"bytes": png(), "path": "0.png"}
CHOICES = ["a dog", "a cat", "1"]
ASKED = "What is it?\nA. a dog\nB. a cat\nC. 1\nAnswer with the option's content."
HELLO = {"from": "gpt", "value": "Hello!"}
# By name: a row with an image, the texts of its conversation, and a row that cannot be used, with its reason.
ROWS = {
    "The Cauldron, FineVision": (
        {"images": [IMAGE], "texts": [{"user": "Q", "assistant": "A"}, {"user": "R", "assistant": "B"}]},
        ["Q", "A", "R", "B"],
        {"images": [IMAGE], "texts": [{"user": "Q", "assistant": None}]},
        "found NoneType",
    ),
    "role and content": (
        {"conversations": [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]},
        ["Q", "A"],
        {"conversations": [{"role": "tool", "content": "Q"}]},
        "the role 'tool'",
    ),
    "answers of several people": (
        {"question": "Q", "answers": ["no", "yes", "yes"]},
        ["Q", "yes"],
        {"question": "Q", "answers": []},
        "expected a list of texts",
    ),
    "answers with more": (
        {"question": "Q", "answers": [{"answer": "two", "answer_id": 1}, {"answer": "one", "answer_id": 2}]},
        ["Q", "two"],
        {"question": None, "answers": [{"answer": "two", "answer_id": 1}]},
        "it has no question",
    ),
    "multiple choice by number": (
        {"question": "What is it?", "choices": CHOICES, "correct_choice_idx": 1},
        [ASKED, "a cat"],
        {"question": "What is it?", "choices": CHOICES, "correct_choice_idx": 3},
        "its answer is 3",
    ),
    "multiple choice by letter": (
        {"question": "What is it?", "options": CHOICES, "answer": "b"},
        [ASKED, "a cat"],
        {"question": "What is it?", "options": CHOICES, "answer": "D"},
        "its answer is 'D'",
    ),
    "multiple choice by text": (
        {"question": "What is it?", "choices": CHOICES, "answer": "1"},
        [ASKED, "1"],
        {"question": "What is it?", "choices": ["alone"], "answer": "alone"},
        "expected a list of 2 to 26",
    ),
    "instruction": (
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        ["Translate.\nHaus", "house"],
        {"instruction": "Translate.", "input": "Haus", "output": ""},
        "an answer without text",
    ),
    "an answer first": (
        {"conversations": [HELLO, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        ["Q", "A"],
        {"conversations": [HELLO, {"from": "human", "value": "Q"}]},
        "does not end with an answer",
    ),
    "a video": (
        {"question": "Q", "answer": "A", "image": IMAGE, "video": None},
        ["Q", "A"],
        {"question": "Q", "answer": "A", "image": IMAGE, "video": "clip.mp4"},
        "it has video, and the model sees images alone",
    ),
    "marks of other media": (
        {"question": "Is a < b > c?", "answer": "<video>"},
        ["Is a < b > c?", "<video>"],
        {"question": "<video>\nWhat happens?", "answer": "A"},
        "the mark <video> of a medium",
    ),
    "marks of other models": (
        {"question": "<image>\nQ", "answer": "A"},
        ["Q", "A"],
        {"question": "<|image_1|>\nQ", "answer": "A"},
        "the mark <|image_1|> of a medium",
    ),
}  # fmt: skip


def texts(row):
    parts = [part for message in row["prompt"] + row["completion"] for part in message["content"]]
    return [part["text"] for part in parts if part["type"] == "text"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_format_of_the_hub_loads_by_its_columns(name, streaming, processor, tmp_path):
    good, expected, bad, reason = ROWS[name]
    source = Dataset.from_list([row if "images" in row else row | {"image": IMAGE} for row in (good, bad)])
    given = {"seed": 0, "quarantine": tmp_path / "bad.jsonl", "max_bad_share": 1.0, "answers_per_row": None}
    (row,) = load_rows([source], processor, streaming=streaming, **given)
    assert texts(row) == expected and len(row["images"]) == 1
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    (entry,) = read_jsonl(tmp_path / "bad.jsonl")
    assert entry["index"] == 1 and reason in entry["reason"]


def test_images_that_are_not_declared_as_such_are_found(processor, tmp_path):
    features = Features(
        {
            "question": Value("string"),
            "answer": Value("string"),
            "scan": {k: Value("binary" if k == "bytes" else "string") for k in IMAGE},
        }
    )
    source = Dataset.from_list([{"question": "Q", "answer": "A", "scan": IMAGE}], features=features)
    (row,) = load_rows([source], processor, seed=0, quarantine=tmp_path / "bad.jsonl")
    assert row["images"][0].size == make_image(0).size


def as_question(row):
    return {"question": row["q"], "answer": row["a"].upper(), "image": row["scan"]}


def as_nothing(row):
    return [row]


def test_a_function_makes_rows_of_anything_else(processor, tmp_path):
    source = Dataset.from_list([{"q": "Q", "a": "yes", "scan": IMAGE}, {"q": "Q", "a": None, "scan": IMAGE}])
    given = {"seed": 0, "quarantine": tmp_path / "bad.jsonl", "max_bad_share": 1.0}
    for streaming in (False, True):
        (row,) = load_rows(
            [{"path": source, "map": f"{__name__}:as_question"}], processor, streaming=streaming, **given
        )
        assert texts(row) == ["Q", "YES"]
        assert "map fails: AttributeError" in read_jsonl(tmp_path / "bad.jsonl")[0]["reason"]


def test_an_edited_function_makes_new_rows(processor, tmp_path, monkeypatch):
    source = Dataset.from_list([{"q": "Q", "a": "yes", "scan": IMAGE}] * 2)
    entry = {"path": source, "map": f"{__name__}:as_question"}
    given = {"seed": 0, "quarantine": tmp_path / "bad.jsonl", "max_bad_share": 1.0}
    assert len(load_rows([entry], processor, **given)) == 2
    monkeypatch.setitem(
        globals(), "as_question", lambda row: {"question": "", "answer": row["a"] * 3, "image": row["scan"]}
    )
    assert texts(load_rows([entry], processor, **given)[0])[-1] == "yesyesyes"


@pytest.mark.parametrize(("name", "message"), [
    ("no_such_module:function", "expected module:function"), ("json:no_such", "expected module:function"),
    ("json", "expected module:function"), ("json:__doc__", "a str; expected"),
    (f"{__name__}:as_nothing", "map gives list"),
])  # fmt: skip
def test_a_function_that_is_none_is_refused(name, message, processor, tmp_path):
    source = Dataset.from_list([{"q": "Q", "a": "yes", "scan": IMAGE}])
    with pytest.raises(ValueError, match=message):
        load_rows([{"path": source, "map": name}], processor, seed=0, quarantine=tmp_path / "bad.jsonl")
