"""Ask a Granulon about one image, or with --batch about many, and see which level it chose.

granulon-ask --model granulon-small --image cat.jpg "What is on the left?" --why
granulon-ask --model granulon-small --batch pictures/ "What is this?" --output answers.jsonl
accelerate launch -m granulon.hub.ask --model granulon-small --batch rows.jsonl --output answers.jsonl
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg, HfArgumentParser

VIEWS = ("full", "pixel", "semantic", "auto")  # as modeling_granulon.image_tokens, which takes seconds to import


@dataclass
class AskArguments:
    model: str = HfArg(help="a Granulon: a folder or a Hub id")
    image: str | None = HfArg(default=None, help="image to ask about: a file or an http(s) address")
    batch: str | None = HfArg(default=None, help="folder of images, JSON file of image and question, or data set")
    output: str | None = HfArg(default=None, help=".jsonl file for the answers of --batch; a run resumes from it")
    split: str = HfArg(default="train", help="split of a data set in --batch")
    granularity: str | None = HfArg(default=None, help="level by name or index; by default the controller's choice")
    view: str = HfArg(default="auto", help="tokens read; auto: the level's view", metadata={"choices": VIEWS})
    max_new_tokens: int = HfArg(default=256, help="maximal length of an answer")
    batch_size: int = HfArg(default=8, help="rows of --batch that each process answers together")
    picture: str | None = HfArg(default=None, help="file for a picture of --image with its clusters")

    @property
    def settings(self) -> dict:
        """What an answer depends on beside its row."""
        return {name: getattr(self, name) for name in ("model", "granularity", "view", "max_new_tokens")}


def _ask_one(arguments: AskArguments, question: str | None, as_json: bool, why: bool):
    from .answer import ask, summary, why_lines
    from .inference import load_model, load_processor, open_image
    from .visualize import draw_clusters

    image = open_image(arguments.image)
    model = load_model(arguments.model, device_map="auto")
    if (arguments.picture or why) and not model.config.granularities:
        raise ValueError("this model has no levels of granularity, so it has no clusters; omit --picture and --why")
    processor = load_processor(arguments.model, model.config)
    settings = (arguments.granularity, arguments.view, arguments.max_new_tokens)
    result = ask(model, processor, image, question, *settings, stream=not as_json, why=why)
    cluster_map = result.pop("cluster_map")
    if arguments.picture:
        lines = [question, result["answer"], summary(result)]
        draw_clusters(image, cluster_map, result["clusters"], lines).save(arguments.picture)
    if why and not as_json:
        print(why_lines(result["clusters"]))
    if as_json:
        print(json.dumps({"question": question, "image": arguments.image, **result}, ensure_ascii=False))


def _ask_many(arguments: AskArguments, question: str | None):
    import torch
    from accelerate import PartialState

    from .answer import answer_rows, read_rows
    from .inference import load_model, load_processor

    # Without a GPU, accelerate counts the processes only if it is set to the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    rows = read_rows(arguments.batch, question, arguments.split)
    model = load_model(arguments.model, device_map={"": state.device})
    if arguments.granularity is not None:
        model.config.granularity_index(arguments.granularity)  # an unknown level is an error before any answer
    processor = load_processor(arguments.model, model.config)
    rank, world_size = state.process_index, state.num_processes
    counts = answer_rows(
        model, processor, rows, arguments.output, arguments.settings, arguments.batch_size, rank, world_size
    )
    print(", ".join(f"{number} {name}" for name, number in counts.items()), file=sys.stderr)


def check(arguments: AskArguments, question: str | None):
    """Raise `ValueError` for what cannot work, before anything is loaded."""
    if (arguments.image is None) == (arguments.batch is None):
        raise ValueError("give either --image or --batch")
    if arguments.image and not question:
        raise ValueError("there is no question; add it to the command")
    if arguments.batch and not arguments.output:
        raise ValueError("--batch needs --output, the .jsonl file for the answers")
    for option, path, one_of in (
        ("--output", arguments.output if arguments.batch else None, (".jsonl",)),
        ("--picture", arguments.picture, (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")),
    ):
        if path is not None:
            _check_writable(option, Path(path), one_of)
    for option in ("max_new_tokens", "batch_size"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option} is {getattr(arguments, option)}; expected 1 or more")


def _check_writable(option: str, path: Path, endings: tuple[str, ...]):
    if path.suffix.lower() not in endings:
        raise ValueError(f"{option} is {path}; expected a file that ends in {', '.join(endings)}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} is {path}, which is not a file")
    was_there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option} is {path}, which cannot be written: {error.strerror}") from error
    if not was_there:
        path.unlink()


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser(AskArguments, prog="granulon-ask", description=__doc__, formatter_class=formatter)
    parser.add_argument("question", nargs="?", help="the question; with --batch for every image whose row has none")
    # Not in the dataclass, whose options of type bool would take the question as their value.
    parser.add_argument("--json", action="store_true", help="print the answer about --image as one JSON object")
    parser.add_argument("--why", action="store_true", help="say which clusters of --image carried the answer")
    try:
        arguments, rest, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}; granulon-ask --help lists those there are")
        check(arguments, rest.question)
        if arguments.batch:
            _ask_many(arguments, rest.question)
        else:
            _ask_one(arguments, rest.question, rest.json, rest.why)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-ask: {error}")


if __name__ == "__main__":
    main()
