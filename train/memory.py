"""How much GPU memory a training needs, from the parameter counts: `python -m granulon.train.memory`.

The models are built with the sizes of the real ones, but without memory (meta device), and frozen as each stage does.
What is counted is what stays from step to step: weights, gradients, optimizer (AdamW, two float32 moments). Beside it
come the activations: with gradient checkpointing the inputs of every layer, which are told per 1,000 tokens, and the
work within one layer.
"""

from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import DINOv3ViTConfig, HfArgumentParser, LlamaConfig, Qwen2Config
from trl import ModelConfig

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration

from .stages import lora_config, parameter_counts, set_trainable

TOWER = DINOv3ViTConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_register_tokens=4
)
LANGUAGE_MODELS = {
    "Qwen2.5-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
}  # fmt: skip
WORK = ("align", "sft", "lora")
ENGINES = ("one GPU", "DDP", "ZeRO-2", "FSDP2")


@dataclass
class MemoryArguments:
    gpus: int = field(default=8, metadata={"help": "that ZeRO-2 and FSDP2 share the states over"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})


@dataclass
class Sizes:
    """Of a model and what is trained of it: parameters, those that learn, and the largest shared group (FSDP2)."""

    every: int
    learning: int
    root: int  # embeddings and projector, which FSDP2 gathers for the whole pass
    frozen_bytes: int = 4

    def states(self, engine: str, gpus: int) -> float:
        """Bytes on each GPU from step to step, with float32 weights and moments."""
        frozen, learning = (self.every - self.learning) * self.frozen_bytes, self.learning
        if engine == "one GPU":
            return frozen + learning * (4 + 4 + 8)
        if engine == "DDP":  # which keeps a second copy of the gradients, to send
            return frozen + learning * (4 + 4 + 4 + 8)
        if engine == "ZeRO-2":  # weights in bfloat16; gradients, float32 weights and moments are shared
            return self.every * 2 + learning * (2 + 4 + 8) / gpus
        return (frozen + learning * (4 + 4 + 8)) / gpus + self.root * 2


def sizes_of(text: str, work: str, lora_r: int) -> Sizes:
    """Of DINOv3 ViT-L/16 with a language model (a key of `LANGUAGE_MODELS`) in one of the kinds of `WORK`."""
    config = GranulonConfig(
        vision_config=TOWER.to_dict(), text_config=LANGUAGE_MODELS[text].to_dict(), image_token_id=0
    )
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
        model.tie_weights()
        root = model.get_input_embeddings().weight.numel()
        root += sum(p.numel() for p in model.model.multi_modal_projector.parameters())
        set_trainable(model, "align" if work == "align" else "sft")
        if work == "lora":
            model = get_peft_model(model, lora_config(model, ModelConfig(lora_r=lora_r)))
    return Sizes(*parameter_counts(model), root, frozen_bytes=2 if work == "lora" else 4)


def table(gpus: int, lora_r: int) -> str:
    """The memory table, in Markdown."""
    engines = [engine if engine == "one GPU" else f"{engine}, {gpus} GPUs" for engine in ENGINES]
    lines = [
        f"| language model | training | parameters | learn | {' | '.join(engines)} | layer inputs of 1,000 tokens |",
        f"|---|---|--:|--:|{'--:|' * len(ENGINES)}--:|",
    ]
    for text, config in LANGUAGE_MODELS.items():
        for work in WORK:
            sizes = sizes_of(text, work, lora_r)
            # The residual stream has the type of the embeddings.
            per_token = config.num_hidden_layers * config.hidden_size * sizes.frozen_bytes
            states = " | ".join(f"{sizes.states(engine, gpus) / 1e9:.1f} GB" for engine in ENGINES)
            name = f"lora (r = {lora_r})" if work == "lora" else work
            lines.append(
                f"| {text} | {name} | {sizes.every / 1e6:,.0f} M | {sizes.learning / 1e6:,.0f} M | {states} | "
                f"{per_token * 1000 / 1e9:.2f} GB |"
            )
    return "\n".join(lines)


def main():
    (arguments,) = HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses()
    print(table(arguments.gpus, arguments.lora_r))


if __name__ == "__main__":
    main()
