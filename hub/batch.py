"""Answers about many images: `granulon-ask --batch`, on one process or many, resumed where it was stopped.

Process r of n handles rows r, r + n, ... and appends to a file of its own; whichever finds that no row is missing
joins the files. Nothing is exchanged between the processes, so that none has to wait and a run may resume with another
number of them.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import HfArgumentParser

from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor, load_rgb

from .ask import level_of, open_image, prompt_of

SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}


@dataclass
class BatchArguments:
    model: str = field(metadata={"help": "a Granulon: a folder, or a Hub id"})
    batch: str = field(
        metadata={"help": "a folder of images, a .jsonl file of rows with image and question, or a dataset's name"}
    )
    output: str = field(metadata={"help": "the .jsonl file of answers; what it already holds is not asked again"})
    question: str | None = field(default=None, metadata={"help": "asked about every image whose row has none"})
    split: str = field(default="train", metadata={"help": "of a dataset"})
    granularity: str | None = field(default=None, metadata={"help": "level by name or index, for all rows"})
    view: str = field(
        default="full",
        metadata={"help": "which image tokens are read", "choices": ["full", "pixel", "semantic", "auto"]},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer"})
    batch_size: int = field(default=8, metadata={"help": "rows in one pass, on each process"})


def read_rows(source, question=None, split="train"):
    """
    The rows of a folder of images, a JSON Lines file, or a dataset.

    Returns:
        a sequence of `{"name": str, "image": what can be opened, "question": str}`.

    Raises:
        ValueError: nothing to ask, or a row without image or question.
    """
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        rows = [{"image": str(file), "name": str(file.relative_to(path))} for file in files]
    elif path.suffix in (".jsonl", ".json") and path.is_file():
        rows = [_beside(path, json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    else:
        return DatasetRows(source, split, question)
    if not rows:
        raise ValueError(f"{source} has nothing to ask about; images end in one of {', '.join(sorted(SUFFIXES))}")
    for number, row in enumerate(rows):
        row["question"] = row.get("question") or question
        _complete(source, number, row)
    return rows


class DatasetRows:
    """The rows of a dataset with a column `image`, and `question` unless one is asked about all; read when needed."""

    def __init__(self, name, split, question):
        from datasets import Image, load_dataset, load_from_disk  # of the [train] extra

        loaded = load_from_disk(name) if Path(name).is_dir() else load_dataset(name)
        self.rows = loaded[split] if isinstance(loaded, dict) else loaded
        columns = self.rows.column_names
        if "image" not in columns or ("question" not in columns and not question):
            raise ValueError(f"{name} has the columns {columns}; image and question are needed, or pass --question")
        if isinstance(self.rows.features["image"], Image):
            self.rows = self.rows.cast_column("image", Image(decode=False))  # load_rgb decodes
        self.name, self.question = name, question

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        image = row["image"]
        if isinstance(image, dict):
            image = image["bytes"] or image["path"]
        question = row.get("question") or self.question
        return _complete(self.name, number, {"name": f"{self.name}#{number}", "image": image, "question": question})


def answer_rows(model, processor, rows, output, asked, batch_size=8, rank=0, processes=1):
    """
    Answer this process's share of the rows that `output` does not hold yet, greedily.

    A row whose image cannot be used gets an `error` in place of an answer, and the run goes on.

    Args:
        rows: a sequence as `read_rows` gives it.
        output (`Path`): of the joined answers, sorted by row; parts lie beside it until all are there.
        asked (`dict`): model, granularity, view, max_new_tokens; written into every line, and the same in all.
        rank, processes (`int`): which share.

    Returns:
        `dict`: rows, answered, failed, earlier, for this process.

    Raises:
        ValueError: answers to other rows or settings in `output`.
    """
    output = Path(output)
    done = read_done(output)
    _refuse_others(done, rows, asked, output)
    mine = range(rank, len(rows), processes)
    left = [number for number in mine if number not in done]
    counts = {"rows": len(mine), "answered": 0, "failed": 0, "earlier": len(mine) - len(left)}
    chunks = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=len(left), unit="row", disable=rank != 0)
    with (
        ThreadPoolExecutor(max_workers=4) as pool,
        _open_part(_part(output, rank, processes)) as part,
    ):
        coming = _opened(pool, rows, chunks[0]) if chunks else None
        for place, chunk in enumerate(chunks):
            opened = [future.result() for future in coming]
            coming = _opened(pool, rows, chunks[place + 1]) if place + 1 < len(chunks) else None
            lines = _answer_chunk(model, processor, chunk, opened, asked)
            part.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            part.flush()
            os.fsync(part.fileno())
            failed = sum("error" in line for line in lines)
            counts["failed"] += failed
            counts["answered"] += len(lines) - failed
            progress.update(len(lines))
    progress.close()
    join_parts(output, len(rows))
    return counts


def read_done(output):
    """The lines of an output and its parts, by row; a last line that was torn by a crash does not count."""
    done = {}
    for file in [output, *_parts(output)]:
        with suppress(FileNotFoundError):  # not begun; or another process has just joined the parts
            data = file.read_bytes()
            lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
            done |= {line["row"]: line for line in lines}
    return done


def join_parts(output, number_of_rows):
    """Once no row is missing, all lines in one file, in order; the parts go. Returns whether it was so."""
    done = read_done(output)
    if len(done) < number_of_rows:
        return False
    if _parts(output):
        joined = output.with_name(f"{output.name}.{os.getpid()}.tmp")
        with open(joined, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(done[row], ensure_ascii=False) + "\n" for row in sorted(done))
            file.flush()
            os.fsync(file.fileno())
        joined.replace(output)
        for part in _parts(output):
            part.unlink(missing_ok=True)
    return True


def _answer_chunk(model, processor, chunk, opened, asked):
    """One line for each row of a chunk; `opened` has (row, image or None, error or None)."""
    lines = [
        {"row": number, "image": row["name"], "question": row["question"], "asked": asked}
        | ({"error": error} if error else {})
        for number, (row, _, error) in zip(chunk, opened)
    ]
    usable = [(line, image) for line, (_, image, error) in zip(lines, opened) if not error]
    if usable:
        questions, images = [line["question"] for line, _ in usable], [image for _, image in usable]
        for (line, _), (answer, level) in zip(usable, _generate(model, processor, questions, images, asked)):
            line |= {"answer": answer, "granularity": level}
    return lines


def _generate(model, processor, questions, images, asked):
    """(answer, level's name) of each question and image; the images are encoded once."""
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(text=prompts, images=[[image] for image in images], padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, dtype=model.dtype)
    visual = model.explain(**inputs, granularity=level_of(model.config, asked["granularity"]))
    output = model.generate(
        **prompt_of(inputs),
        visual=visual,
        visual_view=asked["view"],
        max_new_tokens=asked["max_new_tokens"],
        do_sample=False,
    )
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    levels = [row["granularity"] and row["granularity"]["name"] for row in visual.describe(asked["view"])]
    return [(answer.strip(), level) for answer, level in zip(answers, levels, strict=True)]


def _opened(pool, rows, chunk):
    return [pool.submit(_open_row, rows[number]) for number in chunk]


def _open_row(row):
    """(row, image, None), or (row, None, what is wrong with the image)."""
    try:
        source = row["image"]
        return row, open_image(source) if isinstance(source, str) else load_rgb(source), None
    except (OSError, TypeError, ValueError) as error:
        return row, None, str(error)


def _beside(path, row):
    """A row of a file, its image's path taken relative to the file's folder."""
    image = row.get("image")
    if isinstance(image, str):
        row = row | {"name": image}
        if not image.startswith(("http://", "https://")):
            row["image"] = str(path.parent / image)
    return row


def _complete(source, number, row):
    for name in ("image", "question"):
        if not row.get(name):
            raise ValueError(f"row {number} of {source} has no {name}; a row needs image and question, or --question")
    return row


def _refuse_others(done, rows, asked, output):
    """Answers to something else are neither mixed in nor written over."""
    for number, line in done.items():
        found = line["asked"]
        if found != asked:
            raise ValueError(f"{output} holds answers asked with {found}, not with {asked}; choose another output")
        row = rows[number] if number < len(rows) else {"name": None, "question": None}
        if (line["image"], line["question"]) != (row["name"], row["question"]):
            raise ValueError(
                f"{output} holds an answer to row {number} about {line['image']}, {line['question']!r}, but that row "
                f"is now {row['name']}, {row['question']!r}; choose another output"
            )


def _open_part(file):
    """This process's own part, to append to, without a last line that a crash has torn."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return file.open("a", encoding="utf-8")


def _part(output, rank, processes):
    return output.with_name(f"{output.name}.{rank:05}-of-{processes:05}")


def _parts(output):
    return sorted(output.parent.glob(f"{output.name}.*-of-*"))


def run_batch(arguments):
    """Load the model on this process's device and answer its share; what `granulon-ask --batch` does."""
    # Without a GPU, processes know of each other only if they are told that it is the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    rows = read_rows(arguments.batch, arguments.question, arguments.split)
    model = GranulonForConditionalGeneration.from_pretrained(arguments.model, device_map={"": state.device}).eval()
    level_of(model.config, arguments.granularity)  # refuses an unknown one before anything is asked
    asked = {name: asdict(arguments)[name] for name in ("model", "granularity", "view", "max_new_tokens")}
    return answer_rows(
        model,
        GranulonProcessor.from_pretrained(arguments.model),
        rows,
        Path(arguments.output),
        asked,
        arguments.batch_size,
        state.process_index,
        state.num_processes,
    )


def main():
    (arguments,) = HfArgumentParser(BatchArguments, description=__doc__).parse_args_into_dataclasses()
    try:
        counts = run_batch(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-ask: {error}")
    print(", ".join(f"{number} {name}" for name, number in counts.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
