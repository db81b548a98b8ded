"""`granulon-judge`: GPTscores of finished runs, by a judge at any OpenAI-compatible endpoint.

    granulon-judge --results results --model NAME --input_price 2.5 --output_price 10 --dry_run

Accuracy, hallucination and granularity, 0 to 100, of an answer as a whole and of five segments of it. The judge sees
the image, as the authors' does; `--sees reference` is for one that reads text alone. Equal answers to equal questions
are judged once. Every call is in the journal (`judge/calls.jsonl`) before it is sent: a rerun after any crash repeats
none, and the cap on the cost (`--max_cost`) holds over all runs.

The scores lie beside the results of each run in `judge-<model>-<hash>.json`; the hash is of the prompt, the form of
the reply and what the judge sees. `granulon-evaluate --tables_only` puts them into the tables.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from transformers import HfArgumentParser

from granulon.evaluation.matrix import largest_runs, read_results, read_samples
from granulon.evaluation.scoring import figures
from granulon.hub.files import write_atomically
from granulon.train.controller.journal import Endpoint, Journal, Prices, Request, StopRun, ask_with_bar, call_key

from .form import Verdict, cut_words, no_answer, segments, statistics_of

PROMPT = Path(__file__).with_name("prompt.md")
FOLDER, JOURNAL, QUARANTINE = "judge", "calls.jsonl", "quarantine.jsonl"
TASKS = ("granulon_cc12m", "granulon_imagenet21k_recap", "granulon_flux_reason")  # what the paper has judged
SIGHTS = ("image", "reference", "both")
LETTERS_PER_TOKEN = 4  # of English, for the estimate; the cap reckons with a token for each byte
ESTIMATED_REPLY = 260  # tokens


@dataclass
class JudgeArguments:
    results: str = field(metadata={"help": "the folder of results that granulon-evaluate has written"})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "whose answers are judged"})
    only: list[str] = field(default_factory=list, metadata={"help": "only the entries of these names"})
    model: str | None = field(default=None, metadata={"help": "name of the judging model at the endpoint"})
    base_url: str | None = field(default=None, metadata={"help": "of the endpoint; OpenAI's by default"})
    sees: str = field(
        default="image", metadata={"help": "what the judge gets beside question and answer", "choices": list(SIGHTS)}
    )
    prompt_file: str = field(default=str(PROMPT), metadata={"help": "what the judge is told"})
    max_words: int = field(default=1000, metadata={"help": "of an answer or reference; longer ones are cut, counted"})
    image_side: int = field(default=768, metadata={"help": "pixels of the longer side of what the judge gets"})
    image_tokens: int = field(default=2048, metadata={"help": "the most tokens that such an image can cost"})
    input_price: float | None = field(default=None, metadata={"help": "USD per million tokens; 0 if yours is free"})
    output_price: float | None = field(default=None, metadata={"help": "USD per million tokens"})
    max_cost: float = field(default=10.0, metadata={"help": "USD that may be spent, earlier runs included"})
    concurrency: int = field(default=16, metadata={"help": "calls at a time"})
    max_tokens: int = field(default=800, metadata={"help": "the most a reply may have; more for models that reason"})
    timeout: float = field(default=120.0, metadata={"help": "seconds to wait for a reply"})
    first_wait: float = field(default=1.0, metadata={"help": "seconds before a second attempt, then doubled"})
    retry_quarantined: bool = field(default=False, metadata={"help": "ask again what got no usable reply before"})
    dry_run: bool = field(default=False, metadata={"help": "count and estimate; send nothing"})

    def __post_init__(self):
        if self.model is None:
            raise ValueError("name the judging model with --model")
        if self.input_price is None or self.output_price is None:
            raise ValueError(
                "say what the model costs with --input_price and --output_price (USD per million tokens; 0 for an "
                "endpoint of your own): the cap of --max_cost rests on it"
            )
        if not all(0 <= price < float("inf") for price in (self.input_price, self.output_price)):  # nor nan
            raise ValueError("prices are 0 or more")
        if not self.max_cost >= 0:
            raise ValueError(f"--max_cost is {self.max_cost}; expected 0 or more")
        for name in ("concurrency", "max_tokens", "max_words", "image_side", "image_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class Case:
    """An answer to be judged: a sample of a run, and the call that judges it, or why none does."""

    folder: Path
    id: int
    key: str | None = None  # of the call; None for an empty answer
    text: str = ""  # what the judge reads
    segments: tuple[str, ...] = ()
    unscored: str | None = None
    cut: bool = False

    @property
    def empty(self) -> bool:
        return self.key is None and self.unscored is None


def main(argv: list[str] | None = None):
    try:
        (arguments,) = HfArgumentParser(JudgeArguments, description=__doc__).parse_args_into_dataclasses(argv)
        judge(arguments)
    except (OSError, ValueError, StopRun) as error:
        sys.exit(f"granulon-judge: {error}")
    except KeyboardInterrupt:
        sys.exit("granulon-judge: stopped; the same command goes on from here")


def judge(arguments: JudgeArguments):
    """Ask for what the journal lacks, then write every run's scores; raises `StopRun` after, if it is not all."""
    results = wanted(arguments)
    judging = Judging(arguments, Path(arguments.prompt_file).read_text(encoding="utf-8"))
    by_run = {result["folder"]: list(judging.cases(result)) for result in results}
    cases = [case for own in by_run.values() for case in own]
    folder = Path(arguments.results, FOLDER)
    with Journal(folder / JOURNAL, arguments.max_cost) as journal:
        if arguments.retry_quarantined:
            journal.rejected.clear()
        asked = {case.key: case for case in cases if case.key is not None}
        waiting = [c for key, c in asked.items() if key not in journal.answers and key not in journal.rejected]
        print(f"{len(cases)} answers in {len(results)} runs, {len(asked)} distinct ones to be judged")
        print(f"{len(asked) - len(waiting)} calls are in the journal, {len(waiting)} are to be made")
        print(judging.estimate(waiting, journal))
        if arguments.dry_run:
            return
        stop = judging.ask(waiting, journal)
        left = sum(judging.write(result, by_run[result["folder"]], journal) for result in results)
        write_quarantine(folder / QUARANTINE, cases, journal)
    if stop:
        raise stop
    if left:
        raise StopRun(f"{left} answers got no reply: run the same command again")


def wanted(arguments: JudgeArguments) -> list[dict]:
    """The finished runs whose answers are to be judged; those that others have taken the place of cost nothing."""
    every = largest_runs(read_results(Path(arguments.results)))
    chosen = [
        result
        for result in every
        if result["task"]["name"] in arguments.tasks
        and (not arguments.only or result["entry"]["name"] in arguments.only)
    ]
    if not chosen:
        there = sorted({result["task"]["name"] for result in every})
        raise ValueError(
            f"{arguments.results} has no finished run of {', '.join(arguments.tasks)}"
            + (f" in the entries {', '.join(arguments.only)}" if arguments.only else "")
            + (f"; it has {', '.join(there)}" if there else "; run granulon-evaluate first")
        )
    return chosen


class Judging:
    """What is asked of a judge, and how its replies become scores."""

    def __init__(self, arguments: JudgeArguments, prompt: str):
        self.arguments, self.prompt = arguments, prompt
        self.prices = Prices(arguments.input_price, arguments.output_price)
        form = [Verdict.model_json_schema(), arguments.sees, arguments.max_words]
        form += [arguments.image_side] if self.sees_image else []
        self.prompt_sha = hashlib.sha256((prompt + json.dumps(form, sort_keys=True)).encode()).hexdigest()
        self.images = {}  # by folder of the run

    @property
    def sees_image(self) -> bool:
        return self.arguments.sees != "reference"

    @property
    def name(self) -> str:
        """Of the judge: the stem of its files."""
        model = re.sub(r"[^\w.]+", "-", self.arguments.model).strip("-")
        return "-".join(filter(None, ("judge", model, self.prompt_sha[:12])))

    def cases(self, result: dict) -> Iterator[Case]:
        """Every sample of a run."""
        folder = Path(result["folder"])
        samples = read_samples(folder)
        if self.sees_image:
            from .images import Images  # needs lmms-eval, and the data

            self.images[folder] = Images(result, Path(self.arguments.results), self.arguments.image_side)
        for sample in samples:
            yield self.case(folder, sample)

    def case(self, folder: Path, sample: dict) -> Case:
        answer, cut = cut_words(sample["answer"], self.arguments.max_words)
        if not answer.split():
            return Case(folder, sample["id"])
        content = {"question": sample["question"]}
        if self.arguments.sees != "image":
            reference = next((text for text in sample["references"] if isinstance(text, str) and text.split()), None)
            if reference is None:
                return Case(folder, sample["id"], unscored="the sample has no reference")
            content["reference"], also_cut = cut_words(reference, self.arguments.max_words)
            cut |= also_cut
        parts = tuple(segments(answer))
        content |= {f"segment_{n}": part or "(empty)" for n, part in enumerate(parts, 1)}
        text = json.dumps(content, ensure_ascii=False)
        images = self.images[folder].sha256(sample) if self.sees_image else None
        key = call_key([text, images], self.arguments.model, self.prompt_sha)
        return Case(folder, sample["id"], key, text, parts, cut=cut)

    def request(self, case: Case) -> Request:
        content = case.text
        if self.sees_image:
            urls = self.images[case.folder].data_urls(case.id)
            content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content.append({"type": "text", "text": case.text})
        return Request(case.key, [{"role": "system", "content": self.prompt}, {"role": "user", "content": content}])

    def estimate(self, cases: list[Case], journal: Journal) -> str:
        letters = sum(len(self.prompt) + len(case.text) for case in cases)
        pictures = self.arguments.image_tokens * len(cases) if self.sees_image else 0
        read, written = letters // LETTERS_PER_TOKEN + pictures, ESTIMATED_REPLY * len(cases)
        return (
            f"estimated cost {self.prices.of(read, written):.4f} USD ({read} tokens in, {written} out); "
            f"{journal.spent:.4f} USD are spent, the cap is {self.arguments.max_cost:g}"
        )

    def ask(self, cases: list[Case], journal: Journal) -> StopRun | None:
        args = self.arguments

        def endpoint(client):
            told = {name: getattr(args, name) for name in ("max_tokens", "image_tokens")}
            return JudgesEndpoint(client, args.model, journal, Verdict, self.prices, **told)

        return ask_with_bar(
            map(self.request, cases),  # one by one as they are needed: thousands of images do not fit into memory
            len(cases),
            endpoint,
            base_url=args.base_url,
            timeout=args.timeout,
            concurrency=args.concurrency,
        )

    def write(self, result: dict, cases: list[Case], journal: Journal) -> int:
        """The scores of a run; how many of its answers still wait for a reply."""
        scored, unscored, waiting = [], Counter(), 0
        for case in cases:
            if case.empty or case.key in journal.answers:
                verdict = no_answer() if case.empty else journal.answers[case.key]["answer"]
                told = {"id": case.id, "statistics": statistics_of(verdict, case.segments), "verdict": verdict}
                scored.append(told | ({"cut": True} if case.cut else {}))
            elif case.unscored or case.key in journal.rejected:
                unscored[case.unscored or journal.rejected[case.key]] += 1
            else:
                waiting += 1
        told = {
            "judge": self.name,
            "model": self.arguments.model,
            "base_url": self.arguments.base_url,
            "prompt_sha": self.prompt_sha,
            "sees": self.arguments.sees,
            "run": result["run"],
            "metrics": figures(scored, result["settings"]["seed"]),
            "waiting": waiting,
            "unscored": dict(unscored),
            "empty": sum(case.empty for case in cases),
            "cut": sum(case.cut for case in cases),
            "max_words": self.arguments.max_words,
            "samples": scored,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_atomically(
            Path(result["folder"], f"{self.name}.json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n"
        )
        print(f"{result['run']}: {summary(told)}")
        return waiting


@dataclass
class JudgesEndpoint(Endpoint):
    """An endpoint that takes images: what one costs is bounded by its pixels, and not by the bytes of its file."""

    image_tokens: int = 0

    def most_cost(self, messages: list[dict]) -> float:
        texts, images = [], 0
        for message in messages:
            parts = message["content"]
            for part in parts if isinstance(parts, list) else [{"type": "text", "text": parts}]:
                images += part["type"] == "image_url"
                texts += [part["text"]] if part["type"] == "text" else []
        read = super().most_cost([{"role": "user", "content": text} for text in texts])
        return read + self.prices.of(images * self.image_tokens, 0)


def summary(told: dict) -> str:
    """A run's scores in one line."""
    values = [
        f"{name} {entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"
        for name, entry in told["metrics"].items()
        if not re.search(r"_\d$", name) and entry["low"] is not None
    ]
    more = [
        f"{told[name]} {word}" for name, word in (("waiting", "wait for a reply"), ("empty", "empty")) if told[name]
    ]
    more += [f"{told['cut']} cut to {told['max_words']} words"] if told["cut"] else []
    more += [f"{number} without a score ({reason})" for reason, number in told["unscored"].items()]
    return ", ".join(values + more) or "nothing to judge"


def write_quarantine(path: Path, cases: list[Case], journal: Journal):
    """What got no usable reply, and why."""
    rejected = {case.key: case for case in cases if case.key in journal.rejected}
    lines = [
        {"run": case.folder.name, "id": case.id, "reason": journal.rejected[key], "asked": json.loads(case.text)}
        for key, case in rejected.items()
    ]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


if __name__ == "__main__":
    main()
