"""The questions of a data set: where they come from, which image they share, and samples of them."""

import json

import datasets

from granulon.hub.files import write_jsonl
from granulon.train.controller.questions import DistinctQuestion, image_key, read_questions, stratified
from granulon.train.data import DataSource


def test_a_sample_has_of_every_source_and_kind_its_share_and_a_larger_one_contains_it():
    sizes = {"a": 600, "b": 300, "c": 99, "d": 1}
    questions = [DistinctQuestion(f"{name}{n}", "", name) for name, size in sizes.items() for n in range(size)]
    ordered = [question.text for question in stratified(questions, seed=0)]
    assert sorted(ordered) == sorted(question.text for question in questions)
    for limit in (50, 100, 500):
        for name, size in sizes.items():
            chosen = sum(text.startswith(name) for text in ordered[:limit])
            assert abs(chosen - limit * size / 1000) <= 2
    assert ordered == [question.text for question in stratified(questions[::-1], seed=0)], "whatever the rows' order"
    assert set(ordered[:100]) != {question.text for question in stratified(questions, seed=1)[:100]}


def test_the_source_of_a_question_is_its_data_its_column_or_its_images_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "a?", "kind": "colour"}, {"question": "b?", "kind": "text"}])
    turns = [{"from": "human", "value": "<image>c?"}, {"from": "gpt", "value": "c"}]
    rows = [{"image": image, "conversations": turns} for image in ("coco/1/x.png", "vg/1/x.png", "coco/2/y.png")]
    for number, row in enumerate(rows):
        row["conversations"] = [{**turns[0], "value": f"<image>c{number}?"}, turns[1]]
    second = tmp_path / "b.json"
    second.write_text(json.dumps(rows))
    found, _, total = read_questions([DataSource(str(tmp_path / "a.jsonl")), DataSource(str(second))])
    strata = [question.stratum for question in found]
    assert total == 5 and len(set(strata)) == 4 and strata[2] == strata[4]


def test_questions_come_from_conversations_and_columns_and_parquet(tmp_path):
    image = {"bytes": b"png", "path": None}
    table = datasets.Dataset.from_list([{"q": "a?", "picture": image}, {"q": "b?", "picture": image}])
    table.to_parquet(tmp_path / "table.parquet")
    columns = {"question": "q", "images": "picture"}
    asked, _, total = read_questions([DataSource(str(tmp_path / "table.parquet"), columns=columns)])
    assert total == 2 and [entry.text for entry in asked] == ["a?", "b?"] and asked[0].group == asked[1].group
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Brown."},
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "x.png", "conversations": talk}]))
    asked, _, total = read_questions([DataSource(str(tmp_path / "llava.json"))])
    assert [entry.text for entry in asked] == ["What is it?", "Which colour?"] and asked[0].group == asked[1].group


def test_an_image_is_known_by_its_bytes_else_by_its_name():
    assert image_key({"bytes": b"x", "path": "a"}) == image_key({"bytes": b"x", "path": "b"}) != image_key("x")
    assert image_key([]) is image_key(None) is None and image_key(["p.png"]) == "p.png"
