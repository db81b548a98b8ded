"""`granulon-annotate`: the level at which each question should be read, from a language model or measured.

    granulon-annotate --data questions.jsonl --output corpus --model NAME --prices 0.15 0.6
    granulon-annotate --data rows.json --output corpus --checkpoint granulon-qwen1.5b

Annotated: every distinct question is sent once to an OpenAI-compatible endpoint (`--base_url`, key in OPENAI_API_KEY);
one in twenty is sent twice, which shows how far the annotator agrees with itself. Every call is logged before it is
sent (`run/calls.jsonl`), so that a rerun after a crash repeats none and `--max_cost` holds over all runs together.

Measured (`--checkpoint`): the model answers the rows at every level, and the likelihood of the answer is the label
(measure.py).

Both write a folder for `granulon-train-controller --corpus` and `datasets.load_dataset`, with a file per split and the
card. Questions without a label are in `run/quarantine.jsonl`. Rows with the same image are in the same split.
"""

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator
from tqdm import tqdm
from transformers import HfArgumentParser

from granulon.hub.files import JsonlLog, write_atomically, write_jsonl
from granulon.hub.inference import load_model, load_processor
from granulon.train.data import DataSource, load_rows

from .corpus import (
    ANNOTATED,
    corpus_row,
    hash_fraction,
    split_of,
    upload_corpus,
    write_folder,
)
from .journal import ApiArguments, Endpoint, Journal, Prices, Request, StopRun, ask_with_bar, call_key
from .level_scores import scores
from .measure import measure_rows
from .questions import DistinctQuestion, read_questions

PROMPT = Path(__file__).with_name("labelling_prompt.md")
RUN = "run"  # subfolder of files that are not part of the corpus
JOURNAL, QUARANTINE = "calls.jsonl", "quarantine.jsonl"
LEVEL_DEFINITION = re.compile(r"^\*\*(\w+)\*\*:", re.MULTILINE)  # in the prompt
PART_ROWS = 256
REPEATED_SHARE = 0.05  # of the questions, sent twice
ESTIMATED_REPLY = 60  # tokens


@dataclass(kw_only=True)
class AnnotateArguments(ApiArguments):
    data: str = field(
        metadata={"help": "file, folder or dataset of the Hub, or a DataSource in JSON (path, split, columns, ...)"}
    )
    output: str = field(metadata={"help": "folder for corpus, card and journal; the same folder continues a run"})
    prompt_file: str = field(
        default=str(PROMPT),
        metadata={"help": "instructions; a line '**NAME**: ...' defines each level, coarse to fine"},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "dataset repository to upload the corpus to"})
    checkpoint: str | None = field(default=None, metadata={"help": "measure the labels with this model instead"})
    temperature: float = field(default=1.0, metadata={"help": "of measured labels; higher is softer"})
    cost_per_token: float = field(default=0.0, metadata={"help": "nats per image token, for measured labels"})

    def __post_init__(self):
        if self.checkpoint is None:
            super().__post_init__()

    @property
    def source(self) -> DataSource:
        """The data; raises `ValueError` for JSON that is not a DataSource."""
        return DataSource.of(json.loads(self.data) if self.data.startswith("{") else self.data)


def main():
    try:
        (arguments,) = HfArgumentParser(AnnotateArguments, description=__doc__).parse_args_into_dataclasses()
        (annotate if arguments.checkpoint is None else measure)(arguments)
    except (OSError, ValueError, StopRun, FloatingPointError) as error:
        sys.exit(f"granulon-annotate: {error}")
    except KeyboardInterrupt:
        sys.exit("granulon-annotate: stopped; the same command continues from here")


def annotate(arguments: AnnotateArguments):
    """Send the calls that the journal lacks and write the corpus; raises `StopRun` afterwards if it is incomplete."""
    output, prompt = Path(arguments.output), Path(arguments.prompt_file).read_text(encoding="utf-8")
    levels = LEVEL_DEFINITION.findall(prompt)
    if len(levels) < 2:
        raise ValueError(
            f"{arguments.prompt_file} defines the levels {levels}; expected two or more lines '**NAME**: ...'"
        )
    questions, unusable, total = read_questions(arguments.source)
    annotator = Annotator(arguments, prompt, levels)
    repeated = [entry.text for entry in questions if hash_fraction(f"twice\n{entry.text}") < REPEATED_SHARE]
    requests = [annotator.request(entry.text) for entry in questions]
    requests += [annotator.request(text, "again") for text in repeated]
    with Journal(output / RUN / JOURNAL, arguments.max_cost) as journal:
        if arguments.retry_quarantined:
            journal.rejected.clear()
        waiting = [r for r in requests if r.key not in journal.answers and r.key not in journal.rejected]
        print(f"{total} rows, {len(questions)} distinct questions, {len(repeated)} of them to be sent twice")
        print(f"{len(requests) - len(waiting)} calls are in the journal, {len(waiting)} are to be made")
        characters = sum(len(message["content"]) for request in waiting for message in request.messages)
        print(arguments.estimate(len(waiting), characters, ESTIMATED_REPLY, journal.spent))
        if arguments.dry_run:
            return
        stop = ask_with_bar(
            waiting,
            len(waiting),
            lambda client: annotator.endpoint(client, journal),
            base_url=arguments.base_url,
            concurrency=arguments.concurrency,
        )
        rows, rejected, unanswered = annotator.results(questions, journal)
        pairs = [annotator.pair(text, journal) for text in repeated]
        spent = journal.spent
    unusable += rejected
    report = {
        "rows": total,
        "labelled_rows": sum(row["rows"] for row in rows),
        "quarantined_rows": sum(entry["rows"] for entry in unusable),
        "unanswered_rows": unanswered,
        "questions": len(rows),
        "agreement": agreement([pair for pair in pairs if pair], levels),
        "spent_usd": round(spent, 6),
        "model": arguments.model,
        "prompt_sha": annotator.prompt_sha,
    }
    check_counts(report)
    write_atomically(output / PROMPT.name, prompt)
    write_jsonl(output / RUN / QUARANTINE, unusable)
    finish(arguments, rows, report, annotated_origin(report), is_complete=not (stop or unanswered))
    if stop:
        raise stop
    if unanswered:
        raise StopRun(f"{unanswered} rows got no reply: run the same command again")


def check_counts(report: dict):
    """Raises `ValueError` unless every row of the data is labelled, in the quarantine, or waiting for a reply."""
    counts = {name: report[name] for name in ("labelled_rows", "quarantined_rows", "unanswered_rows")}
    if sum(counts.values()) != report["rows"]:
        raise ValueError(f"{report['rows']} rows were read but the counts are {counts}; nothing was written")


class Annotator:
    """Builds the requests and turns replies into rows of the corpus."""

    def __init__(self, arguments: AnnotateArguments, prompt: str, levels: list[str]):
        self.arguments, self.prompt = arguments, prompt
        self.schema = label_schema(levels)
        identity = prompt + json.dumps(self.schema.model_json_schema(), sort_keys=True)
        self.prompt_sha = hashlib.sha256(identity.encode()).hexdigest()

    def request(self, question: str, variant: str = "") -> Request:
        messages = [{"role": "system", "content": self.prompt}, {"role": "user", "content": json.dumps(question)}]
        return Request(call_key(question, self.arguments.model, self.prompt_sha, variant), messages)

    def endpoint(self, client, journal: Journal) -> Endpoint:
        args = self.arguments
        return Endpoint(client, args.model, journal, self.schema, Prices(*args.prices), max_tokens=args.max_tokens)

    def results(self, questions: list[DistinctQuestion], journal: Journal) -> tuple[list[dict], list[dict], int]:
        """Rows of the corpus, rejected questions with their reason, and the number of rows without a reply."""
        rows, rejected, unanswered = [], [], 0
        for entry in questions:
            key = self.request(entry.text).key
            if key in journal.answers:
                rows.append(self.row(entry, journal.answers[key]))
            elif key in journal.rejected:
                rejected.append({"question": entry.text, "rows": entry.rows, "reason": journal.rejected[key]})
            else:
                unanswered += entry.rows
        return rows, rejected, unanswered

    def row(self, question: DistinctQuestion, entry: dict) -> dict:
        return corpus_row(
            question.text,
            _level_probs(entry),
            ANNOTATED,
            annotator={"model": self.arguments.model, "prompt_sha": self.prompt_sha},
            usage=entry["usage"],
            created_at=entry["at"],
            split=split_of(question.group),
            reason=entry["answer"]["reason"],
            rows=question.rows,
        )

    def pair(self, question: str, journal: Journal) -> tuple[str, str] | None:
        """The levels of both replies to a question that was sent twice; None if one is missing."""
        entries = [journal.answers.get(self.request(question, variant).key) for variant in ("", "again")]
        if None in entries:
            return None
        first, second = (max(probs, key=probs.get) for probs in map(_level_probs, entries))
        return first, second


def label_schema(levels: list[str]) -> type[BaseModel]:
    """Schema of a reply: a reason, then the probability of each level; the sum is 1."""
    strict = ConfigDict(extra="forbid")
    share = (float, Field(description="from 0 to 1", allow_inf_nan=False))
    probabilities = create_model("Probabilities", __config__=strict, **dict.fromkeys(levels, share))

    def sums_to_one(cls, value):
        values = list(value.model_dump().values())
        if min(values) < 0 or abs(sum(values) - 1) > 0.05:
            raise ValueError(f"the probabilities are {values}; expected none below 0 and a sum of 1")
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
    The agreement of two labellings: share of equal levels and Cohen's kappa, each (value, low, high), 95% bootstrap.

    Kappa is 1 where both always name the same level, and 0 where the agreement is that of chance.
    """
    if not pairs:
        return None
    first_P, second_P = np.array([[levels.index(name) for name in pair] for pair in pairs]).T
    found = scores(np.eye(len(levels))[second_P], first_P, [str(number) for number in range(len(pairs))])
    return {"pairs": len(pairs), "equal": found["accuracy"], "kappa": found["kappa"]}


def measure(arguments: AnnotateArguments):
    """Labels from the likelihood of the rows' answers, in parts, so that a rerun continues after the last one."""
    output = Path(arguments.output)
    model = load_model(arguments.checkpoint)
    if torch.cuda.is_available():
        model = model.to("cuda")
    processor = load_processor(arguments.checkpoint, model.config)
    levels, quarantine = model.config.granularity_names, output / RUN / QUARANTINE
    data = load_rows([arguments.source], processor, seed=0, quarantine=quarantine, levels=levels)
    settings = {"temperature": arguments.temperature, "cost_per_token": arguments.cost_per_token}
    with JsonlLog(output / RUN / f"measured-{_settings_key(arguments, data._fingerprint)}.jsonl") as log:
        measured = {part["start"] for part in log.read()}
        for start in tqdm(range(0, len(data), PART_ROWS), unit="part", disable=None):
            if start not in measured:
                selected = data.select(range(start, min(start + PART_ROWS, len(data))))
                log.append({"start": start, "rows": list(measure_rows(model, processor, selected, **settings))})
        rows = list({row["id"]: row for part in log.read() for row in part["rows"]}.values())
    report = {"rows": len(data), "questions": len(rows), "model": arguments.checkpoint, **settings}
    finish(arguments, rows, report, measured_origin(report))
    for file in output.glob(f"{RUN}/measured-*.jsonl"):
        file.unlink()


def _settings_key(arguments: AnnotateArguments, data: str) -> str:
    """Identifies parts that a rerun may use: settings, data (its fingerprint) and weights."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(arguments.checkpoint).glob("*.safetensors"))
    ]
    identity = [asdict(arguments), data, weights]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def finish(arguments: AnnotateArguments, rows: list[dict], report: dict, origin: str, is_complete: bool = True):
    """Write the corpus, print the report, and upload a complete corpus if requested."""
    report = write_folder(Path(arguments.output), rows, report, origin, str(arguments.source.path))
    print(json.dumps(report, indent=1))
    print(f"wrote {arguments.output}")
    if arguments.push_to_hub and not is_complete:
        print(f"not uploaded to {arguments.push_to_hub}: some rows have no reply yet")
    elif arguments.push_to_hub:
        print(f"uploaded to {upload_corpus(Path(arguments.output), arguments.push_to_hub)}")


def measured_origin(report: dict) -> str:
    return (
        f"The labels are measured: `{report['model']}` answered each question at every level, and a level is the more "
        f"probable the more likely the right answer was (temperature {report['temperature']}, "
        f"{report['cost_per_token']} nats per image token). They hold for this model."
    )


def annotated_origin(report: dict) -> str:
    again, agreed = report["agreement"], "No question was sent twice."
    if again is not None:
        agreed = "Of {} questions sent twice, it gave {:.3f} the same level; ".format(
            again["pairs"], again["equal"][0]
        )
        agreed += "Cohen's kappa {:.3f} [{:.3f}, {:.3f}]. ".format(*again["kappa"])
        agreed += "This is its agreement with itself, not its accuracy."
    return (
        f"The labels are those of the model `{report['model']}`, which was given `{PROMPT.name}` (prompt and reply "
        f"schema: {report['prompt_sha'][:16]}) and saw no image. All calls cost {report['spent_usd']:.4f} USD. "
        f"{agreed} "
        "Its outputs are subject to its terms: the name of a model trained on labels by a Llama begins with Llama."
    )


if __name__ == "__main__":
    main()
