"""What is loaded and what of it learns in each stage of training, with and without adapters."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from trl import ModelConfig

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor

# Parts that learn, as names within `GranulonForConditionalGeneration`; the tower is in none of them.
STAGES = {
    "align": ("model.multi_modal_projector",),
    "sft": ("model.language_model", "lm_head", "model.multi_modal_projector", "model.granularity_controller"),
}
# "all-linear" would take the tower's layers too, and a list of names its attention.
LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|qkv|o|gate|up|gate_up|down)_proj"
LORA_WHOLE = ("multi_modal_projector", "granularity_controller")  # trained whole beside the adapters
# What a change of the levels may leave without weights in the checkpoint; it begins anew.
NEW_WITH_LEVELS = (
    "model.granularity_controller.",
    *(f"model.multi_modal_projector.{name}" for name in ("gain_offsets", "level_embedding", "cluster_embedding")),
)


def load_model(
    name: str, *, revision: str = "main", granularities: list[dict] | None = None, dtype="auto", attention=None
) -> GranulonForConditionalGeneration:
    """
    A Granulon to be trained, in eval mode and with nothing frozen but the tower.

    Args:
        name, revision: folder or Hub repository of an assembled or trained checkpoint.
        granularities: levels in place of the checkpoint's own; `[]` is the plain encoder. Gains, embeddings and
            controller start anew where their shapes change.
        dtype, attention: as `dtype` and `attn_implementation` of `from_pretrained`.

    Raises:
        ValueError: the checkpoint is not to be had, none of Granulon's, or lacks weights.
    """
    try:
        values, _ = GranulonConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} is no checkpoint's folder and not to be had: {reason}") from error
    if values.get("model_type") != GranulonConfig.model_type:
        raise ValueError(
            f"{name} is a model of type {values.get('model_type')!r}, expected {GranulonConfig.model_type!r}: "
            "granulon-assemble makes one of an encoder and a language model"
        )
    if granularities is not None:
        values |= {"granularities": granularities, "max_semantic_tokens": None, "default_granularity": None}
    model, report = GranulonForConditionalGeneration.from_pretrained(
        name,
        config=GranulonConfig.from_dict(values),
        revision=revision,
        dtype=getattr(torch, dtype) if dtype not in (None, "auto") else dtype,
        attn_implementation=attention,
        ignore_mismatched_sizes=granularities is not None,
        output_loading_info=True,
    )
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    absent = sorted(key for key in absent if granularities is None or not key.startswith(NEW_WITH_LEVELS))
    if absent:
        raise ValueError(
            f"{name} lacks the weights {', '.join(absent[:3])} ({len(absent)} in all), or has them in another shape; "
            "take a complete checkpoint"
        )
    return model


def load_processor(name: str, config: GranulonConfig, *, revision: str = "main") -> GranulonProcessor:
    """The checkpoint's processor, with as many semantic slots as the model has."""
    processor = GranulonProcessor.from_pretrained(name, revision=revision)
    processor.num_semantic_tokens = config.max_semantic_tokens
    return processor


def set_trainable(model: GranulonForConditionalGeneration, stage: str):
    """Freeze all but the parts that learn in a stage (a key of `STAGES`)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(STAGES[stage]))


def lora_config(model: GranulonForConditionalGeneration, arguments: ModelConfig) -> LoraConfig:
    """
    Adapters for the language model's linear layers; projector and controller are trained whole.

    These two become float32 here, as peft makes the adapters: a step is too small for the precision of bfloat16.
    """
    present = [name for name in LORA_WHOLE if getattr(model.model, name) is not None]
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
    """The base model with a saved adapter in its weights, in the base's dtype; needs peft no more."""
    dtype = model.dtype
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype)


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, those that train), tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
