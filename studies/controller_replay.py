"""Does the controller keep its corpus through joint tuning, with and without replayed questions?

    python studies/controller_replay.py --model build/small112

`--model` is assembled from real parts at 112 pixels (`granulon-assemble --vision dinov2-small --text
smollm2-135m-instruct --image_size 112 --output build/small112`). Its language model is cut to its first layers, all of
which learn together with the projector from captions of photographed things. Prints the controller's accuracy on the
test splits of the seed corpus before and after.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from random import Random

import torch
from datasets import Dataset
from PIL import Image

from granulon.hub.text import markdown_table
from granulon.train.arguments import GranulonSFTConfig
from granulon.train.controller.fit import controller_logits, question_states, train_controller
from granulon.train.controller.replay import QuestionReplay
from granulon.train.controller.templates import TEST_SPLITS, seed_corpus
from granulon.train.trainer import GranulonTrainer
from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor

QUESTIONS = ("What is this?", "Name the thing in the middle.", "What do you see?", "Which object is shown?")
ARMS = {  # weight of the controller's loss, replayed questions a batch
    "no loss of the controller": (0.0, 0),
    "likelihoods alone": (0.1, 0),
    "likelihoods, 64 replayed questions": (0.1, 64),
}


def captions(stamps: Path, count: int) -> list[dict]:
    """Training rows: a photographed thing on a plain ground, and its name."""
    random, rows = Random(0), []
    files = sorted(file for file in stamps.rglob("*.png") if file.with_suffix(".txt").exists())[:200]
    for _ in range(count):
        file = random.choice(files)
        thing = Image.open(file).convert("RGBA")
        thing.thumbnail((90, 90))
        image = Image.new("RGB", (112, 112), tuple(random.randrange(256) for _ in range(3)))
        image.paste(thing, (random.randrange(20), random.randrange(20)), thing)
        name = file.with_suffix(".txt").read_text(errors="ignore").splitlines()[0].strip().rstrip(".!")[:60]
        prompt = [{"type": "image"}, {"type": "text", "text": random.choice(QUESTIONS)}]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": name}]}],
                "images": [image],
            }
        )
    return rows


@torch.no_grad()
def accuracies(model, processor, corpus: list[dict]) -> list[str]:
    """The controller's accuracy on each test split."""
    names, found = model.config.granularity_names, []
    for split in TEST_SPLITS:
        rows = [row for row in corpus if row["split"] == split]
        states_QE = question_states(model, processor, [row["question"] for row in rows])
        level_Q = controller_logits(model.model.granularity_controller, states_QE).argmax(-1).tolist()
        right = sum(names[level] == row["level"] for level, row in zip(level_Q, rows, strict=True))
        found.append(f"{right / len(rows):.3f}")
    return found


def tune(model, processor, corpus: list[dict], rows: list[dict], arm: str, steps: int):
    """Joint tuning of one arm with GranulonTrainer, in place."""
    weight, questions = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        args = GranulonSFTConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=steps, learning_rate=1e-4,
            warmup_steps=5, lr_scheduler_type="cosine", granularity_loss_weight=weight, pixel_loss_weight=0.0,
            logging_steps=steps, save_strategy="no", report_to="none", bf16=True, use_cpu=True,
            gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        replay = QuestionReplay(corpus, processor, model.config.granularity_names, questions) if questions else None
        GranulonTrainer(model, args, processor, train_dataset=Dataset.from_list(rows), replay=replay).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/small112", help="assembled checkpoint (build/small112)")
    parser.add_argument("--stamps", type=Path, default=Path("build/parts/tuxpaint-stamps"), help="from make parts")
    parser.add_argument("--steps", type=int, default=100, help="of 8 rows each (100)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model that are kept (4)")
    options = parser.parse_args()
    processor, corpus = GranulonProcessor.from_pretrained(options.model), seed_corpus()
    model = GranulonForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    decoder = model.model.language_model
    decoder.layers = decoder.layers[: options.layers]
    decoder.config.num_hidden_layers = options.layers
    train_controller(model, processor, corpus)
    images = captions(options.stamps, 8 * options.steps)
    rows = [["before", *accuracies(model, processor, corpus)]]
    for arm in ARMS:
        tuned = copy.deepcopy(model)
        tune(tuned, processor, corpus, images, arm, options.steps)
        rows.append([arm, *accuracies(tuned, processor, corpus)])
    print(markdown_table(["", *TEST_SPLITS], rows))


if __name__ == "__main__":
    main()
