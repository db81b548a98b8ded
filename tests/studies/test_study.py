"""The study's machinery: arms that differ in one thing alone, a test split that stays shut, figures with intervals."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from granulon.train.controller.fit import train_controller
from modeling_granulon.adaptive_token_aggregation import AdaptiveTokenAggregation
from studies import run as study
from studies import world
from studies.arms import (
    ARMS,
    BUDGET_ARMS,
    BUDGETS,
    LEVEL_ARMS,
    ImageTokens,
    Questions,
    answer_logits,
    ask,
    embed,
    make_model,
    make_processor,
    make_tokenizer,
)
from studies.encoders import as_pixels, decodable_kinds, encode, make_encoder
from studies.jobs import TEXT_FIRST, Scale, digits, first_step, numbers, once, open_test_split
from studies.levels import chosen_levels, label_rows, template_level
from studies.report import (
    Comparison,
    comparisons_section,
    mean_over_seeds,
    statistics,
    with_interval,
)
from studies.run import QUICK, comparison, preparation, run_jobs
from studies.tokens import SEMANTIC, SOURCES, ColourClusters, cells_of, make_aggregation

KINDS = tuple(world.ANSWERS)
GRID = (world.GRID, world.GRID)
SCENES = [world.make_scene(seed) for seed in world.seeds("validation", 6)]


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(seed=1)


@pytest.fixture(scope="module")
def features(encoder):
    return encode(encoder, SCENES)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def module_of(source: str, tokens: int, features):
    torch.manual_seed(0)
    if source == SEMANTIC:
        return AdaptiveTokenAggregation()
    module = make_aggregation(source, features.features_SND.shape[-1], tokens)
    if isinstance(module, ColourClusters):
        module.colours = features.colours_SN3
    return module


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_tokens_keeps_the_aggregations_contract(source, tokens, features):
    module, state = module_of(source, tokens, features), torch.get_rng_state()
    patches, clusters = features.features_SND.float(), round(1.2 * tokens)
    with torch.no_grad():
        out = module(patches, features.relation_SNC.float(), 1, clusters, GRID, tokens)
    assert out.tokens.shape == (6, tokens, patches.shape[-1]) and out.tokens.dtype == patches.dtype
    assert out.mask.shape == out.scores.shape == (6, tokens) and out.mask.dtype == torch.bool
    assert out.assignment.shape == (6, *GRID)
    assert 0 <= out.assignment.min() and out.assignment.max() < tokens
    assert out.tokens.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())
    if source != "learned":  # a token is the mean of the patches assigned to it
        for slot in range(tokens):
            members = (out.assignment[0].flatten() == slot).nonzero().flatten()
            assert bool(len(members)) == bool(out.mask[0, slot])
            if len(members):
                assert torch.allclose(out.tokens[0, slot], patches[0, members].mean(0), atol=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_no_image_depends_on_the_batch(source, features):
    module = module_of(source, 8, features)
    with torch.no_grad():
        whole = module(features.features_SND.float(), features.relation_SNC.float(), 1, 10, GRID, 8)
        if isinstance(module, ColourClusters):
            module.colours = features.colours_SN3[3:4]
        alone = module(features.features_SND[3:4].float(), features.relation_SNC[3:4].float(), 1, 10, GRID, 8)
    assert torch.equal(whole.assignment[3], alone.assignment[0])
    assert torch.allclose(whole.tokens[3], alone.tokens[0], atol=1e-5)


def test_cells_are_as_square_as_can_be_and_differ_by_a_patch_at_most(features):
    assert [cells_of(tokens) for tokens in BUDGETS] == [(2, 2), (2, 4), (4, 4), (4, 8)]
    for tokens in BUDGETS:
        out = module_of("grid", tokens, features)(features.features_SND.float(), None, 1, tokens, GRID, tokens)
        heights, widths = [], []
        for slot in range(tokens):
            rows, columns = (out.assignment[0] == slot).nonzero().T
            heights.append(len(rows.unique()))
            widths.append(len(columns.unique()))
        assert max(heights) - min(heights) <= 1 and max(widths) - min(widths) <= 1


@pytest.mark.parametrize("tokens", BUDGETS)
def test_arms_of_one_budget_have_as_many_tokens(tokens, features, tokenizer, encoder):
    shown = {}
    for arm in (arm for arm in BUDGET_ARMS if arm.slots == tokens):
        model = make_model(tokenizer, encoder.config, arm, seed=0)
        rows = torch.arange(len(features))
        embeds, seen = embed(model, ImageTokens(model, arm, features), arm.view, rows, torch.zeros_like(rows))
        assert embeds.shape[1] == tokens
        shown[arm.source] = seen.sum(1).tolist()
    assert set(shown) == {"semantic", "grid", "random", "colour"}
    assert all(counts == [tokens] * len(features) for counts in shown.values())


@pytest.mark.parametrize("name", ["pixels", "semantic 8", "pixels + grid", "pixels + learned", "levels, equal K"])
def test_cached_and_packed_questions_are_answered_as_single_prompts_to_the_whole_model(
    name, features, tokenizer, encoder
):
    """Through the processor and the model's own forward, from pixels, one question at a time: the same logits."""
    arm = ARMS[name]
    model = make_model(tokenizer, encoder.config, arm, seed=0)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    questions = Questions.of(SCENES, tokenizer, KINDS)
    level = torch.full((2,), len(arm.levels) // 2)
    with torch.no_grad():
        embeds, seen = embed(model, ImageTokens(model, arm, features), arm.view, torch.arange(2), level)
        packed = answer_logits(model, questions.rows(torch.arange(2)), embeds, seen)
        pixels = as_pixels(world.draw_all(SCENES[:2]))
        for scene in range(2):
            for number in (0, 3, len(KINDS) - 1):
                text = world.make_questions(SCENES[scene])[number].text
                ids = [tokenizer.get_vocab()[word] for word in text.split()]
                prompt = torch.tensor([[model.config.image_token_id] * embeds.shape[1] + ids])
                whole = model(
                    input_ids=prompt, pixel_values=pixels[scene : scene + 1], visual_view=arm.view,
                    granularity=level[:1] if arm.levels else None,
                )  # fmt: skip
                # The cache is in fp16.
                assert torch.allclose(whole.logits[0, -1], packed[scene, number], atol=2e-2)
                assert whole.logits[0, -1].argmax() == packed[scene, number].argmax()


def test_a_question_sees_the_image_and_nothing_of_the_other_questions(features, tokenizer, encoder):
    arm = ARMS["semantic 8"]
    model = make_model(tokenizer, encoder.config, arm, seed=0)
    rows, tokens = torch.arange(2), ImageTokens(model, arm, features)
    questions = Questions.of(SCENES, tokenizer, KINDS).rows(rows)
    embeds = embed(model, tokens, arm.view, rows, torch.zeros_like(rows))
    with torch.no_grad():
        before = answer_logits(model, questions, *embeds)
        changed = replace(questions, ids_ST=questions.ids_ST.masked_fill(questions.question_ST == 2, 5))
        after = answer_logits(model, changed, *embeds)
        other = answer_logits(model, questions, embeds[0].flip(0), embeds[1])
    same = [number for number in range(len(KINDS)) if number != 2]
    assert torch.allclose(before[:, same], after[:, same], atol=1e-5)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-3)
    assert not torch.allclose(before, other, atol=1e-3)


def test_only_what_the_method_studies_differs_between_arms():
    assert len(ARMS) == len({asdict(arm).__repr__() for arm in ARMS.values()})
    equal, default = LEVEL_ARMS
    assert len({keep for *_, keep in equal.levels}) == 1
    assert [keep for *_, keep in default.levels] == [5, 10, 20]
    for arm in BUDGET_ARMS:
        assert replace(arm, source="semantic", name="") == replace(ARMS[f"semantic {arm.slots}"], name="")


def test_other_images_are_asked_about_by_shifting(features, tokenizer, encoder):
    arm = ARMS["semantic 8"]
    model = make_model(tokenizer, encoder.config, arm, seed=0)
    tokens, questions = ImageTokens(model, arm, features), Questions.of(SCENES, tokenizer, KINDS)
    said, nll = ask(model, tokens, questions, arm.view, shift=1, batch=4)
    moved = replace(features, features_SND=features.features_SND.roll(-1, 0))
    moved = replace(moved, relation_SNC=features.relation_SNC.roll(-1, 0))
    expected = ask(model, ImageTokens(model, arm, moved), questions, arm.view)
    assert np.array_equal(said, expected[0]) and np.allclose(nll, expected[1], atol=1e-4)


def test_a_kind_stays_only_if_all_that_it_needs_is_decoded():
    probes = {kind: {"chance": 0.25, "features": 0.9} for kind in KINDS}
    probes["shape_of"]["features"] = 0.5
    kept = decodable_kinds(probes, margin=0.4)
    assert set(KINDS) - set(kept) == {"shape_of", "has_shape", "has_pair"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Everything before the final stage, and the seeds of all scenes that were drawn for it."""
    folder, drawn, make = tmp_path_factory.mktemp("study"), set(), world.make_scene

    def watched(seed):
        drawn.add(seed)
        return make(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "make_scene", watched)
        run_jobs(preparation(folder, QUICK, (study.CHOOSING_SEED,)) + study.choosing(folder, QUICK)[:2], workers=1)
    return folder, drawn


def test_no_scene_of_the_test_split_is_drawn_before_the_final_stage(prepared):
    _, drawn = prepared
    test = world.seeds("test", world.SPLIT_SIZE)
    assert drawn and not any(seed in test for seed in drawn)


def test_the_test_split_stays_shut_until_all_is_settled(prepared, tmp_path):
    with pytest.raises(RuntimeError, match="stays shut"):
        open_test_split(tmp_path, QUICK, "masked")
    with pytest.raises(RuntimeError, match="stays shut"):
        open_test_split(prepared[0], replace(QUICK, text_steps=3), "masked")


def test_choosing_uses_none_of_the_final_seeds(prepared):
    jobs = comparison(prepared[0], QUICK, (11, 12, 13, 14, 15))
    seeds = {seed for job in jobs if job.name.startswith("arm") for seed in job.arguments[3]}
    assert seeds == {11, 12, 13, 14, 15} and study.CHOOSING_SEED not in seeds
    assert {job.arguments[1].recipe for job in jobs} == {QUICK.recipe}  # one recipe, one number of steps
    assert {job.name.removeprefix("arm ") for job in jobs if job.name.startswith("arm")} == set(ARMS)


def test_what_is_there_is_not_made_again(tmp_path):
    made = []
    for _ in range(2):
        once(tmp_path / "x" / "one.json", lambda: made.append(1) or {"value": 3})
    assert made == [1]
    assert json.loads((tmp_path / "x" / "one.json").read_text())["value"] == 3
    with pytest.raises(KeyError):
        once(tmp_path / "x" / "two.json", lambda: {}["missing"])
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["one.json"]


def test_measured_and_template_labels_have_the_corpus_form():
    nll = np.random.default_rng(0).random((3, len(SCENES), len(KINDS)))
    for source in ("template", "measured"):
        rows = label_rows(source, ["coarse", "medium", "fine"], SCENES, KINDS, nll)
        assert len(rows) == len(SCENES) * len(KINDS)
        assert {row["split"] for row in rows} == {"train", "validation"}
        assert all(abs(sum(row["level_probs"].values()) - 1) < 1e-6 for row in rows)
    assert rows[0]["level"] == ["coarse", "medium", "fine"][nll[:, 0, 0].argmin()]
    assert template_level("ground") == "coarse" and template_level("mark") == "fine"


def test_a_controller_can_be_trained_on_the_studys_own_processor(features, tokenizer, encoder):
    arm = LEVEL_ARMS[0]
    model = make_model(tokenizer, encoder.config, arm, seed=0)
    processor = make_processor(tokenizer, arm)
    nll = np.zeros((3, len(SCENES), len(KINDS)))
    rows = label_rows("template", model.config.granularity_names, SCENES, KINDS, nll)
    train_controller(model, processor, rows, epochs=60, lr=3e-3)
    texts = ["what is the ground ?", "what is the tiny mark ?", "is there a circle ?"]
    assert chosen_levels(model, processor, texts) == [0, 2, 1]


def test_digits_and_steps():
    values = np.array([[1, 0, 1], [0, 0, 1]])
    assert digits(values) == ["101", "001"] and np.array_equal(numbers(digits(values)), values)
    assert first_step([(50, 0.3), (100, 0.7), (150, 0.6)], 0.6) == 100
    assert first_step([(50, 0.3)], 0.6) is None


def test_intervals_take_scenes_and_seeds_into_account():
    random = np.random.default_rng(0)
    right = (random.random((5, 200, 12)) < 0.7).astype(int)
    rows = statistics(right)
    assert rows.shape == (200, 6)
    assert np.isclose(mean_over_seeds(rows.sum(0, keepdims=True))[0], right.mean())

    def width(values):
        low, high = map(float, re.findall(r"\[(.*), (.*)\]", with_interval(values))[0])
        return high - low

    uneven = (random.random((5, 200, 12)) < np.array([0.4, 0.5, 0.6, 0.7, 0.8])[:, None, None]).astype(int)
    assert width(uneven) > 2 * width(right)


def test_comparisons_state_difference_interval_and_corrected_p():
    random = np.random.default_rng(0)
    theirs = (random.random((5, 200, 12)) < 0.6).astype(int)
    ours = np.maximum(theirs, random.random((5, 200, 12)) < 0.2)
    text = "\n".join(
        comparisons_section([Comparison("a", "better", ours, theirs), Comparison("a", "same", theirs, theirs)])
    )
    better, same = (next(line for line in text.splitlines() if f"| {name} |" in line) for name in ("better", "same"))
    assert (
        re.search(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", better) and "| 5 / 0 of 5 |" in better and "| yes |" in better
    )
    assert "+0.0 [+0.0, +0.0]" in same and "1.0000" in same and "| no |" in same
    assert "2 comparisons" in text and "Holm" in text


@pytest.mark.slow
def test_the_quick_study_runs_to_its_report_and_a_rerun_repeats_nothing(tmp_path, monkeypatch):
    arguments = ["study", "--quick", "--seeds", "2", "--workers", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--report", str(tmp_path / "results.md")])
    study.main()
    report = (tmp_path / "results.md").read_text()
    for part in "abcdefg":
        assert re.search(rf"^\| {part} \| .* \[[-+]\d", report, re.M), f"part {part} has no comparison with interval"
    assert all(f"| {name} |" in report for name in ARMS)
    assert (
        "says yes" in report
        and "Do groups of patches follow things?" in report
        and "other image" in report
        and "p, Holm" in report
    )
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len([path for path in made if path.parent.name == "arms"]) == 2 * len(ARMS)
    (tmp_path / "out" / "arms" / "grid_8-12.json").unlink()
    study.main()
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in made if made[path] != again[path]} == {"grid_8-12.json"}


def test_scales_say_how_much_of_everything():
    for scale in (study.SHORT, study.FULL):
        assert isinstance(scale, Scale) and scale.test_scenes >= 400 and scale.gate_margin > 0
    assert TEXT_FIRST >= study.FULL.train_scenes  # no arm sees the scenes of the language model's texts
