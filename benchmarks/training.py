"""What the joint objective costs: a step of plain fine-tuning, of separate passes, of the packed views.

    python benchmarks/training.py > benchmarks/results/training.md

Each step is the trainer's own: `GranulonTrainer.training_step`, its checks and meters included, and AdamW's update.
Weights and images are random: the time depends on neither. Progress goes to stderr.
"""

import gc
import tempfile
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from settings import PATCH, SHAPES, add_shapes, build, command_line, parse, parser
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from granulon.evaluation.timing import interleaved, machine, peak_bytes, times, with_quartiles
from granulon.hub.assemble import byte_tokenizer, with_image_parts
from granulon.hub.text import markdown_table
from granulon.train.arguments import GranulonSFTConfig
from granulon.train.meters import peak_flops
from granulon.train.trainer import GranulonTrainer
from modeling_granulon import GranulonProcessor

IMAGE_TOKEN = "<|image_pad|>"
PLAIN, SEPARATE = "plain fine-tuning", "separate passes"
SAMPLED, PACKED = "packed views, two levels a step", "packed views, every level"
CACHED = "plain fine-tuning, features from the vision cache"
JOINT = {"pixel_loss_weight": 0.5, "semantic_loss_weight": 0.5, "granularity_loss_weight": 0.1}
STEPS = {  # settings of the trainer, and whether one pass holds all views; CACHED alone leaves the tower out
    PLAIN: (dict.fromkeys(JOINT, 0.0) | {"levels_per_step": None}, True),
    CACHED: (dict.fromkeys(JOINT, 0.0) | {"levels_per_step": None}, True),
    SEPARATE: (JOINT | {"levels_per_step": None}, False),
    SAMPLED: (JOINT | {"levels_per_step": 2}, True),
    PACKED: (JOINT | {"levels_per_step": None}, True),
}
GOALS = {196: 1.9, 784: 1.5}  # patches: the largest ratio of packed views to plain fine-tuning
QUESTION, ANSWER = "which is left?", "The red circle is left of the square."  # one token a letter
PREFACE = f"""\
# Training step

`{{command}}`: {{machine}}, {{dtype}}; {{clock}}, medians and quartiles of {{rounds}} interleaved
rounds, ratios within a round.

- A step is forward, backward, the check of the gradients and AdamW's update, of all weights but the tower's, on
  {{batch}}. A row has one image, a question and an answer.
- "{PACKED.capitalize()}" is what `GranulonTrainer` does: the full view, the pixel view, and the semantic view of each
  of the three levels in one pass. "{SAMPLED.capitalize()}" is the same with `levels_per_step: 2`.
  "{SEPARATE.capitalize()}" is what it does under FlashAttention, which takes no block mask: five passes with the same
  losses and gradients. "{PLAIN.capitalize()}" is the same trainer with all weights at 0: the full view alone.
- "{CACHED.capitalize()}" is the same step with `vision_cache`: the image's pixels are hashed, its features and its
  relation map read from disk.
- "Products" counts the multiplications and additions in the matrix products of a step (`FlopCounterMode`). The peak is
  that of all tensors together: weights, gradients, AdamW's moments and activations."""


def make_rows(batch: int, size: int) -> list[dict]:
    """Equal training rows with a random image."""
    image = Image.effect_noise((size, size), 80).convert("RGB")
    prompt = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}],
        "images": [image],
    }
    return [row] * batch


def make_processor(size: int, slots: int) -> GranulonProcessor:
    """For images of this side; one token is a letter."""
    tokenizer = byte_tokenizer()
    return GranulonProcessor(
        ViTImageProcessorPil(size={"height": size, "width": size}, do_convert_rgb=True),
        tokenizer,
        patch_size=PATCH,
        num_semantic_tokens=slots,
        image_token=IMAGE_TOKEN,
        chat_template=with_image_parts(tokenizer.chat_template, IMAGE_TOKEN),
    )


def make_trainer(head, size: int, batch: int, folder: str) -> GranulonTrainer:
    """A trainer with its optimizer; nothing is written."""
    processor = make_processor(size, head.config.max_semantic_tokens)
    args = GranulonSFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        use_cpu=head.device.type == "cpu",
        vision_cache=folder,
        bf16=False,  # the weights themselves are in bfloat16 where that is wanted
        report_to="none",
    )
    trainer = GranulonTrainer(head, args, processor, train_dataset=Dataset.from_list(make_rows(batch, size)))
    trainer.create_optimizer()
    trainer.cache = trainer.granulon._vision
    return trainer


def step(trainer: GranulonTrainer, batch: dict, name: str):
    """One step of one of STEPS, as the training loop makes it."""
    settings, trainer.packs_views = STEPS[name]
    trainer.granulon._vision = trainer.cache if name == CACHED else trainer.cache.tower_says
    for key, value in settings.items():
        setattr(trainer.args, key, value)
    trainer.training_step(trainer.model, dict(batch), num_items_in_batch=(batch["labels"] != -100).sum())
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def count_products(call) -> int:
    """Multiplications and additions of a call's matrix products, those that the counter does not know included."""
    aten = torch.ops.aten
    more = {  # formulas of the shapes of an operation's arguments
        aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        call()
    return counter.get_total_flops()


def measure(name: str, size: int, options, folder: str) -> dict:
    """Seconds, bytes and products of each of STEPS, and what they were measured on, at one size of images."""
    gc.collect()  # the model before this one, which a trainer's cycles keep
    device = options.device
    head = build(name, device, options.dtype, byte_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN))
    trainer = make_trainer(head, size, options.batch, folder)
    batch = {key: value.to(device) for key, value in trainer.data_collator(make_rows(options.batch, size)).items()}
    calls = {name: partial(step, trainer, batch, name) for name in STEPS}
    products = {name: count_products(call) for name, call in calls.items()}  # before any is computed a second time
    if options.gradient_checkpointing:
        head.gradient_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        head.model.language_model.compile(dynamic=False)
    seconds = interleaved(calls, options.rounds, device, options.clock)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in [*head.parameters(), *moments])
    scored = (batch["labels"] != -100).sum().item()
    return {
        "patches": (size // PATCH) ** 2,
        "tokens": batch["attention_mask"].sum().item(),
        "scored": scored,
        "trained": sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad),
        "in_head": head.lm_head.weight.numel(),
        "vocabulary": len(head.lm_head.weight),
        "seconds": seconds,
        "peaks": {name: held + peak_bytes(call, device) for name, call in calls.items()},
        "products": products,
        "views": 2 + len(head.config.granularities),  # full, pixel, and semantic at every level
        # The logits, the logits again in the backward pass, and the gradients of states and weights.
        "head_products": 4 * 2 * scored * head.lm_head.weight.numel(),
    }


def table_of(result: dict, peak: float | None) -> str:
    """Time, memory and products of each of STEPS, with MFU where the device's peak is known."""
    header = [
        f"{result['patches']} patches, {result['tokens']} tokens, {result['scored']} scored",
        "ms", "ratio", "tokens/s", "peak GB", "products, 10^12", "ratio",
    ]  # fmt: skip
    rows = []
    for name in STEPS:
        seconds, products = result["seconds"][name], result["products"][name]
        rows.append(
            [
                name,
                with_quartiles(seconds),
                with_quartiles(seconds / result["seconds"][PLAIN], times),
                with_quartiles(result["tokens"] / seconds, "{:,.0f}".format),
                f"{result['peaks'][name] / 1e9:.2f}",
                f"{products / 1e12:.3f}",
                f"{products / result['products'][PLAIN]:.2f}x",
            ]
        )
        if peak is not None:
            rows[-1].append(with_quartiles(products / seconds / peak, "{:.1%}".format))
    return markdown_table(header if peak is None else [*header, "MFU"], rows)


def verdict(result: dict) -> str:
    """The goal at this number of patches, met or not, and the products with and without those of the head."""
    goal, products, head = GOALS[result["patches"]], result["products"], result["head_products"]
    ratio = np.median(result["seconds"][PACKED] / result["seconds"][PLAIN])
    without = (products[PACKED] - result["views"] * head) / (products[PLAIN] - head)
    return (
        f"{result['patches']} patches: packed views over plain fine-tuning {ratio:.2f}x, goal {goal}x: "
        f"{'met' if ratio <= goal else 'not met'}. The head's products against {result['vocabulary']:,} words are "
        f"{head / products[PLAIN]:.0%} of those of plain fine-tuning; the ratio of products is "
        f"{products[PACKED] / products[PLAIN]:.2f}x with the head and {without:.2f}x without."
    )


def section(name: str, options) -> str:
    """The Markdown section of one model."""
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, size, options, folder) for size in options.sizes]
    trained, in_head = results[0]["trained"] / 1e6, results[0]["in_head"] / 1e6
    parts = [
        f"## {name.capitalize()} shapes: {SHAPES[name][0]}",
        f"{trained:,.0f} million weights train, {in_head:,.0f} of them in the head, which is tied to the embedding of "
        f"{results[0]['vocabulary']:,} words.",
        *(table_of(result, peak_flops(torch.device(options.device))) for result in results),
    ]
    verdicts = [f"- {verdict(result)}" for result in results if result["patches"] in GOALS]
    return "\n\n".join([*parts, "\n".join(verdicts)] if verdicts else parts)


def main() -> None:
    made = parser(__doc__, rounds=3)
    add_shapes(made, "small and medium; real on CUDA", [224, 448])
    made.add_argument("--batch", type=int, help="rows of a batch (1; 16 on CUDA)")
    made.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    made.add_argument("--compile", action="store_true", help="compile the language model")
    options = parse(made)
    on_cuda = options.device == "cuda"
    options.model = options.model or (["real"] if on_cuda else ["small", "medium"])
    options.batch = options.batch or (16 if on_cuda else 1)
    print(
        PREFACE.format(
            command=command_line(),
            machine=machine(options.device),
            dtype=str(options.dtype).removeprefix("torch."),
            clock=options.clock_name,
            rounds=options.rounds,
            batch="one row" if options.batch == 1 else f"{options.batch} rows",
        )
    )
    for name in options.model:
        print("\n" + section(name, options), flush=True)


if __name__ == "__main__":
    main()
