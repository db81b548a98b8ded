"""`generate` in all modes: equal to each other, to rows alone, and to reading without a cache."""

import functools

import pytest
import torch
from conftest import DECODERS, make_image, make_inputs, make_model, make_processor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, TextStreamer

QUESTIONS = ["what is it?", "and how many small marks are there?", "A"]
IMAGES = [[0], [1, 2], [3]]
LEVELS = ["coarse", "fine", "coarse"]
NEW = 6


def batch(processor, rows=slice(None), **kwargs):
    images = [[make_image(seed) for seed in row] for row in IMAGES[rows]]
    return make_inputs(processor, QUESTIONS[rows], images, **kwargs)


def answers(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "granularity": LEVELS, "visual_view": "full", **kwargs}
    output = model.generate(**inputs, **kwargs)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]), "starts with the prompt"
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def setup():
    model, processor = make_model(), make_processor()
    model.generation_config.eos_token_id = None
    inputs = batch(processor)
    return model, processor, inputs, answers(model, inputs)


MODES = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "one beam group": {"num_beams": 1, "num_return_sequences": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_give_the_same_greedy_tokens(setup, mode):
    model, _, inputs, expected = setup
    assert torch.equal(answers(model, inputs, **MODES[mode]), expected)


def test_a_full_prompt_is_read_in_the_view_that_the_chosen_level_names(setup):
    _, processor, inputs, _ = setup
    views = {"coarse": "semantic", "fine": "pixel"}
    levels = [{**level, "view": views.get(level["name"], "full")} for level in make_model().config.granularities]
    model = make_model(granularities=levels)
    model.generation_config.eos_token_id = None
    default = answers(model, inputs, visual_view=None)
    assert not torch.equal(default, answers(model, inputs))
    for row, level in enumerate(LEVELS):
        assert torch.equal(default[row], answers(model, inputs, visual_view=views[level])[row])
    short = batch(processor, slice(0, 1), visual_view="pixel")
    expected = answers(model, batch(processor, slice(0, 1)), granularity="coarse", visual_view="pixel")
    assert torch.equal(answers(model, short, granularity="coarse", visual_view=None), expected), "read as it is"


def test_greedy_tokens_are_those_of_repeated_forward_passes(setup):
    model, processor, inputs, expected = setup
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for step in range(NEW):
        logits = model(input_ids=ids, attention_mask=mask, granularity=LEVELS, **rest).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        assert torch.equal(token, expected[:, step : step + 1])
        ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("visual_view", [None, "full", "pixel", "semantic", "auto"])
def test_a_batch_gives_each_row_the_tokens_it_gets_alone(setup, padding_side, visual_view):
    model, processor, *_ = setup
    together = answers(model, batch(processor, padding_side=padding_side), visual_view=visual_view)
    for row in range(3):
        inputs = batch(processor, slice(row, row + 1))
        alone = answers(model, inputs, granularity=LEVELS[row], visual_view=visual_view)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_a_row_the_same_tokens_in_all_modes(decoder):
    model, processor = make_model(decoder=decoder), make_processor()
    model.generation_config.eos_token_id = None
    inputs = batch(processor)
    expected = answers(model, inputs)
    for mode in ("no cache", "static cache"):
        assert torch.equal(answers(model, inputs, **MODES[mode]), expected)
    for row in range(3):
        alone = batch(processor, slice(row, row + 1))
        assert torch.equal(answers(model, alone, granularity=LEVELS[row])[0], expected[row])
        looked_up = answers(model, alone, granularity=LEVELS[row], prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up[0], expected[row])


def test_a_shortened_prompt_gives_the_tokens_of_the_processors_short_prompt(setup):
    model, processor, inputs, _ = setup
    for view in ("pixel", "semantic"):
        short = batch(processor, visual_view=view)
        assert torch.equal(answers(model, inputs, visual_view=view), answers(model, short))


def test_the_semantic_view_reads_a_shorter_prompt(setup):
    model, _, inputs, _ = setup
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for view in (None, "semantic"):
        answers(model, inputs, visual_view=view, max_new_tokens=1)
    hook.remove()
    assert lengths[1] <= lengths[0] - 2 * 36


def test_decoding_with_a_static_cache_compiles_to_one_graph(setup):
    model, _, inputs, expected = setup
    plain, counters = model.forward, torch._dynamo.utils.counters
    compiled = torch.compile(plain, fullgraph=True)

    @functools.wraps(plain)
    def decode_compiled(**kwargs):
        ids = kwargs.get("input_ids")
        return (compiled if ids is not None and ids.shape[1] == 1 else plain)(**kwargs)

    counters.clear()
    model.forward = decode_compiled
    try:
        assert torch.equal(answers(model, inputs, cache_implementation="static"), expected)
    finally:
        del model.forward
    assert counters["stats"]["unique_graphs"] == 1


def test_beams_and_samples_keep_their_rows(setup):
    model, processor, inputs, _ = setup
    beams = answers_of_many(model, inputs, num_beams=3, num_return_sequences=2)
    for row in range(3):
        alone = answers_of_many(
            model, batch(processor, slice(row, row + 1)), num_beams=3, num_return_sequences=2, granularity=LEVELS[row]
        )
        assert torch.equal(beams[2 * row : 2 * row + 2], alone)
    torch.manual_seed(0)
    sampled = answers_of_many(model, inputs, do_sample=True, num_return_sequences=2, visual_view="semantic")
    assert sampled.shape == (6, NEW)


def answers_of_many(model, inputs, **kwargs):
    output = model.generate(**inputs, **{"max_new_tokens": NEW, "granularity": LEVELS, **kwargs})
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("assistant", ["prompt lookup", "language model", "granulon"])
def test_assisted_decoding_gives_the_same_tokens(setup, assistant):
    model, processor, *_ = setup
    inputs = batch(processor, slice(1, 2))
    expected = answers(model, inputs, granularity="fine")
    if assistant == "prompt lookup":
        extra = {"prompt_lookup_num_tokens": 3}
    else:
        helper = make_model(seed=1)
        extra = {"assistant_model": helper if assistant == "granulon" else text_model(helper)}
    assert torch.equal(answers(model, inputs, granularity="fine", **extra), expected)


def text_model(granulon):
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM(granulon.config.text_config).eval()


def test_embeddings_in_place_of_ids_give_the_same_tokens(setup):
    model, _, inputs, expected = setup
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    for view in ("full", "semantic"):
        output = model.generate(
            inputs_embeds=embeds, **rest, max_new_tokens=NEW, do_sample=False, granularity=LEVELS, visual_view=view
        )
        assert torch.equal(output, expected if view == "full" else answers(model, inputs, visual_view=view))


def test_a_streamer_gets_every_new_token(setup):
    model, processor, *_ = setup
    inputs = batch(processor, slice(0, 1))

    class Collector(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    for view in (None, "semantic"):
        streamer = Collector(processor.tokenizer, skip_prompt=True)
        new = answers(model, inputs, granularity="fine", streamer=streamer, visual_view=view)
        assert streamer.text == processor.decode(new[0])


def test_length_limits_count_the_prompt_that_was_passed(setup):
    model, _, inputs, _ = setup
    prompt = inputs["input_ids"].shape[1]
    for view in (None, "semantic"):
        output = model.generate(**inputs, max_length=prompt + 3, do_sample=False, visual_view=view)
        assert output.shape[1] == prompt + 3
        config = GenerationConfig(max_length=prompt + 2, do_sample=False, pad_token_id=256)
        assert model.generate(**inputs, generation_config=config, visual_view=view).shape[1] == prompt + 2


def test_a_dictionary_output_starts_with_the_prompt_too(setup):
    model, _, inputs, _ = setup
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        granularity=LEVELS,
        visual_view="auto",
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_the_tower_runs_once_per_generation(setup):
    model, _, inputs, _ = setup
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    answers(model, inputs)
    hook.remove()
    assert len(calls) == 1


def test_upstreams_generate_gets_no_pixels_to_encode(setup, monkeypatch):
    """transformers 5.23 encodes pixel values itself, at the default level and before the mask has its holes."""
    model, _, inputs, expected = setup
    seen, upstream = [], GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin,
        "generate",
        lambda self, *args, **kwargs: seen.append(kwargs) or upstream(self, *args, **kwargs),
    )
    monkeypatch.setattr(model, "get_image_features", None)
    assert torch.equal(answers(model, inputs), expected)
    assert seen[0].keys() & {*inputs, "granularity", "visual", "visual_view"} == {"attention_mask"}


def test_text_alone_generates(setup):
    model, processor, *_ = setup
    inputs = make_inputs(processor, ["hello"], [[]])
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


def test_placeholders_without_images_are_refused(setup):
    model, _, inputs, _ = setup
    with pytest.raises(ValueError, match="row 0 has 41 image tokens but no pixel_values"):
        model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)


def test_chunked_prefill_is_refused(setup):
    model, _, inputs, _ = setup
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, prefill_chunk_size=8)


def test_a_cache_of_an_earlier_turn_is_refused(setup):
    model, processor, inputs, _ = setup
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="earlier turn"):
        model.generate(**inputs, past_key_values=cache)
