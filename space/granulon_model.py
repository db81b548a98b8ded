"""The published model behind the Space: checks, prompt, image, answer, and what carried it.

MODEL_ID and MODEL_REVISION name the model: a Hub id and a revision, or a folder.
"""

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MODEL_ID = os.environ.get("MODEL_ID", "jinlab/granulon-qwen1.5b")
MODEL_REVISION = os.environ.get("MODEL_REVISION", "main")
MAX_PIXELS = 25_000_000
MAX_QUESTION = 1000  # characters
MAX_TOKENS = 512
SECONDS = 60  # time limit of an answer
VIEWS = ("auto", "full", "pixel", "semantic")
WORKER = ThreadPoolExecutor(1)  # generates answers: a new thread for each would leak memory
BY_QUESTION = "auto"  # the controller chooses the level


class Granulon:
    """The published model; every error that a user can cause is a ValueError."""

    def __init__(self, name=MODEL_ID, revision=MODEL_REVISION):
        published = {"revision": revision, "trust_remote_code": True}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **published).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(name, **published)
        self.load_rgb = get_class_from_dynamic_module("image_io.load_rgb", name, revision=revision)
        self.levels = [level["name"] for level in self.model.config.granularities]

    def check(self, path, question, level, view, max_new_tokens, temperature, seed):
        """Check the inputs; returns the image and a dict of settings.

        Raises:
            ValueError: with a message for the user.
        """
        question = (question or "").strip()
        if not path:
            raise ValueError("there is no image yet; upload one, or take an example")
        if not question:
            raise ValueError("there is no question yet; type one below the image")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters, the limit is {MAX_QUESTION}; shorten it")
        if level not in (BY_QUESTION, *self.levels):
            raise ValueError(f"the level is {level!r}; choose one of {(BY_QUESTION, *self.levels)}")
        if view not in VIEWS:
            raise ValueError(f"the view is {view!r}; choose one of {VIEWS}")
        try:
            image = self.load_rgb(path, max_pixels=MAX_PIXELS)
        except ValueError as error:
            # Without the path, which is one of the server.
            raise ValueError("this " + str(error).replace(f"image {path}", "image")) from None
        return image, {
            "turns": [question],
            "level": None if level == BY_QUESTION else level,
            "view": view,
            "max_new_tokens": int(min(max(max_new_tokens, 1), MAX_TOKENS)),
            "temperature": float(min(max(temperature, 0.0), 2.0)),
            "seed": int(seed or 0) % 2**32,
        }

    def prepare(self, image, turns):
        """The processed prompt of a conversation about an image: the user's turns and the answers between them."""
        chat = [
            {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": text}]}
            for number, text in enumerate(turns)
        ]
        chat[0]["content"].insert(0, {"type": "image", "image": image})
        return self.processor.apply_chat_template(
            chat,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to(self.model.device, dtype=self.model.dtype)

    def encode(self, inputs, level, view):
        """
        Encode the image and describe the chosen level and the clusters.

        Returns:
            the argument `visual` of `answer`, and a `dict`: level, chosen_by, probabilities (all None in a model
            without levels), view, tokens (pixel, semantic), clusters (number, score, share) and, as an array,
            cluster_map (H, W).
        """
        visual = self.model.explain(**inputs, granularity=level)
        (description,) = visual.describe(view)
        (clusters,) = description.pop("images")
        chosen = description.pop("granularity") or dict.fromkeys(("name", "chosen_by", "probabilities"))
        return visual, {"level": chosen.pop("name"), **chosen, **description, **clusters}

    def answer(self, inputs, visual, settings):
        """Yield (answer so far, seconds to the first token) during generation; closing the generator stops it.

        Returns:
            the ids of the answer's tokens, of a generator that ended.

        Raises:
            TimeoutError: no new text for `SECONDS`.
        """
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS
        )
        stopped, start = threading.Event(), time.perf_counter()

        def generate():
            try:
                if stopped.is_set():
                    return
                torch.manual_seed(settings["seed"])
                output = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    visual=visual,
                    visual_view=settings["view"],
                    max_new_tokens=settings["max_new_tokens"],
                    max_time=SECONDS,
                    do_sample=settings["temperature"] > 0,
                    temperature=settings["temperature"] or None,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), stopped.is_set())],
                )
                return output[0, inputs["input_ids"].shape[1] :]
            finally:
                streamer.end()  # also after an error, which the waiting thread then raises

        generation = WORKER.submit(generate)
        text, first = "", None
        try:
            for piece in streamer:
                first = time.perf_counter() - start if first is None and piece else first
                text += piece
                if piece:
                    yield text, first
        except queue.Empty:
            raise TimeoutError(
                f"the answer took longer than {SECONDS} s; ask for a shorter one, or from the semantic tokens alone"
            ) from None
        finally:
            stopped.set()
            wait([generation])  # else the next answer would have to
        if generation.done() and generation.exception():
            raise generation.exception()
        if not text:
            yield "", time.perf_counter() - start
        return generation.result() if generation.done() else None

    def evidence(self, inputs, visual, ids):
        """For each cluster the log-likelihood, in nats, that the answer loses without it; {} if there is none."""
        if ids is None or visual.semantic_mask is None:
            return {}
        try:
            found = self.model.evidence(**inputs, visual=visual, answer_ids=ids)
        except ValueError:  # an empty answer
            return {}
        return {entry["number"]: entry["nats"] for entry in found["clusters"]}
