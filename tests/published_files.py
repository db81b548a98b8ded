"""Small random checkpoint folders as granulon-train writes them: a model, an adapter, and the parts of a model."""

import json
import shutil
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2ForCausalLM
from trl import ModelConfig

from granulon.hub.assemble import assemble_tiny
from granulon.hub.manifest import read_manifest, write_manifest
from granulon.train.stages import lora_config


def make_checkpoint(folder: Path) -> Path:
    """A tiny model with licences, a training, an evaluation result, and files of the run."""
    assemble_tiny(folder)
    manifest = read_manifest(folder)
    for part in ("vision", "text"):
        manifest[part] |= {"license": "apache-2.0"}
    entry = {"stage": "sft", "recipe": "tiny-cpu", "settings": {"data": ["/home/me/secret/rows.json"]}, "rows": 7}
    manifest["training"] = [entry | {"base": "/home/me/base", "steps": 3, "seed": 0, "processes": 1}]
    write_manifest(folder, manifest)
    (folder / "optimizer.pt").write_bytes(b"of a run")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / ".eval_results").mkdir()
    result = [{"dataset": {"id": "lmms-lab/POPE", "task_id": "pope"}, "value": 0.5, "notes": "made up for a test"}]
    (folder / ".eval_results" / "pope.yaml").write_text(json.dumps(result))
    return folder


def make_adapter(checkpoint: Path, folder: Path) -> Path:
    """A LoRA of a model with projector, processor and its code, and the base's manifest."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = get_peft_model(model, lora_config(model, ModelConfig(lora_r=4)))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name or "gain_offsets" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    shutil.copy(checkpoint / "granulon_manifest.json", folder)
    return folder


def save_parts(checkpoint: Path, target: Path):
    """The encoder and the language model of a tiny checkpoint, as folders of their own in `target`."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model.model.vision_tower.save_pretrained(target / "vision")
    processor.image_processor.save_pretrained(target / "vision")
    text = Qwen2ForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.bfloat16().save_pretrained(target / "text")
    processor.tokenizer.save_pretrained(target / "text")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def changed_manifest(folder: Path, **parts):
    """Change entries of the manifest's parts and set other keys."""
    manifest = read_manifest(folder)
    for key, value in parts.items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) else value
    write_manifest(folder, manifest)
