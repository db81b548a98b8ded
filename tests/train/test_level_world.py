"""A world in which the level decides: the controller finds it from the answers alone, without a label.

An image has three bands, each of one of four colours of its own, and a question asks for the colour of one band. The
aggregation of this world shows band k at level k and nothing else, so that from semantic tokens an answer can be read
at one level only. All levels have the same number of tokens: only what they show tells them apart.
"""

from itertools import product
from random import Random

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_config
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from granulon.train.arguments import GranulonSFTConfig
from granulon.train.trainer import GranulonTrainer
from modeling_granulon import AdaptiveTokenAggregation, GranulonForConditionalGeneration, GranulonProcessor

LEVELS = [{"name": name, "stride": 3 - k, "clusters": 2, "keep": 2} for k, name in enumerate(("low", "mid", "high"))]
BANDS = {  # what stands in each band, and its colours
    "sky": {"blue": (40, 60, 230), "pink": (250, 150, 190), "grey": (130, 130, 130), "white": (250, 250, 250)},
    "house": {"red": (220, 30, 30), "brown": (110, 60, 20), "yellow": (240, 230, 40), "black": (5, 5, 5)},
    "lawn": {"green": (30, 200, 40), "olive": (120, 120, 20), "beige": (230, 210, 160), "teal": (20, 130, 130)},
}
PARTS = (
    ("", "please look and say:", "now", "tell me,", "I ask you:", "look here,"),
    ("what colour is the {}", "the {} is of which colour", "name the colour of the {}", "describe the {}",
     "how is the {} painted", "which colour has the {}"),
    ("?", ", please", "in this picture?", "that you see"),
)  # fmt: skip
EVERY = [" ".join(parts) for parts in product(*PARTS)]
HELD_OUT = EVERY[::5]
TEMPLATES = [template for template in EVERY if template not in HELD_OUT]
STEPS = 400


class OneBandPerLevel(AdaptiveTokenAggregation):
    """The aggregation of one third of the rows of patches, which third being decided by the level's stride."""

    def forward(self, features, attention, alpha, beta, grid, top_k):
        rows = grid[0] // 3
        patches = features.unflatten(1, grid)[:, (3 - alpha) * rows : (4 - alpha) * rows].flatten(1, 2)
        output = super().forward(patches, None, 1, beta, (rows, grid[1]), top_k)
        return output._replace(assignment=output.assignment.repeat(1, 3, 1))


def draw(colours) -> Image.Image:
    image = Image.new("RGB", (24, 24))
    for band, (known, colour) in enumerate(zip(BANDS.values(), colours, strict=True)):
        image.paste(known[colour], (0, 8 * band, 24, 8 * band + 8))
    return image


def make_rows(count, seed):
    random, rows = Random(seed), []
    for _ in range(count):
        colours = [random.choice(list(known)) for known in BANDS.values()]
        band = random.randrange(3)
        text = random.choice(TEMPLATES).format(list(BANDS)[band])
        rows.append(
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": colours[band]}]}],
                "images": [draw(colours)],
            }
        )
    return rows


def make_processor() -> GranulonProcessor:
    """One token a word, so that the world is learned in a minute."""
    split = pre_tokenizers.Whitespace()
    texts = [template.format(band) for template in EVERY for band in BANDS]
    texts += [colour for known in BANDS.values() for colour in known] + ["user assistant"]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    backend = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate(["?", *(word for word in words if word != "?")])},
            unk_token="?",
        )
    )
    backend.pre_tokenizer = split
    special = {"additional_special_tokens": ["<|im_start|>", "<|image_pad|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", **special})
    images = ViTImageProcessorPil(size={"height": 24, "width": 24})
    return GranulonProcessor(images, tokenizer, patch_size=4, num_semantic_tokens=2, image_token="<|image_pad|>")


def make_model(seed, processor):
    torch.manual_seed(seed)
    config = make_config(granularities=LEVELS, controller_hidden_size=64, image_token_id=processor.image_token_id)
    text = config.text_config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.08}
    config.text_config = Qwen2Config(**text)
    model = GranulonForConditionalGeneration(config)
    for name, parameter in model.model.vision_tower.named_parameters():  # a random tower that tells colours apart,
        if parameter.dim() > 1:  # and whose patches know nothing of each other
            torch.nn.init.normal_(parameter, std=0.0 if "o_proj" in name else 0.2)
    model.model.aggregation = OneBandPerLevel()
    return model


def agreement(model, processor, templates) -> float:
    """Share of questions for which the controller chooses the level that shows what is asked for."""
    levels, texts = zip(*[(band, t.format(name)) for t in templates for band, name in enumerate(BANDS)], strict=True)
    inputs = processor.tokenizer(
        list(texts), padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        level_B = model.eval().model.question_logits(inputs["input_ids"], inputs["attention_mask"]).argmax(-1)
    return (level_B == torch.tensor(levels)).float().mean().item()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_the_controller_finds_the_right_level_from_the_task_alone(tmp_path, seed):
    processor = make_processor()
    model = make_model(seed, processor)
    args = GranulonSFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=32, max_steps=STEPS, learning_rate=5e-3,
        warmup_steps=20, lr_scheduler_type="cosine", pixel_loss_weight=0.0, semantic_loss_weight=1.0,
        granularity_loss_weight=1.0, logging_steps=50, save_strategy="no", report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, disable_tqdm=True, seed=seed,
    )  # fmt: skip
    trainer = GranulonTrainer(model, args, processor, train_dataset=Dataset.from_list(make_rows(3000, seed)))
    assert agreement(model, processor, HELD_OUT) < 0.7
    trainer.train()
    assert agreement(model, processor, HELD_OUT) >= 0.9
