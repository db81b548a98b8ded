"""Assembling a checkpoint: complete, equal to its sources, loadable in a new process; its chat template."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from jinja2 import Environment, nodes
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources import PREPROCESSORS, TEMPLATES, VISION_CONFIGS, text_source, tokenizer_of, vision_source
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)
from transformers.utils.chat_template_utils import render_jinja_template

from granulon.hub import assemble as module
from granulon.hub import parts
from granulon.hub.assemble import (
    ADAPTER_ENDINGS,
    ADAPTER_SCALE,
    TRAINABLE,
    TRAINABLE_WEIGHTS,
    assemble,
    assemble_tiny,
    byte_tokenizer,
    main,
    with_image_parts,
)

IMAGE_PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Qwen2 with tied, Llama with separate embeddings."""
    folder = tmp_path_factory.mktemp("text")
    return {
        "qwen2": text_source(folder / "qwen2", "qwen2", tie=True),
        "llama": text_source(folder / "llama", "llama", tie=False),
    }


@pytest.fixture(scope="module")
def visions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {name: vision_source(folder / name, name) for name in VISION_CONFIGS}


@pytest.fixture(scope="module")
def assembled(texts, visions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    return assemble(visions["dinov3"], texts["qwen2"], folder / "model")


def load(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def prompt(processor, image=None, **kwargs):
    text = processor.apply_chat_template(IMAGE_PARTS, add_generation_prompt=True)
    image = image or Image.effect_noise((50, 40), 90).convert("RGB")
    return processor(text=[text], images=[[image]], return_tensors="pt", **kwargs)


# ----- what is written


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_weights_equal_their_sources_and_the_model_answers(name, family, visions, texts, tmp_path):
    model = load(assemble(visions[name], texts[family], tmp_path / "model"))
    config = AutoConfig.from_pretrained(visions[name])
    tower = AutoModel.from_pretrained(visions[name], config=getattr(config, "vision_config", config))
    language_model = AutoModelForCausalLM.from_pretrained(texts[family])
    for own, source in (
        (model.model.vision_tower, tower),
        (model.model.language_model, language_model.model),
        (model.lm_head, language_model.lm_head),
    ):
        expected = source.state_dict()
        assert own.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in own.state_dict().items())
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == (family == "qwen2")
    inputs = prompt(AutoProcessor.from_pretrained(tmp_path / "model"))
    assert model(**inputs).logits.isfinite().all()


USER_CODE = """
import json, sys, warnings
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline)

def check(folder):
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    names = []
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values()), report
        names.append(type(model).__name__)
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    part = {"type": "image", "url": sys.argv[2]}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}]
    greedy = {"max_new_tokens": 3, "do_sample": False}
    answer = ask(text=messages, generate_kwargs=greedy, return_full_text=False)[0]["generated_text"]
    return model, processor, [*names, type(processor).__name__, answer]

model, processor, first = check(sys.argv[1])
model.save_pretrained("again")
processor.save_pretrained("again")
second = check("again")[2]
assert "modeling_granulon" not in sys.modules
assert first == second, (first, second)
print(json.dumps(first))
"""


@pytest.mark.parametrize("name, family", [("dinov3", "qwen2"), ("siglip", "llama")])
def test_a_new_process_in_another_folder_loads_everything_twice(name, family, visions, texts, tmp_path):
    folder = assemble(visions[name], texts[family], tmp_path / "model")
    Image.effect_noise((50, 40), 90).save(tmp_path / "image.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", USER_CODE, folder, tmp_path / "image.png"],
        cwd=elsewhere,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)[:3] == ["GranulonModel", "GranulonForConditionalGeneration", "GranulonProcessor"]
    assert "newly initialized" not in run.stderr and "MISSING" not in run.stderr and "UNEXPECTED" not in run.stderr


def test_the_chat_template_is_kept_and_takes_images(assembled, texts):
    processor, tokenizer = AutoProcessor.from_pretrained(assembled), AutoTokenizer.from_pretrained(texts["qwen2"])
    strings = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    expected = tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(strings, add_generation_prompt=True) == expected
    assert processor.tokenizer.apply_chat_template(strings, tokenize=False, add_generation_prompt=True) == expected
    assert "<|im_start|>user\n<|image_pad|>How many?<|im_end|>" in processor.apply_chat_template(IMAGE_PARTS)


def test_generation_settings_are_kept_and_never_write_a_placeholder(assembled):
    generation = load(assembled).generation_config
    tokenizer = AutoProcessor.from_pretrained(assembled).tokenizer
    assert (generation.temperature, generation.top_p, generation.do_sample) == (0.7, 0.8, True)
    assert generation.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert generation.suppress_tokens == [tokenizer.convert_tokens_to_ids("<|image_pad|>")]
    assert generation.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_images_are_prepared_as_the_encoder_expects_and_shown_whole(name, visions, texts, tmp_path):
    own = PREPROCESSORS[name]
    processor = AutoProcessor.from_pretrained(assemble(visions[name], texts["qwen2"], tmp_path / "model"))
    image = Image.linear_gradient("L").resize((90, 40))  # grey, wide, darkest at the top edge
    pixels = prompt(processor, image)["pixel_values"][0]
    side = 128 if name == "dinov3_convnext" else 32
    assert pixels.shape == (3, side, side)
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("image_mean", "image_std"))
    rgb = pixels * std + mean
    assert rgb.min() < 0.02 and rgb.max() > 0.98, "the edges of the image are cut off, or it is scaled wrongly"
    assert processor.image_processor.resample == own["resample"]


def test_another_image_size_can_be_chosen(visions, texts, tmp_path):
    for name in ("dinov3", "clip"):
        model_folder = assemble(visions[name], texts["qwen2"], tmp_path / name, image_size=48)
        inputs = prompt(AutoProcessor.from_pretrained(model_folder))
        assert inputs["pixel_values"].shape[-2:] == (48, 48)
        assert load(model_folder)(**inputs).logits.isfinite().all()


def test_the_manifest_names_both_parts_and_their_licences(assembled, visions):
    manifest = json.loads((assembled / "granulon_manifest.json").read_text())
    assert manifest["vision"] == {
        "source": "dinov3",
        "revision": None,
        "model_type": "dinov3_vit",
        "license": "other",
        "license_name": "dinov3-license",
        "license_link": "https://example.org/dinov3",
        "origin": None,
    }
    assert manifest["text"]["license"] == "apache-2.0"
    assert manifest["versions"].keys() == {"granulon", "transformers", "torch", "granulon_commit"}
    assert (assembled / "licences" / "vision" / "LICENSE.md").read_text() == "the DINOv3 licence\n"


def test_each_part_keeps_its_dtype_and_the_language_model_decides_how_it_loads(visions, tmp_path):
    text = text_source(tmp_path / "text", "qwen2")
    AutoModelForCausalLM.from_pretrained(text, dtype=torch.bfloat16).save_pretrained(text)
    folder = assemble(visions["dinov3"], text, tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        dtypes = {key.split(".")[1]: weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
    assert dtypes["vision_tower"] is torch.float32
    assert dtypes["language_model"] is dtypes["multi_modal_projector"] is torch.bfloat16
    assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.bfloat16}


def test_assembling_twice_gives_the_same_weights_and_leaves_the_random_state(assembled, visions, texts, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = assemble(visions["dinov3"], texts["qwen2"], tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert (again / "model.safetensors").read_bytes() == (assembled / "model.safetensors").read_bytes()


# ----- the placeholder


@pytest.mark.parametrize("family, token", [("qwen2", "<|image_pad|>"), ("llama", "<|reserved_special_token_0|>")])
def test_the_placeholder_is_an_unused_token_of_the_model(family, token, visions, texts, tmp_path):
    folder = assemble(visions["dinov3"], texts[family], tmp_path / "model")
    processor, model = AutoProcessor.from_pretrained(folder), load(folder)
    assert processor.image_token == token
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids(token)
    assert model.config.text_config.vocab_size == AutoConfig.from_pretrained(texts[family]).vocab_size


@pytest.mark.parametrize("spare_rows", [0, 7])
@pytest.mark.parametrize("tie", [True, False])
def test_a_token_is_added_where_the_model_has_no_unused_one(spare_rows, tie, visions, tmp_path):
    tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    rows = len(tokenizer) + spare_rows
    text = text_source(tmp_path / "text", "qwen2", tokenizer=tokenizer, vocab_size=rows, tie=tie)
    folder = assemble(visions["dinov3"], text, tmp_path / "model")
    processor, model = AutoProcessor.from_pretrained(folder), load(folder)
    assert processor.image_token == "<image>" and model.config.image_token_id == len(tokenizer)
    assert model.config.text_config.vocab_size == max(rows, len(tokenizer) + 1)
    source = AutoModelForCausalLM.from_pretrained(text)
    for own, expected in ((model.get_input_embeddings(), source.model.embed_tokens), (model.lm_head, source.lm_head)):
        assert torch.equal(own.weight[:rows], expected.weight)
    assert model(**prompt(processor)).logits.isfinite().all()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = assemble(visions["dinov3"], text, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_model_without_a_padding_token_gets_one_that_does_not_end_the_answer(visions, tmp_path):
    text = text_source(tmp_path / "text", "llama")
    processor = AutoProcessor.from_pretrained(assemble(visions["dinov3"], text, tmp_path / "model"))
    assert processor.tokenizer.pad_token == "<|finetune_right_pad_id|>"


# ----- where sources come from


def test_hub_ids_are_fetched_at_their_revision(visions, texts, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, revision, **_):
        asked.append((repo_id, revision))
        commit = tmp_path / repo_id / "0a1b2c"
        commit.parent.mkdir(parents=True)
        commit.symlink_to(texts["qwen2"] if "Qwen" in repo_id else visions["dinov3"])
        return str(commit)

    monkeypatch.setattr(parts, "snapshot_download", snapshot_download)
    folder = assemble("facebook/dinov3", "Qwen/Qwen2.5@v1", tmp_path / "model")
    assert asked == [("facebook/dinov3", None), ("Qwen/Qwen2.5", "v1")]
    manifest = json.loads((folder / "granulon_manifest.json").read_text())
    assert (manifest["vision"]["source"], manifest["vision"]["revision"]) == ("facebook/dinov3", "0a1b2c")


# ----- what is refused, and that nothing stays


def without(source, target, *names):
    """A copy of a repository that lacks some files."""
    target.mkdir()
    for file in source.iterdir():
        if file.name not in names:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def broken_sources(visions, texts, tmp_path):
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "vit")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=400)).save_pretrained(tmp_path / "gpt2")
    tokenizer_of("qwen2").save_pretrained(tmp_path / "gpt2")
    no_template = without(texts["qwen2"], tmp_path / "no_template", "chat_template.jinja")
    no_layer = without(texts["qwen2"], tmp_path / "no_layer", "config.json")
    config = json.loads((texts["qwen2"] / "config.json").read_text())
    config.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    (no_layer / "config.json").write_text(json.dumps(config))
    vision, text = visions["dinov3"], texts["qwen2"]
    return {
        "no such folder": (tmp_path / "missing", text, "not found locally or on the Hub"),
        "not a model": (without(vision, tmp_path / "no_config", "config.json"), text, "no config.json"),
        "encoder not supported": (tmp_path / "vit", text, "dinov3_vit, dinov3_convnext"),
        "the two mixed up": (text, vision, "dinov3 has no tokenizer"),
        "language model not supported": (vision, tmp_path / "gpt2", "gpt2"),
        "no preprocessor": (without(vision, tmp_path / "p", "preprocessor_config.json"), text, "preprocessor_config"),
        "no chat template": (vision, no_template, "chat template"),
        "a layer is missing": (vision, no_layer, "incomplete: .*layers.2"),
    }


CASES = ["no such folder", "not a model", "encoder not supported", "the two mixed up", "language model not supported"]
CASES += ["no preprocessor", "no chat template", "a layer is missing"]


@pytest.mark.parametrize("case", CASES)
def test_unusable_sources_are_refused_and_nothing_is_written(case, visions, texts, tmp_path):
    vision, text, message = broken_sources(visions, texts, tmp_path)[case]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        assemble(vision, text, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [-8, 0, 3, 4100])
def test_an_image_size_out_of_range_is_refused(size, visions, texts, tmp_path):
    with pytest.raises(ValueError, match=rf"image_size is {size}; expected 4 \(one patch\) to 4096 pixels"):
        assemble(visions["dinov3"], texts["qwen2"], tmp_path / "model", image_size=size)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tiny", "--vision", "x"], "--tiny makes a model of its own; omit --vision"),
        (["--tiny", "--image_size", "64", "--trained", "x"], "omit --image_size, --trained"),
        (["--tiny", "--colour", "red"], "unknown arguments: --colour red"),
        (["--vision", "x"], "give --vision and --text, --trained, or --tiny"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["granulon-assemble", "--output", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value).startswith("granulon-assemble: ") and message in str(stop.value)
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_an_image_size_that_patches_do_not_divide_is_refused(visions, texts, tmp_path):
    with pytest.raises(ValueError, match="50 x 50 .* patches of 4; choose an image_size of 48 or 52"):
        assemble(visions["dinov3"], texts["qwen2"], tmp_path / "model", image_size=50)


def test_an_existing_model_is_not_overwritten(assembled, visions, texts):
    before = (assembled / "config.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        assemble(visions["clip"], texts["llama"], assembled)
    assert (assembled / "config.json").read_bytes() == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(error, visions, texts, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(module, "_copy_licences", fail)
    with pytest.raises(type(error)):
        assemble(visions["dinov3"], texts["qwen2"], tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


MEMORY = """
import resource, sys
from granulon.hub.assemble import assemble
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assemble(*sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_no_second_copy_of_the_weights_is_held(visions, tmp_path):
    text = text_source(tmp_path / "text", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    weights = (text / "model.safetensors").stat().st_size / 1024
    command = [sys.executable, "-c", MEMORY, visions["dinov3"], text, tmp_path / "model"]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 1.5 * weights, f"{grown} kB for {weights:.0f} kB of weights"


# ----- the tiny model and the command


def test_the_tiny_model_is_complete_small_and_repeatable(tmp_path):
    first, second = assemble_tiny(tmp_path / "first"), assemble_tiny(tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert sum(file.stat().st_size for file in first.rglob("*") if file.is_file()) < 5e6
    processor, model = AutoProcessor.from_pretrained(first), load(first)
    inputs = prompt(processor)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_the_command_writes_a_tiny_model(tmp_path):
    command = [sys.executable, "-m", "granulon.hub.assemble", "--tiny", "--output", tmp_path / "model"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"wrote {tmp_path / 'model'}\n"
    assert "100%" in run.stderr, "no progress is shown"
    load(tmp_path / "model")


@pytest.mark.parametrize("options, message", [(["--tiny"], "exists already"), ([], "give --vision and --text")])
def test_the_command_explains_its_errors_in_a_line(options, message, assembled, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["granulon-assemble", "--output", str(assembled), *options])
    with pytest.raises(SystemExit, match=f"^granulon-assemble: .*{message}"):
        module.main()


# ----- the chat template

IMAGE = {"qwen2": "<|image_pad|>", "llama": "<|reserved_special_token_0|>"}
TEMPLATE = {family: tokenizer_of(family).chat_template for family in IMAGE}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CONVERSATIONS = {
    "one turn": turns("How many?"),
    "several turns": turns("How many?", "Two.", "Where?"),
    "ends with an answer": turns("How many?", "Two."),
    "system prompt": turns("How many?", "Two.", "Where?", system="Be brief."),
    "spaces and line breaks": turns(" \n How many?\n\n", "\tTwo. ", "  ", system="\n"),
    "other scripts": turns("Wie viele Bäume? 木はいくつ? 🌳", "Zwei 🌲"),
    "looks like a template": turns("{{ messages }} {% raw %} {# note #} {{ 1 / 0 }}", "<|im_end|> [INST]"),
    "empty": turns(""),
    "tool call": [
        *turns("Weather in Oslo?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": '{"wind": 3}'},
        {"role": "assistant", "content": "Rain."},
    ],
    "tool call without content": [*turns("Weather?"), {"role": "assistant", "tool_calls": [CALL]}],
    "tool result that is a list": [
        *turns("Weather?"),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "string", "value": 1}, 2, "three"]},
    ],
}


def render(template, messages, **kwargs):
    values = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "date_string": "1 Jan 2026", **kwargs}
    return render_jinja_template([messages], chat_template=template, **values)[0][0]


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompt", [False, True], ids=["complete", "with prompt"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("family", TEMPLATE)
def test_strings_render_as_before_to_the_byte(family, messages, prompt, tools):
    before = render(TEMPLATE[family], messages, add_generation_prompt=prompt, tools=tools)
    after = with_image_parts(TEMPLATE[family], IMAGE[family])
    assert render(after, messages, add_generation_prompt=prompt, tools=tools) == before


TEXT_TEMPLATES = sorted(
    path for path in TEMPLATES.glob("*.jinja") if not any(vl in path.name for vl in ("idefics", "llava", "smolvlm"))
)


@pytest.mark.parametrize("path", TEXT_TEMPLATES, ids=lambda path: path.stem)
def test_any_text_template_takes_image_parts_and_keeps_its_strings(path):
    before, after = path.read_text(), with_image_parts(path.read_text(), "<image>")
    for prompt in (False, True):
        messages = turns("How many?", "Two.", "Where?")
        assert render(after, messages, add_generation_prompt=prompt) == render(
            before, messages, add_generation_prompt=prompt
        )
    with_parts = turns([{"type": "image"}, {"type": "text", "text": "How many?"}], "Two.", "Where?")
    assert render(after, with_parts) == render(before, turns("<image>How many?", "Two.", "Where?"))


@pytest.mark.parametrize(
    "template", ["  {% if true %} x{% endif %}", "\n\n{{ messages[0].role }}", " {{- 1 }}\n", "\t", ""]
)
def test_white_space_at_the_edges_of_a_template_survives(template):
    assert render(with_image_parts(template, "<image>"), turns("a")) == render(template, turns("a"))


@pytest.mark.parametrize("family", TEMPLATE)
def test_parts_render_as_the_string_they_stand_for(family):
    template, image = with_image_parts(TEMPLATE[family], IMAGE[family]), IMAGE[family]
    parts = turns(
        [{"type": "image"}, {"type": "text", "text": "Compare with "}, {"type": "image", "url": "b.png"}],
        [{"type": "text", "text": "Same."}],
        [{"type": "text", "text": "Sure?"}, {"type": "text", "text": "Why?"}, {"type": "image"}, {"type": "image"}],
        system=[{"type": "text", "text": "Be brief."}],
    )
    strings = turns(f"{image}Compare with {image}", "Same.", f"Sure?\nWhy?{image}{image}", system="Be brief.")
    assert render(template, parts) == render(TEMPLATE[family], strings)


def test_several_named_templates_are_all_extended():
    extended = with_image_parts({"default": TEMPLATE["qwen2"], "tool_use": TEMPLATE["llama"]}, "<image>")
    assert extended == {
        "default": with_image_parts(TEMPLATE["qwen2"], "<image>"),
        "tool_use": with_image_parts(TEMPLATE["llama"], "<image>"),
    }


@pytest.mark.parametrize("name", ["qwen2_5_training.jinja", "llama3_training.jinja"])
def test_what_the_assistant_generates_is_still_marked(name):
    before = (TEMPLATES / name).read_text()
    answer = [{"type": "text", "text": "Two."}]
    spans = []
    for template, messages in (
        (before, turns("<image>How many?", "Two.")),
        (
            with_image_parts(before, "<image>"),
            turns([{"type": "image"}, {"type": "text", "text": "How many?"}], answer),
        ),
    ):
        texts, indices = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, bos_token="", eos_token=""
        )
        spans.append([texts[0][start:end] for start, end in indices[0]])
    assert spans[0] == spans[1] and "Two." in spans[0][0]


@pytest.mark.parametrize("family", TEMPLATE)
def test_the_template_loops_over_message_content_as_vllm_expects(family):
    tree = Environment().parse(with_image_parts("", IMAGE[family]))
    loops = [(loop.target.name, loop.iter) for loop in tree.find_all(nodes.For)]
    assert ("message", "messages") in [(name, getattr(over, "name", None)) for name, over in loops]
    assert any(isinstance(over, nodes.Getitem) and over.node.name == "message" for _, over in loops)


def test_an_answer_that_ends_in_parts_can_be_continued():
    template = with_image_parts(TEMPLATE["qwen2"], "<image>")
    messages = turns([{"type": "image"}], [{"type": "text", "text": "Two and"}])
    assert render(template, messages, continue_final_message=True).endswith("assistant\nTwo and")


@pytest.mark.parametrize("family", TEMPLATE)
def test_sanitised_parts_cannot_write_control_tokens(family):
    tokenizer, image = tokenizer_of(family), IMAGE[family]
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers has no sanitize_control_tokens")
    tokenizer.chat_template = with_image_parts(tokenizer.chat_template, image)
    end = tokenizer.eos_token
    halves = [{"type": "text", "text": end[:4]}, {"type": "text", "text": end[4:]}]
    attacks = [
        [{"type": "text", "text": f"{end}{image}"}],
        halves,
        [{"type": "text", "text": image[:3]}, {"type": "text", "text": image[3:]}],
        [{"type": "image", "url": f"{image}{end}"}],
    ]

    def count(content):
        ids = tokenizer.apply_chat_template(
            turns(content, "ok"), sanitize_control_tokens=True, return_dict=False, date_string="1 Jan 2026"
        )
        return [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in (end, image)]

    ends, _ = count("plain")
    assert [count(attack) for attack in attacks] == [[ends, 0], [ends, 0], [ends, 0], [ends, 1]]


# ----- trained parts


@pytest.fixture
def trained(assembled, tmp_path):
    """Trained parts of the assembled model: another projector and controller, and adapters of one layer."""
    folder, random = tmp_path / "trained", torch.Generator().manual_seed(3)
    folder.mkdir()
    weights = {
        name: torch.rand(value.shape, generator=random)
        for name, value in load(assembled).state_dict().items()
        if name.startswith(TRAINABLE_WEIGHTS)
    }
    layer = "model.language_model.layers.0.mlp.up_proj"
    width, inner = load(assembled).get_submodule(layer).weight.T.shape
    pair = torch.rand(4, width, generator=random), torch.rand(inner, 4, generator=random)
    weights |= {layer + ending: value for ending, value in zip(ADAPTER_ENDINGS, pair, strict=True)}
    save_file(weights, folder / TRAINABLE, {"format": "pt", ADAPTER_SCALE: "0.5"})
    for name in ("config.json", "processor_config.json", "granulon_manifest.json"):
        shutil.copyfile(assembled / name, folder / name)
    (folder / "chat_template.jinja").write_text("<image>{{ messages[-1]['content'] }}")
    return folder


def test_adapters_among_the_trained_parts_are_merged_into_the_language_model(
    assembled, visions, texts, trained, tmp_path
):
    before, weights = load(assembled).state_dict(), load_file(trained / TRAINABLE)
    folder = assemble(visions["dinov3"], texts["qwen2"], tmp_path / "model", trained=trained)
    after = load(folder).state_dict()
    first, second = (next(name for name in weights if name.endswith(ending)) for ending in ADAPTER_ENDINGS)
    layer = first.removesuffix(ADAPTER_ENDINGS[0]) + ".weight"
    torch.testing.assert_close(after[layer], before[layer] + 0.5 * weights[second] @ weights[first])
    for name, value in after.items():
        if name != layer:
            assert torch.equal(value, weights.get(name, before[name])), name
    assert AutoProcessor.from_pretrained(folder).chat_template == (trained / "chat_template.jinja").read_text()


def test_trained_parts_name_the_models_that_they_belong_to(assembled, visions, texts, trained, tmp_path, monkeypatch):
    manifest = json.loads((trained / "granulon_manifest.json").read_text())
    manifest["vision"]["source"], manifest["text"]["source"] = str(visions["dinov3"]), str(texts["qwen2"])
    manifest["training"] = [{"stage": "sft", "rows": 3}]
    (trained / "granulon_manifest.json").write_text(json.dumps(manifest))
    named = assemble(None, None, tmp_path / "named", trained=trained)
    given = assemble(visions["dinov3"], texts["qwen2"], tmp_path / "given", trained=trained)
    assert (named / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()
    assert json.loads((named / "granulon_manifest.json").read_text())["training"] == manifest["training"]


def test_trained_parts_of_other_models_are_refused(assembled, visions, texts, trained, tmp_path):
    origin = {"repo_id": "facebook/dinov2-base", "revision": None, "files": {}}
    other = shutil.copytree(visions["dinov3"], tmp_path / "other")
    (other / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(ValueError, match=r"was trained with dinov3 \(dinov3_vit\), not with facebook/dinov2-base"):
        assemble(other, texts["qwen2"], tmp_path / "model", trained=trained)
    with pytest.raises(
        ValueError, match=r"was trained with dinov3 \(dinov3_vit\), not with clip \(clip_vision_model\)"
    ):
        assemble(visions["clip"], texts["qwen2"], tmp_path / "model", trained=trained)
    weights = load_file(trained / TRAINABLE)
    del weights[next(name for name in weights if name.endswith(ADAPTER_ENDINGS[1]))]
    save_file(weights, trained / TRAINABLE)
    with pytest.raises(ValueError, match="up_proj, 1 in all, are missing or have another shape"):
        assemble(visions["dinov3"], texts["qwen2"], tmp_path / "model", trained=trained)
    assert not (tmp_path / "model").exists()
