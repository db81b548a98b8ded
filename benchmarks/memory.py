"""The GPU memory that a training needs, computed from parameter counts: `python benchmarks/memory.py`.

The models have the sizes of the real ones but no memory (meta device) and are frozen as in each stage. Counted is what
stays from step to step: weights, gradients, optimizer (AdamW, two float32 moments). Activations come on top: with
gradient checkpointing the inputs of every layer, given per 1,000 tokens, and the work within one layer.

The second table is the worst batch of a recipe: every row has `max_length` tokens and an image at its start, so that
each partial view copies nearly all of it. Counted is also what autograd keeps of one layer and the block mask.
"""

from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import AutoModel, DINOv3ViTConfig, HfArgumentParser, LlamaConfig, Qwen2Config
from trl import ModelConfig

from granulon.hub.text import markdown_table
from granulon.train.sft import read_recipe
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
RECIPES = ("align-qwen2.5-1.5b", "sft-qwen2.5-1.5b", "lora-qwen2.5-1.5b", "qlora-qwen2.5-1.5b")
RECIPES += ("align-llama3.2-3b", "sft-llama3.2-3b")
PATCHES = 14 * 14  # of an image of 224 pixels
PROJECTOR, LEVELS = "multi_modal_projector", GranulonConfig().granularities
NF4_BYTES = 0.5 + 1 / 64  # of a weight in blocks of 64, whose scales have 8 bits
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


def meta_model(text: str, kind: str, lora_r: int) -> torch.nn.Module:
    """DINOv3 ViT-L/16 with a language model (a key of `LANGUAGE_MODELS`), frozen as in a kind of `KINDS`."""
    config = GranulonConfig(
        vision_config=TOWER.to_dict(), text_config=LANGUAGE_MODELS[text].to_dict(), image_token_id=0
    )
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
        model.tie_weights()
        set_trainable(model, "align" if kind == "align" else "sft")
        return get_peft_model(model, lora_config(model, ModelConfig(lora_r=lora_r))) if kind == "lora" else model


def sizes_of(text: str, kind: str, lora_r: int) -> Sizes:
    """The sizes of `meta_model`."""
    model = meta_model(text, kind, lora_r)
    root = model.get_input_embeddings().weight.numel()
    root += sum(p.numel() for name, p in model.named_parameters() if "original" not in name and PROJECTOR in name)
    counts = model.num_parameters(), model.num_parameters(only_trainable=True)
    return Sizes(*counts, root, frozen_bytes=2 if kind == "lora" else 4)


def packed_length(tokens: int, levels: list[dict]) -> int:
    """Tokens of a row of `tokens` with its partial views, if an image of `PATCHES` follows its first token."""
    after = tokens - PATCHES - max(level["keep"] for level in levels)  # what the pixel view copies
    return tokens + after + sum(after + level["keep"] for level in levels)


def layer_bytes(text: str) -> int:
    """What autograd keeps of one token in one layer, in bfloat16."""
    config = LANGUAGE_MODELS[text]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
        rotary = torch.ones(1, 2, config.hidden_size // config.num_attention_heads, dtype=torch.bfloat16)
        kept = []
        for tokens in (1, 2):  # the difference is without the weights
            states = torch.ones(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            found = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x.nbytes) or x, lambda x: x):  # noqa: B023
                model.layers[0](states, position_embeddings=(rotary[:, :tokens], rotary[:, :tokens]))
            kept.append(sum(found))
    return kept[1] - kept[0]


def worst_case(name: str) -> list[str]:
    """The table row of a recipe: its worst batch on one of eight GPUs with DDP, or on the only one."""
    recipe = read_recipe(name)
    text = next(known for known in LANGUAGE_MODELS if known.lower().replace("llama-", "llama") in name)
    kind = "lora" if recipe.get("use_peft") else recipe["stage"]
    sizes, config = sizes_of(text, kind, recipe.get("lora_r", 0)), LANGUAGE_MODELS[text]
    states = sizes.states("one GPU" if kind == "lora" else "DDP", 8)
    if recipe.get("load_in_4bit"):
        layers = meta_model(text, "sft", 0).model.language_model.layers
        linear = sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, torch.nn.Linear))
        states -= linear * (sizes.frozen_bytes - NF4_BYTES)
    rows, length = recipe["per_device_train_batch_size"], packed_length(recipe["max_length"], LEVELS)
    tokens = rows * length
    inputs = tokens * config.num_hidden_layers * config.hidden_size * sizes.frozen_bytes
    parts = states, inputs, tokens * layer_bytes(text), rows * length**2
    numbers = [f"{rows:,}", f"{recipe['max_length']:,}", f"{length:,}"]
    return [f"`{name}`", *numbers, *(f"{part / 1e9:.1f} GB" for part in (*parts, sum(parts)))]


def worst_cases() -> str:
    """The table of the recipes' worst batches, in Markdown."""
    header = [
        "recipe",
        "rows",
        "tokens of a row",
        "with all views",
        "states",
        "layer inputs",
        "one layer",
        "mask",
        "sum",
    ]
    return markdown_table(header, [worst_case(name) for name in RECIPES])


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
    print(table(arguments.gpus, arguments.lora_r), worst_cases(), sep="\n\n")


if __name__ == "__main__":
    main()
