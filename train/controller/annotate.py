"""`granulon-annotate`: questions get the level they should be read at, from a language model or by measurement.

    granulon-annotate --data questions.jsonl --output corpus --model NAME --input_price 0.15 --output_price 0.6
    granulon-annotate --measured --checkpoint granulon-qwen1.5b --data rows.json --output corpus

Annotated: every distinct question goes once to an OpenAI-compatible endpoint (`--base_url`, key in OPENAI_API_KEY), a
share of them twice, to see how far the annotator agrees with itself. Every call is in the journal (`run/calls.jsonl`)
before it is sent: a rerun after any crash repeats none, and the cap on the cost (`--max_cost`) holds over all runs.

Measured: a checkpoint answers the rows at every level, and the answers' likelihood is the label; see measure.py.

Both leave a folder that `granulon-train-controller --corpus` and `datasets.load_dataset` read: a file per split and
the card; what could not be labelled is in `run/quarantine.jsonl`. Rows of one image are in one split.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator
from tqdm import tqdm
from transformers import HfArgumentParser

from granulon.train.data import DataSource, load_rows
from granulon.train.stages import load_model, load_processor

from .corpus import ANNOTATED, corpus_row, draw_of, read_corpus, split_of, write_corpus
from .corpus_card import upload_folder, write_folder
from .journal import Endpoint, Journal, Prices, Request, StopRun, ask_with_bar, call_key
from .measure import measure_rows
from .questions import Asked, read_questions

PROMPT = Path(__file__).with_name("labelling_prompt.md")
RUN = "run"  # folder of what belongs to the run and not to the corpus
JOURNAL, QUARANTINE, PARTS = "calls.jsonl", "quarantine.jsonl", "parts"
PART_ROWS = 256
RESAMPLES = 2000  # of the bootstrap
LETTERS_PER_TOKEN = 4  # of English, for the estimate; the cap reckons with a token for each byte
ESTIMATED_REPLY = 60  # tokens


@dataclass
class AnnotateArguments:
    data: str = field(metadata={"help": "file (.jsonl, .json, .parquet, .csv), folder, or dataset of the Hub"})
    output: str = field(metadata={"help": "folder for corpus, card and journal; the same again goes on"})
    split: str = field(default="train", metadata={"help": "of the data, as in load_dataset"})
    config: str | None = field(default=None, metadata={"help": "configuration of a dataset of the Hub"})
    question_column: str = field(default="question", metadata={"help": "conversations and messages need none"})
    image_column: str = field(default="image", metadata={"help": "tells which rows belong together, if it is there"})
    image_folder: str | None = field(default=None, metadata={"help": "of image files, with --measured"})
    push_to_hub: str | None = field(default=None, metadata={"help": "dataset repository to upload the corpus to"})
    private: bool = field(default=False, metadata={"help": "make that repository private"})

    model: str | None = field(default=None, metadata={"help": "name of the annotating model at the endpoint"})
    base_url: str | None = field(default=None, metadata={"help": "of the endpoint; OpenAI's by default"})
    levels: list[str] = field(default_factory=lambda: ["coarse", "medium", "fine"], metadata={"help": "their names"})
    prompt_file: str = field(default=str(PROMPT), metadata={"help": "what the annotator is told; defines the levels"})
    input_price: float | None = field(default=None, metadata={"help": "USD per million tokens; 0 if yours is free"})
    output_price: float | None = field(default=None, metadata={"help": "USD per million tokens"})
    max_cost: float = field(default=10.0, metadata={"help": "USD that may be spent, earlier runs included"})
    concurrency: int = field(default=16, metadata={"help": "calls at a time"})
    max_tokens: int = field(default=400, metadata={"help": "the most a reply may have; more for models that reason"})
    timeout: float = field(default=60.0, metadata={"help": "seconds to wait for a reply"})
    twice: float = field(default=0.05, metadata={"help": "share of the questions that are asked a second time"})
    retry_quarantined: bool = field(default=False, metadata={"help": "ask again what got no usable reply before"})
    dry_run: bool = field(default=False, metadata={"help": "count and estimate; send nothing"})

    measured: bool = field(default=False, metadata={"help": "measure the labels with a checkpoint instead"})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or Hub repository, for --measured"})
    temperature: float = field(default=1.0, metadata={"help": "of the measured labels; the larger, the softer"})
    cost_per_token: float = field(default=0.0, metadata={"help": "nats for every image token that a level shows"})
    batch_size: int = field(default=8, metadata={"help": "rows at a time, for --measured"})

    def source(self) -> DataSource:
        return DataSource(self.data, name=self.config, split=self.split, image_folder=self.image_folder)

    def __post_init__(self):
        if self.measured:
            if self.checkpoint is None:
                raise ValueError("--measured needs --checkpoint, the model that answers")
            return
        if self.model is None:
            raise ValueError("name the annotating model with --model, or use --measured with --checkpoint")
        if self.input_price is None or self.output_price is None:
            raise ValueError(
                "say what the model costs with --input_price and --output_price (USD per million tokens; 0 for an "
                "endpoint of your own): the cap of --max_cost rests on it"
            )
        priced = all(0 <= price < float("inf") for price in (self.input_price, self.output_price))  # and not nan
        if not priced or not self.max_cost >= 0 or not 0 <= self.twice <= 1:
            raise ValueError("prices and --max_cost are 0 or more, --twice is a share from 0 to 1")
        if min(self.concurrency, self.max_tokens) < 1:
            raise ValueError(
                f"--concurrency is {self.concurrency} and --max_tokens {self.max_tokens}; expected 1 or more"
            )


def main():
    try:
        (arguments,) = HfArgumentParser(AnnotateArguments, description=__doc__).parse_args_into_dataclasses()
        (measure if arguments.measured else annotate)(arguments)
    except (OSError, ValueError, StopRun, FloatingPointError) as error:
        sys.exit(f"granulon-annotate: {error}")
    except KeyboardInterrupt:
        sys.exit("granulon-annotate: stopped; the same command goes on from here")


def annotate(arguments: AnnotateArguments):
    """Ask for what the journal lacks, then write the corpus; raises `StopRun` after writing, if it is not all."""
    output, prompt = Path(arguments.output), Path(arguments.prompt_file).read_text(encoding="utf-8")
    if absent := [name for name in arguments.levels if name not in prompt]:
        raise ValueError(
            f"{arguments.prompt_file} does not define the levels {absent}; --levels are {arguments.levels}"
        )
    asked, unusable, total = read_questions(
        arguments.source(), column=arguments.question_column, image_column=arguments.image_column
    )
    annotator = Annotator(arguments, prompt)
    twice = [entry.question for entry in asked if draw_of(f"twice\n{entry.question}") < arguments.twice]
    requests = [annotator.request(entry.question) for entry in asked] + [annotator.request(q, "again") for q in twice]
    with Journal(output / RUN / JOURNAL, arguments.max_cost) as journal:
        if arguments.retry_quarantined:
            journal.rejected.clear()
        waiting = [r for r in requests if r.key not in journal.answers and r.key not in journal.rejected]
        print(f"{total} rows, {len(asked)} distinct questions, {len(twice)} of them to be asked twice")
        print(f"{len(requests) - len(waiting)} calls are in the journal, {len(waiting)} are to be made")
        print(annotator.estimate(waiting, journal))
        if arguments.dry_run:
            return
        stop = annotator.run(waiting, journal)
        rows, rejected, left = annotator.sorted_out(asked, journal)
        pairs = [annotator.pair(question, journal) for question in twice]
        spent = journal.spent
    unusable += rejected
    report = {
        "rows": total,
        "labelled_rows": sum(row["rows"] for row in rows),
        "quarantined_rows": sum(entry["rows"] for entry in unusable),
        "unanswered_rows": left,
        "questions": len(rows),
        "agreement": agreement([pair for pair in pairs if pair], arguments.levels),
        "spent_usd": round(spent, 6),
        "model": arguments.model,
        "prompt_sha": annotator.prompt_sha,
    }
    check_count(report)
    draft = output / RUN / PROMPT.name
    draft.write_text(prompt, encoding="utf-8")
    draft.replace(output / PROMPT.name)
    write_corpus(unusable, output / RUN / QUARANTINE)
    finish(arguments, rows, report, annotated_origin(report), whole=not (stop or left))
    if stop:
        raise stop
    if left:
        raise StopRun(f"{left} rows got no reply: run the same command again")


def check_count(report: dict):
    """Raises `ValueError` unless every row of the data is labelled, in the quarantine, or waiting for a reply."""
    found = {name: report[name] for name in ("labelled_rows", "quarantined_rows", "unanswered_rows")}
    if sum(found.values()) != report["rows"]:
        raise ValueError(f"{report['rows']} rows were read, of which {found} are told; nothing was written")


class Annotator:
    """What is asked and how an answer becomes a row."""

    def __init__(self, arguments: AnnotateArguments, prompt: str):
        self.arguments, self.prompt = arguments, prompt
        self.schema = label_schema(arguments.levels)
        self.prices = Prices(arguments.input_price, arguments.output_price)
        identity = prompt + json.dumps(self.schema.model_json_schema(), sort_keys=True)
        self.prompt_sha = hashlib.sha256(identity.encode()).hexdigest()

    def request(self, question: str, variant: str = "") -> Request:
        messages = [{"role": "system", "content": self.prompt}, {"role": "user", "content": json.dumps(question)}]
        return Request(call_key(question, self.arguments.model, self.prompt_sha, variant), messages)

    def estimate(self, requests: list[Request], journal: Journal) -> str:
        letters = sum(len(message["content"]) for request in requests for message in request.messages)
        read, written = letters // LETTERS_PER_TOKEN, ESTIMATED_REPLY * len(requests)
        return (
            f"estimated cost {self.prices.of(read, written):.4f} USD ({read} tokens in, {written} out); "
            f"{journal.spent:.4f} USD are spent, the cap is {self.arguments.max_cost:g}"
        )

    def run(self, requests: list[Request], journal: Journal) -> StopRun | None:
        args = self.arguments

        def endpoint(client):
            return Endpoint(client, args.model, journal, self.schema, self.prices, max_tokens=args.max_tokens)

        return ask_with_bar(
            requests,
            len(requests),
            endpoint,
            base_url=args.base_url,
            timeout=args.timeout,
            concurrency=args.concurrency,
        )

    def sorted_out(self, asked: list[Asked], journal: Journal) -> tuple[list[dict], list[dict], int]:
        """Rows of the corpus; questions without a usable reply, with the reason; how many rows wait for a reply."""
        rows, rejected, left = [], [], 0
        for entry in asked:
            key = self.request(entry.question).key
            if key in journal.answers:
                rows.append(self.row(entry, journal.answers[key]))
            elif key in journal.rejected:
                rejected.append({"question": entry.question, "rows": entry.rows, "reason": journal.rejected[key]})
            else:
                left += entry.rows
        return rows, rejected, left

    def row(self, asked: Asked, entry: dict) -> dict:
        probs = _level_probs(entry)
        return corpus_row(
            asked.question,
            probs,
            ANNOTATED,
            annotator={"model": self.arguments.model, "prompt_sha": self.prompt_sha},
            usage=entry["usage"],
            created_at=entry["at"],
            split=split_of(asked.group),
            reason=entry["answer"]["reason"],
            rows=asked.rows,
        )

    def pair(self, question: str, journal: Journal) -> tuple[str, str] | None:
        """The levels of both askings, where both were answered."""
        entries = [journal.answers.get(self.request(question, variant).key) for variant in ("", "again")]
        if None in entries:
            return None
        first, second = (max(probs, key=probs.get) for probs in map(_level_probs, entries))
        return first, second


def label_schema(levels: list[str]) -> type[BaseModel]:
    """The reply: a reason, then the levels' probabilities, whose sum is 1."""
    strict = ConfigDict(extra="forbid")
    share = (float, Field(description="from 0 to 1", allow_inf_nan=False))
    probabilities = create_model("Probabilities", __config__=strict, **dict.fromkeys(levels, share))

    def sums_to_one(cls, value):
        values = list(value.model_dump().values())
        if min(values) < 0 or abs(sum(values) - 1) > 0.05:
            raise ValueError(f"the probabilities are {values}; expected none below 0, and the sum 1")
        return value

    return create_model(
        "Label",
        __config__=strict,
        __validators__={"sums_to_one": field_validator("probabilities")(sums_to_one)},
        reason=(str, ...),
        probabilities=(probabilities, ...),
    )


def _level_probs(entry: dict) -> dict[str, float]:
    probs = entry["answer"]["probabilities"]
    return {name: value / sum(probs.values()) for name, value in probs.items()}


def agreement(pairs: list[tuple[str, str]], levels: list[str]) -> dict | None:
    """
    How far two labellings agree: share of equal levels and Cohen's kappa, each (value, low, high), 95% bootstrap.

    Kappa is 1 where both always name the same level; where chance alone would explain all, 0.
    """
    if not pairs:
        return None
    index_P2 = np.array([[levels.index(first), levels.index(second)] for first, second in pairs])
    draws_RP = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    resampled = np.array([_agreement(index_P2[draw_P], len(levels)) for draw_P in draws_RP])
    names = ("equal", "kappa")
    bounds = np.percentile(resampled, (2.5, 97.5), axis=0).T
    values = _agreement(index_P2, len(levels))
    scores = {name: (value, *map(float, bound)) for name, value, bound in zip(names, values, bounds, strict=True)}
    return {"pairs": len(pairs), **scores}


def _agreement(index_P2: np.ndarray, levels: int) -> tuple[float, float]:
    equal = float((index_P2[:, 0] == index_P2[:, 1]).mean())
    share_2G = [np.bincount(column, minlength=levels) / len(column) for column in index_P2.T]
    by_chance = float(share_2G[0] @ share_2G[1])
    return equal, 1.0 if by_chance == 1 else (equal - by_chance) / (1 - by_chance)


def measure(arguments: AnnotateArguments):
    """Labels from the likelihood of the rows' answers, in parts: a rerun goes on after the last one that is done."""
    output = Path(arguments.output)
    model = load_model(arguments.checkpoint)
    if torch.cuda.is_available():
        model = model.to("cuda")
    processor = load_processor(arguments.checkpoint, model.config)
    levels, quarantine = model.config.granularity_names, output / RUN / QUARANTINE
    data = load_rows([arguments.source()], processor, seed=0, quarantine=quarantine, levels=levels)
    parts = output / RUN / PARTS / _settings_key(arguments, data._fingerprint)
    parts.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in tqdm(range(0, len(data), PART_ROWS), unit="part", disable=None):
        part = parts / f"{start:09d}.jsonl"
        if not part.exists():
            some = data.select(range(start, min(start + PART_ROWS, len(data))))
            settings = (arguments.batch_size, arguments.temperature, arguments.cost_per_token)
            write_corpus(measure_rows(model, processor, some, *settings), part)
        rows += read_corpus(part)
    rows = list({row["id"]: row for row in rows}.values())
    report = {
        "rows": len(data),
        "questions": len(rows),
        "model": arguments.checkpoint,
        "temperature": arguments.temperature,
        "cost_per_token": arguments.cost_per_token,
    }
    finish(arguments, rows, report, measured_origin(report))
    shutil.rmtree(output / RUN / PARTS)


def _settings_key(arguments: AnnotateArguments, data: str) -> str:
    """Parts measured under other settings, on other data (its fingerprint) or by other weights are not taken up."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(arguments.checkpoint).glob("*.safetensors"))
    ]
    identity = [asdict(arguments), data, weights]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finish(arguments: AnnotateArguments, rows: list[dict], report: dict, origin: str, whole: bool = True):
    """Write the corpus, say what is in it, upload it where that was asked for and it is whole."""
    report = write_folder(Path(arguments.output), rows, report, origin, arguments.data)
    print(json.dumps(report, indent=1))
    print(f"wrote {arguments.output}")
    if arguments.push_to_hub and not whole:
        print(f"not uploaded to {arguments.push_to_hub}: rows wait for a reply")
    elif arguments.push_to_hub:
        print(f"uploaded to {upload_folder(Path(arguments.output), arguments.push_to_hub, arguments.private)}")


def measured_origin(report: dict) -> str:
    return (
        f"The labels are measured: `{report['model']}` answered each question at every level, and the more likely the "
        f"right answer, the more probable the level (temperature {report['temperature']}, {report['cost_per_token']} "
        "nats for each image token). They say what helps this very model."
    )


def annotated_origin(report: dict) -> str:
    again, agreed = report["agreement"], "No question was asked twice."
    if again is not None:
        agreed = "Asked a second time, it named the same level for {:.3f} of {} questions; ".format(
            again["equal"][0], again["pairs"]
        ) + "Cohen's kappa {:.3f} [{:.3f}, {:.3f}]. ".format(*again["kappa"])
        agreed += "That is how far it agrees with itself, not how far it is right."
    return (
        f"The labels are the opinion of the model `{report['model']}`, which was told what stands in `{PROMPT.name}` "
        f"(prompt and form of the reply: {report['prompt_sha'][:16]}) and never saw an image. All calls cost "
        f"{report['spent_usd']:.4f} USD. {agreed} Outputs of a "
        "model stand under its terms: with labels by a Llama, the name of a model trained on them begins with Llama."
    )


if __name__ == "__main__":
    main()
