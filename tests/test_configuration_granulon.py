"""The configuration checks itself, and says what to do."""

import pytest
from conftest import DECODER, LEVELS, make_config
from transformers import AutoConfig, GPT2Config, MistralConfig, Qwen2Config, ViTConfig

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


def test_an_unsupported_decoder_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="gpt2.*choose one of"):
        GranulonConfig(text_config=GPT2Config(), image_token_id=5)


def test_an_unsupported_tower_is_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="vit"):
        GranulonConfig(vision_config=ViTConfig(), text_config=Qwen2Config(**DECODER), image_token_id=5)


@pytest.mark.parametrize(
    "text_config",
    [
        Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=0),
        MistralConfig(**DECODER, sliding_window=16),
    ],
)
def test_sliding_window_attention_is_refused(text_config):
    with pytest.raises(ValueError, match="sliding"):
        GranulonConfig(text_config=text_config, image_token_id=5)
