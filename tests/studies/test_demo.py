"""The quick demo runs through all its stages; its report counts right answers."""

import json
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from granulon.hub.manifest import MANIFEST
from granulon.train.data.scenes import LEVELS, make_questions, make_scene
from studies.demo import run as demo

needs_masks = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL refuses assistant_only_loss with images before 5.18",
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    run = [sys.executable, "-m", "studies.demo.run", "--output", str(output), "--quick"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stdout


@needs_masks
def test_the_quick_form_leaves_a_checkpoint_a_picture_and_a_table(quick):
    output, said = quick
    assert (output / "checkpoint" / "modeling_granulon.py").is_file()
    manifest = json.loads((output / "checkpoint" / MANIFEST).read_text())
    (training,) = manifest["training"]
    assert training["steps"] == 2 and training["settings"]["data"] == ["scenes"]
    assert manifest["vision"]["model_type"] == "dinov3_vit", "the record of the assembly is kept"
    assert Image.open(output / "demo.png").width > 1000
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(LEVELS)}
    assert [int(lines[level][0]) for level in LEVELS] == [12, 18, 12]
    assert all(0 <= float(number) <= 1 for level in LEVELS for number in lines[level][1:])


@needs_masks
def test_every_question_got_an_answer_of_its_own_and_one_about_another_image(quick):
    rows = json.loads((quick[0] / "answers.json").read_text())
    assert len(rows) == 6 * 7
    assert all(row["image"] != row["other_image"] for row in rows)
    assert all({"answer", "pixel_answer", "semantic_answer", "other_answer", "chosen"} <= row.keys() for row in rows)


@needs_masks
def test_granulon_ask_works_on_the_output_of_the_demo(quick, tmp_path):
    output, _ = quick
    run = [sys.executable, "-m", "granulon.hub.ask", "--model", output / "checkpoint", "--image", output / "scene.png"]
    run += ["What is the tiny mark?", "--json", "--max_new_tokens", "4", "--picture", tmp_path / "clusters.png"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["granularity"]["name"] in LEVELS
    assert Image.open(tmp_path / "clusters.png").size > (0, 0)


@needs_masks
def test_the_demo_can_run_again_in_the_same_folder(quick):
    output, _ = quick
    run = [sys.executable, "-m", "studies.demo.run", "--output", str(output), "--quick"]
    assert subprocess.run(run, capture_output=True, timeout=900).returncode == 0


def test_the_report_counts_right_answers_per_level():
    scenes = [make_scene(seed) for seed in range(40)]
    rows = [
        {
            "truth": q.answer,
            "level": q.level,
            "kind": q.kind,
            "answer": q.answer,
            "pixel_answer": q.answer,
            "semantic_answer": "!",
            "other_answer": "?",
            "chosen": "fine",
        }
        for scene in scenes
        for q in make_questions(scene)
    ]
    coarse = [row for row in rows if row["level"] == "coarse"]
    for row in coarse[::2]:
        row["answer"] = "something else"
    lines = {line.split()[0]: line.split()[1:] for line in demo.report(rows, scenes).splitlines()[2:]}
    assert lines["coarse"][:2] == ["80", "0.500"] and lines["coarse"][6:] == ["0.000", "0.000"]
    assert lines["medium"][:4] == ["120", "1.000", "1.000", "0.000"]
    assert lines["fine"][4] == "0.375" and lines["fine"][7] == "1.000"
    assert 0.25 < float(lines["medium"][5]) < 0.5
