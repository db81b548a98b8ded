"""`make train-demo`: train a small Granulon on drawn scenes and ask it about new ones; offline, in minutes.

Without downloads nothing is pretrained, so tower and language model are trained first: the tower on the labels of the
scenes, the language model on their descriptions. The rest is what a user does with real parts: assemble, train the
controller on the seed corpus, train everything with the joint objective, save, load in another process, ask.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from trl import SFTConfig, SFTTrainer

from granulon.hub.assemble import assemble
from granulon.hub.inference import load_model, load_processor
from granulon.train.arguments import GranulonSFTConfig
from granulon.train.checkpoints import record_training
from granulon.train.controller.corpus import TRAIN
from granulon.train.controller.fit import train_controller
from granulon.train.controller.replay import QuestionReplay
from granulon.train.controller.templates import seed_corpus
from granulon.train.data.scenes import ANSWERS, LEVELS, SIZE, make_questions, make_scene
from granulon.train.trainer import GranulonTrainer

from .picture import draw_answers

PATCH = 8
# The default levels with smaller strides, since a picture has 8 x 8 patches only.
GRANULARITIES = [
    {"name": "coarse", "stride": 2, "clusters": 6, "keep": 5},
    {"name": "medium", "stride": 1, "clusters": 12, "keep": 10},
    {"name": "fine", "stride": 1, "clusters": 24, "keep": 20},
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class DemoArguments:
    output: str = field(default="build/train-demo", metadata={"help": "folder for checkpoint, picture and scene"})
    seed: int = field(default=0, metadata={"help": "seed of scenes and training"})
    quick: bool = field(default=False, metadata={"help": "a few steps of everything, to check that it runs"})


@dataclass(frozen=True)
class Budget:
    """Numbers of scenes and steps, chosen on scenes that are neither trained on nor reported."""

    scenes: int = 5000
    held_out: int = 150
    tower_steps: int = 350
    text_steps: int = 120
    controller_epochs: int = 100
    image_steps: int = 160
    batch: int = 32


QUICK = Budget(scenes=64, held_out=6, tower_steps=2, text_steps=2, controller_epochs=1, image_steps=2, batch=8)


def main():
    (arguments,) = HfArgumentParser(DemoArguments, description=__doc__).parse_args_into_dataclasses()
    budget, output = QUICK if arguments.quick else Budget(), Path(arguments.output)
    for name in ("tower", "language_model", "assembled", "checkpoint", "scenes"):
        shutil.rmtree(output / name, ignore_errors=True)
    disable_progress_bars()
    set_seed(arguments.seed)
    first = 1_000_000 * arguments.seed
    with stage(f"Drawing {budget.scenes} scenes for training and {budget.held_out} for questions"):
        scenes = [make_scene(first + number) for number in range(budget.scenes)]
        held_out = [make_scene(first + 500_000 + number) for number in range(budget.held_out)]
        tokenizer = make_tokenizer(scenes)
    with stage("Tower: training a small DINOv3 on the labels of the scenes"):
        train_tower(scenes, held_out, budget, output / "tower")
    with stage("Language model: training a small Qwen2 on descriptions of the scenes"):
        train_language_model(scenes, tokenizer, budget, output)
    with stage("Assembling both"):
        assemble(output / "tower", output / "language_model", output / "assembled")
        model = load_model(output / "assembled", overrides={"granularities": GRANULARITIES})
        processor = load_processor(output / "assembled", model.config)
    with stage("Controller: training on the levels of the seed corpus, which has general questions"):
        trained = train_controller(model, processor, seed_corpus(), epochs=budget.controller_epochs)
        print(levels_read_right(trained))
    with stage("Granulon: training everything but the tower with GranulonTrainer and the joint objective"):
        train_granulon(model, processor, scenes, budget, output)
    with stage("Loading the checkpoint in a fresh process with pipeline() and asking about new scenes"):
        results = ask(held_out, output)
    print(report(results, scenes))
    draw_answers(model, processor, results, output / "demo.png")
    shutil.copy(results[0]["image"], output / "scene.png")
    print(
        f"\ncheckpoint  {output}/checkpoint\npicture     {output}/demo.png\n\nTry it:\n"
        f'  granulon-ask --model {output}/checkpoint --image {output}/scene.png "{results[0]["question"]}"'
    )


@contextmanager
def stage(title: str):
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   done in {time.perf_counter() - start:.0f} s", flush=True)


def make_tokenizer(scenes) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's words and the seed corpus's, with Qwen's chat tokens."""
    texts = [in_words(scene) for scene in scenes[:500]]
    texts += [f"{question.text} {question.answer}" for scene in scenes[:500] for question in make_questions(scene)]
    texts += [row["question"] for row in seed_corpus() if row["split"] == TRAIN]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    special = {"additional_special_tokens": ["<|im_start|>", "<|image_pad|>"]}
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", **special})
    return tokenizer


def in_words(scene) -> str:
    """The facts of a scene, in an order of its own."""
    facts = [f"{kind} {fact}" for kind, fact in scene.facts().items()]
    Random(scene.seed).shuffle(facts)
    return ". ".join(facts) + "."


def talk(scene, before: str = "") -> list[dict]:
    """All questions about a scene as one conversation: every answer is a target (TRL's `assistant_only_loss`)."""
    messages = []
    for question in make_questions(scene):
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    messages[0]["content"] = before + messages[0]["content"]
    return messages


def train_tower(scenes, held_out, budget: Budget, folder: Path):
    """Patch by patch, the tower and one linear head per kind of question learn what the patch shows.

    The heads are linear probes of the features that stay: a kind that they cannot read cannot be answered.
    """
    config = DINOv3ViTConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_register_tokens=1,
    )  # fmt: skip
    tower = DINOv3ViTModel(config).eval()  # in train mode the position embedding would jitter
    heads = nn.ModuleDict({kind: nn.Linear(config.hidden_size, len(names) + 1) for kind, names in ANSWERS.items()})
    pixels, labels = patch_labels(scenes)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=budget.tower_steps, pct_start=0.1)
    for _ in tqdm(range(budget.tower_steps), unit="step"):
        rows = torch.randint(len(pixels), (2 * budget.batch,))
        features = patch_features(tower, pixels[rows])
        loss = sum(head_loss(heads[kind](features), labels[kind][rows]) for kind in ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pixels, labels = patch_labels(held_out)
    with torch.no_grad():
        features = patch_features(tower, pixels)
    for kind, names in ANSWERS.items():
        shown = labels[kind] < len(names)
        right = (heads[kind](features).argmax(-1) == labels[kind])[shown].float().mean()
        print(f"   linear probe of the patches of held-out scenes, {kind:7}{right:.2f}")
    tower.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def head_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which "nothing of this kind here", the last class and the commonest, weighs little."""
    weight = torch.ones(logits.shape[-1])
    weight[-1] = 0.1
    return nn.functional.cross_entropy(logits.mT, labels, weight)


def patch_features(tower: DINOv3ViTModel, pixels: torch.Tensor) -> torch.Tensor:
    return tower(pixels).last_hidden_state[:, 1 + tower.config.num_register_tokens :]


def patch_labels(scenes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels (S,3,64,64) in [-1, 1] and, for each kind, labels (S,N) of the patches."""
    pixels = torch.stack([torch.from_numpy(np.array(scene.draw())) for scene in scenes])
    rows = [scene.labels(SIZE // PATCH) for scene in scenes]
    labels = {kind: torch.tensor([row[kind] for row in rows]) for kind in rows[0]}
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, labels  # (S,h,w,3) -> (S,3,h,w)


def train_language_model(scenes, tokenizer, budget: Budget, output: Path):
    """Train on conversations about scenes that are described in words."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,  # at this width the default of 0.02 learns several times slower
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    rows = [{"messages": talk(scene, in_words(scene) + "\n")} for scene in scenes]
    config = SFTConfig(**settings(budget.text_steps, budget.batch, output))
    SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model.save_pretrained(output / "language_model")
    tokenizer.save_pretrained(output / "language_model")


def levels_read_right(trained: dict) -> str:
    """How often the controller reads the corpus's held-out questions at their level, beside chance and words alone."""
    return "\n".join(
        f"   {split:15} controller {part['controller']['accuracy'][0]:.2f}   bag of words "
        f"{part['bag_of_words']['accuracy'][0]:.2f}   chance {part['chance']:.2f}"
        for split, part in trained["splits"].items()
    )


def train_granulon(model, processor, scenes, budget: Budget, output: Path):
    """All answers about a scene are learned in one row; its level is that of the latest question, which is read."""
    rows = [
        {"messages": talk(scene), "images": [scene.draw()], "granularity": make_questions(scene)[-1].level}
        for scene in scenes
    ]
    config = GranulonSFTConfig(
        **settings(budget.image_steps, budget.batch, output),
        pixel_loss_weight=0.5,
        semantic_loss_weight=0.5,
        granularity_loss_weight=0.1,
    )
    replay = QuestionReplay(seed_corpus(), processor, model.config.granularity_names)
    GranulonTrainer(model, config, processor, train_dataset=Dataset.from_list(rows), replay=replay).train()
    model.save_pretrained(output / "checkpoint")
    processor.save_pretrained(output / "checkpoint")
    record_training(
        model.config,
        output / "checkpoint",
        stage="demo",
        recipe="make demo",
        settings={"data": ["scenes"], "pixel_loss_weight": 0.5, "semantic_loss_weight": 0.5},
        rows=len(rows),
        steps=budget.image_steps,
        seed=config.seed,
        processes=1,
    )


def settings(steps: int, batch: int, output: Path) -> dict:
    """What both trainings have in common, as arguments of TRL's configuration."""
    return {
        "output_dir": str(output / "training"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "assistant_only_loss": True,
        "max_length": None,
        "logging_steps": max(1, steps // 5),
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    }


def ask(held_out, output: Path) -> list[dict]:
    """Question, true answer, and the model's: from all image tokens, from each group alone, about another image."""
    (output / "scenes").mkdir(parents=True)
    paths = [str(output / "scenes" / f"{scene.seed}.png") for scene in held_out]
    for scene, path in zip(held_out, paths, strict=True):
        scene.draw().save(path)
    rows = [
        {"image": path, "question": item.text, "truth": item.answer, "level": item.level, "kind": item.kind}
        for scene, path in zip(held_out, paths, strict=True)
        for item in make_questions(scene)
    ]
    for number, entry in enumerate(rows):
        entry["other_image"] = rows[(number + len(ANSWERS)) % len(rows)]["image"]  # the next scene's
    (output / "questions.json").write_text(json.dumps(rows, indent=1))
    script = Path(__file__).with_name("fresh_answers.py")
    subprocess.run([sys.executable, script, output], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return json.loads((output / "answers.json").read_text())


def report(results: list[dict], scenes) -> str:
    """A table of accuracy per level and view, beside chance, the commonest answer of a kind, and other images."""
    commonest = {}
    for kind in ANSWERS:
        answers = [question.answer for scene in scenes for question in make_questions(scene) if question.kind == kind]
        commonest[kind] = max(sorted(set(answers)), key=answers.count)
    titles = (
        "questions", "accuracy", "pixels alone", "semantic alone", "chance", "commonest", "other image", "level right",
    )  # fmt: skip
    lines = ["", "level   " + "".join(f"{title:>15}" for title in titles)]
    for level in LEVELS:
        asked = [entry for entry in results if entry["level"] == level]
        columns = [
            *(
                [entry[key] == entry["truth"] for entry in asked]
                for key in ("answer", "pixel_answer", "semantic_answer")
            ),
            [1 / len(ANSWERS[entry["kind"]]) for entry in asked],
            [commonest[entry["kind"]] == entry["truth"] for entry in asked],
            [entry["other_answer"] == entry["truth"] for entry in asked],
            [entry["chosen"] == entry["level"] for entry in asked],
        ]
        lines.append(f"{level:8}{len(asked):15}" + "".join(f"{sum(column) / len(asked):15.3f}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
