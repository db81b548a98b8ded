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
        slot = slots[cluster["image"], cluster["number"] - 6]  # the last five slots, in the order of the clusters
        expected = found["log_likelihood"] - likelihood_by_hand(model, inputs, visual, slot)
        assert cluster["nats"] == pytest.approx(expected, abs=1e-5)
    assert max(abs(cluster["nats"]) for cluster in found["clusters"]) > 1e-2, "no token matters"


@torch.no_grad()
def test_the_number_of_a_cluster_is_that_of_its_patches():
    """A cluster's token is the projected mean of its patches: changing it changes what that cluster carries alone."""
    model, inputs, visual = asked("qwen2", 1)
    before = {e["number"]: e["nats"] for e in model.evidence(**inputs, visual=visual, answer_ids=ANSWER)["clusters"]}
    vision = model.model._vision(inputs["pixel_values"])
    member_N = visual.cluster_map[0].flatten() == 1  # cluster number 2
    mean_D = vision.features[0, member_N].mean(0)
    level = torch.tensor([model.config.granularity_index("fine")])
    clusters = model.model.aggregation(vision.features, model.model._relation(vision), 1, 6, grid=vision.grid, top_k=5)
    torch.testing.assert_close(clusters.tokens[0, 1], mean_D)
    token = model.model.multi_modal_projector(clusters.tokens[:, 1:2], level, clusters.geometry[:, 1:2])
    slots = (visual.image_hidden_states[0] - token[0]).abs().amax(-1)
    place = int(slots.argmin())
    assert slots[place] < 1e-5
    placeholders = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(-1)
    expected = likelihood_by_hand(model, inputs, visual) - likelihood_by_hand(
        model, inputs, visual, placeholders[place]
    )
    assert before[2] == pytest.approx(expected, abs=1e-5)


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
