"""Which parts of the model are trained in each stage, with and without adapters."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from trl import ModelConfig

from modeling_granulon import GranulonForConditionalGeneration

# Trained parts, as names within `GranulonForConditionalGeneration`; the vision tower is in none of them.
STAGES = {
    "align": ("model.multi_modal_projector",),
    "sft": ("model.language_model", "lm_head", "model.multi_modal_projector", "model.granularity_controller"),
}
# "all-linear" would take the tower's layers too, and a list of names its attention.
LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|qkv|o|gate|up|gate_up|down)_proj"
FULLY_TRAINED = ("multi_modal_projector", "granularity_controller")  # beside the adapters


def set_trainable(model: GranulonForConditionalGeneration, stage: str):
    """Freeze all but the parts that a stage (a key of `STAGES`) trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(STAGES[stage]))


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


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, trained parameters); tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
