"""Which parts of the model are trained in each stage, with and without adapters, and how many bits they have."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config

from modeling_granulon import GranulonForConditionalGeneration

# Trained parts, as names within `GranulonForConditionalGeneration`; the vision tower is in none of them.
STAGES = {
    "align": ("model.multi_modal_projector",),
    "sft": ("model.language_model", "lm_head", "model.multi_modal_projector", "model.granularity_controller"),
}
# "all-linear" would take the tower's layers too, and a list of names its attention.
LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|qkv|o|gate|up|gate_up|down)_proj"
FULLY_TRAINED = ("multi_modal_projector", "granularity_controller")  # beside the adapters


def set_trainable(model: GranulonForConditionalGeneration, stage: str, vision_blocks: int = 0):
    """
    Freeze all but the parts that a stage (a key of `STAGES`) trains and the tower's last blocks, if any.

    Raises:
        ValueError: the tower has fewer blocks that are read, or none.
    """
    for name, parameter in model.named_parameters():  # weights in 4 or 8 bits are integers
        parameter.requires_grad_(name.startswith(STAGES[stage]) and parameter.is_floating_point())
    for block in _last_vision_blocks(model, vision_blocks):
        block.requires_grad_(True)


def _last_vision_blocks(model: GranulonForConditionalGeneration, count: int) -> list[torch.nn.Module]:
    """The last `count` transformer blocks of the tower before the hidden state that is read."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    depth = getattr(tower.config, "num_hidden_layers", None)
    lists = (module for module in tower.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)
    blocks = list(next(lists, []))
    blocks = blocks[: layer if layer >= 0 else len(blocks) + 1 + layer]
    if not 0 <= count <= len(blocks):
        raise ValueError(
            f"unfreeze_vision_blocks is {count}; of this tower ({tower.config.model_type}) {len(blocks)} transformer "
            f"blocks are read: give 0 to {len(blocks)}"
        )
    return blocks[len(blocks) - count :]


def quantization(arguments: ModelConfig) -> BitsAndBytesConfig | None:
    """4 or 8 bits for the language model's layers; tower, head and what is trained fully keep the run's dtype."""
    config = get_quantization_config(arguments)
    if config is not None:
        config.llm_int8_skip_modules = ["lm_head", "model.vision_tower", *(f"model.{name}" for name in FULLY_TRAINED)]
    return config


def lora_config(model: GranulonForConditionalGeneration, arguments: ModelConfig) -> LoraConfig:
    """
    Adapters for the language model's linear layers; projector and controller are trained fully.

    These two become float32 here, as peft makes the adapters: bfloat16 is too coarse for small updates.
    """
    present = [name for name in FULLY_TRAINED if getattr(model.model, name) is not None]
    for name in present:
        getattr(model.model, name).float()
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        target_modules=arguments.lora_target_modules or LORA_TARGETS,
        modules_to_save=arguments.lora_modules_to_save or present,
    )


def merge(model: GranulonForConditionalGeneration, adapter: str | Path) -> GranulonForConditionalGeneration:
    """The base model with a saved adapter merged into its weights, in the base's dtype."""
    dtype = model.dtype
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype)
