"""The small model's demo and its training run through all their stages, with stand-ins for parts and stamps."""

import json
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image
from sources import text_source, vision_source

from granulon.hub.assemble import TRAINABLE, assemble, assemble_tiny
from granulon.train.data import cutouts
from studies.small import demo, measure, run, why


def test_without_cut_outs_the_demo_asks_about_photographs(tmp_path, monkeypatch, capsys):
    assemble_tiny(tmp_path / "model")
    monkeypatch.setattr(demo, "fetch_stamps", lambda: None)
    demo.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "demo")])
    said = capsys.readouterr().out
    assert "it is asked about whole photographs alone" in said and "| chelsea | What is this? |" in said
    assert Image.open(tmp_path / "demo" / "demo.png").width > 900
    rows = json.loads((tmp_path / "demo" / "answers.json").read_text())["rows"]
    assert {row["level"] for row in rows} <= set(cutouts.LEVELS) and all("said_without" in row for row in rows)


def test_the_demo_counts_right_answers_by_set_and_level():
    row = {"tokens": {"pixel": 0, "semantic": 5}, "view": "semantic", "level": "coarse", "kind": "ground"}
    row |= {"said_of_other": "mist", "said_without": "no", "set": "scenes", "answer": "grass"}
    rows = [{**row, "said": "Grass."}, {**row, "said": "mist", "level": "fine"}]
    (line,) = (line for line in demo.table(rows).splitlines() if line.startswith("| new scenes"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["new scenes", "coarse", "2", "0.50", "0.14", "1.00", "0.00", "0.00", "0.50", "semantic", "5.0"]


def test_every_kind_of_question_has_a_number_of_answers():
    assert measure.CHOICES.keys() == cutouts.LEVEL_OF.keys() and min(measure.CHOICES.values()) == 2


def test_the_cluster_of_a_thing_is_the_one_that_covers_it_and_little_else():
    mask = np.zeros((cutouts.SIDE, cutouts.SIDE), np.uint8)
    mask[: 4 * cutouts.PATCH, : 4 * cutouts.PATCH] = 2
    mask[4 * cutouts.PATCH :: 2] = 2  # half of the other patches: not mostly
    thing = why.patch_share(mask, 2)
    assert thing[:4, :4].all() and thing.sum() == 16
    cluster_map = np.zeros(thing.shape, int)
    cluster_map[:4, :5], cluster_map[:2, :2] = 1, 2
    assert why.own_cluster(cluster_map, thing) == 1


@pytest.mark.slow
def test_training_runs_through_its_stages_and_can_be_called_again(tmp_path, monkeypatch, stamps, capsys):
    vision, text = (
        vision_source(tmp_path / "vision", "dinov2"), text_source(tmp_path / "text", "llama", tie=True)
    )  # fmt: skip
    monkeypatch.setattr(run, "assemble", partial(assemble, image_size=64))  # 16 x 16 patches, as the scenes name
    monkeypatch.setattr(run, "fetch_part", {"dinov2-small": vision, "smollm2-135m-instruct": text}.get)
    monkeypatch.setattr(
        cutouts.write, "__defaults__", ({"train": (30, 5, False, False), "phrasings": (2, 0, False, True)},)
    )
    monkeypatch.setattr(sys, "argv", ["run"])
    arguments = ["--output", str(tmp_path / "out"), "--max_steps", "40"]
    run.main(arguments)
    release = tmp_path / "out" / "release"
    folder = assemble(vision, text, tmp_path / "again", trained=release)
    first, second = (measure.load_model(path).state_dict() for path in (tmp_path / "out" / "model", folder))
    for name, value in first.items():
        assert (value.float() - second[name].float()).abs().max() < 0.02 * value.float().abs().max() + 1e-3, name
    assert (release / TRAINABLE).stat().st_size < 12e6
    stages = [entry["stage"] for entry in json.loads((release / "granulon_manifest.json").read_text())["training"]]
    assert stages == ["words", "sft", "controller"]
    capsys.readouterr()
    run.main(arguments)
    assert capsys.readouterr().out.count("done before") == 6


def test_the_release_is_what_the_repository_holds():
    files = {path.name for path in demo.TRAINED.iterdir()}
    assert {TRAINABLE, "config.json", "granulon_manifest.json", "README.md"} <= files
    assert sum(path.stat().st_size for path in demo.TRAINED.rglob("*") if path.is_file()) <= 12e6
