"""Answer the rows of a folder, file or data set on the workers of a Ray cluster, as `granulon-ask --batch` would.

    python -m granulon.hub.ask_ray --model granulon-small --batch rows.jsonl --output out.jsonl --workers 8 --gpus 1

Needs the package ray. Every worker loads the model once and reads the rows itself, so every node must reach both.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.hf_argparser import HfArg, HfArgumentParser

from .ask import AskArguments, check


@dataclass
class RayArguments(AskArguments):
    question: str | None = HfArg(default=None, help="asked about every image whose row has none")
    workers: int = HfArg(default=1, help="copies of the model")
    gpus: float = HfArg(default=0.0, help="GPUs of each worker")


class Worker:
    """A model that answers batches of row numbers."""

    def __init__(self, arguments: RayArguments):
        from .answer import read_rows
        from .inference import load_model, load_processor

        self.rows = read_rows(arguments.batch, arguments.question, arguments.split)
        self.settings = arguments.settings
        self.model = load_model(arguments.model, device_map="cuda" if arguments.gpus else "cpu")
        self.processor = load_processor(arguments.model, self.model.config)

    def __call__(self, batch: dict) -> dict:
        from .answer import add_answers, open_row

        opened = [open_row(number, self.rows[number], self.settings) for number in batch["id"].tolist()]
        add_answers(self.model, self.processor, opened, self.settings)
        return {"line": [json.dumps(line) for line, _ in opened]}


def run(arguments: RayArguments):
    """Write the lines of all rows to the output, in order; raises `ValueError` as `granulon-ask` does."""
    import ray

    from .answer import read_rows
    from .files import write_jsonl

    check(arguments, arguments.question)
    rows = len(read_rows(arguments.batch, arguments.question, arguments.split))
    paths = {name: Path(getattr(arguments, name)) for name in ("batch", "model")}
    absolute = {name: str(path.absolute()) for name, path in paths.items() if path.exists()}
    # Not ray.data.range: its reading tasks would wait for a CPU while the workers hold them all.
    answered = ray.data.from_items([{"id": number} for number in range(rows)]).map_batches(
        Worker,
        # Workers have other working directories.
        fn_constructor_kwargs={"arguments": replace(arguments, **absolute)},
        batch_size=arguments.batch_size,
        concurrency=arguments.workers,
        num_gpus=arguments.gpus,
    )
    lines = [json.loads(entry["line"]) for entry in answered.iter_rows()]
    write_jsonl(arguments.output, sorted(lines, key=lambda line: line["row"]))
    print(f"{rows} rows, {sum('error' in line for line in lines)} failed", file=sys.stderr)


def main():
    try:
        (arguments,) = HfArgumentParser(RayArguments, description=__doc__).parse_args_into_dataclasses()
        run(arguments)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"granulon.hub.ask_ray: {error}")


if __name__ == "__main__":
    main()
