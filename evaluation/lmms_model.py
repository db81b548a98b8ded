"""Granulon as a model of lmms-eval: `lmms_eval --model granulon --model_args pretrained=FOLDER`.

Each answer carries the chosen level and the number of visual and text tokens; lmms-eval saves both with the sample,
under `token_counts`. With `answers`, each batch of answers is appended to a log before the next one starts, so that a
run that was killed can go on.
"""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from granulon.hub.files import JsonlLog
from granulon.hub.inference import describe, encode, generate, load_model, load_processor
from modeling_granulon import load_rgb
from modeling_granulon.image_tokens import VISUAL_VIEWS

MANIFEST = ModelManifest("granulon", chat_class_path="granulon.evaluation.lmms_model.GranulonForEvaluation")
MAX_NEW_TOKENS = 256  # for tasks without a limit
GENERATION = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "min_new_tokens"}


@dataclass
class VisualCounts(TokenCounts):
    """The counts of lmms-eval, and what was read of the images."""

    granularity: str | None = None
    view: str | None = None
    pixel_tokens: int = 0
    semantic_tokens: int = 0

    @classmethod
    def of(cls, described: dict, answer_tokens: int) -> "VisualCounts":
        """From the description of a prompt (`granulon.hub.inference.describe`) and the length of its answer."""
        tokens = described["tokens"]
        counts = cls(input_tokens=sum(tokens.values()), output_tokens=answer_tokens)
        if described["images"]:
            counts.granularity = described["granularity"] and described["granularity"]["name"]
            counts.view = described["view"]
            counts.pixel_tokens, counts.semantic_tokens = tokens["pixel"], tokens["semantic"]
        return counts

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
        max_new_tokens: for tasks without a limit.
        seed: of levels drawn by the random controller.
        answers: a log of answers; those that it holds already are not generated again. Each process has its own file.

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
        if view not in VISUAL_VIEWS:
            raise ValueError(f"view is {view!r}; choose one of {VISUAL_VIEWS}")
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        model = load_model(
            pretrained,
            revision=revision,
            overrides=json.loads(overrides) if isinstance(overrides, str) else overrides,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
        self.model, self.config = model.to(self.accelerator.device), model.config
        self.processor = load_processor(pretrained, model.config, revision=revision)
        self.granularity = None if granularity is None else model.config.granularity_index(granularity)
        self.view, self.answers, self.seed = view, answers, int(seed)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def clean(self):
        """lmms-eval calls this after a task; the model stays, since the next task uses it too."""

    def loglikelihood(self, requests):
        raise NotImplementedError("Granulon generates answers; choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "tasks of several rounds are not supported; choose one of output_type generate_until"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order; batches hold prompts with equal generation options."""
        keys = [_request_key(request) for request in requests]
        with JsonlLog(self.answers, self.rank, self.world_size) if self.answers else nullcontext() as log:
            answers = {row["key"]: row for row in log.read()} if log else {}
            batches = self._batches({key: request for key, request in zip(keys, requests) if key not in answers})
            for batch in tqdm(batches, unit="batch", disable=self.rank != 0, leave=False):
                results = self._answer(list(batch.values()))
                rows = [
                    {"key": key, "text": result.text, "counts": vars(result.token_counts)}
                    for key, result in zip(batch, results, strict=True)
                ]
                if log:
                    log.append(*rows)
                answers |= {row["key"]: row for row in rows}
        return [GenerationResult(answers[key]["text"], VisualCounts(**answers[key]["counts"])) for key in keys]

    def _batches(self, requests: dict[str, Instance]) -> list[dict[str, Instance]]:
        """Requests with equal generation options in batches, by key."""
        batches = []
        for _, group in groupby(sorted(requests.items(), key=_options_text), _options_text):
            group = list(group)
            starts = range(0, len(group), self.batch_size)
            batches += [dict(group[start : start + self.batch_size]) for start in starts]
        return batches

    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        conversations = [self._conversation(request) for request in requests]
        prompt = encode(self.model, self.processor, conversations, self._requested_level(requests))
        options, until = _generation_options(requests[0].args[2], self.max_new_tokens)
        texts, tokens = generate(self.model, self.processor, prompt, self.view, **options)
        described = describe(self.model, prompt, self.view)
        return [
            GenerationResult(_cut(text, until), VisualCounts.of(*counts))
            for text, *counts in zip(texts, described, map(len, tokens), strict=True)
        ]

    def _conversation(self, request: Instance) -> list[dict]:
        """A sample as a chat; raises `ValueError` naming the sample if an image cannot be used."""
        _, to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        try:
            for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
                part["image"] = load_rgb(part["image"])
        except ValueError as error:
            raise ValueError(f"sample {request.doc_id} of {request.task_name}: {error}") from error
        return messages

    def _requested_level(self, requests: list[Instance]) -> int | list[int] | None:
        """The level for `encode`: a fixed one, None for the controller's choice, or one per request.

        A random level is drawn here from the sample's key, so that it does not depend on the batch.
        """
        if not self.config.granularities or self.config.controller != "random" or self.granularity is not None:
            return self.granularity
        return [_random_level(self.seed, request, len(self.config.granularities)) for request in requests]


def _options_text(item: tuple[str, Instance]) -> str:
    return json.dumps(item[1].args[2], sort_keys=True, default=str)


def _request_key(request: Instance) -> str:
    """A hash of what makes two requests the same: task, split, sample, generation options, and which repeat."""
    _, _, options, doc_id, task, split = request.args
    identity = json.dumps([task, split, doc_id, request.idx, options], sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _random_level(seed: int, request: Instance, levels: int) -> int:
    digest = hashlib.sha256(f"{seed} {_request_key(request)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % levels


def _generation_options(given: dict, max_new_tokens: int) -> tuple[dict, list[str]]:
    """A task's options for `generate`, greedy by default, and the texts that end an answer."""
    options = {name: value for name, value in given.items() if name in GENERATION and value is not None}
    options["max_new_tokens"] = int(given.get("max_new_tokens") or max_new_tokens)
    options["do_sample"] = bool(options.get("do_sample", False)) and options.get("temperature") != 0
    if not options["do_sample"]:  # generate warns of sampling options that it does not use
        options |= {"temperature": None, "top_p": None, "top_k": None}
    until = given.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def _cut(text: str, until: list[str]) -> str:
    """The answer up to the first text that ends it; one at the very start of the answer does not count."""
    text = text.strip()
    places = [place for stop in until if stop and (place := text.find(stop)) > 0]
    return text[: min(places)].strip() if places else text
