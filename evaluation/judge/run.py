"""`granulon-judge`: GPTscores of finished runs, from a judge at any OpenAI-compatible endpoint.

    granulon-judge --results results --model NAME --prices 2.5 10 --dry_run

The judge scores accuracy, hallucination and granularity of an answer, 0 to 100; for runs of the authors' protocol
accuracy and hallucination of five segments (protocols.py). It sees the image, as the authors' judge does; `--sees
reference` is for models without vision. Equal answers to equal questions are judged once. Every call is logged
(`judge/calls.jsonl`) before it is sent: a rerun after a crash repeats none, and the cap on the cost (`--max_cost`)
holds over all reruns.

The scores are written beside the result of each run, to `judge-<model>-<hash>.json`; the hash is of all that the judge
is asked. `granulon-evaluate --tables_only` puts them into the tables.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from transformers import HfArgumentParser

from granulon.evaluation.matrix import largest_runs, read_samples
from granulon.evaluation.protocols import OURS
from granulon.evaluation.scoring import figures
from granulon.hub.files import write_atomically, write_jsonl
from granulon.hub.text import with_interval
from granulon.train.controller.journal import CHARACTERS_PER_TOKEN, ApiArguments, Endpoint, Journal, StopRun, call_key

from .protocols import PROTOCOLS
from .reply import cut_words

FOLDER, JOURNAL, QUARANTINE = "judge", "calls.jsonl", "quarantine.jsonl"
TASKS = ("granulon_cc12m", "granulon_imagenet21k_recap", "granulon_flux_reason")  # those that the paper judges
MAX_WORDS = 1000  # of an answer or reference; longer ones are cut and counted
IMAGE_TOKENS = 2048  # the most that an image is assumed to cost, unless --image_tokens are more


@dataclass(kw_only=True)
class JudgeArguments(ApiArguments):
    results: str = field(metadata={"help": "folder of results that granulon-evaluate has written"})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "tasks whose answers are judged"})
    only: list[str] = field(default_factory=list, metadata={"help": "judge only the entries of these names"})
    protocol: str = field(default=OURS, metadata={"help": "of the runs, and of the judge", "choices": list(PROTOCOLS)})
    sees: str = field(
        default="image",
        metadata={"help": "what the judge sees of each sample", "choices": ["image", "reference", "both"]},
    )
    prompt_file: str | None = field(
        default=None, metadata={"help": "file with the judge's instructions, instead of the protocol's"}
    )
    image_tokens: int | None = field(
        default=None, metadata={"help": "tokens of an image, for the estimate; by default gpt-4o's"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sees != "image" and not PROTOCOLS[self.protocol].sees_reference:
            raise ValueError(f"the judge of the protocol {self.protocol} sees the image alone; omit --sees")


@dataclass(frozen=True)
class Case:
    """An answer to judge."""

    folder: Path  # of the run
    id: int  # of the sample
    key: str | None = None  # of the call, if one is needed
    text: str = ""  # what the judge reads
    unscored: str | None = None  # why the answer is not judged
    cut: bool = False  # whether answer or reference was too long

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
        sys.exit("granulon-judge: stopped; run the same command to continue")


def judge(arguments: JudgeArguments):
    """
    Make the calls that are not in the journal yet, then write the scores of every run.

    Raises:
        StopRun: some answers have no scores yet; those that have are written.
    """
    results = largest_runs(Path(arguments.results), arguments.only, arguments.tasks, arguments.protocol)
    judge = Judge(arguments)
    cases_by_run = [judge.cases(result) for result in results]
    cases = [case for own in cases_by_run for case in own]
    folder = Path(arguments.results, FOLDER)
    with Journal(folder / JOURNAL, arguments.max_cost) as journal:
        if arguments.retry_quarantined:
            journal.rejected.clear()
        distinct = {case.key: case for case in cases if case.key is not None}
        pending = [c for key, c in distinct.items() if key not in journal.answers and key not in journal.rejected]
        print(f"{len(cases)} answers in {len(results)} runs, {len(distinct)} distinct ones to be judged")
        print(f"{len(distinct) - len(pending)} calls are in the journal, {len(pending)} are to be made")
        print(judge.estimate(pending, journal.spent))
        if arguments.dry_run:
            return
        stop = judge.ask(pending, journal)
        waiting = sum(judge.write(result, own, journal) for result, own in zip(results, cases_by_run))
        write_quarantine(folder / QUARANTINE, cases, journal)
    if stop:
        raise stop
    if waiting:
        raise StopRun(f"{waiting} answers got no reply: run the same command again")


class Judge:
    """A judging model with its prompt: builds the calls and writes the scores."""

    def __init__(self, arguments: JudgeArguments):
        self.arguments, self.protocol = arguments, PROTOCOLS[arguments.protocol]
        self.prompt = Path(arguments.prompt_file or self.protocol.prompt).read_text(encoding="utf-8")
        self.sees_image = arguments.sees != "reference"
        self.image_tokens = arguments.image_tokens or self.protocol.image_tokens
        asked = [self.protocol.schema.model_json_schema(), arguments.sees, self.protocol.image_detail]
        asked = json.dumps([*asked, self.protocol.request], sort_keys=True)
        self.prompt_sha = hashlib.sha256((self.prompt + asked).encode()).hexdigest()
        model = re.sub(r"[^\w.]+", "-", arguments.model).strip("-")
        self.name = f"judge-{model}-{self.prompt_sha[:12]}"  # of its files
        self.images = {}  # by folder of the run

    def cases(self, result: dict) -> list[Case]:
        """The cases of all samples of a run."""
        folder = Path(result["folder"])
        if self.sees_image:
            from .images import Images  # needs lmms-eval, and the data

            self.images[folder] = Images(result, Path(self.arguments.results), self.protocol.image_side)
        return [self._case(folder, sample) for sample in read_samples(folder)]

    def _case(self, folder: Path, sample: dict) -> Case:
        answer, cut = cut_words(sample["answer"], MAX_WORDS)
        if not answer and self.protocol.empty is not None:
            return Case(folder, sample["id"])
        reference = None
        if self.arguments.sees != "image":
            reference = next((text for text in sample["references"] if isinstance(text, str) and text.split()), None)
            if reference is None:
                return Case(folder, sample["id"], unscored="the sample has no reference")
            reference, reference_cut = cut_words(reference, MAX_WORDS)
            cut |= reference_cut
        text = json.dumps(self.protocol.content(sample["question"], answer, reference), ensure_ascii=False)
        images = self.images[folder].sha256(sample) if self.sees_image else None
        key = call_key([text, images], self.arguments.model, self.prompt_sha)
        return Case(folder, sample["id"], key, text, cut=cut)

    def estimate(self, cases: list[Case], spent: float) -> str:
        """A sentence on what the calls will cost."""
        characters = sum(len(self.prompt) + len(case.text) for case in cases)
        image_tokens = self.image_tokens * len(cases) if self.sees_image else 0
        tokens_in = characters // CHARACTERS_PER_TOKEN + image_tokens
        return self.arguments.estimate(tokens_in, self.protocol.reply_tokens * len(cases), spent)

    def ask(self, cases: list[Case], journal: Journal) -> StopRun | None:
        """Make the calls; the replies are in the journal. Returns why it stopped before the end, if it did."""
        # Built when they are sent: thousands of images do not fit into memory.
        calls = ({case.key: self._messages(case)} for case in cases)
        endpoint = ImageEndpoint(self.arguments, journal, self.protocol.schema)
        endpoint.same_in_all_calls |= self.protocol.request
        return endpoint.ask_all(calls, len(cases))

    def _messages(self, case: Case) -> list[dict]:
        urls = self.images[case.folder].data_urls(case.id) if self.sees_image else []
        images = [
            {"type": "image_url", "image_url": {"url": url, "detail": self.protocol.image_detail}} for url in urls
        ]
        return self.protocol.messages(self.prompt, case.text, images)

    def write(self, result: dict, cases: list[Case], journal: Journal) -> int:
        """Write the scores of a run; returns how many of its answers still wait for a reply."""
        scored, unscored, waiting = [], Counter(), 0
        for case in cases:
            if case.empty or case.key in journal.answers:
                verdict = self.protocol.empty if case.empty else journal.answers[case.key]["answer"]
                sample = {"id": case.id, "statistics": self.protocol.schema.statistics(verdict), "verdict": verdict}
                scored.append(sample | ({"cut": True} if case.cut else {}))
            elif case.unscored or case.key in journal.rejected:
                unscored[case.unscored or journal.rejected[case.key]] += 1
            else:
                waiting += 1
        scores = {
            "judge": self.name,
            "model": self.arguments.model,
            "base_url": self.arguments.base_url,
            "prompt_sha": self.prompt_sha,
            "protocol": self.arguments.protocol,
            "sees": self.arguments.sees,
            "run": result["run"],
            "metrics": figures(scored),
            "waiting": waiting,
            "unscored": dict(unscored),
            "empty": sum(case.empty for case in cases),
            "cut": sum(case.cut for case in cases),
            "max_words": MAX_WORDS,
            "samples": scored,
            "finished_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(result["folder"], f"{self.name}.json"), text)
        print(f"{result['run']}: {summary(scores)}")
        return waiting


class ImageEndpoint(Endpoint):
    """An endpoint that takes images, whose cost is bounded by their pixels instead of the bytes of the file."""

    def most_cost(self, messages: list[dict]) -> float:
        texts, images = [], 0
        for message in messages:
            content = message["content"]
            for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
                images += part["type"] == "image_url"
                texts += [part["text"]] if part["type"] == "text" else []
        of_texts = super().most_cost([{"role": "user", "content": text} for text in texts])
        return of_texts + self.options.cost(images * max(IMAGE_TOKENS, self.options.image_tokens or 0), 0)


def summary(scores: dict) -> str:
    """The scores of a run in one line."""
    parts = [
        f"{name} {with_interval(figure['value'], figure['low'], figure['high'], digits=1)}"
        for name, figure in scores["metrics"].items()
        if not re.search(r"_\d$", name)
    ]
    parts += [
        f"{scores[name]} {words}"
        for name, words in (("waiting", "wait for a reply"), ("empty", "empty"))
        if scores[name]
    ]
    parts += [f"{scores['cut']} cut to {scores['max_words']} words"] if scores["cut"] else []
    parts += [f"{number} without a score ({reason})" for reason, number in scores["unscored"].items()]
    return ", ".join(parts) or "nothing to judge"


def write_quarantine(path: Path, cases: list[Case], journal: Journal):
    """Write the cases that got no usable reply, with the reason."""
    rejected = {case.key: case for case in cases if case.key in journal.rejected}
    rows = [
        {"run": case.folder.name, "id": case.id, "reason": journal.rejected[key], "asked": json.loads(case.text)}
        for key, case in rejected.items()
    ]
    write_jsonl(path, rows)


if __name__ == "__main__":
    main()
