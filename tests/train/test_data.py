"""Training rows: every format gives the same rows, and no invalid row passes or is lost unreported."""

import copy
import io
import json
import struct
import tarfile
import zlib
from random import Random

import datasets
import numpy as np
import pytest
import torch
from conftest import LEVELS, make_image, make_model, make_processor
from datasets import Dataset, List
from PIL import Image
from sources import tokenizer_of
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from granulon.hub.assemble import with_image_parts
from granulon.hub.files import read_jsonl
from granulon.train.data import DataSource, load_rows
from granulon.train.data import rows as module
from modeling_granulon import GranulonProcessor

NAMES = [level["name"] for level in LEVELS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at the end of a parquet stream
    datasets.disable_progress_bars()


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures, 0.png to 2.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        make_image(seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def load(tmp_path, processor):
    """`load_rows` with what most tests have in common; all may be bad unless a test says otherwise."""

    def load(*sources, **kwargs):
        given = {"seed": 0, "quarantine": tmp_path / "bad.jsonl", "max_bad_share": 1.0, **kwargs}
        return load_rows(list(sources), given.pop("processor", processor), **given)

    return load


@pytest.fixture
def quarantined(tmp_path):
    return lambda: read_jsonl(tmp_path / "bad.jsonl")


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def llava(*turns, image="0.png", **extra):
    """A LLaVA row from questions and answers in turn."""
    speakers = ("human", "gpt") * len(turns)
    row = {"conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]}
    return row | ({"image": image} if image is not None else {}) | extra


def user(*parts):
    texts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": texts}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def plain(rows):
    """Rows with the pixels of their pictures, so that they can be compared."""
    return [{**row, "images": [np.asarray(image).tolist() for image in row["images"]]} for row in rows]


SAME_ROW = {
    "llava": llava("<image>\nWhat?", "This."),
    "messages of texts": {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}],
        "images": ["0.png"],
    },
    "messages of parts": {"messages": [user(None, "What?"), assistant("This.")], "images": ["0.png"]},
    "messages that hold images": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]},
            assistant("This."),
        ]
    },
    "messages with images nowhere": {"messages": [user("What?"), assistant("This.")], "images": ["0.png"]},
    "prompt and completion": {"prompt": "What?", "completion": "This.", "image": "0.png"},
    "prompt, completion of messages": {
        "prompt": [user(None, "What?")],
        "completion": [assistant("This.")],
        "images": ["0.png"],
    },
    "question and answer": {"question": "What?", "answer": "This.", "image": "0.png"},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", SAME_ROW)
def test_every_format_gives_the_same_row(name, suffix, streaming, load, pictures, quarantined):
    path = pictures / f"rows.{suffix}"
    path.write_text(json.dumps([SAME_ROW[name]]) if suffix == "json" else json.dumps(SAME_ROW[name]))
    (row,) = load(str(path), streaming=streaming)
    assert row["prompt"] == [user(None, "What?")] and row["completion"] == [assistant("This.")]
    assert row["granularity"] is None and quarantined() == []
    assert row["images"][0].mode == "RGB" and np.array_equal(row["images"][0], make_image(0))


def test_rows_of_one_file_may_differ_in_form(load, pictures):
    rows = [
        llava("<image>\nA?", "a", id=1),
        llava("<image> or <image>?", "b", image=["0.png", "1.png"], id="x"),
        llava("No image?", "c", image=None),
    ]
    for suffix, text in {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}.items():
        (pictures / f"rows.{suffix}").write_text(text)
        loaded = list(load(str(pictures / f"rows.{suffix}")))
        assert [len(row["images"]) for row in loaded] == [1, 2, 0]
        assert loaded[1]["prompt"] == [user(None, "or", None, "?")]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_answer_is_a_row_with_its_own_images_and_level(streaming, load, pictures):
    turns = [user(None, "A?"), assistant("a"), user(None, "B?"), assistant("b")]
    messages = [{"role": "system", "content": "Be short."}, *turns]
    row = {"messages": messages, "images": ["0.png", "1.png"], "granularity": ["coarse", "fine"]}
    rows = list(load(lines(pictures / "rows.jsonl", [row]), streaming=streaming, levels=NAMES))
    rows.sort(key=lambda row: len(row["prompt"]))  # streams are shuffled
    assert [row["completion"] for row in rows] == [[assistant("a")], [assistant("b")]]
    assert [len(row["prompt"]) for row in rows] == [2, 4]
    assert [len(row["images"]) for row in rows] == [1, 2]
    assert [row["granularity"] for row in rows] == ["coarse", "fine"]


def test_answers_in_a_prompt_are_not_trained_on(load, pictures):
    row = {"prompt": [user("A?"), assistant("a"), user("B?")], "completion": [assistant("b")]}
    (loaded,) = load(lines(pictures / "rows.jsonl", [row]))
    assert loaded["completion"] == [assistant("b")] and len(loaded["prompt"]) == 3


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder, count=2, per_shard=2):
    """WebDataset shards of pictures 0 ... n and JSON."""
    for shard in range(count):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for index in range(shard * per_shard, (shard + 1) * per_shard):
                members = {"png": png(make_image(index)), "json": json.dumps({"question": f"{index}?", "answer": "a"})}
                for name, content in members.items():
                    content = content if isinstance(content, bytes) else content.encode()
                    info = tarfile.TarInfo(f"{index:04d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "shard-*.tar")


def table(count=3):
    pairs = {"question": [f"{index}?" for index in range(count)], "answer": ["a"] * count}
    rows = Dataset.from_dict({**pairs, "image": [make_image(index) for index in range(count)]})
    return rows.cast_column("image", datasets.Image())


STORAGE = ["parquet", "list of images", "csv", "image folder", "shards", "saved to disk", "in memory"]


def stored(kind, folder):
    """The path of a source of that kind with the questions '0?' ... and the pictures 0 ..."""
    if kind == "parquet":
        table().to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "saved to disk":
        table().save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "list of images":
        rows = table().map(lambda row: {"images": [row["image"]]}, remove_columns="image")
        rows.cast_column("images", List(datasets.Image())).to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "csv":
        text = "question,answer,image\n" + "".join(f"{index}?,a,{index}.png\n" for index in range(3))
        (folder / "rows.csv").write_text(text)
        return str(folder / "rows.csv")
    if kind == "image folder":
        rows = [{"file_name": f"{index}.png", "question": f"{index}?", "answer": "a"} for index in range(3)]
        lines(folder / "metadata.jsonl", rows)
        return str(folder)
    if kind == "shards":
        return shards(folder)
    return table()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", STORAGE)
def test_storage_of_every_kind_is_read_undecoded(kind, streaming, load, pictures, quarantined, monkeypatch):
    path = stored(kind, pictures)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded by datasets"))
    rows = {row["prompt"][0]["content"][1]["text"]: row["images"] for row in load(path, streaming=streaming)}
    assert len(rows) >= 3 and quarantined() == []
    for question, (image,) in rows.items():
        assert np.array_equal(image, make_image(int(question[:-1])))


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_get_the_question_of_their_source(streaming, load, pictures):
    path = lines(pictures / "rows.jsonl", [{"caption": "A cat.", "picture": "1.png"}])
    columns = {"answer": "caption", "images": "picture"}
    (row,) = load({"path": path, "columns": columns, "question": "Describe it."}, streaming=streaming)
    assert row["prompt"] == [user(None, "Describe it.")] and row["completion"] == [assistant("A cat.")]


def bomb():
    """A PNG of a few bytes that says it has 64 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_ROWS = {
    "no JSON": ("{broken", "not JSON"),
    "no object": ("[1]", "JSON list"),
    "no conversation": ({"image": "0.png"}, "no conversations"),
    "no turns": (llava(image=None), "does not end with an answer"),
    "no answer": (llava("<image>A?"), "does not end with an answer"),
    "last question without answer": (llava("<image>A?", "a", "B?"), "does not end with an answer"),
    "empty answer": (llava("<image>A?", " "), "without text"),
    "answer without question": (
        {"conversations": [{"from": "gpt", "value": "a"}]},
        "turn 0 is an answer, but the turn before it is not a question",
    ),
    "half a surrogate pair": (llava("A?", "\ud800", image=None), "cannot be rendered"),
    "stranger": ({"conversations": [{"from": "robot", "value": "a"}]}, "role 'robot'"),
    "too few images": (llava("<image><image>A?", "a"), "2 places for images but 1 images"),
    "too many images": (llava("<image>A?", "a", image=["0.png", "1.png"]), "1 places for images but 2 images"),
    "missing image": (llava("<image>A?", "a", image="none.png"), "none.png cannot be read"),
    "text as image": (llava("<image>A?", "a", image="text.png"), "is not an image"),
    "truncated image": (llava("<image>A?", "a", image="half.png"), "half.png cannot be read"),
    "bomb": (llava("<image>A?", "a", image="bomb.png"), "bomb.png has 8000 x 8000 pixels"),
    "address": (llava("<image>A?", "a", image="http://example.org/a.png"), "download it"),
    "unknown level": (llava("<image>A?", "a", granularity="huge"), "its level is 'huge', the model has ['coarse',"),
    "level without name": (llava("<image>A?", "a", granularity=1), "its level is 1"),
    "too many levels": (llava("<image>A?", "a", granularity=["fine", "fine"]), "2 levels for 1 answers"),
    "too long": (llava("<image>" + "A" * 500, "a"), "max_length is 200"),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_rows_are_quarantined_with_their_reason_and_the_others_are_used(
    streaming, load, pictures, quarantined
):
    (pictures / "text.png").write_text("no picture")
    (pictures / "half.png").write_bytes(png(make_image(0))[:200])
    (pictures / "bomb.png").write_bytes(bomb())
    good = llava("<image>Good?", "yes")
    rows = [good, *(row for row, _ in BAD_ROWS.values()), "", good]
    source = lines(pictures / "rows.jsonl", rows)
    loaded = list(load(source, streaming=streaming, levels=NAMES, max_length=200))
    assert [row["completion"] for row in loaded] == [[assistant("yes")]] * 2
    entries = sorted(quarantined(), key=lambda entry: entry["index"])
    assert [entry["index"] for entry in entries] == list(range(1, 1 + len(BAD_ROWS)))
    for entry, (name, (_, reason)) in zip(entries, BAD_ROWS.items(), strict=True):
        assert reason in entry["reason"], name
        assert source in entry["source"] and entry["row"]


def test_a_bad_turn_leaves_the_others(load, pictures, quarantined):
    rows = [llava("<image>A?", "a", "B" * 300, "b", "C?", "c")]
    loaded = load(lines(pictures / "rows.jsonl", rows), max_length=200)
    assert [row["completion"] for row in loaded] == [[assistant("a")]]
    assert [entry["turn"] for entry in quarantined()] == [1, 2]


def test_a_row_that_the_chat_template_refuses_is_quarantined(load, pictures, quarantined):
    processor = make_processor()
    processor.chat_template = "{% if messages[0].content[0].text == 'A?' %}{{ raise_exception('never A') }}{% endif %}"
    processor.chat_template += processor.tokenizer.chat_template
    rows = [llava("A?", "a", image=None), llava("B?", "b", image=None)]
    assert len(load(lines(pictures / "rows.jsonl", rows), processor=processor)) == 1
    assert "cannot be rendered: never A" in quarantined()[0]["reason"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_quarantine_holds_no_image_bytes(streaming, load, quarantined, processor):
    rows = Dataset.from_dict(
        {"question": ["A?", "B?"], "answer": ["a", "b"], "image": [b"no image", png(make_image())]}
    )
    assert len(list(load(rows, streaming=streaming))) == 1
    (entry,) = quarantined()
    assert "<8 bytes>" in json.dumps(entry["row"])


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_bad_rows_stop_the_run_and_say_why(streaming, load, pictures, tmp_path):
    rows = [llava("A?", "a", image=None)] * 150 + [llava("A?", image=None)] * 3
    path = lines(pictures / "rows.jsonl", rows)
    assert len(list(load(path, streaming=streaming, max_bad_share=0.03))) == 150
    with pytest.raises(
        ValueError, match=r"rows.jsonl:train cannot be used, more than max_bad_share = 0.01"
    ) as failure:
        list(load(path, streaming=streaming, max_bad_share=0.01))
    assert str(tmp_path / "bad.jsonl") in str(failure.value) and "does not end with an answer" in str(failure.value)


def test_one_bad_row_among_few_does_not_stop_the_run(load, pictures):
    rows = [llava("A?", "a", image=None), llava("A?", image=None)]
    assert len(load(lines(pictures / "rows.jsonl", rows), max_bad_share=0.01)) == 1
    with pytest.raises(ValueError, match="1 of 2 rows"):
        load(lines(pictures / "rows.jsonl", rows), max_bad_share=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_give_nothing_are_refused_with_what_was_found(streaming, load, pictures):
    for name, text in {"rows.jsonl": "", "rows.json": "[]"}.items():
        (pictures / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}:train (cannot be loaded.*empty|is empty)"):
            load(str(pictures / name), streaming=streaming)
    with pytest.raises(ValueError, match="no file .*nowhere.json"):
        load(str(pictures / "nowhere.json"), streaming=streaming)
    with pytest.raises(ValueError, match="has no usable row|cannot be used"):
        load(lines(pictures / "bad.jsonl", [llava("A?")]), streaming=streaming)
    with pytest.raises(ValueError, match=r"columns \['id', 'text'\]; expected \['conversations'\] \(llava\) or"):
        load(lines(pictures / "other.jsonl", [{"id": 1, "text": "A"}]), streaming=streaming)
    path = lines(pictures / "pairs.jsonl", [{"question": "A?", "reply": "a"}])
    with pytest.raises(ValueError, match=r"not \['response'\]"):
        load({"path": path, "columns": {"answer": "response"}}, streaming=streaming)
    (pictures / "broken.json").write_text('[{"question": "A?"')
    with pytest.raises(ValueError, match="broken.json:train cannot be loaded"):
        load(str(pictures / "broken.json"), streaming=streaming)


def test_a_missing_image_does_not_make_a_text_row(load, pictures, quarantined):
    rows = [{"question": "A?", "answer": "a", "image": image} for image in ("0.png", None, [])]
    assert [len(row["images"]) for row in load(lines(pictures / "rows.jsonl", rows))] == [1, 0]
    assert [entry["reason"] for entry in quarantined()] == ["it has no image"]


JUNK = [
    *(None, True, 0, -1.5, "", "<image>", "none.png", "\x00", "assistant"),
    *([], {}, [[]], [None], {"type": "image"}, {"url": 3}),
]


def changed(value, random):
    """A copy in which one entry, somewhere, is replaced by junk, left out, or doubled."""
    if not value or not isinstance(value, (dict, list)) or random.random() < 0.1:
        return random.choice(JUNK)
    value = copy.deepcopy(value)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = random.random()
    if action < 0.1:
        value.pop(key)
    elif action < 0.2 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = changed(value[key], random)
    return value


@pytest.mark.parametrize("name", SAME_ROW)
def test_whatever_a_row_holds_it_is_trained_on_or_shown(name, load, pictures, quarantined, processor):
    random = Random(name)
    rows = [SAME_ROW[name], *(changed(changed(SAME_ROW[name], random), random) for _ in range(60))]
    path = lines(pictures / "rows.jsonl", map(json.dumps, rows))
    loaded = list(load(path, max_length=300))
    reasons = {entry["index"]: entry["reason"] for entry in quarantined()}
    assert loaded and reasons and len(loaded) + len(reasons) >= len(rows)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for row in loaded:
        labels = collate([dict(row)])["labels"]  # the collator changes its examples
        assert (labels != -100).any() and not (labels == processor.image_token_id).any()
    streamed = list(load(path, max_length=300, streaming=True))
    assert sorted(map(repr, plain(streamed))) == sorted(map(repr, plain(loaded)))
    assert {entry["reason"] for entry in quarantined()} == set(reasons.values())


def test_of_two_image_columns_one_must_be_named(load):
    rows, masks = table().rename_column("image", "photo"), table().select_columns("image")
    rows = datasets.concatenate_datasets([rows, masks.rename_column("image", "mask")], axis=1)
    with pytest.raises(ValueError, match="images in the columns"):
        load(rows)
    loaded = load({"path": rows, "columns": {"images": "photo"}})
    assert len(loaded) == 3 and len(loaded[0]["images"]) == 1


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"file": "a.json"}, r"keys \['file'\]; expected 'path'"),
        ({"path": "a.json", "format": "csv"}, "format is 'csv'; choose one of"),
        ({"path": "a.json", "columns": {"picture": "a"}}, r"columns names \['picture'\]"),
        ({"path": "a.json", "weight": 0}, "weight is 0"),
    ],
)
def test_a_source_that_is_written_wrong_says_what_it_takes(entry, message):
    with pytest.raises(ValueError, match=message):
        DataSource.of(entry)


def test_weights_are_given_to_all_sources_or_none(load, pictures):
    path = lines(pictures / "rows.jsonl", [llava("A?", "a", image=None)])
    with pytest.raises(ValueError, match="2 data sources, 1 with a weight"):
        load({"path": path, "weight": 1}, path)
    with pytest.raises(ValueError, match="several streams need a weight each"):
        load(path, path, streaming=True)
    with pytest.raises(ValueError, match="0 data sources"):
        load()


def processor_of(family):
    """With the template of a real model of a family."""
    if family == "bytes":
        return make_processor()
    tokenizer, image_token = tokenizer_of(family), IMAGE_TOKENS[family]
    tokenizer.pad_token = tokenizer.pad_token or "<|finetune_right_pad_id|>"
    template = with_image_parts(tokenizer.chat_template, image_token)
    image_processor = make_processor().image_processor
    return GranulonProcessor(image_processor, tokenizer, 4, 5, image_token=image_token, chat_template=template)


IMAGE_TOKENS = {"qwen2": "<|image_pad|>", "llama": "<|reserved_special_token_0|>"}


@pytest.mark.parametrize("family", ["bytes", "qwen2", "llama"])
def test_the_measured_length_is_what_the_collator_makes(family, load, pictures):
    processor = processor_of(family)
    rows = [
        llava("<image>What?", "This."),
        llava("<image> and <image>, more?", "Both of these.", image=["0.png", "1.png"]),
        llava("No image?", "None.", image=None),
    ]
    for row in rows:
        path = lines(pictures / "rows.jsonl", [row])
        collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        length = collate([load(path, processor=processor)[0]])["input_ids"].shape[1]
        assert len(load(path, processor=processor, max_length=length)) == 1
        with pytest.raises(ValueError, match=f"it has {length} tokens"):
            load(path, processor=processor, max_length=length - 1)


def text_rows(name, count):
    return [llava(f"{name}{index}?", "a", image=None) for index in range(count)]


def questions(rows):
    return [row["prompt"][0]["content"][0]["text"] for row in rows]


def test_sources_without_weights_follow_each_other_whole(load, pictures):
    paths = [lines(pictures / f"{name}.jsonl", text_rows(name, 3)) for name in "ab"]
    assert questions(load(*paths)) == ["a0?", "a1?", "a2?", "b0?", "b1?", "b2?"]


@pytest.mark.parametrize("streaming", [False, True])
def test_weighted_sources_mix_by_weight_and_lose_no_row(streaming, load, pictures):
    entries = [
        {"path": lines(pictures / "a.jsonl", text_rows("a", 60)), "weight": 3},
        {"path": lines(pictures / "b.jsonl", text_rows("b", 10)), "weight": 1},
    ]
    first, again = (questions(load(*entries, streaming=streaming)) for _ in range(2))
    other = questions(load(*entries, streaming=streaming, seed=1))
    assert first == again and first != other
    assert len(set(first)) == 70
    share = sum(question.startswith("a") for question in first) / len(first)
    assert abs(share - 0.75) < 0.15


def test_a_stream_is_reshuffled_in_each_epoch_and_equal_in_each_process(load, pictures):
    path = lines(pictures / "a.jsonl", text_rows("a", 50))

    def epochs():
        stream = load(path, streaming=True)
        for epoch in range(2):
            stream.set_epoch(epoch)
            yield questions(stream)

    first, second = epochs()
    assert first != second and sorted(first) == sorted(second)
    assert [first, second] == list(epochs())


def test_bad_rows_of_a_stream_are_written_once_however_often_they_pass(load, pictures, quarantined):
    rows = text_rows("a", 20) + [llava("bad?", image=None)]
    stream = load(lines(pictures / "a.jsonl", rows), streaming=True)
    for _ in range(2):
        loader = DataLoader(stream, batch_size=None, num_workers=1)
        assert len(list(loader)) == 20
    assert [entry["index"] for entry in quarantined()] == [20]


def test_workers_and_processes_check_the_same_rows(load, pictures, quarantined):
    rows = [llava("<image>A?", f"{index}", image=f"{index % 4}.png") for index in range(200)]
    path = lines(pictures / "rows.jsonl", rows)
    alone = plain(load(path))
    entries = quarantined()
    assert len(alone) == 150 and len(entries) == 50
    path = lines(pictures / "again.jsonl", rows)
    loader = DataLoader(load(path, num_proc=2), batch_size=16, num_workers=1, collate_fn=list)
    assert plain(row for batch in loader for row in batch) == alone
    assert [entry["index"] for entry in quarantined()] == [entry["index"] for entry in entries]


def test_a_repaired_image_comes_back_and_a_lost_one_is_named(load, pictures, quarantined):
    rows = [llava("<image>A?", str(index), image=f"{index}.png") for index in range(4)]
    path = lines(pictures / "rows.jsonl", rows)
    answers = [row["completion"][0]["content"][0]["text"] for row in load(path)]
    assert answers == ["0", "1", "2"] and len(quarantined()) == 1
    make_image(3).save(pictures / "3.png")
    (pictures / "1.png").unlink()
    rows = load(path)
    assert len(rows) == 4 and quarantined() == []
    with pytest.raises(ValueError, match="row 1 of .*rows.jsonl:train was valid when it was checked: .*1.png"):
        rows[1]


def record_opened_images(monkeypatch):
    """A list that grows with every image that is opened from now on."""
    opened, original = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda image: opened.append(image) or original(image))
    return opened


def test_checks_are_cached_until_what_they_depend_on_changes(load, pictures, monkeypatch):
    path = lines(pictures / "rows.jsonl", [llava("<image>A?", "a")])
    opened = record_opened_images(monkeypatch)
    counts = []
    for kwargs in ({}, {}, {"max_length": 300}, {"max_length": 300}, {"levels": NAMES}):
        processor = make_processor()
        processor.tokenizer(["a", "bc"], padding=bool(counts))  # leaves its mark on a tokenizer
        load(path, processor=processor, **kwargs)
        counts.append(len(opened))
    assert counts == [1, 1, 2, 2, 3]


def test_pictures_are_opened_at_access_and_not_kept(load, pictures, monkeypatch):
    rows = load(lines(pictures / "rows.jsonl", [llava("<image>A?", "a", image=f"{index}.png") for index in range(3)]))
    opened = record_opened_images(monkeypatch)
    assert rows[1]["images"][0].size == (40, 30) and len(opened) == 1
    assert rows[1]["images"][0].size == (40, 30) and len(opened) == 2
    assert len(rows[:2]["images"]) == 2


def trainer_of(dataset, processor, folder, **kwargs):
    given = {"max_length": None, "remove_unused_columns": False, "completion_only_loss": True, "report_to": "none"}
    quiet = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
    args = SFTConfig(str(folder), per_device_train_batch_size=2, max_steps=4, save_steps=2, **given, **quiet, **kwargs)
    return SFTTrainer(make_model(), args, train_dataset=dataset, processing_class=processor)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("streaming", [False, True])
def test_trl_trains_on_the_rows_and_resumes_with_the_same_ones(streaming, load, pictures, processor, tmp_path):
    rows = [
        llava("<image>A?", "a", "B?", "b"),
        llava("No image?", "c", image=None),
        llava("<image><image>D?", "d", image=["1.png", "2.png"]),
        *text_rows("e", 2),
    ]
    path = lines(pictures / "rows.jsonl", rows)
    full = trainer_of(load(path, streaming=streaming), processor, tmp_path / "out")
    assert full.train().global_step == 4
    resumed = trainer_of(load(path, streaming=streaming), processor, tmp_path / "out")
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")).global_step == 4
    trained = full.model.state_dict()
    assert not torch.equal(trained["lm_head.weight"], make_model().state_dict()["lm_head.weight"])
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, trained[name]), name


def test_deep_grey_and_rotated_pictures_are_read_as_everywhere_else(load):
    grey = Image.fromarray(np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4))
    rows = Dataset.from_dict({"question": ["A?"], "answer": ["a"], "image": [png(grey)]})
    (image,) = load(rows)[0]["images"]
    assert image.mode == "RGB" and len(set(np.asarray(image)[..., 0].ravel())) == 12
