"""The study's world: every scene is its seed's, nothing is answered without the picture, and colour does not do it."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from studies.encoders import linear_probe
from studies.tokens import ColourClusters, RandomClusters, separation
from studies.world import (
    ANSWERS,
    GRID,
    KIND_LEVEL,
    LEVELS,
    NUMBERS,
    PATCH,
    PRESENCE,
    SIZE,
    SPLIT_SIZE,
    SPLITS,
    draw_all,
    make_questions,
    make_scene,
    patch_colours,
    seeds,
    sentences,
)

SCENES = [make_scene(seed) for seed in seeds("train", 900)]
ASKED = [make_questions(scene) for scene in SCENES]


def named(scene) -> set[str]:
    things = [{thing.shape, thing.pattern, f"{thing.pattern} {thing.shape}"} for thing in scene.things]
    return set().union({scene.mark}, *things)


def test_a_seed_gives_the_same_scene_picture_questions_and_words():
    for seed in range(20):
        first, second = make_scene(seed), make_scene(seed)
        assert first == second
        assert first.draw().tobytes() == second.draw().tobytes()
        assert make_questions(first) == make_questions(second)
        assert sentences(first) == sentences(second)
    assert len({scene.draw().tobytes() for scene in SCENES[:200]}) == 200


def test_splits_are_disjoint_and_end_where_the_next_begins():
    ranges = [seeds(split, SPLIT_SIZE) for split in SPLITS]
    for one, other in zip(ranges, ranges[1:]):
        assert one.stop <= other.start
    with pytest.raises(ValueError, match="unknown split"):
        seeds("dev", 1)
    with pytest.raises(ValueError, match="are not among them"):
        seeds("train", SPLIT_SIZE, first=1)


def test_every_scene_has_a_question_of_each_kind_with_one_of_its_answers():
    for questions in ASKED[:100]:
        assert [question.kind for question in questions] == list(ANSWERS)
        assert {question.level for question in questions} == set(LEVELS)
        for question in questions:
            assert question.answer in ANSWERS[question.kind]
            assert question.subject is None or question.subject in question.text


def test_answers_are_what_the_scene_holds():
    for scene, questions in zip(SCENES[:200], ASKED):
        for question in questions:
            if question.kind in PRESENCE:
                assert (question.subject in named(scene)) == (question.answer == "yes"), question
            elif KIND_LEVEL[question.kind] in ("medium", "fine"):
                (thing,) = (thing for thing in scene.things if question.subject in (thing.shape, thing.pattern))
                assert question.answer in (thing.shape, thing.pattern, thing.core)
            else:
                assert question.answer == getattr(scene, question.kind)
        assert len(scene.things) == NUMBERS[scene.number]


def test_an_absent_pair_is_half_there():
    for scene, questions in zip(SCENES[:200], ASKED):
        question = next(question for question in questions if question.kind == "has_pair")
        pattern, shape = question.subject.split()
        assert any(pattern == thing.pattern or shape == thing.shape for thing in scene.things)


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_answer_is_much_commoner_than_another(kind):
    answers = [question.answer for questions in ASKED for question in questions if question.kind == kind]
    counts = Counter(answers)
    assert set(counts) == set(ANSWERS[kind])
    assert max(counts.values()) < 1.25 * len(answers) / len(counts)


def test_the_words_of_a_question_do_not_tell_its_answer():
    """Learned on half of the questions, the commonest answer to a text is near chance on the other half."""
    seen = defaultdict(Counter)
    for questions in ASKED[:450]:
        for question in questions:
            seen[question.text][question.answer] += 1
    asked = [question for questions in ASKED[450:] for question in questions if question.text in seen]
    right = np.mean([seen[question.text].most_common(1)[0][0] == question.answer for question in asked])
    chance = np.mean([1 / len(ANSWERS[question.kind]) for question in asked])
    assert len(asked) > 5000
    assert right < chance + 0.04


def test_facts_do_not_tell_each_other():
    """No one-word fact of a scene changes how common the values of another are by much."""
    facts = [{kind: getattr(scene, kind) for kind in ("ground", "time", "number", "mark", "ink")} for scene in SCENES]
    for one in facts[0]:
        for other in facts[0]:
            if one == other:
                continue
            for value in {fact[one] for fact in facts}:
                counts = Counter(fact[other] for fact in facts if fact[one] == value)
                assert max(counts.values()) < 1.35 * sum(counts.values()) / len(ANSWERS[other])


def test_things_and_mark_lie_in_the_picture_and_do_not_touch():
    for scene in SCENES:
        places = [(thing.centre, 12) for thing in scene.things] + [(scene.mark_centre, 4)]
        for number, ((x, y), reach) in enumerate(places):
            assert reach <= min(x, y) <= max(x, y) <= SIZE - reach
            for (other_x, other_y), other_reach in places[:number]:
                assert max(abs(x - other_x), abs(y - other_y)) >= reach + other_reach


def test_the_patches_of_a_question_hold_its_thing():
    for scene, questions in zip(SCENES[:100], ASKED):
        for question in questions:
            patches = scene.patches(question.kind, question.subject)
            if question.level == "coarse":
                assert patches == list(range(GRID * GRID))
            elif question.level == "pixel":
                x, y = (place // PATCH for place in scene.mark_centre)
                assert patches == [GRID * y + x]
            elif question.kind not in PRESENCE:
                assert len(patches) == (1 if question.kind == "core_of" else 9)


def test_the_words_of_a_scene_tell_every_fact_once():
    for scene in SCENES[:100]:
        told = " ".join(sentences(scene)).split()
        facts = [scene.ground, scene.time, scene.number, scene.mark, scene.ink]
        facts += [getattr(thing, part) for thing in scene.things for part in ("shape", "pattern")]
        assert all(told.count(fact) == 1 for fact in facts)


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if kind not in PRESENCE])
def test_mean_colours_alone_do_not_tell_the_answer(kind):
    """A linear probe of the mean colours, of the very patches that the question is about, stays near chance."""
    colours_SN3 = patch_colours(_pictures())
    rows, answers = [], []
    for colours_N3, scene, questions in zip(colours_SN3, SCENES, ASKED):
        question = next(question for question in questions if question.kind == kind)
        shown_3 = colours_N3[scene.patches(kind, question.subject)]
        rows.append(np.concatenate([shown_3.mean(0), [shown_3.mean()]]))
        answers.append(ANSWERS[kind].index(question.answer))
    rows, answers = torch.tensor(np.array(rows), dtype=torch.float32), torch.tensor(answers)
    accuracy = linear_probe(rows[:600], answers[:600], rows[600:], answers[600:], len(ANSWERS[kind]))
    assert accuracy < 1 / len(ANSWERS[kind]) + 0.13


def test_mean_colours_do_not_show_where_things_are():
    """Clusters of a scene's mean colours follow its things no better than random regions do."""
    colours_SN3 = torch.from_numpy(patch_colours(_pictures()[:100]))
    by_colour, by_chance = ColourClusters(), RandomClusters()
    by_colour.colours = colours_SN3
    of_colour, random = (
        separation(module(colours_SN3, None, 1, 16, (GRID, GRID), 16).assignment.flatten(1).numpy(), SCENES[:100])
        for module in (by_colour, by_chance)
    )
    assert of_colour < random < 0.2


_drawn = []


def _pictures() -> np.ndarray:
    if not _drawn:
        _drawn.append(draw_all(SCENES))
    return _drawn[0]
