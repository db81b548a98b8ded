"""Images are encoded once: `encode`, and what takes its result."""

import numpy as np
import pytest
import torch
from conftest import LEVELS, count_calls, make_image, make_inputs, make_model, make_processor

QUESTIONS = ["what is it?", "and how many small marks are there?", "A"]
IMAGES = [[0], [1, 2], [3]]
MIXED = ["coarse", None, "fine"]


@pytest.fixture
def inputs(processor):
    return make_inputs(processor, QUESTIONS, [[make_image(seed) for seed in row] for row in IMAGES])


def text_of(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("visual_view", [None, "pixel", "semantic", "auto"])
def test_an_encoded_image_gives_the_logits_and_the_answer_of_its_pixels(model, inputs, visual_view):
    visual = model.encode(**inputs, granularity=MIXED)
    expected = model(**inputs, granularity=MIXED, visual_view=visual_view).logits
    assert torch.equal(model(**text_of(inputs), visual=visual, visual_view=visual_view).logits, expected)
    generate = {"max_new_tokens": 4, "do_sample": False, "visual_view": visual_view}
    answers = model.generate(**inputs, granularity=MIXED, **generate)
    assert torch.equal(model.generate(**text_of(inputs), visual=visual, **generate), answers)


def test_one_answer_runs_tower_and_controller_once_and_the_aggregation_once_per_level(model, inputs):
    calls = count_calls(model)
    output = model.generate(**inputs, granularity=MIXED, max_new_tokens=4, return_dict_in_generate=True)
    levels = len(set(output.visual.granularity_index.tolist()))
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": levels}
    output.visual.describe()
    model.generate(**text_of(inputs), visual=output.visual, max_new_tokens=2)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": levels}


def test_forcing_the_chosen_level_changes_no_bit_of_the_answer(model, inputs):
    free = model(**inputs)
    forced = model(**inputs, granularity=free.granularity_index)
    assert torch.equal(free.logits, forced.logits)
    names = [LEVELS[index]["name"] for index in free.granularity_index.tolist()]
    assert torch.equal(model(**inputs, granularity=names).logits, free.logits)


def test_a_row_without_a_requested_level_is_left_to_the_controller(model, inputs):
    chosen = model.explain(**inputs).granularity_index[1]
    visual = model.explain(**inputs, granularity=[np.int64(0), None, "fine"])
    assert visual.granularity_index.tolist() == [0, chosen, 1]
    described = [row["granularity"]["chosen_by"] for row in visual.describe()]
    assert described == ["request", "controller", "request"]


@pytest.mark.parametrize(
    "granularity, match", [(["coarse"], "1 granularities for 3 rows"), ("huge", "unknown"), (7, "unknown")]
)
def test_levels_that_do_not_fit_are_refused(model, inputs, granularity, match):
    with pytest.raises(ValueError, match=match):
        model.encode(**inputs, granularity=granularity)


@pytest.mark.parametrize("method", ["encode", "explain"])
def test_an_unknown_argument_is_refused(model, inputs, method):
    with pytest.raises(TypeError, match="granularty"):
        getattr(model, method)(**inputs, granularty="fine")


def test_an_encoding_of_other_rows_is_refused(model, inputs):
    visual = model.encode(inputs["pixel_values"])  # every image a row of its own
    with pytest.raises(ValueError, match="encoded for rows with .1, 1, 1, 1. images, but the prompts have .1, 2, 1."):
        model(**text_of(inputs), visual=visual)
    with pytest.raises(ValueError, match="only one of pixel_values, visual and image_embeds"):
        model(**inputs, visual=visual)


def test_a_description_says_what_was_chosen_and_read(model, inputs):
    visual = model.explain(**inputs, granularity=MIXED)
    first, second, third = visual.describe("auto")
    assert first["granularity"]["name"] == "coarse" and first["view"] == "semantic"
    assert first["tokens"] == {"pixel": 0, "semantic": 2}
    assert third["tokens"] == {"pixel": 36, "semantic": 5}
    assert len(second["images"]) == 2
    assert sum(second["granularity"]["probabilities"].values()) == pytest.approx(1)
    for row in (first, second, third):
        for image in row["images"]:
            assert image["cluster_map"].shape == (6, 6)
            assert sum(cluster["share"] for cluster in image["clusters"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="choose one of"):
        visual.describe("both")


def test_a_model_without_levels_describes_its_pixel_tokens():
    model, processor = make_model(granularities=[]), make_processor(num_semantic_tokens=0)
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    (row,) = model.explain(**inputs).describe()
    assert row["granularity"] is None and row["view"] == "pixel"
    assert row["tokens"] == {"pixel": 36, "semantic": 0}
    assert row["images"] == [{"clusters": [], "cluster_map": None}]


def test_every_level_can_be_encoded_at_once(model, inputs):
    visual = model.explain(**inputs, every_level=True)
    for level, candidate in enumerate(LEVELS):
        alone = model.explain(**inputs, granularity=level).image_hidden_states[:, 36:]
        torch.testing.assert_close(visual.level_hidden_states[:, level], alone)
        assert visual.used_tokens(level) == candidate["keep"]


def test_gradients_reach_projector_gains_and_controller(model, inputs):
    output = model(**inputs, labels=inputs["input_ids"])
    (output.loss + output.granularity_logits.logsumexp(-1).sum()).backward()
    projector = model.model.multi_modal_projector
    for name in ("gain_offsets", "level_embedding", "cluster_embedding"):
        assert getattr(projector, name).grad.abs().sum() > 0, name
    assert model.model.granularity_controller.linear_2.weight.grad.abs().sum() > 0


def test_what_trains_the_controller_does_not_pull_the_layers_that_it_reads(model, inputs):
    logits = model.encode(**inputs).granularity_logits
    logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is None for parameter in model.model.language_model.parameters())


def test_learned_gains_survive_bfloat16(model, inputs):
    projector = model.model.multi_modal_projector
    torch.nn.init.constant_(projector.gain_offsets, 1e-3)
    model.to(torch.bfloat16)
    assert torch.allclose(1 + projector.gain_offsets.float(), torch.tensor(1.001), atol=1e-5)


def test_generating_without_an_attention_mask_leaves_padding_out(model, inputs, processor):
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(model.generate(**rest, max_new_tokens=4, do_sample=False), expected)
    ends_turns = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = ends_turns
    rest["input_ids"] = rest["input_ids"].masked_fill(inputs["attention_mask"] == 0, ends_turns)
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**rest, max_new_tokens=1, do_sample=False)
    assert torch.equal(tokens[:, length:], expected[:, length : length + 1])


def test_an_unfrozen_tower_stays_unfrozen_and_learns(model, inputs, tmp_path):
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    model.model.vision_tower.requires_grad_(True)
    model.train().eval().train()
    assert not model.model.vision_tower.training
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.vision_tower.parameters())


def test_the_encoder_exports(model, inputs):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.model

        def forward(self, pixel_values):
            return torch.stack(self.model.get_image_features(pixel_values).pooler_output)

    encoder = Encoder()
    with torch.no_grad():
        program = torch.export.export(encoder, (inputs["pixel_values"],))
        torch.testing.assert_close(program.module()(inputs["pixel_values"]), encoder(inputs["pixel_values"]))
