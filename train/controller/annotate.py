"""`granulon-annotate`: label questions with the granularity level they should be read at; no paid call is repeated.

    granulon-annotate --data llava.json --output corpus --limit 20000 --dry_run
    granulon-annotate --data rows.json --output corpus --checkpoint granulon-qwen1.5b

Annotated: every distinct question is sent to an OpenAI-compatible endpoint (`--base_url`, key in OPENAI_API_KEY),
`--questions_per_call` at a time; one in twenty is sent twice, which shows how far the annotator agrees with itself.
Every call is logged before it is sent (`run/calls.jsonl`), so that a rerun after a crash repeats none and `--max_cost`
holds over all runs together. `--limit` labels a sample with all sources and kinds of question in their proportions.

Measured (`--checkpoint`): the model answers the rows at every level, and the likelihood of the answer is the label
(measure.py).

Both write a folder for `granulon-train-controller --corpus` and `datasets.load_dataset`, with a file per split and the
card. Questions without a label are in `run/quarantine.jsonl`. Rows with the same image are in the same split.
"""

import hashlib
import json
import random
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from tqdm import tqdm
from transformers import HfArgumentParser

from granulon.hub.files import JsonlLog, write_atomically, write_jsonl
from granulon.hub.inference import load_model, load_processor
from granulon.hub.text import with_interval
from granulon.train.data import DataSource, load_rows

from .corpus import ANNOTATED, corpus_row, hash_fraction, split_of, upload_corpus, write_folder
from .journal import CHARACTERS_PER_TOKEN, ApiArguments, Endpoint, Journal, StopRun, call_key
from .level_scores import scores
from .measure import measure_rows
from .questions import read_questions, stratified

PROMPT = Path(__file__).with_name("labelling_prompt.md")
RUN = "run"  # subfolder of files that are not part of the corpus
JOURNAL, QUARANTINE = "calls.jsonl", "quarantine.jsonl"
MODEL, PRICES = "gpt-4o-mini", (0.15, 0.60)  # USD per million tokens in and out, as OpenAI listed them in May 2026
LEVEL_DEFINITION = re.compile(r"^\*\*(\w+)\*\*:", re.MULTILINE)  # in the prompt
PART_ROWS = 256
REPEATED_SHARE = 0.05  # of the questions, sent twice
LABEL_TOKENS = 60  # of one label in a reply, for the estimate
NUMBERS = range(1000, 10_000)  # of the questions in a call; many, so that one that was not copied names none of them
STRICT = ConfigDict(extra="forbid")


@dataclass(kw_only=True)
class AnnotateArguments(ApiArguments):
    data: list[str] = field(
        metadata={"help": "files, folders or datasets of the Hub, or DataSources in JSON (path, split, columns, ...)"}
    )
    output: str = field(metadata={"help": "folder for corpus, card and journal; the same folder continues a run"})
    model: str = field(default=MODEL, metadata={"help": "name of the model at the endpoint; others need --prices"})
    max_tokens: int = field(default=4000, metadata={"help": "maximum tokens of a reply, reasoning included"})
    questions_per_call: int = field(default=20, metadata={"help": "questions asked in one call"})
    limit: int | None = field(default=None, metadata={"help": "questions to label: of each source and kind its share"})
    seed: int = field(default=0, metadata={"help": "seed of the questions that --limit chooses"})
    prompt_file: str = field(
        default=str(PROMPT),
        metadata={"help": "instructions; a line '**NAME**: ...' defines each level, coarse to fine"},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "dataset repository to upload the corpus to"})
    checkpoint: str | None = field(default=None, metadata={"help": "measure the labels with this model instead"})
    temperature: float = field(default=1.0, metadata={"help": "of measured labels; higher is softer"})
    cost_per_token: float = field(default=0.0, metadata={"help": "nats per image token, for measured labels"})

    def __post_init__(self):
        if self.checkpoint is not None:
            if self.limit is not None:
                raise ValueError("--limit is for questions to annotate; choose the rows to measure in --data (split)")
            return
        if not self.prices and self.model == MODEL and self.base_url is None:
            self.prices = list(PRICES)
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; expected 1 or more")
        most = self.max_tokens // LABEL_TOKENS
        if not 1 <= self.questions_per_call <= most:
            raise ValueError(
                f"--questions_per_call is {self.questions_per_call}; expected 1 to {most}, as a label takes about "
                f"{LABEL_TOKENS} of the {self.max_tokens} tokens of --max_tokens"
            )

    @property
    def sources(self) -> list[DataSource]:
        """The data; raises `ValueError` for JSON that is not a DataSource."""
        return [DataSource.of(json.loads(entry) if entry.startswith("{") else entry) for entry in self.data]


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
    found, quarantine, total = read_questions(arguments.sources)
    questions = stratified(found, arguments.seed)[: arguments.limit]
    repeated = [entry.text for entry in questions if hash_fraction(f"twice\n{entry.text}") < REPEATED_SHARE]
    folder = Path(arguments.output)
    with Journal(folder / RUN / JOURNAL, arguments.max_cost) as journal:
        annotator = Annotator(arguments, journal)
        if arguments.retry_quarantined:
            journal.rejected.clear()
        # The second answer to a question never comes from the same call as the first.
        calls = annotator.calls([entry.text for entry in questions]) + annotator.calls(repeated, "again")
        waiting = sum(map(len, calls))
        print(f"{total} rows, {len(found)} distinct questions: {len(questions)} to label, {len(repeated)} twice")
        print(f"{len(questions) + len(repeated) - waiting} are done, {waiting} are to be asked in {len(calls)} calls")
        print(annotator.estimate(calls))
        if arguments.dry_run:
            return
        stop = annotator.ask_all(calls, len(calls))
        rows, unanswered = [], 0
        for question in questions:
            key = annotator.key(question.text)
            if entry := journal.answers.get(key):
                more = {"usage": entry["usage"], "created_at": entry["at"], "split": split_of(question.group)}
                more |= {"reason": entry["answer"]["reason"], "rows": question.rows, "annotator": annotator.identity}
                rows.append(corpus_row(question.text, entry["answer"]["probabilities"], ANNOTATED, **more))
            elif key in journal.rejected:
                reason = journal.rejected[key]
                quarantine.append({"question": question.text, "rows": question.rows, "reason": reason})
            else:
                unanswered += question.rows
        pairs = [(annotator.level(text), annotator.level(text, "again")) for text in repeated]
        spent = journal.spent
    report = {
        "rows": total,
        "labelled_rows": sum(row["rows"] for row in rows),
        "quarantined_rows": sum(entry["rows"] for entry in quarantine),
        "unanswered_rows": unanswered,
        "unchosen_rows": sum(question.rows for question in found) - sum(question.rows for question in questions),
        "questions": len(rows),
        "agreement": agreement([pair for pair in pairs if all(pair)], annotator.levels),
        "spent_usd": round(spent, 6),
        **annotator.identity,
    }
    write_atomically(folder / PROMPT.name, annotator.prompt)
    write_jsonl(folder / RUN / QUARANTINE, quarantine)
    finish(arguments, rows, report, annotated_origin(report), is_complete=not (stop or unanswered))
    if stop:
        raise stop
    if unanswered:
        raise StopRun(f"{unanswered} rows got no reply: run the same command again")


class Annotator(Endpoint):
    """Asks for the levels of several questions in one call, and turns the answers into rows of the corpus."""

    def __init__(self, options: AnnotateArguments, journal: Journal):
        self.prompt = Path(options.prompt_file).read_text(encoding="utf-8")
        self.levels = LEVEL_DEFINITION.findall(self.prompt)
        if len(self.levels) < 2:
            raise ValueError(
                f"{options.prompt_file} defines the levels {self.levels}; expected two or more lines '**NAME**: ...'"
            )
        self.label = label_schema(self.levels)
        super().__init__(options, journal, create_model("Labels", __config__=STRICT, labels=(list[self.label], ...)))
        asked = self.prompt + json.dumps(self.schema.model_json_schema(), sort_keys=True)
        self.identity = {"model": options.model, "prompt_sha": hashlib.sha256(asked.encode()).hexdigest()}

    def key(self, question: str, variant: str = "") -> str:
        return call_key(question, **self.identity, variant=variant)

    def calls(self, questions: list[str], variant: str = "") -> list[dict[str, str]]:
        """The questions without a label, grouped into calls."""
        known, size = self.journal.answers.keys() | self.journal.rejected.keys(), self.options.questions_per_call
        waiting = [(key, text) for text in questions if (key := self.key(text, variant)) not in known]
        return [dict(waiting[start : start + size]) for start in range(0, len(waiting), size)]

    def messages(self, call: dict[str, str]) -> list[dict]:
        asked = [{"number": number, "question": text} for number, text in zip(_numbers(call), call.values())]
        content = json.dumps(asked, ensure_ascii=False)
        return [{"role": "system", "content": self.prompt}, {"role": "user", "content": content}]

    def read(self, call: dict[str, str], text: str) -> dict[str, dict | str]:
        labels = json.loads(text)["labels"]
        return {key: self._label(labels, number) for key, number in zip(call, _numbers(call))}

    def _label(self, labels: list[dict], number: int) -> dict | str:
        """The one valid label with a question's number, or why there is none."""
        own = [label for label in labels if isinstance(label, dict) and label.get("number") == number]
        if len(own) != 1:
            return f"{len(own)} of {len(labels)} labels have the number of the question; expected one"
        try:
            return self.label.model_validate(own[0], strict=True).model_dump(exclude={"number"})
        except ValidationError as error:
            return str(error)

    def estimate(self, calls: list[dict]) -> str:
        """A sentence on what the calls will cost, prompt and schema included."""
        characters = sum(len(message["content"]) for call in calls for message in self.messages(call))
        characters += len(calls) * len(json.dumps(self.response_format))
        tokens = characters // CHARACTERS_PER_TOKEN, LABEL_TOKENS * sum(map(len, calls))
        return self.options.estimate(*tokens, self.journal.spent)

    def level(self, question: str, variant: str = "") -> str | None:
        """The most probable level of an answer; None where there is none."""
        entry = self.journal.answers.get(self.key(question, variant))
        return entry and max(entry["answer"]["probabilities"], key=entry["answer"]["probabilities"].get)


def _numbers(call: dict) -> list[int]:
    """
    A number for each question, the same ones for the same questions.

    They are drawn, not counted: an annotator that leaves out a question and counts on would give the following ones
    each other's labels.
    """
    return random.Random("".join(call)).sample(NUMBERS, len(call))


def label_schema(levels: list[str]) -> type[BaseModel]:
    """Schema of a label: the question's number, a reason, then the probability of each level, scaled to the sum 1."""
    share = (float, Field(description="from 0 to 1", allow_inf_nan=False))
    probabilities = create_model("Probabilities", __config__=STRICT, **dict.fromkeys(levels, share))

    def sums_to_one(cls, value):
        probs = value.model_dump()
        total = sum(probs.values())
        if min(probs.values()) < 0 or abs(total - 1) > 0.05:
            raise ValueError(f"the probabilities are {probs}; expected none below 0 and a sum of 1")
        return value.model_copy(update={name: prob / total for name, prob in probs.items()})

    return create_model(
        "Label",
        __config__=STRICT,
        __validators__={"sums_to_one": field_validator("probabilities")(sums_to_one)},
        number=(int, Field(description="that of the question")),
        reason=(str, ...),
        probabilities=(probabilities, ...),
    )


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
    data = load_rows(arguments.sources, processor, seed=0, quarantine=quarantine, levels=levels)
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
    files = [(file.name, file.stat()) for file in sorted(Path(arguments.checkpoint).glob("*.safetensors"))]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps([asdict(arguments), data, weights], sort_keys=True).encode()).hexdigest()[:16]


def finish(arguments: AnnotateArguments, rows: list[dict], report: dict, origin: str, is_complete: bool = True):
    """Write the corpus, print the report, and upload a complete corpus if requested."""
    sources = [str(source.path) for source in arguments.sources]
    report = write_folder(Path(arguments.output), rows, report, origin, sources)
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
    agreed = "No question was sent twice."
    if again := report["agreement"]:
        agreed = (
            f"Of {again['pairs']} questions sent twice, it gave {again['equal'][0]:.3f} the same level; Cohen's kappa "
            f"{with_interval(*again['kappa'], digits=3)}. This is its agreement with itself, not its accuracy."
        )
    return (
        f"The labels are those of the model `{report['model']}`, which was given `{PROMPT.name}` (prompt and reply "
        f"schema: {report['prompt_sha'][:16]}) and saw no image. All calls cost {report['spent_usd']:.4f} USD.\n\n"
        f"{agreed} Its outputs are subject to its terms: a model trained on labels by a Llama has a name that begins "
        "with Llama."
    )


if __name__ == "__main__":
    main()
