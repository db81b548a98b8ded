"""The configuration checks itself, and says what to do."""

import json

import pytest
from conftest import DECODER, LEVELS, VIT, make_config
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
    ViTConfig,
)

from modeling_granulon import GranulonConfig


def level(**changes):
    return {**LEVELS[0], **changes}


def test_defaults_are_three_levels_from_coarse_to_fine():
    config = make_config(granularities=None)
    assert config.granularity_names == ["coarse", "medium", "fine"]
    assert config.default_granularity == "medium"
    assert config.max_semantic_tokens == 20


def test_no_granularities_is_the_plain_encoder():
    config = make_config(granularities=[])
    assert config.max_semantic_tokens == 0
    assert config.default_granularity is None


def test_a_configuration_survives_saving_and_loading(tmp_path):
    config = make_config(score_weights=[1.0, 0.5, 0.0], relation_weight=0.3, max_semantic_tokens=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_every_auto_class_finds_its_remote_class():
    auto_map = make_config().auto_map
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}


@pytest.mark.parametrize("granularity, index", [("coarse", 0), ("fine", 1), (0, 0), (1, 1)])
def test_a_level_is_found_by_name_and_by_index(granularity, index):
    assert make_config().granularity_index(granularity) == index


@pytest.mark.parametrize("granularity", ["finest", 2, -1, True, 1.0])
def test_an_unknown_level_is_refused_with_the_choices(granularity):
    with pytest.raises(ValueError, match="coarse.*fine"):
        make_config().granularity_index(granularity)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"granularities": [level(), level()]}, "unique"),
        ({"granularities": [LEVELS[1], LEVELS[0]]}, "coarse to fine"),
        ({"granularities": [level(keep=4)]}, "keeps 4 of 3"),
        ({"granularities": [level(stride=0)]}, "above 0"),
        ({"granularities": [level(clusters=2.5)]}, "whole numbers"),
        ({"granularities": [level(view="both")]}, "view"),
        ({"granularities": [level(size=1)]}, "unknown .*size"),
        ({"granularities": [{"name": "x"}]}, "missing"),
        ({"granularities": [[1, 3]]}, "is a dict"),
        ({"default_granularity": "huge"}, "unknown granularity"),
        ({"controller": "oracle"}, "controller"),
        ({"max_semantic_tokens": 3}, "keep 5"),
        ({"relation_weight": -0.1}, "relation_weight"),
        ({"score_weights": [1.0, 2.0]}, "three"),
        ({"image_token_id": 300}, "vocabulary has 300"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_config(**overrides)


@pytest.mark.parametrize("text_config", [GPT2Config(), Gemma3TextConfig()])
def test_an_unsupported_decoder_is_refused_when_the_config_is_made(text_config):
    with pytest.raises(ValueError, match=f"{text_config.model_type}.*choose one of"):
        GranulonConfig(text_config=text_config, image_token_id=5)


def test_an_unsupported_tower_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="vit"):
        GranulonConfig(vision_config=ViTConfig(), text_config=Qwen2Config(**DECODER), image_token_id=5)


@pytest.mark.parametrize(
    "text_config",
    [
        Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=0),
        MistralConfig(**DECODER, sliding_window=16),
        Phi3Config(**DECODER, sliding_window=16),
        SmolLM3Config(**DECODER, use_sliding_window=True, sliding_window=16, no_rope_layer_interval=2),
    ],
)
def test_sliding_window_attention_is_refused(text_config):
    with pytest.raises(ValueError, match="sliding"):
        GranulonConfig(text_config=text_config, image_token_id=5)


@pytest.mark.parametrize("tower, layer", [("clip", -2), ("siglip", -1), ("dinov3", -1)])
def test_features_are_read_from_the_layer_that_suits_the_tower(tower, layer, tmp_path):
    config = make_config(tower)
    assert config.vision_feature_layer == layer
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_feature_layer"] == layer
    assert AutoConfig.from_pretrained(tmp_path).vision_feature_layer == layer


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_an_explicit_feature_layer_is_kept(tower, layer, tmp_path):
    """Also in files from before CLIP's default was -2, which say -1."""
    make_config(tower, vision_feature_layer=layer).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_feature_layer == layer


def test_the_default_layer_of_clip_is_found_for_a_config_and_for_a_dict():
    clip = CLIPVisionConfig(**VIT, projection_dim=16)
    for vision_config in (clip, clip.to_dict()):
        config = GranulonConfig(vision_config=vision_config, text_config=Qwen2Config(**DECODER), image_token_id=5)
        assert config.vision_feature_layer == -2
