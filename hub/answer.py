"""Answers to one question or to many rows, with the level that was chosen: what `granulon-ask` does.

Of many rows, rank r of n processes answers rows r, r + n, ... and appends them to a file of its own. When no row is
left, the files are joined. The processes do not communicate: none waits, and a run resumes with any number of them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import TextStreamer

from .files import JsonlLog, join_rank_files, read_log
from .inference import describe, encode, generate, open_image, question_about
from .text import first_line

SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
ROWS = (".json", ".jsonl")  # endings of files of rows
OURS = ("row", "image", "question", "settings", "answer", "granularity", "error")  # entries of an output line
CHOSEN = {"controller": "chosen by the controller", "default": "the default level", "request": "as requested",
          "configuration": "set by the configuration"}  # fmt: skip


def ask(
    model,
    processor,
    image: Image.Image,
    question,
    granularity=None,
    view="auto",
    max_new_tokens=256,
    stream=False,
    why=False,
) -> dict:
    """
    Answer a question about an RGB image.

    Args:
        granularity: a level of the model by name or index; None for the controller's choice.
        view: "full", "pixel", "semantic" or "auto".
        stream: print level and number of tokens to stderr, then the answer to stdout while it is generated.
        why: also say which clusters carried the answer.

    Returns:
        answer, granularity (name, chosen_by, probabilities), view, tokens (pixel, semantic, text), clusters (number,
        score, share), and for drawing cluster_map (H, W), None for a model without levels. With `why` each cluster
        has its place and nats, the log-likelihood that the answer loses without its token, and the one with the most
        comes first.

    Raises:
        ValueError: an unknown level or view; `why` of a model without levels or of an empty answer.
    """
    prompt = encode(model, processor, [question_about(image, question)], granularity)
    (description,) = describe(model, prompt, view)
    (clusters,) = description.pop("images")
    result = description | clusters
    streamer = None
    if stream:
        print(summary(result), file=sys.stderr, flush=True)
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,), (ids,) = generate(model, processor, prompt, view, streamer, max_new_tokens=max_new_tokens)
    if why:
        evidence = model.evidence(**prompt.inputs, visual=prompt.visual, answer_ids=ids)["clusters"]
        clusters = {entry["number"]: entry for entry in result["clusters"]}
        result["clusters"] = [
            {**clusters[found["number"]], "nats": found["nats"]}
            | {"place": place_of(result["cluster_map"], found["number"] - 1)}
            for found in evidence
        ]
    return {"answer": answer, **result}


def place_of(cluster_map: np.ndarray, cluster: int) -> str:
    """Where the middle of a cluster lies, in words: "top left", "middle", ..."""
    rows, columns = np.nonzero(cluster_map == cluster)
    third = [int(3 * (places.mean() + 0.5) / side) for places, side in zip((rows, columns), cluster_map.shape)]
    words = [("top", "", "bottom")[third[0]], ("left", "", "right")[third[1]]]
    return " ".join(filter(None, words)) or "middle"


def why_lines(clusters: list[dict]) -> str:
    """The clusters by what the answer loses without them, a line each."""
    lines = ["nats that the answer loses without the cluster's token:"]
    lines += [
        f"  {entry['nats']:+7.2f}  cluster {entry['number']} ({entry['place']}, {entry['share']:.0%} of the image)"
        for entry in clusters
    ]
    return "\n".join(lines)


def summary(result: dict) -> str:
    """Level and number of tokens, in one line."""
    tokens, level = result["tokens"], result["granularity"]
    read = f"{tokens['pixel']} pixel + {tokens['semantic']} semantic + {tokens['text']} text tokens"
    if level is None:
        return read
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (level["probabilities"] or {}).items())
    return f"{level['name']}, {CHOSEN[level['chosen_by']]}{f' ({shares})' if shares else ''}; {read}"


def read_rows(source: str | Path, question: str | None = None, split: str = "train") -> Sequence[dict]:
    """
    The rows of a folder of images, a JSON file, or a data set.

    Args:
        source: a folder; a file with a JSON list or JSON Lines, whose image paths are relative to the file or else to
            the working directory; or the name or folder of a data set.
        question: asked about every image whose row has none.

    Returns:
        rows with "name", "image" (what `open_image` takes), "question", and in a file its other entries.

    Raises:
        ValueError: no rows, a file that is not JSON, or a row without image or question.
    """
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        rows = [{"image": str(file), "name": str(file.relative_to(path))} for file in files]
    elif not path.is_dir() and (path.suffix in ROWS or path.exists() or not is_hub_id(str(source))):
        if not path.is_file() or path.suffix not in ROWS:
            found = "does not exist"
            if path.exists():
                found = f"does not end in {' or '.join(ROWS)}" if path.is_file() else "is no regular file"
            raise ValueError(f"{source} {found}; give a folder of images, a file of rows or a data set")
        rows = [_with_path(path, row) for row in _read_json(path)]
    else:
        return DatasetRows(str(source), split, question)
    if not rows:
        raise ValueError(f"{source} has no rows; an image file ends in one of {', '.join(sorted(SUFFIXES))}")
    return [_with_question(source, number, row, question) for number, row in enumerate(rows)]


def is_hub_id(name: str) -> bool:
    """Whether a name could be one on the Hub: NAME or OWNER/NAME, without an ending of a file of rows."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and not part.startswith((".", "~")) for part in parts)


class DatasetRows(Sequence):
    """The rows of a data set with the columns `image` and `question`, loaded when they are accessed."""

    def __init__(self, name: str, split: str, question: str | None):
        from datasets import Image, load_dataset, load_from_disk  # of the [train] extra

        loaded = load_from_disk(name) if Path(name).is_dir() else load_dataset(name)
        self.rows = loaded[split] if isinstance(loaded, dict) else loaded
        columns = self.rows.column_names
        if "image" not in columns or ("question" not in columns and not question):
            raise ValueError(f"{name} has the columns {columns}; image and question are needed, or give a question")
        if isinstance(self.rows.features["image"], Image):
            self.rows = self.rows.cast_column("image", Image(decode=False))  # load_rgb decodes
        self.name, self.question = name, question

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number] | {"name": f"{self.name}#{number}"}
        if isinstance(row["image"], dict):
            row["image"] = row["image"]["bytes"] or row["image"]["path"]
        return _with_question(self.name, number, row, self.question)


def _read_json(path: Path) -> list:
    text = path.read_text(encoding="utf-8").strip()
    try:
        if text.startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give rows with image and question") from error


def _with_path(file: Path, row):
    """A row of a file with the path of its image, which is relative to the file or to the working directory."""
    if not isinstance(row, dict) or not row.get("image"):
        return row
    image = str(row["image"])
    beside = file.parent / image
    if image.startswith(("http://", "https://", "data:")) or (Path(image).exists() and not beside.exists()):
        return row | {"name": image}
    return row | {"name": image, "image": str(beside)}


def _with_question(source, number: int, row, question: str | None) -> dict:
    if not isinstance(row, dict):
        raise ValueError(
            f"row {number} of {source} is a {type(row).__name__}; expected an object with image and question"
        )
    row = row | {"question": row.get("question") or question}
    for name in ("image", "question"):
        if not row.get(name):
            raise ValueError(f"row {number} of {source} has no {name}; a row needs image and question")
    return row


def answer_rows(
    model, processor, rows: Sequence[dict], output: str | Path, settings: dict, batch_size=8, rank=0, world_size=1
) -> dict[str, int]:
    """
    Answer the rows (of `read_rows`) of one process that `output` does not have yet, greedily.

    A row whose image cannot be used gets an `error` instead of an answer, and the run continues; the next run tries it
    again. Other entries of a row are kept in its line, as `given_NAME` where the name is one of ours.

    Args:
        output: file of all answers, sorted by row; until all are there each process has a file beside it.
        settings: model, granularity, view, max_new_tokens; written into every line.

    Returns:
        the number of rows, answered, failed and earlier ones of this process.

    Raises:
        ValueError: `output` has answers to other rows or with other settings.
    """
    output = Path(output)
    done = {line["row"]: line for line in read_log(output)}
    _check_same_run(done, rows, settings, output)
    own = range(rank, len(rows), world_size)
    left = [number for number in own if "answer" not in done.get(number, {})]
    failed = 0
    with JsonlLog(output, rank, world_size) as log, tqdm(total=len(left), unit="row", disable=rank != 0) as progress:
        for opened in _open_batches(rows, left, batch_size, settings):
            add_answers(model, processor, opened, settings)
            log.append(*(line for line, _ in opened))
            failed += sum(image is None for _, image in opened)
            progress.update(len(opened))
    done = {line["row"]: line for line in read_log(output)}
    if len(done) == len(rows):
        join_rank_files(output, (done[number] for number in sorted(done)))
    return {"rows": len(own), "answered": len(left) - failed, "failed": failed, "earlier": len(own) - len(left)}


def _check_same_run(done: dict[int, dict], rows: Sequence[dict], settings: dict, output: Path):
    """Raise `ValueError` if the output has answers to other rows or with other settings."""
    for number, line in done.items():
        found = line.get("settings")
        if found != settings:
            raise ValueError(f"{output} has answers with settings {found}, not {settings}; choose another output")
        row = rows[number] if number < len(rows) else {"name": None, "question": None}
        before, now = (f"{entry[key]}, {entry['question']!r}" for entry, key in ((line, "image"), (row, "name")))
        if before != now:
            changed = f"{output} has an answer to row {number} about {before}, which is now {now}"
            raise ValueError(f"{changed}; choose another output")


def _open_batches(rows: Sequence[dict], numbers: list[int], batch_size: int, settings: dict) -> Iterator[list]:
    """Batches of `open_row`; the images of the next one are opened while the caller works on the current one."""
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = []
        for batch in [*batches, []]:
            opened = [future.result() for future in futures]
            futures = [pool.submit(open_row, number, rows[number], settings) for number in batch]
            if opened:
                yield opened


def open_row(number: int, row: dict, settings: dict) -> tuple[dict, Image.Image | None]:
    """The output line of a row, still without answer, and its image; a line with `error` and None if it fails."""
    line = {"row": number, "image": row["name"], "question": row["question"], "settings": settings} | _given(row)
    try:
        return line, open_image(row["image"])
    except (OSError, TypeError, ValueError) as error:
        return line | {"error": first_line(error)}, None


def _given(row: dict) -> dict:
    """The entries of a row that are not ours, as far as JSON can hold them."""
    given = {}
    for name, value in row.items():
        if name in ("image", "question", "name"):
            continue
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            value = str(value)[:200]
        given[f"given_{name}" if name in OURS else str(name)] = value
    return given


def add_answers(model, processor, opened: list[tuple[dict, Image.Image | None]], settings: dict):
    """Add answer and level to those output lines of a batch that have an image."""
    opened = [(line, image) for line, image in opened if image is not None]
    if not opened:
        return
    conversations = [question_about(image, line["question"]) for line, image in opened]
    prompt = encode(model, processor, conversations, settings["granularity"])
    options = {"max_new_tokens": settings["max_new_tokens"], "do_sample": False}
    answers, _ = generate(model, processor, prompt, settings["view"], **options)
    for (line, _), answer, description in zip(opened, answers, describe(model, prompt, settings["view"]), strict=True):
        level = description["granularity"]
        line |= {"answer": answer, "granularity": level and level["name"]}
