"""The study's world: seeds decide scenes, and neither questions nor colours nor other facts give an answer away."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from studies.tokens import ColourClusters, RandomClusters, separation
from studies.world import (
    ANSWERS,
    GRID,
    KIND_LEVEL,
    LEVELS,
    NUMBERS,
    PRESENCE,
    SIZE,
    SPLIT_SIZE,
    SPLITS,
    draw_all,
    make_questions,
    make_scene,
    make_scenes,
    patch_colours,
    sentences,
)

SCENES = make_scenes("train", 900)
QUESTIONS = [make_questions(scene) for scene in SCENES]


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


def test_splits_are_disjoint():
    firsts = list(SPLITS.values())
    assert all(first + SPLIT_SIZE <= following for first, following in zip(firsts, firsts[1:]))
    assert make_scenes("test", 1, first=2)[0].seed == SPLITS["test"] + 2
    with pytest.raises(ValueError, match="unknown split"):
        make_scenes("dev", 1)
    with pytest.raises(ValueError, match="were requested"):
        make_scenes("train", SPLIT_SIZE, first=1)


def test_every_scene_has_a_question_of_each_kind_with_one_of_its_answers():
    for questions in QUESTIONS[:100]:
        assert [question.kind for question in questions] == list(ANSWERS)
        assert {question.level for question in questions} == set(LEVELS)
        for question in questions:
            assert question.answer in ANSWERS[question.kind]
            assert question.subject is None or question.subject in question.text


def test_answers_are_true_of_the_scene():
    for scene, questions in zip(SCENES[:200], QUESTIONS):
        for question in questions:
            if question.kind in PRESENCE:
                assert (question.subject in named(scene)) == (question.answer == "yes"), question
            elif KIND_LEVEL[question.kind] in ("medium", "fine"):
                (thing,) = (thing for thing in scene.things if question.subject in (thing.shape, thing.pattern))
                assert question.answer in (thing.shape, thing.pattern, thing.core)
            else:
                assert question.answer == getattr(scene, question.kind)
            if question.kind == "has_pair":  # an absent pair shares its pattern or its shape with a thing
                pattern, shape = question.subject.split()
                assert any(pattern == thing.pattern or shape == thing.shape for thing in scene.things)
        assert len(scene.things) == NUMBERS[scene.number]


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_answer_is_much_commoner_than_another(kind):
    answers = [question.answer for questions in QUESTIONS for question in questions if question.kind == kind]
    counts = Counter(answers)
    assert set(counts) == set(ANSWERS[kind])
    assert max(counts.values()) < 1.25 * len(answers) / len(counts)


def test_the_words_of_a_question_do_not_give_its_answer():
    """Learned on half of the questions, the commonest answer to a text is near chance on the other half."""
    seen = defaultdict(Counter)
    for questions in QUESTIONS[:450]:
        for question in questions:
            seen[question.text][question.answer] += 1
    tested = [question for questions in QUESTIONS[450:] for question in questions if question.text in seen]
    right = np.mean([seen[question.text].most_common(1)[0][0] == question.answer for question in tested])
    chance = np.mean([1 / len(ANSWERS[question.kind]) for question in tested])
    assert len(tested) > 5000
    assert right < chance + 0.04


def test_facts_are_independent():
    """No one-word fact of a scene changes how common the values of another are by much."""
    facts = [{kind: getattr(scene, kind) for kind in ("ground", "time", "number", "mark", "ink")} for scene in SCENES]
    for one in facts[0]:
        for other in facts[0].keys() - {one}:
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


def test_the_words_of_a_scene_state_every_fact_once():
    for scene in SCENES[:100]:
        words = " ".join(sentences(scene)).split()
        facts = [scene.ground, scene.time, scene.number, scene.mark, scene.ink]
        facts += [getattr(thing, part) for thing in scene.things for part in ("shape", "pattern")]
        assert all(words.count(fact) == 1 for fact in facts)
        shown = {word for words in scene.patch_words() for word in words}
        assert shown >= {scene.ground, scene.mark, *(thing.core for thing in scene.things)}


def test_mean_colours_do_not_show_where_things_are():
    """Clusters of a scene's mean colours follow its things no better than random regions do."""
    colours_SN3 = torch.from_numpy(patch_colours(draw_all(SCENES[:100])))
    by_colour, by_chance = ColourClusters(), RandomClusters()
    by_colour.colours = colours_SN3
    of_colour, random = (
        separation(module(colours_SN3, None, 1, 16, (GRID, GRID), 16).assignment.flatten(1).numpy(), SCENES[:100])
        for module in (by_colour, by_chance)
    )
    assert of_colour < random < 0.2
