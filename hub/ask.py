"""Ask a Granulon about one image, or with --batch about many, and see which level it chose: `granulon-ask`.

With --batch, rank r of n processes answers rows r, r + n, ... and appends them to a file of its own. When no row is
left, the files are joined. The processes do not communicate: none waits, and a run resumes with any number of them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser, TextStreamer
from transformers.hf_argparser import HfArg

from modeling_granulon.image_tokens import VISUAL_VIEWS

from .files import JsonlLog, join_rank_files, read_log
from .inference import describe, encode, generate, load_model, load_processor, open_image, question_about
from .text import first_line
from .visualize import draw_clusters

SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}


@dataclass
class AskArguments:
    model: str = HfArg(help="a Granulon: a folder or a Hub id")
    image: str | None = HfArg(default=None, help="image to ask about: a file or an http(s) address")
    batch: str | None = HfArg(default=None, help="folder of images, JSON file of image and question, or data set")
    output: str | None = HfArg(default=None, help=".jsonl file for the answers of --batch; a run resumes from it")
    split: str = HfArg(default="train", help="split of a data set in --batch")
    granularity: str | None = HfArg(default=None, help="level by name or index; by default the controller's choice")
    view: str = HfArg(default="auto", help="tokens read; auto: the level's view", metadata={"choices": VISUAL_VIEWS})
    max_new_tokens: int = HfArg(default=256, help="maximal length of an answer")
    batch_size: int = HfArg(default=8, help="rows of --batch that each process answers together")
    picture: str | None = HfArg(default=None, help="file for a picture of --image with its clusters")


def ask(
    model, processor, image: Image.Image, question, granularity=None, view="auto", max_new_tokens=256, stream=False
) -> dict:
    """
    Answer a question about an RGB image.

    Args:
        granularity: a level of the model by name or index; None for the controller's choice.
        view: "full", "pixel", "semantic" or "auto".
        stream: print level and number of tokens to stderr, then the answer to stdout while it is generated.

    Returns:
        answer, granularity (name, chosen_by, probabilities), view, tokens (pixel, semantic, text), clusters (number,
        score, share), and for drawing cluster_map (H, W), None for a model without levels.

    Raises:
        ValueError: an unknown level or view.
    """
    prompt = encode(model, processor, [question_about(image, question)], granularity)
    (description,) = describe(model, prompt, view)
    (clusters,) = description.pop("images")
    result = description | clusters
    streamer = None
    if stream:
        print(_summary(result), file=sys.stderr, flush=True)
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,), _ = generate(model, processor, prompt, view, streamer, max_new_tokens=max_new_tokens)
    return {"answer": answer, **result}


def _summary(result: dict) -> str:
    """Level and number of tokens, in one line."""
    tokens, level = result["tokens"], result["granularity"]
    read = f"{tokens['pixel']} pixel + {tokens['semantic']} semantic + {tokens['text']} text tokens"
    if level is None:
        return read
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (level["probabilities"] or {}).items())
    return f"{level['name']}, chosen by the {level['chosen_by']}{f' ({shares})' if shares else ''}; {read}"


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
    elif path.suffix in (".jsonl", ".json") and path.is_file():
        rows = [_with_path(path, row) for row in _read_json(path)]
    else:
        return DatasetRows(str(source), split, question)
    if not rows:
        raise ValueError(f"{source} has no rows; an image file ends in one of {', '.join(sorted(SUFFIXES))}")
    return [_with_question(source, number, row, question) for number, row in enumerate(rows)]


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
    row = row | {"question": row.get("question") or question} if isinstance(row, dict) else {}
    for name in ("image", "question"):
        if not row.get(name):
            raise ValueError(f"row {number} of {source} has no {name}; a row needs image and question")
    return row


def answer_rows(
    model, processor, rows: Sequence[dict], output: str | Path, settings: dict, batch_size=8, rank=0, world_size=1
) -> dict[str, int]:
    """
    Answer the rows (of `read_rows`) of one process that `output` does not have yet, greedily.

    A row whose image cannot be used gets an `error` instead of an answer, and the run continues.

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
    left = [number for number in own if number not in done]
    failed = 0
    with JsonlLog(output, rank, world_size) as log, tqdm(total=len(left), unit="row", disable=rank != 0) as progress:
        for opened in _open_batches(rows, left, batch_size, settings):
            _add_answers(model, processor, [entry for entry in opened if entry[1] is not None], settings)
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
    """Batches of `_open_row`; the images of the next one are opened while the caller works on the current one."""
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = []
        for batch in [*batches, []]:
            opened = [future.result() for future in futures]
            futures = [pool.submit(_open_row, number, rows[number], settings) for number in batch]
            if opened:
                yield opened


def _open_row(number: int, row: dict, settings: dict) -> tuple[dict, Image.Image | None]:
    """The output line of a row, still without answer, and its image; a line with `error` and None if it fails."""
    line = {"row": number, "image": row["name"], "question": row["question"], "settings": settings}
    try:
        return line, open_image(row["image"])
    except (OSError, TypeError, ValueError) as error:
        return line | {"error": first_line(error)}, None


def _add_answers(model, processor, opened: list[tuple[dict, Image.Image]], settings: dict):
    """Add answer and level to the output lines of a batch."""
    if not opened:
        return
    conversations = [question_about(image, line["question"]) for line, image in opened]
    prompt = encode(model, processor, conversations, settings["granularity"])
    options = {"max_new_tokens": settings["max_new_tokens"], "do_sample": False}
    answers, _ = generate(model, processor, prompt, settings["view"], **options)
    for (line, _), answer, description in zip(opened, answers, describe(model, prompt, settings["view"]), strict=True):
        level = description["granularity"]
        line |= {"answer": answer, "granularity": level and level["name"]}


def _ask_one(arguments: AskArguments, question: str | None, as_json: bool):
    if not question:
        raise ValueError("there is no question; add it to the command")
    image = open_image(arguments.image)
    model = load_model(arguments.model, device_map="auto")
    if arguments.picture and not model.config.granularities:
        raise ValueError("this model has no levels of granularity, so there are no clusters to draw; omit --picture")
    processor = load_processor(arguments.model, model.config)
    settings = (arguments.granularity, arguments.view, arguments.max_new_tokens)
    result = ask(model, processor, image, question, *settings, stream=not as_json)
    cluster_map = result.pop("cluster_map")
    if arguments.picture:
        lines = [question, result["answer"], _summary(result)]
        draw_clusters(image, cluster_map, result["clusters"], lines).save(arguments.picture)
    if as_json:
        print(json.dumps({"question": question, "image": arguments.image, **result}, ensure_ascii=False))


def _ask_many(arguments: AskArguments, question: str | None):
    if not arguments.output:
        raise ValueError("--batch needs --output, the .jsonl file for the answers")
    # Without a GPU, accelerate counts the processes only if it is set to the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    rows = read_rows(arguments.batch, question, arguments.split)
    model = load_model(arguments.model, device_map={"": state.device})
    if arguments.granularity is not None:
        model.config.granularity_index(arguments.granularity)  # an unknown level is an error before any answer
    processor = load_processor(arguments.model, model.config)
    settings = {name: asdict(arguments)[name] for name in ("model", "granularity", "view", "max_new_tokens")}
    rank, world_size = state.process_index, state.num_processes
    counts = answer_rows(model, processor, rows, arguments.output, settings, arguments.batch_size, rank, world_size)
    print(", ".join(f"{number} {name}" for name, number in counts.items()), file=sys.stderr)


def main():
    parser = HfArgumentParser(AskArguments, description=__doc__)
    parser.add_argument("question", nargs="?", help="the question; with --batch for every image whose row has none")
    # Not in the dataclass, whose options of type bool would take the question as their value.
    parser.add_argument("--json", action="store_true", help="print the answer about --image as one JSON object")
    arguments, rest = parser.parse_args_into_dataclasses()
    try:
        if (arguments.image is None) == (arguments.batch is None):
            raise ValueError("give either --image or --batch")
        if arguments.batch:
            _ask_many(arguments, rest.question)
        else:
            _ask_one(arguments, rest.question, rest.json)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-ask: {error}")


if __name__ == "__main__":
    main()
