"""The study: arms that differ in one thing alone, answers like the model's own, figures with intervals."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from granulon.evaluation.token_reduction import grid_shape
from granulon.train.controller.fit import train_controller
from modeling_granulon.adaptive_token_aggregation import AdaptiveTokenAggregation
from studies import run as study
from studies import world
from studies.arms import (
    ARMS,
    BUDGET_ARMS,
    BUDGETS,
    LEVEL_ARMS,
    Questions,
    answer_logits,
    ask,
    embed,
    make_model,
    make_processor,
    make_tokenizer,
)
from studies.encoders import as_pixels, encode, make_encoder
from studies.report import comparisons_table, mean_over_seeds, mean_with_interval, statistics
from studies.tokens import MODULES, SOURCES, ColourClusters
from studies.training import TEXT_FIRST, Scale, cached, label_rows, predicted_levels, template_level

KINDS = tuple(world.KINDS)
GRID = (world.GRID, world.GRID)
SCENES = world.make_scenes("validation", 6)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(seed=1)


@pytest.fixture(scope="module")
def features(encoder):
    return encode(encoder, SCENES)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def module_of(source: str, features):
    module = MODULES.get(source, AdaptiveTokenAggregation)()
    if isinstance(module, ColourClusters):
        module.colours = features.colours_SN3
    return module


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_tokens_keeps_the_aggregations_contract(source, tokens, features):
    module, state = module_of(source, features), torch.get_rng_state()
    patches, clusters = features.features_SND.float(), round(1.2 * tokens)
    with torch.no_grad():
        out = module(patches, features.relation_SNC.float(), 1, clusters, GRID, tokens)
    assert out.tokens.shape == (6, tokens, patches.shape[-1]) and out.tokens.dtype == patches.dtype
    assert out.mask.shape == out.scores.shape == (6, tokens) and out.mask.dtype == torch.bool
    assert out.assignment.shape == (6, *GRID)
    assert 0 <= out.assignment.min() and out.assignment.max() < tokens
    assert out.tokens.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())
    for slot in range(tokens):  # a token is the mean of the patches assigned to it
        members = (out.assignment[0].flatten() == slot).nonzero().flatten()
        assert bool(len(members)) == bool(out.mask[0, slot])
        if len(members):
            assert torch.allclose(out.tokens[0, slot], patches[0, members].mean(0), atol=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_no_image_depends_on_the_batch(source, features):
    module, one = module_of(source, features), features.rows(slice(3, 4))
    with torch.no_grad():
        together = module(features.features_SND.float(), features.relation_SNC.float(), 1, 10, GRID, 8)
        if isinstance(module, ColourClusters):
            module.colours = one.colours_SN3
        alone = module(one.features_SND.float(), one.relation_SNC.float(), 1, 10, GRID, 8)
    assert torch.equal(together.assignment[3], alone.assignment[0])
    assert torch.allclose(together.tokens[3], alone.tokens[0], atol=1e-5)


def test_grid_cells_are_square_up_to_one_patch(features):
    assert [grid_shape(tokens) for tokens in BUDGETS] == [(2, 2), (2, 4), (4, 4), (4, 8)]
    for tokens in BUDGETS:
        out = module_of("grid", features)(features.features_SND.float(), None, 1, tokens, GRID, tokens)
        places = [(out.assignment[0] == slot).nonzero() for slot in range(tokens)]
        for axis in (0, 1):
            lengths = [len(place[:, axis].unique()) for place in places]
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("tokens", BUDGETS)
def test_arms_of_one_budget_have_as_many_tokens(tokens, features, tokenizer):
    shown = {}
    for arm in (arm for arm in BUDGET_ARMS if arm.slots == tokens):
        embeds, visible = embed(make_model(tokenizer, arm), arm, features, arm.view)
        assert embeds.shape[1] == tokens
        shown[arm.source] = visible.sum(1).tolist()
    assert set(shown) == set(SOURCES)
    assert all(counts == [tokens] * len(features) for counts in shown.values())


@pytest.mark.parametrize("name", ["pixels", "semantic 8", "pixels + grid", "levels, default K"])
def test_cached_features_and_packed_questions_give_the_logits_of_single_prompts(name, features, tokenizer, encoder):
    """Through the model's own forward, from pixels, one question at a time."""
    arm = ARMS[name]
    model = make_model(tokenizer, arm)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    rows, level = slice(2), len(arm.levels) // 2
    questions = Questions.of(SCENES, tokenizer)
    with torch.no_grad():
        embeds, visible = embed(model, arm, features.rows(rows), arm.view, level)
        packed = answer_logits(model, questions.rows(rows), embeds, visible)
        pixels = as_pixels(world.draw_all(SCENES[:2]))
        for scene in range(2):
            for number in (0, 3, len(KINDS) - 1):
                text = world.make_questions(SCENES[scene])[number].text
                ids = [tokenizer.get_vocab()[word] for word in text.split()]
                prompt = torch.tensor([[model.config.image_token_id] * embeds.shape[1] + ids])
                single = model(
                    input_ids=prompt, pixel_values=pixels[scene : scene + 1], visual_view=arm.view,
                    granularity=level if arm.levels else None,
                )  # fmt: skip
                # Cached features are in fp16.
                assert torch.allclose(single.logits[0, -1], packed[scene, number], atol=2e-2)
                assert single.logits[0, -1].argmax() == packed[scene, number].argmax()


def test_a_question_sees_the_image_and_no_other_question(features, tokenizer):
    arm = ARMS["semantic 8"]
    model, rows = make_model(tokenizer, arm), slice(2)
    questions = Questions.of(SCENES, tokenizer).rows(rows)
    with torch.no_grad():
        embeds, visible = embed(model, arm, features.rows(rows), arm.view)
        before = answer_logits(model, questions, embeds, visible)
        changed = replace(questions, ids_SQL=questions.ids_SQL.clone())
        changed.ids_SQL[:, 2] = 5
        after = answer_logits(model, changed, embeds, visible)
        other = answer_logits(model, questions, embeds.flip(0), visible)
    same = [number for number in range(len(KINDS)) if number != 2]
    assert torch.allclose(before[:, same], after[:, same], atol=1e-5)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-3)
    assert not torch.allclose(before, other, atol=1e-3)


def test_arms_differ_only_in_what_is_studied():
    assert len(ARMS) == len({repr(asdict(arm)) for arm in ARMS.values()})
    equal, default = LEVEL_ARMS
    assert len({keep for *_, keep in equal.levels}) == 1
    assert [keep for *_, keep in default.levels] == [5, 10, 20]
    for arm in BUDGET_ARMS:
        assert replace(arm, source="semantic", name="") == replace(ARMS[f"semantic {arm.slots}"], name="")
    assert Scale().train_scenes <= TEXT_FIRST, "the texts are about scenes that no arm sees"


def test_shifting_asks_about_the_next_image(features, tokenizer):
    arm = ARMS["semantic 8"]
    model, questions = make_model(tokenizer, arm), Questions.of(SCENES, tokenizer)
    answers, nll = ask(model, arm, features, questions, arm.view, shift=1)
    moved = features.rows(torch.arange(len(features)).roll(-1))
    expected = ask(model, arm, moved, questions, arm.view)
    assert torch.equal(answers, expected[0]) and torch.allclose(nll, expected[1], atol=1e-4)


def test_a_cached_result_is_made_once_and_never_half_written(tmp_path):
    made = []
    for _ in range(2):
        assert cached(tmp_path / "x" / "one.pt", lambda: made.append(1) or {"value": 3}) == {"value": 3}
    assert made == [1]
    with pytest.raises(KeyError):
        cached(tmp_path / "x" / "two.pt", lambda: {}["missing"])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["one.pt"]


def test_measured_and_template_labels_have_the_corpus_form():
    nll = torch.rand(3, len(SCENES), len(KINDS), generator=torch.Generator().manual_seed(0))
    for source in ("template", "measured"):
        rows = label_rows(source, ["coarse", "medium", "fine"], SCENES, nll)
        assert len(rows) == len(SCENES) * len(KINDS)
        assert {row["split"] for row in rows} == {"train", "validation"}
        assert all(abs(sum(row["level_probs"].values()) - 1) < 1e-6 for row in rows)
    assert rows[0]["level"] == ["coarse", "medium", "fine"][nll[:, 0, 0].argmin()]
    levels = {question.kind: template_level(question) for question in world.make_questions(SCENES[0])}
    assert levels["ground"] == "coarse" and levels["mark"] == "fine"


def test_a_controller_learns_the_template_labels(tokenizer):
    arm = LEVEL_ARMS[0]
    model = make_model(tokenizer, arm)
    processor = make_processor(tokenizer, arm)
    rows = label_rows("template", model.config.granularity_names, SCENES, torch.zeros(3, len(SCENES), len(KINDS)))
    train_controller(model, processor, rows, epochs=60, lr=3e-3)
    texts = ["what is the ground ?", "what is the tiny mark ?", "is there a circle ?"]
    assert predicted_levels(model, processor, texts) == [0, 2, 1]


def test_intervals_take_scenes_and_seeds_into_account():
    random = np.random.default_rng(0)
    right = (random.random((5, 200, 12)) < 0.7).astype(int)
    rows = statistics(right)
    assert rows.shape == (200, 6)
    assert np.isclose(mean_over_seeds(rows.sum(0, keepdims=True))[0], right.mean())

    def width(values):
        low, high = map(float, re.findall(r"\[(.*), (.*)\]", mean_with_interval(values))[0])
        return high - low

    uneven = (random.random((5, 200, 12)) < np.array([0.4, 0.5, 0.6, 0.7, 0.8])[:, None, None]).astype(int)
    assert width(uneven) > 2 * width(right)


def test_comparisons_state_difference_interval_and_corrected_p():
    random = np.random.default_rng(0)
    theirs = (random.random((5, 200, 12)) < 0.6).astype(int)
    ours = np.maximum(theirs, random.random((5, 200, 12)) < 0.2)
    text = comparisons_table([("a", "better", ours, theirs), ("a", "same", theirs, theirs)])
    better, same = (next(line for line in text.splitlines() if f"| {name} |" in line) for name in ("better", "same"))
    assert re.search(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", better)
    assert "| 5 / 0 of 5 |" in better and "| yes |" in better
    assert "+0.0 [+0.0, +0.0]" in same and "1.0000" in same and "| no |" in same


@pytest.mark.slow
def test_the_quick_study_runs_to_its_report_and_a_rerun_repeats_nothing(tmp_path):
    options = ["--quick", "--seeds", "2", "--workers", "1", "--output", str(tmp_path)]
    study.main(options)
    report = (tmp_path / "results.md").read_text()
    for part in "abcdg":
        assert re.search(rf"^\| {part} \| .* \[[-+]\d", report, re.M), f"part {part} has no comparison with interval"
    assert all(f"| {name} |" in report or f"**{name}**" in report for name in ARMS)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len([path for path in made if path.parent.name == "arms"]) == 2 * len(ARMS)
    (tmp_path / "arms" / "grid_8-12.pt").unlink()
    study.main(options)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert {path.name for path in made if made[path] != again[path]} == {"grid_8-12.pt"}
