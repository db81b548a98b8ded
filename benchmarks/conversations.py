"""What rows of whole conversations and batches of similar length save, on a mix like that of LLaVA-1.5.

    python benchmarks/conversations.py > benchmarks/results/conversations.md

Steps are the trainer's own, with the joint objective. Weights, images and texts are random; the shares of the mix's
parts, their answers per conversation and their lengths are in MIX. Progress goes to stderr.
"""

import io
import sys
import tempfile
from random import Random

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from settings import SHAPES, build, command_line, parse, parser
from training import IMAGE_TOKEN, JOINT, make_trainer

from granulon.evaluation.statistics import interval
from granulon.evaluation.timing import machine
from granulon.hub.assemble import byte_tokenizer
from granulon.hub.text import markdown_table, with_interval
from granulon.train.data import load_rows
from granulon.train.sampling import GroupedByLength

# Thousands of conversations in LLaVA-1.5's mix, as its authors list them; typical numbers of answers per conversation
# and of tokens per question and answer are ours.
MIX = {
    "conversations": (57, 3, 14, 50), "descriptions": (24, 1, 14, 110), "reasoning": (77, 1, 20, 100),
    "text alone": (40, 5, 40, 160), "VQAv2": (83, 5, 16, 3), "GQA": (72, 10, 16, 3), "OKVQA": (9, 1, 16, 3),
    "OCR-VQA": (80, 4, 16, 6), "A-OKVQA": (66, 1, 60, 2), "TextCaps": (22, 1, 40, 14), "RefCOCO": (48, 6, 24, 16),
    "VG": (86, 9, 24, 14),
}  # fmt: skip
BEFORE, GROUPED = "an answer per row, at random", "an answer per row, by length"
SHARED, BOTH = "a conversation per row, at random", "a conversation per row, by length"
WAYS = {BEFORE: (1, False), GROUPED: (1, True), SHARED: (None, False), BOTH: (None, True)}
PREFACE = """\
# Rows of conversations

`{command}`: {machine}, {clock}; {model} at {size} px, {batch} rows a batch, the
joint objective with every level; {count} conversations of LLaVA-1.5's mix, whose {answers} answers are all learned in
each way. Of each way {batches} batches, drawn at random, are timed; in brackets 95% bootstrap intervals over batches.
"""


def make_conversations(count: int, size: int) -> list[dict]:
    """Conversations of the mix, in random order; one token of the byte tokenizer is a letter."""
    random, noise = Random(0), np.random.default_rng(0)
    rows = []
    for part in random.choices(list(MIX), [share for share, *_ in MIX.values()], k=count):
        _, answers, question, answer = MIX[part]
        messages = []
        for _ in range(max(1, round(random.gauss(answers, answers / 3)))):
            for role, length in (("user", question), ("assistant", answer)):
                letters = "".join(random.choices("abcdefgh ", k=max(1, round(random.lognormvariate(0, 0.4) * length))))
                messages.append({"role": role, "content": f"{letters}."})
        images = [] if part == "text alone" else [noise.integers(0, 255, (size, size, 3), dtype=np.uint8)]
        rows.append({"messages": messages, "images": [_png(image) for image in images]})
    return rows


def _png(pixels: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def batches(rows, batch: int, by_length: bool) -> list[list[int]]:
    """Row numbers of every batch, as the trainer draws them."""
    lengths = rows.with_format("numpy")["length"][:]
    sampler = GroupedByLength(lengths, batch, seed=0) if by_length else torch.randperm(len(rows)).tolist()
    order = list(sampler)
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def measure(trainer, rows, chosen: list[list[int]], clock) -> dict:
    """Steps over these batches, after one that does not count: `steps`, (seconds, answers) of each, and padding."""
    steps = []
    for number, batch in enumerate([chosen[0], *chosen]):
        inputs = trainer.data_collator([rows[row] for row in batch])
        inputs = {name: value.to(trainer.args.device) for name, value in inputs.items()}
        found = len(inputs["granularity_labels"])
        if number == 1:
            trainer.meters["train"].read(trainer.accelerator)
        start = clock()
        trainer.training_step(trainer.model, inputs, num_items_in_batch=(inputs["labels"] != -100).sum())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            steps.append((clock() - start, found))
        print(f"{number} of {len(chosen)}: {clock() - start:.1f} s", file=sys.stderr, flush=True)
    return {"steps": np.array(steps)} | trainer.meters["train"].read(trainer.accelerator)


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--model", default="small", choices=SHAPES, help="shape (small)")
    made.add_argument("--size", type=int, default=224, help="image side in pixels (224)")
    made.add_argument("--batch", type=int, default=8, help="rows of a batch (8)")
    made.add_argument("--batches", type=int, default=6, help="batches that are timed of each way (6)")
    made.add_argument("--count", type=int, default=2000, help="conversations that batches are drawn from (2000)")
    options = parse(made)
    if options.quick:
        options.model, options.size, options.batch, options.batches, options.count = "tiny", 64, 2, 1, 12
    source = Dataset.from_list(make_conversations(options.count, options.size))
    head = build(options.model, options.device, options.dtype, byte_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(head, options.size, options.batch, folder)
        trainer.granulon._vision = trainer.granulon._vision.tower_says
        for name, value in JOINT.items():
            setattr(trainer.args, name, value)
        for name, (answers, by_length) in WAYS.items():
            rows = load_rows(
                [source], trainer.processing_class, seed=0, quarantine=f"{folder}/bad.jsonl", answers_per_row=answers
            )
            drawn = batches(rows, options.batch, by_length)
            chosen = Random(0).sample(drawn[:-1], min(options.batches, len(drawn) - 1))
            results[name] = measure(trainer, rows, chosen, options.clock) | {"rows": len(rows)}
    print(
        PREFACE.format(
            command=command_line(),
            machine=machine(options.device),
            clock=options.clock_name,
            model=SHAPES[options.model][0],
            size=options.size,
            batch=options.batch,
            count=f"{options.count:,}",
            answers=f"{results[BEFORE]['rows']:,}",
            batches=options.batches,
        )
    )
    print(table_of(results))


def _ms_an_answer(sums_R2: np.ndarray) -> np.ndarray:
    return 1000 * sums_R2[:, 0] / sums_R2[:, 1]


def table_of(results: dict[str, dict]) -> str:
    """What an answer costs in each way, beside the first."""
    sums = {name: result["steps"].sum(0) for name, result in results.items()}
    per_answer = {name: seconds / answers for name, (seconds, answers) in sums.items()}
    header = ["rows", "number", "answers a step", "padding", "ms an answer", "answers per second, ratio"]
    rows = [
        [
            name,
            f"{result['rows']:,}",
            f"{result['steps'][:, 1].mean():.1f}",
            f"{result['padding_share']:.0%}",
            with_interval(1000 * per_answer[name], *interval(_ms_an_answer, result["steps"]), digits=0),
            f"{per_answer[BEFORE] / per_answer[name]:.2f}x",
        ]
        for name, result in results.items()
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
