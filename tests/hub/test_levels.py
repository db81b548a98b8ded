"""The level that the vLLM plug-in chooses from a few weights of a checkpoint is the one that the model chooses."""

import pytest
import torch
from conftest import DECODERS, make_model, make_processor

from granulon.hub.vllm_plugin.levels import LevelChooser

QUESTIONS = [
    "What is it?",
    "How many tiny marks are there?",
    "Where?",
    "a",
    "What kind of place is this, and why?",
] * 3


@pytest.mark.parametrize("shards", ["one file", "several files"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_level_is_that_of_the_whole_model(decoder, shards, tmp_path):
    model = make_model(decoder=decoder, controller_layers=2 if shards == "one file" else 1)
    tokenizer = make_processor().tokenizer
    questions = [torch.tensor([tokenizer(question)["input_ids"]]) for question in QUESTIONS]
    with torch.no_grad():  # each level is the best for some
        mean = torch.cat([model.model.question_logits(ids) for ids in questions]).mean(0)
        model.model.granularity_controller.linear_2.bias -= mean
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == "one file" else "20KB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "several files")
    chooser = LevelChooser(model.config, str(tmp_path), torch.float32)
    chosen = [chooser.choose(tuple(ids[0].tolist())) for ids in questions]
    assert chosen == [int(model.model.question_logits(ids).argmax(-1)) for ids in questions]
    assert set(chosen) == {0, 1}


def test_a_question_is_read_once(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    chooser = LevelChooser(model.config, str(tmp_path), torch.float32)
    runs = []
    chooser.controller.register_forward_hook(lambda *_: runs.append(1))
    assert chooser.choose((1, 2, 3)) == chooser.choose((1, 2, 3))
    chooser.choose((1, 2))
    assert len(runs) == 2


def test_a_checkpoint_without_the_weights_is_refused_by_name(tmp_path):
    model = make_model()
    state = {name: value for name, value in model.state_dict().items() if "layers.0.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=r"layer 0 of the language model in .* \(mlp.up_proj.weight\); expected a full"
    ):
        LevelChooser(model.config, str(tmp_path), torch.float32)
