"""The GPU memory that a training needs, computed from parameter counts: `python benchmarks/memory.py`.

The models have the sizes of the real ones but no memory (meta device) and are frozen as in each stage. Counted is what
stays from step to step: weights, gradients, optimizer (AdamW, two float32 moments). Activations come on top: with
gradient checkpointing the inputs of every layer, given per 1,000 tokens, and the work within one layer.
"""

from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import DINOv3ViTConfig, HfArgumentParser, LlamaConfig, Qwen2Config
from trl import ModelConfig

from granulon.hub.text import markdown_table
from granulon.train.stages import lora_config, set_trainable
from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration

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
KINDS = ("align", "sft", "lora")
ENGINES = ("one GPU", "DDP", "ZeRO-2", "FSDP2")


@dataclass
class MemoryArguments:
    gpus: int = field(default=8, metadata={"help": "GPUs over which ZeRO-2 and FSDP2 shard the states"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})


@dataclass
class Sizes:
    """Numbers of parameters of a model."""

    total: int
    trained: int
    root: int  # embeddings and projector, which FSDP2 gathers for the whole pass
    frozen_bytes: int = 4

    def states(self, engine: str, gpus: int) -> float:
        """Bytes on each GPU from step to step, with float32 weights and moments."""
        frozen, trained = (self.total - self.trained) * self.frozen_bytes, self.trained
        if engine == "one GPU":
            return frozen + trained * (4 + 4 + 8)
        if engine == "DDP":  # keeps a second copy of the gradients for the reduction
            return frozen + trained * (4 + 4 + 4 + 8)
        if engine == "ZeRO-2":  # weights in bfloat16; gradients, float32 weights and moments are sharded
            return self.total * 2 + trained * (2 + 4 + 8) / gpus
        return (frozen + trained * (4 + 4 + 8)) / gpus + self.root * 2


def sizes_of(text: str, kind: str, lora_r: int) -> Sizes:
    """The sizes of DINOv3 ViT-L/16 with a language model (a key of `LANGUAGE_MODELS`), for a kind of `KINDS`."""
    config = GranulonConfig(
        vision_config=TOWER.to_dict(), text_config=LANGUAGE_MODELS[text].to_dict(), image_token_id=0
    )
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
        model.tie_weights()
        root = model.get_input_embeddings().weight.numel()
        root += sum(p.numel() for p in model.model.multi_modal_projector.parameters())
        set_trainable(model, "align" if kind == "align" else "sft")
        if kind == "lora":
            model = get_peft_model(model, lora_config(model, ModelConfig(lora_r=lora_r)))
    counts = model.num_parameters(), model.num_parameters(only_trainable=True)
    return Sizes(*counts, root, frozen_bytes=2 if kind == "lora" else 4)


def table(gpus: int, lora_r: int) -> str:
    """The memory table, in Markdown."""
    engines = [engine if engine == "one GPU" else f"{engine}, {gpus} GPUs" for engine in ENGINES]
    rows = []
    for text, config in LANGUAGE_MODELS.items():
        for kind in KINDS:
            sizes = sizes_of(text, kind, lora_r)
            # The residual stream has the dtype of the embeddings.
            layer_inputs = 1000 * config.num_hidden_layers * config.hidden_size * sizes.frozen_bytes
            rows.append(
                [text, f"lora (r = {lora_r})" if kind == "lora" else kind]
                + [f"{count / 1e6:,.0f} M" for count in (sizes.total, sizes.trained)]
                + [f"{sizes.states(engine, gpus) / 1e9:.1f} GB" for engine in ENGINES]
                + [f"{layer_inputs / 1e9:.2f} GB"]
            )
    header = ["language model", "training", "parameters", "trained", *engines, "layer inputs of 1,000 tokens"]
    return markdown_table(header, rows, text_columns=2)


def main():
    (arguments,) = HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses()
    print(table(arguments.gpus, arguments.lora_r))


if __name__ == "__main__":
    main()
