"""The command line and the model shapes that the benchmarks share."""

import argparse
import sys
from pathlib import Path
from time import perf_counter, process_time

import torch
from transformers import DINOv3ViTConfig, Qwen2Config

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration

PATCH = 16


def vit(width: int, layers: int, heads: int) -> dict:
    """The shape of a DINOv3 ViT."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers} | {
        "num_attention_heads": heads
    }


def qwen2(width: int, mlp: int, layers: int, heads: int, vocabulary: int = 151936) -> dict:
    """The shape of a Qwen2 decoder with two heads of keys and values."""
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return shape | {"num_attention_heads": heads, "num_key_value_heads": 2}


SHAPES = {  # name: description, vision tower, language model
    "tiny": (
        "a DINOv3 ViT of four layers of width 64 and a Qwen2 of four layers of width 128",
        vit(64, 4, 4),
        qwen2(128, 256, 4, 4, vocabulary=512),
    ),
    "small": ("DINOv3 ViT-S/16 and six layers of width 512", vit(384, 12, 6), qwen2(512, 2816, 6, 8)),
    "medium": ("DINOv3 ViT-B/16 and the decoder of Qwen2.5-0.5B", vit(768, 12, 12), qwen2(896, 4864, 24, 14)),
    "large": ("DINOv3 ViT-L/16 and the decoder of Qwen2.5-0.5B", vit(1024, 24, 16), qwen2(896, 4864, 24, 14)),
    "real": ("DINOv3 ViT-L/16 and the decoder of Qwen2.5-1.5B", vit(1024, 24, 16), qwen2(1536, 8960, 28, 12)),
}


def build(name: str, device: str, dtype: torch.dtype, image_token_id: int) -> GranulonForConditionalGeneration:
    """A Granulon of one of `SHAPES`, with random weights and the default levels."""
    _, vision, text = SHAPES[name]
    config = GranulonConfig(
        vision_config=DINOv3ViTConfig(**vision, patch_size=PATCH, num_register_tokens=4).to_dict(),
        text_config=Qwen2Config(**text, max_position_embeddings=32768, tie_word_embeddings=True).to_dict(),
        image_token_id=image_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return GranulonForConditionalGeneration(config).to(dtype)


def command_line() -> str:
    """The command that runs this benchmark, for its report."""
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--rounds", type=int, default=rounds, help=f"rounds of which median and quartiles are taken ({rounds})"
    )
    made.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    made.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a machine that is shared")
    made.add_argument("--quick", action="store_true", help="few rounds of the smallest shapes")
    return made


def add_shapes(made: argparse.ArgumentParser, models: str, sizes: list[int]):
    """The options of benchmarks of whole models; `models` describes the default in the help."""
    shown = " ".join(map(str, sizes))
    made.add_argument("--model", nargs="+", choices=SHAPES, help=f"shapes to run ({models})")
    made.add_argument("--sizes", nargs="+", type=int, default=sizes, help=f"image sides in pixels ({shown})")


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options with `device`, `dtype`, `clock` and `clock_name` of the run; sets the number of threads."""
    options = made.parse_args()
    if "sizes" in options:
        if options.quick:
            options.model, options.sizes, options.rounds = ["tiny"], [64], 1
        if wrong := [size for size in options.sizes if size < PATCH or size % PATCH]:
            made.error(f"--sizes {wrong}: a size must be a multiple of the patch size, {PATCH}")
    on_cuda = torch.cuda.is_available() and not options.cpu_time
    # Without matrix units for bfloat16, a CPU is slower with it.
    options.device, options.dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    options.clock, options.clock_name = (process_time, "CPU time") if options.cpu_time else (perf_counter, "wall time")
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    return options
