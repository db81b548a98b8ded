"""The drawn world: every scene is its seed's, questions agree with the picture, nothing is answered without it."""

from collections import Counter
from math import isclose

import numpy as np
import pytest

from granulon.train.data.scenes import ANSWERS, COLOURS, INKS, KIND_LEVEL, LEVELS, SIZE, make_questions, make_scene

SCENES = [make_scene(seed) for seed in range(600)]


def test_a_seed_gives_the_same_scene_picture_and_questions():
    for seed in range(20):
        first, second = make_scene(seed), make_scene(seed)
        assert first == second
        assert first.draw().tobytes() == second.draw().tobytes()
        assert make_questions(first) == make_questions(second)
    assert len({scene.draw().tobytes() for scene in SCENES}) == len(SCENES)


def test_every_scene_has_a_question_of_each_kind_with_the_scenes_answer():
    for scene in SCENES[:50]:
        questions = make_questions(scene)
        assert sorted(question.kind for question in questions) == sorted(ANSWERS)
        assert {question.level for question in questions} == set(LEVELS)
        for question in questions:
            assert question.answer == scene.facts()[question.kind] in ANSWERS[question.kind]
            assert question.level == KIND_LEVEL[question.kind]


def test_what_is_asked_about_can_be_seen():
    for scene in SCENES[:100]:
        pixels = {tuple(pixel) for pixel in np.asarray(scene.draw()).reshape(-1, 3)}
        assert {COLOURS[scene.thing.colour], COLOURS[scene.thing.core], INKS[scene.ink]} <= pixels


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_answer_is_much_commoner_than_another(kind):
    counts = Counter(scene.facts()[kind] for scene in SCENES)
    assert set(counts) == set(ANSWERS[kind])
    assert max(counts.values()) < 1.35 * len(SCENES) / len(counts)


def test_the_words_of_a_question_do_not_tell_its_answer():
    """Of all scenes with the same question text, the commonest answer is hardly commoner than chance."""
    asked = {}
    for scene in SCENES:
        for question in make_questions(scene):
            asked.setdefault((question.kind, question.text), []).append(question.answer)
    for (kind, text), answers in asked.items():
        assert Counter(answers).most_common(1)[0][1] < 1.5 * len(answers) / len(ANSWERS[kind]), text


def test_object_and_mark_never_touch_and_lie_in_the_picture():
    for scene in SCENES:
        (x, y), (mark_x, mark_y) = scene.thing.centre, scene.mark_centre
        assert max(abs(x - mark_x), abs(y - mark_y)) >= 13 + 4
        assert 13 <= min(x, y) <= max(x, y) <= SIZE - 13
        assert 4 <= min(mark_x, mark_y) <= max(mark_x, mark_y) <= SIZE - 4


def test_patch_labels_stand_where_the_thing_and_the_mark_are():
    for scene in SCENES[:50]:
        labels = scene.labels(grid=8)
        for kind, place in (("shape", scene.thing.centre), ("ink", scene.mark_centre)):
            x, y = (min(coordinate // 8, 7) for coordinate in place)
            assert labels[kind][8 * y + x] == ANSWERS[kind].index(scene.facts()[kind])
            shown = sum(label < len(ANSWERS[kind]) for label in labels[kind])
            assert 4 <= shown <= 9
        assert set(labels["place"]) == {ANSWERS["place"].index(scene.place)}


def test_night_is_darker_than_day():
    brightness = {time: [] for time in ANSWERS["time"]}
    for scene in SCENES[:200]:
        brightness[scene.time].append(np.asarray(scene.draw())[:: SIZE - 1, :: SIZE - 1].mean())
    assert not isclose(np.mean(brightness["day"]), np.mean(brightness["night"]), rel_tol=0.3)
    assert np.mean(brightness["night"]) < np.mean(brightness["day"])
