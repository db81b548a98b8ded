"""Granulon as a model of lmms-eval: `lmms_eval --model granulon --model_args pretrained=FOLDER`.

Each answer carries the level that was chosen and how many visual and text tokens were read; lmms-eval saves both with
the sample, under `token_counts`. With `answers`, every answer is also appended to a file before the next batch is
asked, so that a run that was killed goes on where it was.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from granulon.hub.ask import level_of, prompt_of, text_tokens
from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor, load_rgb

MANIFEST = ModelManifest("granulon", chat_class_path="granulon.evaluation.lmms_model.GranulonForEvaluation")
VIEWS = ("full", "pixel", "semantic", "auto")
MAX_NEW_TOKENS = 256  # where a task names no limit
GENERATION = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "min_new_tokens"}
LEVEL_KEYS = ("granularities", "default_granularity", "max_semantic_tokens")


@dataclass
class VisualCounts(TokenCounts):
    """What lmms-eval counts, and what was read of the images."""

    granularity: str | None = None
    view: str | None = None
    pixel_tokens: int = 0
    semantic_tokens: int = 0

    @classmethod
    def of(cls, row: dict | None, text: int, answer: int) -> "VisualCounts":
        """From a row of `visual.describe`, or None for a batch without images, and the tokens of prompt and answer."""
        if row is None or not row["images"]:
            return cls(input_tokens=text, output_tokens=answer)
        return cls(
            input_tokens=text + sum(row["tokens"].values()),
            output_tokens=answer,
            granularity=row["granularity"] and row["granularity"]["name"],
            view=row["view"],
            pixel_tokens=row["tokens"]["pixel"],
            semantic_tokens=row["tokens"]["semantic"],
        )

    def to_dict(self) -> dict:
        seen = {name: getattr(self, name) for name in ("granularity", "view", "pixel_tokens", "semantic_tokens")}
        return super().to_dict() | seen


class GranulonForEvaluation(lmms):
    """
    Args:
        pretrained, revision: folder or Hub repository.
        granularity: a level by name or index for every question; None leaves it to the controller.
        view: "full", "pixel", "semantic" or "auto".
        overrides: changes of the configuration, a dict or JSON (`{"controller": "random"}`).
        dtype, attn_implementation: as in `from_pretrained`.
        batch_size: prompts in one pass, on each process.
        max_new_tokens: where a task names no limit.
        seed: of levels and tokens drawn at random.
        answers: a file to append answers to and to take earlier ones from; each process has its own beside it.

    Raises:
        ValueError: another kind of model, an unknown level or view, overrides that the weights do not fit.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        granularity: str | int | None = None,
        view: str = "full",
        overrides: dict | str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 8,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        answers: str | None = None,
        device: str | None = None,
        max_batch_size=None,
    ):
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"view is {view!r}; choose one of {VIEWS}")
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model = load(pretrained, revision, overrides, dtype, attn_implementation).to(self.accelerator.device)
        self.processor = GranulonProcessor.from_pretrained(pretrained, revision=revision)
        self.processor.num_semantic_tokens = self.model.config.max_semantic_tokens
        self.granularity, self.view = level_of(self.config, granularity), view
        self.batch_size, self.max_new_tokens, self.seed = int(batch_size), int(max_new_tokens), int(seed)
        self.answers = answers

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def config(self) -> GranulonConfig:
        return self.model.config

    def clean(self):
        """The model stays: the next task asks it too."""

    def loglikelihood(self, requests):
        raise NotImplementedError("Granulon is asked for answers; choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "tasks of several rounds are not supported; choose one of output_type generate_until"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order; batches hold prompts with equal generation options."""
        keys = [_request_key(request) for request in requests]
        with AnswerFile(self.answers, self.rank, self.world_size) as done:
            left = {}
            for key, request in zip(keys, requests):
                if key not in done:
                    left.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), {})[key] = request
            progress = tqdm(total=sum(map(len, left.values())), unit="answer", disable=self.rank != 0, leave=False)
            for group in left.values():
                group = list(group.items())
                for start in range(0, len(group), self.batch_size):
                    chunk = group[start : start + self.batch_size]
                    done.add(dict(zip([key for key, _ in chunk], self._answer([request for _, request in chunk]))))
                    progress.update(len(chunk))
            progress.close()
            return [done.result(key) for key in keys]

    @torch.no_grad()
    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        messages = [self._messages(request) for request in requests]
        images = [_images(request, row) for request, row in zip(requests, messages)]
        prompts = self.processor.apply_chat_template(
            [row.to_hf_messages() for row in messages], add_generation_prompt=True
        )
        inputs = self.processor(
            text=prompts, images=images if any(images) else None, padding=True, return_tensors="pt"
        ).to(self.device, dtype=self.model.dtype)
        options, until = _generation_options(requests[0].args[2], self.max_new_tokens)
        seen, rows = {}, [None] * len(requests)
        if any(images):
            visual = self.model.encode(**inputs, granularity=self._requested_level(requests))
            seen, rows = {"visual": visual, "visual_view": self.view}, visual.describe(self.view)
        output = self.model.generate(**prompt_of(inputs), **seen, **options)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        answer_B = (new != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        counts = zip(rows, text_tokens(self.config, inputs), answer_B, strict=True)
        return [
            GenerationResult(_cut(text, until), VisualCounts.of(*count))
            for text, count in zip(texts, counts, strict=True)
        ]

    def _messages(self, request: Instance) -> ChatMessages:
        _, to_messages, _, doc_id, task, split = request.args
        return ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))

    def _requested_level(self, requests: list[Instance]) -> int | list[int] | None:
        """What to ask `encode` for: the row's level, or None for the controller's choice.

        A level drawn at random is drawn here, so that it depends on the sample alone and not on its batch.
        """
        if not self.config.granularities or self.config.controller != "random" or self.granularity is not None:
            return self.granularity
        return [_drawn_level(self.seed, request, len(self.config.granularities)) for request in requests]


class AnswerFile:
    """
    Answers by request, kept in memory and, where there is a path, in an append-only file of this process.

    Answers of other processes and of earlier runs lie beside it and are read too, so that a run may go on with another
    number of processes. A last line that a crash has torn does not count.
    """

    def __init__(self, path: str | Path | None, rank: int = 0, processes: int = 1):
        self.path = None if path is None else Path(path)
        self.own = None if path is None else self.path.with_name(f"{self.path.name}.{rank:05}-of-{processes:05}")
        self.lines, self.file = {}, None

    def __enter__(self):
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for file in sorted(self.path.parent.glob(f"{self.path.name}.*-of-*")):
                with suppress(FileNotFoundError):
                    data = file.read_bytes()
                    lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
                    self.lines |= {line["key"]: line for line in lines}
            if self.own.exists():
                os.truncate(self.own, self.own.read_bytes().rfind(b"\n") + 1)
            self.file = open(self.own, "a", encoding="utf-8")
        return self

    def __exit__(self, *exception):
        if self.file is not None:
            self.file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def add(self, results: dict[str, GenerationResult]):
        lines = {
            key: {"key": key, "text": result.text, "counts": vars(result.token_counts)}
            for key, result in results.items()
        }
        self.lines |= lines
        if self.file is not None:
            self.file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
            self.file.flush()
            os.fsync(self.file.fileno())

    def result(self, key: str) -> GenerationResult:
        return GenerationResult(self.lines[key]["text"], VisualCounts(**self.lines[key]["counts"]))


def load(
    pretrained: str, revision: str = "main", overrides: dict | str | None = None, dtype="auto", attention=None
) -> GranulonForConditionalGeneration:
    """
    A Granulon in eval mode, its configuration changed as `overrides` say.

    Raises:
        ValueError: no Granulon is found there, an override is unknown, or the weights do not fit it.
    """
    try:
        values, _ = GranulonConfig.get_config_dict(pretrained, revision=revision)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{pretrained} is no checkpoint's folder and not to be had: {reason}") from error
    if values.get("model_type") != GranulonConfig.model_type:
        raise ValueError(f"{pretrained} is a model of type {values.get('model_type')!r}, expected 'granulon'")
    overrides = json.loads(overrides) if isinstance(overrides, str) else dict(overrides or {})
    if unknown := overrides.keys() - GranulonConfig().to_dict().keys():
        raise ValueError(f"overrides name {sorted(unknown)}, which the configuration does not have")
    if "granularities" in overrides:
        values |= dict.fromkeys(LEVEL_KEYS)
    model, report = GranulonForConditionalGeneration.from_pretrained(
        pretrained,
        config=GranulonConfig.from_dict(values | overrides),
        revision=revision,
        dtype=getattr(torch, dtype) if dtype != "auto" else dtype,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"with overrides {overrides} the weights of {pretrained} do not fit: {', '.join(wrong[:3])}; keep the "
            "number of levels, or train the model with them"
        )
    return model.eval()


def _images(request: Instance, messages: ChatMessages) -> list:
    """The images of a sample; raises `ValueError` naming the sample of one that cannot be used."""
    try:
        return [load_rgb(image) for image in messages.extract_media()[0]]
    except ValueError as error:
        raise ValueError(f"sample {request.doc_id} of {request.task_name}: {error}") from error


def _request_key(request: Instance) -> str:
    """What makes two requests of a run the same: task, split, sample, generation options, and which repeat."""
    _, _, options, doc_id, task, split = request.args
    identity = json.dumps([task, split, doc_id, request.idx, options], sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _drawn_level(seed: int, request: Instance, levels: int) -> int:
    digest = hashlib.sha256(f"{seed} {_request_key(request)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % levels


def _generation_options(given: dict, max_new_tokens: int) -> tuple[dict, list[str]]:
    """A task's options as `generate` takes them, greedy unless it says otherwise, and the texts that end an answer."""
    options = {name: value for name, value in given.items() if name in GENERATION and value is not None}
    options["max_new_tokens"] = int(given.get("max_new_tokens") or max_new_tokens)
    options["do_sample"] = bool(options.get("do_sample", False)) and options.get("temperature") != 0
    if not options["do_sample"]:  # generate warns of what it will not use
        options |= {"temperature": None, "top_p": None, "top_k": None}
    until = given.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def _cut(text: str, until: list[str]) -> str:
    """The answer before the first of the texts that end it; a text at its very start ends nothing."""
    text = text.strip()
    places = [place for stop in until if stop and (place := text.find(stop)) > 0]
    return text[: min(places)].strip() if places else text


__all__ = ["MANIFEST", "AnswerFile", "GranulonForEvaluation", "VisualCounts", "load"]
