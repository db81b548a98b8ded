"""granulon-ask: one answer with level, tokens and clusters; with --batch many, sharded and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import count_calls
from PIL import Image
from sources import text_source, vision_source

from granulon.hub import answer as module
from granulon.hub.answer import answer_rows, ask, place_of, read_rows
from granulon.hub.ask import VIEWS, main
from granulon.hub.assemble import assemble, assemble_tiny
from granulon.hub.inference import load_model, load_processor
from modeling_granulon import load_rgb
from modeling_granulon.image_tokens import VISUAL_VIEWS

SETTINGS = {"model": "tiny", "granularity": None, "view": "full", "max_new_tokens": 6}


def load(folder):
    model = load_model(folder)
    return model, load_processor(folder, model.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sources = tmp_path_factory.mktemp("sources")
    vision, text = vision_source(sources / "dinov3", "dinov3"), text_source(sources / "llama", "llama", tie=False)
    return assemble(vision, text, sources / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = assemble_tiny(tmp_path_factory.mktemp("batch") / "tiny")
    model, processor = load(folder)
    return SimpleNamespace(folder=folder, model=model, processor=processor)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


@pytest.fixture
def image_file(picture, tmp_path):
    picture.save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def run_command(monkeypatch, capsys, *arguments):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["granulon-ask", *map(str, arguments)])
    main()
    return capsys.readouterr()


def error_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["granulon-ask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value).startswith("granulon-ask: ") and "\n" not in str(stop.value)
    return str(stop.value)


# ----- one image


def test_the_controller_chooses_unless_a_level_is_requested(loaded, picture):
    free = ask(*loaded, picture, "How many?", max_new_tokens=2)
    probabilities = free["granularity"]["probabilities"]
    assert free["granularity"]["name"] == max(probabilities, key=probabilities.get)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert free["granularity"]["chosen_by"] == "controller"
    for level in ("fine", "2"):
        forced = ask(*loaded, picture, "How many?", granularity=level, max_new_tokens=2)["granularity"]
        assert (forced["name"], forced["chosen_by"]) == ("fine", "request")
        assert forced["probabilities"] == pytest.approx(probabilities)


@pytest.mark.parametrize("level, kept", [("coarse", 5), ("medium", 10), ("fine", 20)])
@pytest.mark.parametrize("view", ["full", "pixel", "semantic", "auto"])
def test_tokens_and_clusters_are_counted_as_read(level, kept, view, loaded, picture):
    result = ask(*loaded, picture, "How many?", granularity=level, view=view, max_new_tokens=2)
    clusters, tokens = result["clusters"], result["tokens"]
    assert result["view"] == ("full" if view == "auto" else view)
    assert len(clusters) <= kept and [entry["number"] for entry in clusters] == list(range(1, len(clusters) + 1))
    assert [entry["score"] for entry in clusters] == sorted((entry["score"] for entry in clusters), reverse=True)
    assert sum(entry["share"] for entry in clusters) == pytest.approx(1)
    assert result["cluster_map"].min() == 0, "every patch belongs to a cluster"
    assert tokens["pixel"] == (0 if view == "semantic" else 64)
    assert tokens["semantic"] == (0 if view == "pixel" else len(clusters))
    messages = [{"role": "user", "content": "How many?"}]
    rendered = loaded[1].tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokens["text"] == len(loaded[1].tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_the_answer_is_the_one_of_generate(loaded, picture):
    model, processor = loaded
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    torch.manual_seed(0)  # the model's own settings sample
    output = model.generate(**inputs, visual_view="full", max_new_tokens=12)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    torch.manual_seed(0)
    assert ask(model, processor, picture, "How many?", max_new_tokens=12)["answer"] == expected.strip()


def changed(folder, **values):
    """The model of a folder with another configuration and random weights, and the processor."""
    model, processor = load(folder)
    return type(model)(type(model.config).from_dict(model.config.to_dict() | values)).eval(), processor


def test_a_model_without_levels_answers_too(folder, picture):
    model, processor = changed(folder, granularities=[], default_granularity=None, max_semantic_tokens=0)
    processor.num_semantic_tokens = 0
    result = ask(model, processor, picture, "How many?", max_new_tokens=2)
    assert result["granularity"] is None and result["tokens"]["pixel"] == 64 and result["clusters"] == []


def test_a_random_level_is_drawn_once(folder, picture, monkeypatch):
    model, processor = changed(folder, controller="random")
    read, generate = [], type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kwargs: read.append(kwargs["visual"]) or generate(self, **kwargs)
    )
    for _ in range(6):
        result = ask(model, processor, picture, "How many?", max_new_tokens=1)
        assert read[-1].describe()[0]["granularity"]["name"] == result["granularity"]["name"]
        assert result["granularity"]["chosen_by"] == "configuration"


def test_one_answer_runs_each_part_once(folder, picture):
    model, processor = load(folder)
    calls = count_calls(model)
    ask(model, processor, picture, "How many?", view="auto", max_new_tokens=4)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


def test_the_command_streams_the_answer_and_prints_what_it_read(folder, image_file, monkeypatch, capsys):
    options = ["--model", folder, "--image", image_file, "How many?", "--max_new_tokens", "8"]
    printed = run_command(monkeypatch, capsys, *options)
    assert "chosen by the controller (coarse" in printed.err and "64 pixel + " in printed.err
    assert "chosen by" not in printed.out


def test_json_is_one_object_on_stdout(folder, image_file, monkeypatch, capsys):
    options = ["--model", folder, "--image", image_file, "--granularity", "coarse", "--max_new_tokens", "4"]
    result = json.loads(run_command(monkeypatch, capsys, *options, "--json", "Wie viele Bäume?").out)
    assert result["question"] == "Wie viele Bäume?" and result["granularity"]["name"] == "coarse"
    assert result.keys() == {"question", "image", "answer", "granularity", "view", "tokens", "clusters"}


def test_the_picture_is_written(folder, image_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.png"
    options = ["--model", folder, "--image", image_file, "--picture", target, "--max_new_tokens", "2"]
    run_command(monkeypatch, capsys, *options, "How many?")
    with Image.open(target) as page:
        assert page.mode == "RGB" and page.width > 900


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--granularity": "huge"}, "unknown granularity 'huge': choose one of"),
        ({"--granularity": "7"}, "unknown granularity 7"),
        ({"--image": "missing.png"}, "missing.png cannot be read"),
        ({"--image": __file__}, "is not an image in one of the formats"),
        ({"--model": "/no/such/folder"}, "/no/such/folder was not found locally or on the Hub"),
        ({"--picture": "out.txt"}, "--picture is out.txt; expected a file that ends in .png, .jpg"),
        ({"--picture": f"{__file__}/out.png"}, "which cannot be written"),
        ({"--picture": "/proc/out.png"}, "/proc/out.png, which cannot be written"),
        ({"--max_new_tokens": "0"}, "--max_new_tokens is 0; expected 1 or more"),
        ({"--colour": "red"}, "unknown arguments: --colour"),
        ({"--batch": "pictures"}, "give either --image or --batch"),
    ],
)
def test_errors_are_one_line(changes, message, folder, image_file, monkeypatch):
    options = {"--model": folder, "--image": image_file, "--max_new_tokens": "2", **changes}
    assert message in error_of(monkeypatch, *[word for option in options.items() for word in option], "How many?")


def test_what_is_missing_in_the_command_is_named(folder, image_file, monkeypatch):
    assert "give either --image or --batch" in error_of(monkeypatch, "--model", folder, "How many?")
    assert "no question" in error_of(monkeypatch, "--model", folder, "--image", image_file)
    assert "needs --output" in error_of(monkeypatch, "--model", folder, "--batch", "pictures", "How many?")


def test_what_cannot_work_is_refused_before_the_model_is_loaded(folder, image_file, tmp_path, monkeypatch):
    monkeypatch.setattr("granulon.hub.inference.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.jsonl")
    one = ["--model", folder, "--image"]
    many = ["--model", folder, "--output", tmp_path / "out.jsonl", "--batch"]
    for options, message in (
        ([*one, tmp_path / "pipe.png", "What?"], "is not a regular file"),
        ([*one, image_file, "--picture", tmp_path, "What?"], "expected a file that ends in"),
        ([*many, tmp_path / "pipe.jsonl", "What?"], "pipe.jsonl is no regular file"),
        ([*many, tmp_path / "none.jsonl", "What?"], "none.jsonl does not exist; give a folder"),
        ([*many, "./none", "What?"], "./none does not exist"),
        ([*many, "a/b/c", "What?"], "a/b/c does not exist"),
        ([*many, image_file, "What?"], "does not end in .json or .jsonl"),
        (["--model", folder, "--output", "out.csv", "--batch", tmp_path, "What?"], "ends in .jsonl"),
        (["--model", folder, "--output", "/proc/out.jsonl", "--batch", tmp_path, "What?"], "cannot be written"),
    ):
        assert message in error_of(monkeypatch, *options)


def test_the_help_comes_at_once_and_shows_the_batch():
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "granulon.hub.ask", "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - start)
    assert "--batch pictures/" in done.stdout and "accelerate launch" in done.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, granulon.hub.ask; print('torch' in sys.modules)"], capture_output=True
    )
    assert loaded.stdout.strip() == b"False", "what takes seconds to import is imported later"
    assert VIEWS == VISUAL_VIEWS


def test_why_names_the_cluster_whose_token_the_answer_needs(loaded, picture, monkeypatch):
    model, processor = loaded
    result = ask(model, processor, picture, "How many?", granularity="medium", max_new_tokens=4, why=True)
    plain = ask(model, processor, picture, "How many?", granularity="medium", max_new_tokens=4)
    nats = [entry["nats"] for entry in result["clusters"]]
    assert nats == sorted(nats, reverse=True) and len(nats) == 10
    by_number = {entry["number"]: entry for entry in plain["clusters"]}
    for entry in result["clusters"]:
        assert entry["share"] == by_number[entry["number"]]["share"]
        assert entry["place"] == place_of(result["cluster_map"], entry["number"] - 1)


@pytest.mark.parametrize(
    "cells, place",
    [([(0, 0)], "top left"), ([(4, 4)], "middle"), ([(8, 4), (8, 5)], "bottom"), ([(4, 8)], "right"),
     ([(0, 8), (1, 8)], "top right"), ([(0, 0), (8, 8)], "middle")],
)  # fmt: skip
def test_a_place_is_named_by_the_middle_of_a_cluster(cells, place):
    cluster_map = np.zeros((9, 9), int)
    for cell in cells:
        cluster_map[cell] = 1
    assert place_of(cluster_map, 1) == place


def test_the_command_says_why_and_draws_it(folder, image_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "new" / "why.png"
    options = ["--model", folder, "--image", image_file, "--picture", target, "--max_new_tokens", "4", "--why"]
    printed = run_command(monkeypatch, capsys, *options, "How many?").out
    lines = printed[printed.index("nats that the answer loses") :].splitlines()
    assert len(lines) > 3 and all(re.search(r"[+-]\d+\.\d\d  cluster \d+ \(.*% of the image\)", x) for x in lines[1:])
    with Image.open(target) as page:
        assert page.width > 1500, "a third picture"


# ----- many images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with 7 images, one of them in a subfolder and one of them broken, and a text file."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    for number, name in enumerate(["a.png", "b.jpg", "c.webp", "below/d.png", "e.PNG", "f.png"]):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def lines_of(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def run(tiny, rows, output, **options):
    return answer_rows(tiny.model, tiny.processor, rows, output, SETTINGS, **{"batch_size": 3} | options)


def test_a_folder_is_answered_as_one_image_at_a_time_would_be(tiny, images, tmp_path):
    rows = read_rows(images, "How many?")
    assert [row["name"] for row in rows] == [
        "a.png", "b.jpg", "below/d.png", "broken.png", "c.webp", "e.PNG", "f.png"
    ]  # fmt: skip
    counts = run(tiny, rows, tmp_path / "out.jsonl")
    assert counts == {"rows": 7, "answered": 6, "failed": 1, "earlier": 0}
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["row"] for line in found] == list(range(7)) and all(line["settings"] == SETTINGS for line in found)
    assert "is not an image" in found[3]["error"] and "answer" not in found[3]
    tiny.model.generation_config.do_sample = False
    for line in found[:3] + found[4:]:
        alone = ask(tiny.model, tiny.processor, load_rgb(images / line["image"]), "How many?", max_new_tokens=6)
        assert (line["answer"], line["granularity"]) == (alone["answer"], alone["granularity"]["name"])
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"], "the files of the processes are left"


@pytest.mark.parametrize("level, name", [("fine", "fine"), ("0", "coarse")])
def test_level_and_view_hold_for_all_rows(level, name, tiny, images, tmp_path):
    settings = SETTINGS | {"granularity": level, "view": "semantic"}
    answer_rows(tiny.model, tiny.processor, read_rows(images, "How many?"), tmp_path / "out.jsonl", settings)
    assert {line.get("granularity") for line in lines_of(tmp_path / "out.jsonl")} == {name, None}


def test_one_batch_runs_each_part_once(tiny, images, tmp_path):
    model, _ = load(tiny.folder)
    calls, rows = count_calls(model), read_rows(images, "How many?")[:3]
    settings = SETTINGS | {"granularity": "coarse"}
    answer_rows(model, tiny.processor, rows, tmp_path / "out.jsonl", settings, batch_size=3)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_several_processes_write_the_same_file_as_one(processes, tiny, images, tmp_path):
    rows = read_rows(images, "How many?")
    run(tiny, rows, tmp_path / "one.jsonl")
    for rank in reversed(range(processes)):
        assert not (tmp_path / "many.jsonl").exists()
        run(tiny, rows, tmp_path / "many.jsonl", rank=rank, world_size=processes)
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_run_resumes_with_another_number_of_processes_and_after_a_torn_line(tiny, images, tmp_path, monkeypatch):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    run(tiny, rows, tmp_path / "complete.jsonl")
    run(tiny, rows, output, rank=0, world_size=2)
    part = tmp_path / "out.jsonl.00000-of-00002"
    part.write_bytes(part.read_bytes()[:-9])  # killed while it wrote
    opened, open_row = [], module.open_row
    monkeypatch.setattr(module, "open_row", lambda *arguments: opened.append(arguments) or open_row(*arguments))
    assert run(tiny, rows, output)["earlier"] == 3 and len(opened) == 4
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()
    assert run(tiny, rows, output)["earlier"] == 6 and len(opened) == 5, "only the row that failed is tried again"
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()


def test_a_process_resumes_its_own_file_after_a_torn_line(tiny, images, tmp_path):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    run(tiny, rows, tmp_path / "complete.jsonl")
    run(tiny, rows, output, rank=0, world_size=2)
    part = tmp_path / "out.jsonl.00000-of-00002"
    part.write_bytes(part.read_bytes()[:-9])
    for rank in (0, 1):
        run(tiny, rows, output, rank=rank, world_size=2)
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()


def test_answers_to_other_rows_or_settings_are_not_mixed_in(tiny, images, tmp_path):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    run(tiny, rows, output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match="has an answer to row 0 about a.png, 'How many.'.*choose another output"):
        run(tiny, read_rows(images, "What is it?"), output)
    with pytest.raises(ValueError, match="answers with settings .*choose another output"):
        answer_rows(tiny.model, tiny.processor, rows, output, SETTINGS | {"max_new_tokens": 7})
    assert output.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "lines.json"])
def test_rows_of_a_file_have_their_own_questions_and_paths_beside_it(name, images):
    rows = [{"image": "a.png", "question": "Where?"}, {"image": str(images / "f.png")}]
    text = json.dumps(rows) if name == "list.json" else "\n".join(map(json.dumps, rows))
    (images / name).write_text(text)
    first, second = read_rows(images / name, "How many?")
    assert first == {"image": str(images / "a.png"), "name": "a.png", "question": "Where?"}
    assert second["image"] == str(images / "f.png") and second["question"] == "How many?"
    with pytest.raises(ValueError, match=f"row 1 of .*{name} has no question"):
        read_rows(images / name)


@pytest.mark.parametrize(
    "text, message", [("[5]", "row 0 of .* is a int; expected an object"), ("{", "is not JSON"), ("", "no rows")]
)
def test_a_file_without_usable_rows_is_refused(text, message, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "rows.json", "How many?")


def test_rows_that_failed_are_tried_again(tiny, images, tmp_path):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    assert run(tiny, rows, output)["failed"] == 1
    complete = lines_of(output)
    good = (images / "a.png").read_bytes()
    broken = images / "broken.png"
    before = broken.read_bytes()
    broken.write_bytes(good)
    try:
        assert run(tiny, rows, output) == {"rows": 7, "answered": 1, "failed": 0, "earlier": 6}
    finally:
        broken.write_bytes(before)
    again = lines_of(output)
    assert again[3]["answer"] == complete[0]["answer"] and "error" not in again[3]
    assert again[:3] + again[4:] == complete[:3] + complete[4:] and len(list(tmp_path.iterdir())) == 1


def test_other_columns_of_a_row_are_kept(tiny, images, tmp_path):
    row = {
        "image": "a.png",
        "question": "Where?",
        "id": 7,
        "answer": "the truth",
        "tags": ["x"],
        "score": float("nan"),
    }
    (images / "more.jsonl").write_text(json.dumps(row))
    run(tiny, read_rows(images / "more.jsonl"), tmp_path / "out.jsonl")
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert line["id"] == 7 and line["tags"] == ["x"] and line["score"] == "nan"
    assert line["given_answer"] == "the truth" and line["answer"] != "the truth" and "name" not in line


def test_odd_file_names_and_pipes_in_a_folder_do_not_stop_a_run(tiny, images, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["with space.png", "new\nline.png", "-dash.png", "ümlaut.png", "[star*].png"]
    for name in names:
        (folder / name).write_bytes((images / "a.png").read_bytes())
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write((images / "a.png").read_bytes())
    os.mkfifo(folder / "pipe.png")
    counts = run(tiny, read_rows(folder, "How many?"), tmp_path / "out.jsonl")
    assert counts == {"rows": 7, "answered": 6, "failed": 1, "earlier": 0}
    found = {
        line["image"]: line for line in (json.loads(x) for x in (tmp_path / "out.jsonl").read_bytes().splitlines())
    }
    assert set(names) < set(found) and "is not a regular file" in found["pipe.png"]["error"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no rows; an image file ends in one of .avif"):
        read_rows(tmp_path, "How many?")


def test_a_data_set_is_read_row_by_row_and_decoded_by_load_rgb(tiny, images, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": str(images / name), "question": f"{name}?"} for name in ("a.png", "broken.png", "f.png")]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "data")
    loaded = read_rows(str(tmp_path / "data"))
    assert run(tiny, loaded, tmp_path / "out.jsonl")["failed"] == 1
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["question"] for line in found] == ["a.png?", "broken.png?", "f.png?"]
    assert found[0]["image"].endswith("data#0") and found[2]["answer"] is not None
    data.remove_columns("question").save_to_disk(tmp_path / "mute")
    with pytest.raises(ValueError, match=r"has the columns \['image'\]"):
        read_rows(str(tmp_path / "mute"))


def batch_options(tiny, images, output):
    options = {
        "--model": tiny.folder,
        "--batch": images,
        "--output": output,
        "--max_new_tokens": 40,
        "--batch_size": 1,
    }
    return [str(word) for option in options.items() for word in option] + ["How many?"]


def test_the_batch_command_counts_its_rows_and_its_errors_are_one_line(tiny, images, tmp_path, monkeypatch, capsys):
    options = batch_options(tiny, images, tmp_path / "out.jsonl")
    assert run_command(monkeypatch, capsys, *options).err.endswith("7 rows, 6 answered, 1 failed, 0 earlier\n")
    assert "unknown granularity 'huge'" in error_of(monkeypatch, *options, "--granularity", "huge")


def in_two_processes(options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "granulon.hub.ask", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stderr


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_by_two_processes_it_ends_with_the_same_file(tiny, images, tmp_path):
    command = [sys.executable, "-m", "granulon.hub.ask"]
    complete = tmp_path / "complete.jsonl"
    subprocess.run([*command, *batch_options(tiny, images, complete)], check=True, capture_output=True)
    for number in range(3):
        output = tmp_path / f"killed{number}.jsonl"
        process = subprocess.Popen([*command, *batch_options(tiny, images, output)], stderr=subprocess.DEVNULL)
        while not any(tmp_path.glob(f"{output.name}.0*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_two_processes(batch_options(tiny, images, output))
        assert lines_of(output) == lines_of(complete)


@pytest.mark.slow
def test_two_processes_share_the_rows_without_a_gpu_too(tiny, images, tmp_path):
    printed = in_two_processes(batch_options(tiny, images, tmp_path / "out.jsonl"))
    assert sorted(re.findall(r"(\d+) rows, ", printed)) == ["3", "4"]
