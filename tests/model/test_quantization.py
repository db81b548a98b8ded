"""Loaded in 8 or 4 bits: tower and decoder are quantized, projector and controller are not, answers stay close."""

import pytest
import torch
from conftest import DECODER, DECODERS, TOWERS, VIT, make_image, make_inputs, make_model, make_processor
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, DINOv3ViTConfig, Qwen2Config

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 4-bit weights have 64 numbers
UNQUANTIZED = ("multi_modal_projector", "granularity_controller", "lm_head")
BITS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}
# Least cosines of logits, of features and relation map with the plain model's; largest gap of a level's probability.
CLOSE = {"8 bits": (0.998, 0.999, 0.02), "4 bits": (0.88, 0.96, 0.1)}


@pytest.fixture(scope="module")
def plain():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOWERS, "dinov3", DINOv3ViTConfig(**VIT | WIDTHS))
        patch.setitem(DECODERS, "qwen2", Qwen2Config(**DECODER | WIDTHS))
        model = make_model(controller_hidden_size=64)
    for parameter in model.model.granularity_controller.parameters():  # probabilities far from 0 and 1
        parameter.data *= 0.2
    for name, parameter in model.model.vision_tower.named_parameters():  # a map that is far from even
        if "q_proj.weight" in name or "k_proj.weight" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization") / "plain"
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs():
    images = [[make_image(0)], [make_image(1), make_image(2)]]
    return make_inputs(make_processor(), ["what is it?", "and how many marks are there?"], images)


def load(folder, bits, auto=AutoModelForImageTextToText, dtype=torch.float32):
    return auto.from_pretrained(folder, quantization_config=BITS[bits], dtype=dtype)


def layers_by_kind(model):
    """Names of the linear layers that are quantized, and of those that are not."""
    layers = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    plain = {name for name, kind in layers.items() if kind is torch.nn.Linear}
    return layers.keys() - plain, plain


def cosine(left, right):
    return torch.nn.functional.cosine_similarity(left.float().flatten(), right.float().flatten(), dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("bits", BITS)
def test_projector_and_controller_are_not_quantized_and_all_else_is(plain, folder, auto, bits, dtype):
    model = load(folder, bits, auto, dtype)
    quantized, kept = layers_by_kind(model)
    assert kept == {name for name in kept | quantized if any(part in name for part in UNQUANTIZED)}
    for part in ("language_model", "vision_tower"):
        assert any(f"{part}." in name and name.endswith("q_proj") for name in quantized)
    for part in UNQUANTIZED[:2]:
        for name, parameter in getattr(model.base_model, part).named_parameters():
            own = getattr(plain.model, part).get_parameter(name)
            assert torch.equal(parameter, own.to(parameter.dtype)), name
            assert parameter.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("bits", BITS)
def test_modules_that_the_user_names_are_left_out_too(folder, bits):
    named = {"load_in_8bit": bits == "8 bits", "load_in_4bit": bits == "4 bits"}
    config = BitsAndBytesConfig(**named, llm_int8_skip_modules=["lm_head", "model.vision_tower"])
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    quantized, _ = layers_by_kind(model)
    assert quantized and not any(part in name for name in quantized for part in (*UNQUANTIZED, "vision_tower"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_answers_stay_close_to_those_of_the_plain_model(plain, folder, inputs, bits, dtype):
    model = load(folder, bits, dtype=dtype)
    with torch.no_grad():
        expected, found = plain(**inputs), model(**inputs)
    assert torch.equal(found.granularity_index, expected.granularity_index)
    levels = (output.granularity_logits.float().softmax(-1) for output in (expected, found))
    torch.testing.assert_close(*levels, atol=CLOSE[bits][2], rtol=0)
    assert cosine(found.logits[:, -1], expected.logits[:, -1]) > CLOSE[bits][0]
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("bits", BITS)
def test_the_relation_map_of_a_quantized_tower_is_read_from_its_projections(plain, folder, inputs, bits):
    model = load(folder, bits)
    with torch.no_grad():
        expected, found = (part.model._vision(inputs["pixel_values"]) for part in (plain, model))
    assert cosine(found.features, expected.features) > CLOSE[bits][1]
    even = 1 / 36
    expected, found = (vision.relation.profiles() - even for vision in (expected, found))
    assert expected.abs().max() > even
    assert cosine(found, expected) > CLOSE[bits][1]


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_survives_saving_and_loading(folder, inputs, bits, tmp_path):
    model = load(folder, bits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert layers_by_kind(loaded) == layers_by_kind(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
