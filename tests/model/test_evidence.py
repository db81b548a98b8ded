"""Which clusters carried an answer: as by hand, whatever the images, and in an order that never varies."""

import pytest
import torch
from conftest import count_calls, make_image, make_inputs, make_model, make_processor

ANSWER = torch.tensor([104, 97, 116, 258])  # the last one ends the answer


def asked(decoder, images, **kwargs):
    model, processor = make_model(decoder=decoder), make_processor()
    inputs = make_inputs(processor, ["what is it?"], [[make_image(seed) for seed in range(images)]], **kwargs)
    return model, inputs, model.explain(**inputs, granularity="fine")


def likelihood_by_hand(model, inputs, visual, hidden=None):
    """From a forward pass over the full prompt and the answer, with one slot masked in addition."""
    answer = ANSWER[:-1].unsqueeze(0)
    mask = inputs["attention_mask"].clone()
    if hidden is not None:
        mask[0, hidden] = 0
    logits = model(
        input_ids=torch.cat([inputs["input_ids"], answer], 1),
        attention_mask=torch.cat([mask, torch.ones_like(answer)], 1),
        visual=visual,
        visual_view="semantic",
    ).logits[:, -answer.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("view", ["full", "semantic"])
def test_a_cluster_counts_as_much_as_masking_its_token_by_hand_costs(decoder, images, view):
    model, inputs, visual = asked(decoder, images, visual_view=view)
    calls = count_calls(model)
    found = model.evidence(**inputs, visual=visual, answer_ids=ANSWER)
    assert not any(calls.values()), "the tower ran again"
    assert len(found["clusters"]) == 5 * images
    assert found["log_likelihood"] == pytest.approx(likelihood_by_hand(model, inputs, visual), abs=1e-5)
    slots = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(-1).reshape(images, -1)
    for cluster in found["clusters"]:
        slot = slots[cluster["image"], -cluster["number"]]  # the best cluster stands last
        expected = found["log_likelihood"] - likelihood_by_hand(model, inputs, visual, slot)
        assert cluster["nats"] == pytest.approx(expected, abs=1e-5)
    assert max(abs(cluster["nats"]) for cluster in found["clusters"]) > 1e-2, "no token matters"


def test_the_clusters_are_sorted_and_their_order_is_always_the_same():
    model, inputs, visual = asked("qwen2", 2)
    first, again = (model.evidence(**inputs, visual=visual, answer_ids=ANSWER) for _ in range(2))
    assert first == again
    nats = [cluster["nats"] for cluster in first["clusters"]]
    assert nats == sorted(nats, reverse=True)
    visual.image_hidden_states = torch.zeros_like(visual.image_hidden_states)
    model.model.language_model.embed_tokens.weight.data[:] = 0  # nothing matters: ties by image and number
    tied = model.evidence(**inputs, visual=visual, answer_ids=ANSWER)["clusters"]
    order = [(cluster["image"], cluster["number"]) for cluster in tied]
    assert order == [(image, number) for image in range(2) for number in range(1, 6)]


def test_padding_and_the_end_of_an_answer_do_not_count():
    model, inputs, visual = asked("llama", 1)
    padded = torch.tensor([[*ANSWER.tolist(), 256, 256]])
    assert model.evidence(**inputs, visual=visual, answer_ids=padded) == model.evidence(
        **inputs, visual=visual, answer_ids=ANSWER[:-1]
    )


def test_what_has_no_evidence_is_refused():
    model, inputs, visual = asked("qwen2", 1)
    for answer, found in (([258], "no tokens"), ([model.config.image_token_id], "image tokens")):
        with pytest.raises(ValueError, match=f"the answer has {found}"):
            model.evidence(**inputs, visual=visual, answer_ids=torch.tensor(answer))
    two = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="one prompt, found 2"):
        model.evidence(**two, visual=model.explain(**two), answer_ids=ANSWER)
    model = make_model(granularities=[], default_granularity=None, max_semantic_tokens=0)
    inputs = make_inputs(make_processor(num_semantic_tokens=0), ["what?"], [[make_image()]])
    with pytest.raises(ValueError, match="without levels"):
        model.evidence(**inputs, visual=model.explain(**inputs), answer_ids=ANSWER)
