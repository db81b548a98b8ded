"""granulon-ask --batch: folders, rows and datasets; sharded, resumed after a kill, nothing asked twice."""

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
from conftest import count_calls
from PIL import Image

from granulon.hub import ask as ask_command
from granulon.hub import batch
from granulon.hub.ask import ask, load_model
from granulon.hub.batch import answer_rows, join_parts, read_done, read_rows
from granulon.hub.assemble import assemble_tiny
from modeling_granulon import load_rgb

ASKED = {"model": "tiny", "granularity": None, "view": "full", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = assemble_tiny(tmp_path_factory.mktemp("batch") / "tiny")
    model, processor = load_model(str(folder))
    return SimpleNamespace(folder=folder, model=model, processor=processor)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with 7 images, one of them in a folder below and one of them broken, and something else."""
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
    return answer_rows(tiny.model, tiny.processor, rows, output, ASKED, **{"batch_size": 3} | options)


def test_a_folder_is_answered_as_one_image_at_a_time_would_be(tiny, images, tmp_path):
    rows = read_rows(images, "How many?")
    assert [row["name"] for row in rows] == [
        "a.png", "b.jpg", "below/d.png", "broken.png", "c.webp", "e.PNG", "f.png"
    ]  # fmt: skip
    counts = run(tiny, rows, tmp_path / "out.jsonl")
    assert counts == {"rows": 7, "answered": 6, "failed": 1, "earlier": 0}
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["row"] for line in found] == list(range(7)) and all(line["asked"] == ASKED for line in found)
    assert "is no image" in found[3]["error"] and "answer" not in found[3]
    tiny.model.generation_config.do_sample = False
    for line in found[:3] + found[4:]:
        alone = ask(tiny.model, tiny.processor, load_rgb(images / line["image"]), "How many?", max_new_tokens=6)
        assert (line["answer"], line["granularity"]) == (alone["answer"], alone["granularity"]["name"])
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"], "no parts are left"


@pytest.mark.parametrize("level, name", [("fine", "fine"), ("0", "coarse")])
def test_level_and_view_hold_for_all_rows(level, name, tiny, images, tmp_path):
    asked = ASKED | {"granularity": level, "view": "semantic"}
    answer_rows(tiny.model, tiny.processor, read_rows(images, "How many?"), tmp_path / "out.jsonl", asked)
    assert {line.get("granularity") for line in lines_of(tmp_path / "out.jsonl")} == {name, None}


def test_one_answer_runs_each_part_once(tiny, images, tmp_path):
    """A batch of three rows at one level: one pass of each part for all of them."""
    model, _ = load_model(str(tiny.folder))
    calls, rows = count_calls(model), read_rows(images, "How many?")[:3]
    answer_rows(model, tiny.processor, rows, tmp_path / "out.jsonl", ASKED | {"granularity": "coarse"}, batch_size=3)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_shares_of_several_processes_make_the_same_file(processes, tiny, images, tmp_path):
    rows = read_rows(images, "How many?")
    run(tiny, rows, tmp_path / "one.jsonl")
    for rank in reversed(range(processes)):
        assert not (tmp_path / "many.jsonl").exists()
        run(tiny, rows, tmp_path / "many.jsonl", rank=rank, processes=processes)
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_run_goes_on_with_another_number_of_processes_and_after_a_torn_line(tiny, images, tmp_path, monkeypatch):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    run(tiny, rows, tmp_path / "whole.jsonl")
    run(tiny, rows, output, rank=0, processes=2)
    part = tmp_path / "out.jsonl.00000-of-00002"
    part.write_bytes(part.read_bytes()[:-9])  # killed while it wrote
    asked = []
    monkeypatch.setattr(batch, "_open_row", lambda row, real=batch._open_row: asked.append(row["name"]) or real(row))
    counts = run(tiny, rows, output)
    assert counts["earlier"] == 3 and len(asked) == 4
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(tiny, rows, output)["earlier"] == 7 and len(asked) == 4, "a finished run asks nothing"


def test_a_process_goes_on_in_its_own_part_after_a_torn_line(tiny, images, tmp_path):
    rows, output = read_rows(images, "How many?"), tmp_path / "out.jsonl"
    run(tiny, rows, tmp_path / "whole.jsonl")
    run(tiny, rows, output, rank=0, processes=2)
    part = tmp_path / "out.jsonl.00000-of-00002"
    part.write_bytes(part.read_bytes()[:-9])
    for rank in (0, 1):
        run(tiny, rows, output, rank=rank, processes=2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_granulon_ask_answers_many_with_batch(tiny, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["granulon-ask", *command(tiny, images, tmp_path / "out.jsonl")[3:]])
    ask_command.main()
    assert capsys.readouterr().err.endswith("7 rows, 6 answered, 1 failed, 0 earlier\n")


def test_answers_to_something_else_are_not_mixed_in(tiny, images, tmp_path):
    output = tmp_path / "out.jsonl"
    run(tiny, read_rows(images, "How many?"), output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match="holds an answer to row 0 about a.png, 'How many.'.*choose another output"):
        run(tiny, read_rows(images, "What is it?"), output)
    with pytest.raises(ValueError, match="asked with .*choose another output"):
        answer_rows(tiny.model, tiny.processor, read_rows(images, "How many?"), output, ASKED | {"max_new_tokens": 7})
    assert output.read_bytes() == before


def test_rows_of_a_file_have_their_own_questions_and_paths_beside_it(tiny, images):
    rows = [{"image": "a.png", "question": "Where?"}, {"image": str(images / "f.png")}]
    (images / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_rows(images / "rows.jsonl", "How many?")
    assert first == {"image": str(images / "a.png"), "name": "a.png", "question": "Where?"}
    assert second["image"] == str(images / "f.png") and second["question"] == "How many?"
    with pytest.raises(ValueError, match="row 1 of .*rows.jsonl has no question"):
        read_rows(images / "rows.jsonl")


def test_a_dataset_is_read_row_by_row_and_decoded_by_load_rgb(tiny, images, tmp_path):
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


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to ask about"):
        read_rows(tmp_path, "How many?")


def test_joining_waits_for_every_row(tmp_path):
    part = tmp_path / "out.jsonl.00000-of-00002"
    part.write_text('{"row": 0}\n{"row": 2}\n{"ro')
    assert not join_parts(tmp_path / "out.jsonl", 3) and set(read_done(tmp_path / "out.jsonl")) == {0, 2}
    (tmp_path / "out.jsonl.00001-of-00002").write_text('{"row": 1}\n')
    assert join_parts(tmp_path / "out.jsonl", 3) and not part.exists()
    assert [line["row"] for line in lines_of(tmp_path / "out.jsonl")] == [0, 1, 2]


def command(tiny, images, output, launcher=()):
    options = {"--model": tiny.folder, "--batch": images, "--output": output, "--question": "How many?"}
    options |= {"--max_new_tokens": 40, "--batch_size": 1}
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", *launcher, "granulon.hub.batch", *words]


def test_errors_of_the_command_are_one_line(tiny, images, tmp_path, monkeypatch):
    words = command(tiny, images, tmp_path / "out.jsonl")[2:]
    monkeypatch.setattr(sys, "argv", [*words, "--granularity", "huge"])
    with pytest.raises(SystemExit, match="^granulon-ask: unknown granularity 'huge'"):
        batch.main()


def test_the_command_counts_what_it_did(tiny, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(tiny, images, tmp_path / "out.jsonl")[2:])
    batch.main()
    assert capsys.readouterr().err.endswith("7 rows, 6 answered, 1 failed, 0 earlier\n")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_by_two_processes_it_ends_with_the_same_file(tiny, images, tmp_path):
    subprocess.run(command(tiny, images, tmp_path / "whole.jsonl"), check=True, capture_output=True)
    for number in range(3):
        output = tmp_path / f"killed{number}.jsonl"
        process = subprocess.Popen(command(tiny, images, output), stderr=subprocess.DEVNULL)
        while not any(tmp_path.glob(f"{output.name}.0*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_two_processes(tiny, images, output)
        assert lines_of(output) == lines_of(tmp_path / "whole.jsonl")


def in_two_processes(tiny, images, output):
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = command(tiny, images, output, launcher)
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stderr


@pytest.mark.slow
def test_two_processes_share_the_rows_without_a_gpu_too(tiny, images, tmp_path):
    said = in_two_processes(tiny, images, tmp_path / "out.jsonl")
    assert sorted(re.findall(r"(\d+) rows, ", said)) == ["3", "4"]
