"""The whole model: batching, padding, views, towers, decoders, precision, saving."""

import pytest
import torch
from conftest import DECODERS, LEVELS, TOWERS, make_image, make_inputs, make_model, make_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

QUESTIONS = ["what is it?", "and how many small marks are there in the picture?", "A", "hello"]
IMAGES = [[0], [1, 2], [3], []]


def images_of(rows=IMAGES):
    return [[make_image(seed) for seed in row] for row in rows]


def close(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_each_row_the_logits_it_gets_alone(decoder, padding_side):
    model, processor = make_model(decoder=decoder), make_processor()
    levels = ["coarse", "fine", "fine", "coarse"]
    batch = make_inputs(processor, QUESTIONS, images_of(), padding_side=padding_side)
    logits = model(**batch, granularity=levels).logits
    for row, (question, images, level) in enumerate(zip(QUESTIONS, images_of(), levels, strict=True)):
        alone = model(**make_inputs(processor, [question], [images]), granularity=level).logits[0]
        close(logits[row][batch["attention_mask"][row].bool()], alone)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_decoder_packs_its_views_as_separate_passes(decoder, attention):
    model, processor = make_model(decoder=decoder).model, make_processor()
    model.set_attn_implementation(attention)
    inputs = make_inputs(processor, QUESTIONS, images_of())
    last = inputs["attention_mask"].cumsum(-1).argmax(-1, keepdim=True)
    packed = model(**inputs, granularity="fine", joint_views=["pixel", "coarse"], predict=last).last_hidden_state
    views = [{"granularity": "fine"}, {"granularity": "fine", "visual_view": "pixel"}]
    views.append({"granularity": "coarse", "visual_view": "semantic"})
    alone = [model(**inputs, **view).last_hidden_state for view in views]
    close(packed, torch.stack([states[range(4), last[:, 0] - 1] for states in alone], dim=1))


def test_padding_side_does_not_change_logits(model):
    processor = make_processor()
    left, right = (make_inputs(processor, QUESTIONS, images_of(), padding_side=side) for side in ("left", "right"))
    logits = [model(**batch).logits[batch["attention_mask"].bool()] for batch in (left, right)]
    close(*logits)


def test_text_alone_equals_the_language_model(model, processor):
    inputs = make_inputs(processor, ["hello"], [[]])
    assert set(inputs) == {"input_ids", "attention_mask"}
    states = model.model.language_model(**inputs).last_hidden_state
    close(model(**inputs).logits, model.lm_head(states))


def test_the_image_and_the_level_change_the_answer(model, processor):
    one, other = (make_inputs(processor, ["what is it?"], [[make_image(seed)]]) for seed in (0, 5))
    last = [model(**one, granularity=level).logits[0, -1] for level in ("coarse", "fine")]
    assert (last[0] - last[1]).abs().max() > 1e-3
    assert (last[0] - model(**other, granularity="coarse").logits[0, -1]).abs().max() > 1e-3


def test_unused_slots_are_invisible(model, processor):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    visual = model.explain(**inputs, granularity="coarse")
    before = model(**inputs, granularity="coarse").logits[0, -1]
    assert (~visual.semantic_mask).sum() == 3
    visual.image_hidden_states[:, 36:39] = 100.0
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    close(model(**prompt, visual=visual).logits[0, -1], before)


def test_the_last_slot_of_a_span_is_never_empty(model, processor):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    visual = model.explain(**inputs, granularity="coarse")
    assert visual.semantic_mask.tolist() == [[True, True, False, False, False]]
    assert (visual.image_hidden_states[0, 36:39].abs().sum() == 0) | (
        visual.image_hidden_states[0, -2:].abs().sum() > 0
    )
    tokens = visual.image_hidden_states[0, -2:]
    assert (tokens[0] - tokens[1]).abs().max() > 0


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_answers_at_its_own_size(tower):
    patch, size = (32, 192) if tower == "dinov3_convnext" else (4, 24)
    model, processor = make_model(tower), make_processor(size, patch)
    inputs = make_inputs(processor, QUESTIONS, images_of())
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.cluster_map.shape == (4, 6, 6)
    assert torch.isfinite(output.loss)
    output.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())


@pytest.mark.parametrize(
    "size", [{"height": 32, "width": 16}, {"height": 12, "width": 40}, {"height": 48, "width": 48}]
)
def test_any_image_size_that_the_patch_divides(model, size):
    processor = make_processor(size)
    output = model(**make_inputs(processor, ["what?"], [[make_image(0)]]))
    assert output.cluster_map.shape == (1, size["height"] // 4, size["width"] // 4)


def test_an_image_size_that_the_patch_does_not_divide_is_refused(model, processor):
    inputs = make_inputs(processor, ["what?"], [[make_image(0)]])
    inputs["pixel_values"] = torch.rand(1, 3, 26, 24)
    with pytest.raises(ValueError, match="26"):
        model(**inputs)


def test_no_granularities_gives_the_plain_encoder():
    model, processor = make_model(granularities=[]), make_processor(num_semantic_tokens=0)
    output = model(**make_inputs(processor, ["what is it?"], [[make_image(0)]]))
    assert output.image_hidden_states.shape[1] == 36
    assert output.granularity_index is None
    assert not any(
        "granularity" in name or "gain" in name or "embedding" in name.split(".")[-1]
        for name, _ in model.named_parameters()
    )


def test_one_granularity_is_a_fixed_level_without_a_controller():
    model = make_model(granularities=LEVELS[1:])
    assert model.model.granularity_controller is None
    visual = model.explain(**make_inputs(make_processor(), ["what is it?"], [[make_image(0)]]))
    assert visual.granularity_index.tolist() == [0]
    assert visual.semantic_mask.all()


def test_the_frozen_tower_stays_in_eval_mode_and_without_gradients(model, tmp_path):
    model.train()
    assert model.training and model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.model.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in loaded.model.language_model.parameters())


def test_explain_gives_what_forward_gives(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    explained, output = model.explain(**inputs), model(**inputs)
    for name, value in explained.items():
        assert torch.equal(value, output[name]), name


def test_clusters_of_the_map_are_the_kept_ones(model, processor):
    visual = model.explain(**make_inputs(processor, ["what is it?"], [[make_image(0)]]), granularity="fine")
    kept = visual.semantic_mask[0].sum().item()
    assert set(visual.cluster_map.unique().tolist()) == set(range(kept))
    assert (visual.cluster_scores[0, :-1] >= visual.cluster_scores[0, 1:]).all()


def test_features_that_are_not_finite_are_refused_by_image(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    inputs["pixel_values"][2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="image 2 has features that are not finite"):
        model(**inputs)


def test_truncated_and_swapped_prompts_are_refused_by_row(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    cut = {**inputs, "input_ids": inputs["input_ids"].clone()}
    cut["input_ids"][1, (cut["input_ids"][1] == model.config.image_token_id).nonzero()[-1]] = 5
    with pytest.raises(ValueError, match="row 1 has 81 image tokens"):
        model(**cut)
    with pytest.raises(ValueError, match="3 were passed"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})
    with pytest.raises(ValueError, match="row 0 has 41 image tokens but no pixel_values"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_the_number_of_semantic_tokens_does_not_depend_on_what_an_image_shows(model, processor):
    flat = Image.new("RGB", (24, 24), "grey")
    visual = model.explain(
        **make_inputs(processor, ["what is it?"] * 2, [[flat], [make_image(0)]]), granularity="fine"
    )
    assert torch.isfinite(visual.image_hidden_states).all()
    assert visual.semantic_mask.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_full(model, processor, dtype):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    full = model(**inputs, granularity="fine", visual_view="pixel")
    half = model.to(dtype)(**inputs, granularity="fine", visual_view="pixel")
    assert half.logits.dtype == dtype
    assert torch.nn.functional.cosine_similarity(full.logits[0, -1], half.logits[0, -1].float(), dim=0) > 0.99
    assert (full.cluster_map == half.cluster_map).float().mean() > 0.8
    assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)


def test_gradient_checkpointing_does_not_change_gradients(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        close(gradient, plain[name])


def test_lora_trains_adapters_projector_and_controller_only(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    adapted = get_peft_model(
        model,
        LoraConfig(
            target_modules=r".*language_model\..*\.(q_proj|v_proj)",
            modules_to_save=["multi_modal_projector", "granularity_controller"],
        ),
    )
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_" in name for name in trained)
    assert any("multi_modal_projector.modules_to_save" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    merged = adapted.merge_and_unload()
    assert torch.isfinite(merged(**inputs).logits).all()


PARTS = ["vision_tower", "multi_modal_projector", "granularity_controller", "aggregation", "language_model"]
PARTS = [*(f"model.{part}" for part in PARTS), "lm_head"]
# SigLIP's pooling head hands a submodule's weights to a function, which accelerate does not see.
OFFLOADED_TOWERS = [tower for tower in TOWERS if not tower.startswith("siglip")]


@pytest.mark.parametrize("disk", [["model.vision_tower"], ["model.language_model"], PARTS[1:3], PARTS])
@pytest.mark.parametrize("tower", OFFLOADED_TOWERS)
def test_parts_on_disk_give_the_same_logits_with_and_without_a_question(tower, disk, tmp_path):
    model = make_model(tower)
    processor = make_processor(192, 32) if tower == "dinov3_convnext" else make_processor()
    inputs = make_inputs(processor, QUESTIONS, images_of())
    model.save_pretrained(tmp_path / "model")
    split = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model",
        device_map={part: "disk" if part in disk else "cpu" for part in PARTS},
        offload_folder=tmp_path / "offload",
    )
    for given in (inputs, {name: value for name, value in inputs.items() if "question" not in name}):
        close(split(**given).logits, model(**given).logits)
        answers = (part.generate(**given, max_new_tokens=2, do_sample=False) for part in (split, model))
        assert torch.equal(*answers)


def test_a_model_is_split_automatically(model, processor, tmp_path):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    model.save_pretrained(tmp_path)
    automatic = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto")
    close(automatic(**inputs).logits, model(**inputs).logits)


def test_saved_models_reload_equal_with_every_auto_class(model, processor, tmp_path):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    expected = model(**inputs).logits
    for step in ("first", "second"):
        model.save_pretrained(tmp_path / step)
        model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / step, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        close(model(**inputs).logits, expected)
    base, report = AutoModel.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    close(base(**inputs).last_hidden_state @ model.lm_head.weight.T, expected)
    assert AutoConfig.from_pretrained(tmp_path / "second").granularities == LEVELS


def test_image_features_without_a_question_take_the_default_level(model, processor):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    for level in (0, 1):
        model.config.default_granularity = model.config.granularity_names[level]
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        visual = model.explain(pixel_values=inputs["pixel_values"], granularity=level)
        used = torch.cat([torch.ones(36, dtype=torch.bool), visual.semantic_mask[0].flip(-1)])
        assert len(features[0]) == 36 + model.config.granularities[level]["keep"]
        close(features[0], visual.image_hidden_states[0, used])


@pytest.mark.parametrize("view, message", [("semantic", "made for another view"), ("both", "choose one of")])
def test_a_view_that_the_prompt_does_not_hold_is_refused(model, processor, view, message):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]], visual_view="pixel")
    with pytest.raises(ValueError, match=message):
        model(**inputs, visual_view=view)


def test_in_the_auto_view_each_row_follows_its_level(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    levels = ["coarse", "fine", "coarse", "fine"]
    auto = model(**inputs, granularity=levels, visual_view="auto").logits[:, -1]
    views = {level["name"]: level["view"] for level in LEVELS}
    for row, level in enumerate(levels):
        forced = model(**inputs, granularity=levels, visual_view=views[level]).logits[row, -1]
        close(auto[row], forced)


@pytest.mark.slow
def test_a_compiled_forward_breaks_only_where_values_are_read_and_hooks_are_set(model, processor):
    inputs = make_inputs(processor, QUESTIONS, images_of())
    with torch.no_grad():
        expected = model(**inputs).logits
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(model)(**inputs).break_reasons
        reading = {entry.user_stack[-1].name for entry in breaks}
        assert reading <= {"slot_layout", "_check_spans", "_encode", "_check_rows", "__init__"}, reading
        torch._dynamo.reset()
        close(torch.compile(model, backend="aot_eager")(**inputs).logits, expected)


def test_reading_image_tokens_that_are_in_order_compiles_to_one_graph(model, processor):
    """What `generate` hands over: no value of the prompt is needed on the host."""
    inputs = make_inputs(processor, QUESTIONS[1:2], images_of()[1:2])
    visual = model.explain(**inputs, granularity="fine")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    embeds = visual.image_hidden_states.flatten(0, 1).unsqueeze(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(**prompt, image_embeds=embeds).logits, model(**inputs, granularity="fine").logits)
