"""Does the controller keep its corpus through joint tuning? With and without what protects it.

    python studies/controller_replay.py --model build/small112

`--model` is assembled from real parts at 112 pixels (`granulon-assemble --vision dinov2-small --text
smollm2-135m-instruct --image_size 112 --output build/small112`). Its language model is cut to its first layers, all of
which learn together with the projector from captions of photographed things; the corpus knows nothing of these
captions. Prints the controller's accuracy on the test splits of the seed corpus before and after.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from random import Random

import torch
from datasets import Dataset
from PIL import Image

from granulon.train.arguments import GranulonSFTConfig
from granulon.train.controller.fit import controller_logits, question_states, train_controller
from granulon.train.controller.replay import QuestionReplay
from granulon.train.controller.templates import seed_corpus
from granulon.train.trainer import GranulonTrainer
from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor

SPLITS = ("test_questions", "test_phrasings", "test_kinds")
QUESTIONS = (
    "What is this?", "What is in the picture?", "Name the thing in the middle.", "What do you see?",
    "Which object is shown?",
)  # fmt: skip
ARMS = {  # weight of the controller's loss, replayed questions a batch, whether what the controller reads is frozen
    "no loss of the controller": (0.0, 0, False),
    "likelihoods alone": (0.1, 0, False),
    "likelihoods, first layer and embedding frozen": (0.1, 0, True),
    "likelihoods, 16 replayed questions": (0.1, 16, False),
    "likelihoods, 64 replayed questions": (0.1, 64, False),
}


def captions(stamps: Path, count: int) -> list[dict]:
    """Training rows: a photographed thing on a plain ground, and what it is."""
    random, rows = Random(0), []
    files = sorted(file for file in stamps.rglob("*.png") if file.with_suffix(".txt").exists())[:200]
    for _ in range(count):
        file = random.choice(files)
        thing = Image.open(file).convert("RGBA")
        thing.thumbnail((90, 90))
        image = Image.new("RGB", (112, 112), tuple(random.randrange(256) for _ in range(3)))
        image.paste(thing, (random.randrange(20), random.randrange(20)), thing)
        name = file.with_suffix(".txt").read_text(errors="ignore").splitlines()[0].strip().rstrip(".!")[:60]
        asked = [{"type": "image"}, {"type": "text", "text": random.choice(QUESTIONS)}]
        rows.append(
            {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": name}]}],
                "images": [image],
            }
        )
    return rows


@torch.no_grad()
def accuracies(model, processor, corpus: list[dict]) -> str:
    """The controller's accuracy on each test split, as table columns."""
    names, found = model.config.granularity_names, []
    for split in SPLITS:
        rows = [row for row in corpus if row["split"] == split]
        states_QE = question_states(model, processor, [row["question"] for row in rows])
        level_Q = controller_logits(model.model.granularity_controller, states_QE).argmax(-1).tolist()
        found.append(sum(names[level] == row["level"] for level, row in zip(level_Q, rows, strict=True)) / len(rows))
    return " | ".join(f"{value:.3f}" for value in found)


def tune(model, processor, corpus: list[dict], rows: list[dict], arm: str, options):
    """Joint tuning of one arm, with GranulonTrainer."""
    weight, questions, frozen = ARMS[arm]
    if frozen:
        model.model.language_model.embed_tokens.requires_grad_(False)
        model.model.language_model.layers[0].requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        args = GranulonSFTConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=options.steps, learning_rate=options.rate,
            warmup_steps=5, lr_scheduler_type="cosine", granularity_loss_weight=weight, pixel_loss_weight=0.0,
            logging_steps=options.steps, save_strategy="no", report_to="none", bf16=True, use_cpu=True,
            gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        replay = QuestionReplay(corpus, processor, model.config.granularity_names, questions) if questions else None
        GranulonTrainer(model, args, processor, train_dataset=Dataset.from_list(rows), replay=replay).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/small112", help="assembled checkpoint (build/small112)")
    parser.add_argument("--stamps", type=Path, default=Path("build/parts/tuxpaint-stamps"), help="from make parts")
    parser.add_argument("--steps", type=int, default=100, help="of 8 rows each (100)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (1e-4)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model that are kept (4)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="all by default")
    options = parser.parse_args()
    processor, corpus = GranulonProcessor.from_pretrained(options.model), seed_corpus()
    model = GranulonForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    decoder = model.model.language_model
    decoder.layers = decoder.layers[: options.layers]
    decoder.config.num_hidden_layers = options.layers
    train_controller(model, processor, corpus)
    rows = captions(options.stamps, 8 * options.steps)
    print("| | " + " | ".join(SPLITS) + " |\n|---|" + "--:|" * len(SPLITS))
    print(f"| before | {accuracies(model, processor, corpus)} |", flush=True)
    for arm in options.arms:
        tuned = copy.deepcopy(model)
        tune(tuned, processor, corpus, rows, arm, options)
        print(f"| {arm} | {accuracies(tuned, processor, corpus)} |", flush=True)


if __name__ == "__main__":
    main()
