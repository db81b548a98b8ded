"""Photographed scenes: what is asked is what is there, facts are balanced, splits are apart. Stamps are stand-ins."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image, ImageDraw

from granulon.hub.files import read_jsonl
from granulon.train.data import cutouts
from granulon.train.data.cutouts import LEVEL_OF, MOST, PHRASINGS, Scene, Thing, compose, patch_texts, questions


@pytest.fixture(scope="module", autouse=True)
def stamps(tmp_path_factory):
    """A disc or a bar in a colour of its own for every stamp of the table, and for every letter."""
    folder, random = tmp_path_factory.mktemp("stamps"), np.random.default_rng(0)
    known = [cutout.stamp for held_out in (False, True) for cutout in cutouts.cutouts(held_out)]
    for number, name in enumerate([f"{stamp}.png" for stamp in known] + list(cutouts.SIGNS.values())):
        picture = Image.new("RGBA", (90, 70 if number % 2 else 90))
        ImageDraw.Draw(picture).ellipse((5, 5, 84, 64), fill=(*random.integers(0, 255, 3).tolist(), 255))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    patch = pytest.MonkeyPatch()
    patch.setattr(cutouts, "STAMPS", folder)
    cutouts.stamp.cache_clear()
    yield folder
    patch.undo()
    cutouts.stamp.cache_clear()


@pytest.fixture(scope="module")
def scenes():
    return [compose(seed) for seed in range(300)]


def test_the_table_names_things_plainly_and_holds_out_others_of_the_same_name():
    train, held_out = (set(cutouts.by_name(which)) for which in (False, True))
    assert held_out < train and len(train) > 250
    assert not {c.stamp for c in cutouts.cutouts(False)} & {c.stamp for c in cutouts.cutouts(True)}
    kinds = defaultdict(set)
    for which in (False, True):
        for cutout in cutouts.cutouts(which):
            assert cutout.name == cutout.name.strip() and len(cutout.name.split()) <= 4 and cutout.name[-1] not in ".!"
            kinds[cutout.name].add(cutout.kind)
    assert all(len(found) == 1 for found in kinds.values()), "a name has one kind"


def test_a_seed_gives_one_scene(scenes):
    again = compose(7)
    assert again.things == scenes[7].things and again.sign == scenes[7].sign and again.ground == scenes[7].ground
    assert np.array_equal(np.array(again.picture), np.array(scenes[7].picture))
    assert scenes[7].things != scenes[8].things


def test_things_are_where_the_mask_says_and_can_be_seen(scenes):
    for scene in scenes:
        assert 1 <= len(scene.main) <= MOST and len({thing.name for thing in scene.things}) == len(scene.things)
        for number, thing in enumerate(scene.things, 1):
            rows, columns = np.nonzero(scene.mask == number)
            assert len(rows) / scene.mask.size == pytest.approx(thing.area) and len(rows) > 150
            assert (columns.mean() / cutouts.SIDE, rows.mean() / cutouts.SIDE) == pytest.approx((thing.x, thing.y))
        assert (scene.mask == 255).any() == (scene.sign is not None)
    assert {len(scene.main) for scene in scenes} == set(range(1, MOST + 1))


def scene_of(*things, sign=None, ground="grass"):
    return Scene(None, None, ground, tuple(Thing(*thing) for thing in things), sign)


def answers(scene, tries=40):
    """Every answer that a scene's questions have, by kind and text."""
    found = defaultdict(dict)
    for seed in range(tries):
        for question in questions(scene, seed):
            found[question.kind][question.text] = question.answer
    return found


def test_answers_are_what_the_scene_says():
    zebra, owl = ("zebra", "mammal", 0.8, 0.5, 0.2), ("owl", "bird", 0.2, 0.5, 0.1)
    tiny = ("apple", "fruit", 0.5, 0.9, 0.01, True)
    found = answers(scene_of(zebra, owl, sign=cutouts.Sign("Q", "red")))
    assert set(found["kinds"].values()) == {"birds and mammals"} and set(found["ground"].values()) == {"grass"}
    assert found["place"]["What is on the right?"] == "zebra" and found["place"]["What is on the left?"] == "owl"
    assert found["beside"]["What is to the left of the zebra?"] == "owl"
    assert found["beside"]["What is to the right of the owl?"] == "zebra"
    assert set(found["biggest"].values()) == {"zebra"}
    assert found["exists"]["Is there an owl?"] == "yes" and "no" in found["exists"].values()
    assert set(found["letter"].values()) == {"Q"} and set(found["colour"].values()) == {"red"}
    assert not {"count", "single", "tiny"} & found.keys(), "a sign is no thing to be counted, or not counted"
    found = answers(scene_of(zebra, owl, tiny))
    assert set(found["tiny"].values()) == {"apple"} and set(found["count"].values()) == {"three"}
    assert "kinds" not in found, "three kinds are not asked for"
    assert set(answers(scene_of(zebra))["single"].values()) == {"zebra"}


def test_what_is_not_clear_is_not_asked():
    level = scene_of(("zebra", "mammal", 0.5, 0.3, 0.2), ("owl", "bird", 0.52, 0.7, 0.19))
    found = answers(level)
    assert "biggest" not in found, "neither is clearly bigger"
    assert not any("left" in text or "right" in text for text in found["beside"]), "neither is beside the other"


def test_every_question_is_balanced_so_that_none_is_answered_without_the_image(scenes):
    counts = defaultdict(Counter)
    for seed, scene in enumerate(scenes):
        for question in questions(scene, seed):
            counts[question.kind][question.answer] += 1
    assert counts.keys() == LEVEL_OF.keys() == PHRASINGS.keys()
    for kind, found in counts.items():
        most = found.most_common(1)[0][1] / found.total()
        assert most < (0.65 if kind in ("exists", "mostly") else 0.4), (kind, most)


def test_the_held_out_phrasing_is_never_trained_on(scenes):
    train = {question.text for seed, scene in enumerate(scenes) for question in questions(scene, seed)}
    held_out = {question.text for seed, scene in enumerate(scenes) for question in questions(scene, seed, True)}
    assert train and held_out and not train & held_out


def test_patches_are_named_by_what_they_mostly_show(scenes):
    for scene in scenes[:40]:
        texts = patch_texts(scene)
        names = {thing.name for thing in scene.things} | {scene.ground}
        names |= {f"{scene.sign.colour} {scene.sign.letter}"} if scene.sign else set()
        assert len(texts) == 256 and set(texts) <= names and scene.ground in texts
        for thing in scene.main:
            assert thing.name in texts


def test_sets_are_written_once_and_are_read_as_training_rows(tmp_path, monkeypatch):
    splits = {"train": (6, 2, False, False), "things": (3, 1, True, False)}
    files = list(cutouts.write(tmp_path, splits))
    rows = read_jsonl(files[0])
    assert {row["image"] for row in rows} == {f"train/{number:05}.jpg" for number in range(6)}
    for row in rows:
        assert Image.open(tmp_path / row["image"]).size == (224, 224)
        assert row["granularity"] in cutouts.LEVELS and row["kind"] in PHRASINGS
    assert {row["kind"] for row in rows if row["image"] < "train/00002"} <= {"single", "kinds", "ground"}
    texts = json.loads((tmp_path / "train-texts.json").read_text())
    assert np.load(tmp_path / "train-patches.npy").shape == (6, 256) and texts
    assert all(row["granularity"] == LEVEL_OF[row["kind"]] for row in read_jsonl(files[1])), "tests keep their level"
    stored = files[0].stat().st_mtime_ns
    list(cutouts.write(tmp_path, splits))
    assert files[0].stat().st_mtime_ns == stored


def test_missing_stamps_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cutouts, "STAMPS", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="stamps are not there.*`make parts` fetches them"):
        list(cutouts.write(tmp_path / "scenes", {"train": (1, 0, False, False)}))
    assert not (tmp_path / "scenes").exists()
