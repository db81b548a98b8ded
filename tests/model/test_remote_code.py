"""A checkpoint folder is all that another machine needs: loaded in fresh processes, from another folder."""

import json
import os
import subprocess
import sys

import pytest
from conftest import make_image, make_model, make_processor

LOAD = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from PIL import Image
sys.modules["modeling_granulon"] = None  # an installed package must not help
folder, resaved = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
reports = {}
base, reports["base"] = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
head, reports["head"] = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
for name, report in reports.items():
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (name, kind, report[kind])
image = Image.open(folder + "/../image.png")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
)
ids = head.generate(**inputs, max_new_tokens=4, do_sample=False)
answer = processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
greedy = {"max_new_tokens": 4, "do_sample": False}
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
piped = pipe(text=messages, generate_kwargs=greedy, return_full_text=False)[0]["generated_text"]
both = pipe(text=[messages, messages], batch_size=2, generate_kwargs=greedy, return_full_text=False)
head.save_pretrained(resaved)
processor.save_pretrained(resaved)
print("RESULT" + json.dumps({
    "answer": answer, "piped": piped, "both": [row[0]["generated_text"] for row in both],
    "classes": [type(thing).__name__ for thing in (config, processor, base, head)],
    "logits": head(**inputs).logits[0, -1, :8].tolist(),
}))
"""


def load_elsewhere(folder, resaved):
    """Load in a fresh interpreter that sees neither this package nor this folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(resaved.parent / f"modules-{resaved.name}")}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(resaved)],
        capture_output=True,
        text=True,
        cwd=resaved.parent,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    noise = [line for line in run.stderr.splitlines() if "newly initialized" in line or "not used" in line]
    assert not noise, noise
    return json.loads(run.stdout.split("RESULT")[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "granulon"
    model, processor = make_model(), make_processor()
    model.generation_config.suppress_tokens = [processor.image_token_id]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    make_image(0).save(folder.parent / "image.png")
    return folder


def test_a_checkpoint_loads_elsewhere_and_survives_being_saved_again(checkpoint):
    first = load_elsewhere(checkpoint, checkpoint.parent / "second")
    second = load_elsewhere(checkpoint.parent / "second", checkpoint.parent / "third")
    assert first == second
    assert first["piped"] == first["answer"] and first["both"] == [first["answer"]] * 2
    names = ["GranulonConfig", "GranulonProcessor", "GranulonModel", "GranulonForConditionalGeneration"]
    assert first["classes"] == names


def test_a_checkpoint_holds_everything_and_nothing_else(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    code = {path.name for path in (checkpoint.parents[0] / "granulon").glob("*.py")}
    assert code == {
        "adaptive_token_aggregation.py",
        "configuration_granulon.py",
        "generation_granulon.py",
        "granularity_controller.py",
        "image_io.py",
        "image_tokens.py",
        "joint_views.py",
        "modeling_granulon.py",
        "multi_modal_projector.py",
        "processing_granulon.py",
        "vision_features.py",
        "visual_encoder.py",
        "visual_output.py",
    }
    assert names - code == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
