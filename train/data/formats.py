"""Parse a stored row of any supported format into its answers.

Every answer of a conversation becomes a `Turn` with the preceding messages as its prompt; rows.py says which of them
share a row.
"""

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import fsspec
from datasets import Features, Json, List

from modeling_granulon.image_io import load_rgb

# Required columns of each format; a source has the first one that its columns fit.
FORMATS = {
    "llava": ("conversations",),
    "messages": ("messages",),
    "texts": ("texts",),
    "prompt-completion": ("prompt", "completion"),
    "multiple-choice": ("question", "choices", "answer"),
    "question-answer": ("question", "answer"),
    "question-answers": ("question", "answers"),
    "instruction": ("instruction", "output"),
}
FIELDS = (*dict.fromkeys(name for needed in FORMATS.values() for name in needed), "input", "images", "granularity")
ALIASES = {"choices": ("options",), "answer": ("correct_choice_idx",)}  # other names of columns
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Places of media in the prompts of other models: trained as words, they would teach answers to what is not seen.
MEDIA_MARK = re.compile(
    r"<\|?/?(?:video|audio|image|img|vision|sound|speech|start_of_image)(?:[\w-]*|_\d+)\|?>|\[IMG\]|<ImageHere>",
    re.IGNORECASE,
)
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # columns that a row may not fill
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_MARK = "<image>"


class BadRow(ValueError):
    """A row that cannot be used for training; the message gives the reason."""


@dataclass
class Turn:
    """One answer with its prompt; `images` are mappings with `bytes` or `path`, in the order of the prompt."""

    prompt: list[dict]
    completion: list[dict]
    images: list[dict]
    granularity: str | None


@dataclass
class Reader:
    """Parses the stored rows of one source into `Turn`s."""

    label: str
    format: str
    columns: dict[str, str]  # our name -> column
    image_folder: str
    question: str | None = None
    is_lines: bool = False
    features: Features | None = None
    map: Callable[[dict], dict] | None = None

    def row(self, stored: dict) -> dict | None:
        """A stored row as plain Python; None for an empty line."""
        return mapped(parse_row(stored, self.is_lines, self.features), self.map)

    def for_quarantine(self, stored: dict) -> dict:
        """A stored row without the bytes of images."""
        try:
            row = self.row(stored)
        except Exception:  # as in turns
            row = stored
        return without_bytes(row)

    def turns(self, stored: dict) -> list[Turn]:
        """The answers of a stored row with their prompts; raises `BadRow` and nothing else."""
        try:
            return self._turns(stored)
        except BadRow:
            raise
        except Exception as error:  # rows may be malformed in any way
            raise BadRow(f"it cannot be read: {type(error).__name__}: {error}") from error

    def _turns(self, stored: dict) -> list[Turn]:
        row = self.row(stored)
        if row is None:
            return []
        if media := [name for name in OTHER_MEDIA if row.get(name)]:
            raise BadRow(f"it has {' and '.join(media)}, and the model sees images alone")
        given = {name: row.get(column) for name, column in self.columns.items()}
        if "question" in FORMATS[self.format] and given.get("question") is None:
            given["question"] = self.question
        missing = [self.columns.get(name, name) for name in FORMATS[self.format] if given.get(name) is None]
        if "question" in FORMATS[self.format] and "images" in self.columns and given["images"] is None:
            missing.append(self.columns["images"])  # an empty list means no image on purpose
        if missing:
            raise BadRow(f"it has no {' and no '.join(missing)}")
        images = [self._image(image) for image in _as_list(given.get("images"))]
        messages, first_target = self._messages(given)
        messages, first_target, dropped = _without_leading_answers(messages, first_target)
        levels = given.get("granularity")
        if isinstance(levels, list) and dropped:
            levels = levels[dropped:]
        messages, images = _with_images(messages, images, self._image)
        return _split_turns(messages, first_target, images, levels)

    def _messages(self, given: dict) -> tuple[list[dict], int]:
        """The conversation, and the index from which its answers are trained on."""
        if self.format in ("llava", "messages"):
            turns = _mappings(given[FORMATS[self.format][0]])
            return [
                _message(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns
            ], 0
        if self.format != "prompt-completion":
            pairs = [zip(("user", "assistant"), pair) for pair in _PAIRS[self.format](given)]
            return [_message(role, _text(text)) for pair in pairs for role, text in pair], 0
        prompt, completion = (
            [{"role": role, "content": given[name]}] if isinstance(given[name], str) else _mappings(given[name])
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        return [_message(turn.get("role"), turn.get("content")) for turn in prompt + completion], len(prompt)

    def _image(self, image) -> dict:
        """An image as bytes or a path, relative ones joined to `image_folder`."""
        if isinstance(image, dict) and "url" in image:
            image = image["url"]
        if isinstance(image, dict) and (image.get("bytes") is not None or image.get("path")):
            content, path = image.get("bytes"), image.get("path")
        elif isinstance(image, (bytes, bytearray)):
            content, path = bytes(image), None
        elif isinstance(image, str) and image.startswith("data:"):
            content, path = _base64_bytes(image), None
        elif isinstance(image, str) and "://" in image:
            raise BadRow(f"image {image} is a URL; download it and give the file")
        elif isinstance(image, str) and image:
            content, path = None, image
        else:
            raise BadRow(f"an image is a file name or bytes, found {type(image).__name__}")
        if path and content is None and "://" not in path:
            path = os.path.join(self.image_folder, path)
        return {"bytes": content, "path": path}


def open_image(image: dict):
    """The RGB picture of an entry of `Turn.images`; raises `ValueError`."""
    if image["bytes"] is not None:
        return load_rgb(image["bytes"])
    if "://" not in image["path"]:
        return load_rgb(image["path"])
    try:
        with fsspec.open(image["path"], "rb") as file:
            content = file.read()
    except Exception as error:  # every file system of fsspec has its own exceptions
        raise ValueError(f"image {image['path']} cannot be read: {error}") from error
    return load_rgb(content)


def parse_row(stored: dict, is_lines: bool, features: Features | None) -> dict | None:
    """A stored row as plain Python; None for an empty line; raises `BadRow` for a line that is not a JSON object."""
    if not is_lines:
        row = _decode_json(stored, features)
        inner = row.get("json") if "__key__" in row else None  # WebDataset: a sample's texts are in its .json
        return {**inner, **{k: v for k, v in row.items() if k != "json"}} if isinstance(inner, dict) else row
    return parse_json_object(stored["text"]) if stored["text"].strip() else None


def parse_json_object(line: str) -> dict:
    """The JSON object of a line; raises `BadRow` for anything else."""
    if "\ufffd" in line:
        raise BadRow("the line is not UTF-8")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRow(f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"the line is a JSON {type(row).__name__}, expected an object")
    return row


def _decode_json(value, feature):
    """Decode columns of mixed types, which `datasets` stores as JSON text."""
    if value is None or feature is None:
        return value
    if isinstance(feature, Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, dict):
        return {key: _decode_json(entry, feature.get(key)) for key, entry in value.items()}
    if isinstance(feature, List):
        return [_decode_json(entry, feature.feature) for entry in value]
    return value


def _as_list(images) -> list:
    if images is None or isinstance(images, (list, tuple)):
        return [image for image in images or [] if image is not None]
    return [images]


def _mappings(turns) -> list[dict]:
    turns = _from_json(turns)
    turns = list(map(_from_json, turns)) if isinstance(turns, list) else turns
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"a conversation is a list of turns, found {type(turns).__name__}")
    return turns


def _text(value) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"a question and its answer are texts, found {type(value).__name__}")
    return value


def _text_pairs(given: dict) -> list[tuple]:
    """The Cauldron, FineVision: a list of `user` and `assistant`."""
    return [(turn.get("user"), turn.get("assistant")) for turn in _mappings(given["texts"])]


def _commonest_answer(given: dict) -> list[tuple]:
    """VQA: the answers of several people, of which the commonest counts, or the first of these."""
    answers = _from_json(given["answers"])
    if not isinstance(answers, list) or not answers:
        raise BadRow(f"answers is {answers!r}, expected a list of texts")
    texts = [_text(answer.get("answer") if isinstance(answer, dict) else answer) for answer in answers]
    return [(given["question"], Counter(texts).most_common(1)[0][0])]


def _chosen(given: dict) -> list[tuple]:
    """Multiple choice: the options follow the question by letter, and the answer is the text of the right one."""
    choices, answer = _from_json(given["choices"]), given["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise BadRow(f"it has the choices {choices!r}, expected a list of 2 to {len(LETTERS)}")
    texts = [_text(choice) for choice in choices]
    if answer not in texts:
        place = (
            LETTERS.find(answer.strip().upper()) if isinstance(answer, str) and len(answer.strip()) == 1 else answer
        )
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(texts):
            raise BadRow(f"its answer is {answer!r}, expected the text, letter or number (from 0) of one of {texts}")
        answer = texts[place]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts))
    return [(f"{_text(given['question'])}\n{options}\nAnswer with the option's content.", answer)]


def _instruction(given: dict) -> list[tuple]:
    """Alpaca: an instruction, perhaps with an input, and the output."""
    parts = [given["instruction"], given.get("input")]
    return [("\n".join(_text(part) for part in parts if part), given["output"])]


# Formats of questions and answers: a row gives pairs of them.
_PAIRS = {
    "texts": _text_pairs,
    "multiple-choice": _chosen,
    "question-answer": lambda given: [(given["question"], given["answer"])],
    "question-answers": _commonest_answer,
    "instruction": _instruction,
}


def mapped(row: dict | None, function: Callable | None) -> dict | None:
    """The row as a source's own function makes it; raises `BadRow` where that fails."""
    if row is None or function is None:
        return row
    try:
        made = function(row)
    except Exception as error:  # a function of the user's may raise anything
        raise BadRow(f"map fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, dict):
        raise BadRow(f"map gives {type(made).__name__}, expected a row: a dict with the columns of a format")
    return made


def _without_leading_answers(messages: list[dict], first_target: int) -> tuple[list[dict], int, int]:
    """A conversation without the answers before its first question, and how many of those to learn it lost."""
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    leading = [place for place in range(first) if messages[place]["role"] == "assistant"]
    kept = [message for place, message in enumerate(messages) if place not in leading]
    before = sum(place < first_target for place in leading)
    return kept, first_target - before, len(leading) - before


def _from_json(value):
    """Decode JSON text, as which `datasets` stores list entries of different types."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value
    except ValueError:
        return value


def _base64_bytes(address: str) -> bytes:
    try:
        return base64.b64decode(address.partition(",")[2], validate=True)
    except ValueError as error:
        raise BadRow(f"an image is given as broken base64: {error}") from error


def _message(role, content) -> dict:
    """A message whose content is a list of parts: `{"type": "text", "text"}` and `{"type": "image"[, "image"]}`."""
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"a turn has the role {role!r}, expected one of {tuple(ROLES)}")
    role = ROLES[role]
    if content is None:
        return {"role": role, "content": []}
    if role != "assistant":
        _check_media_marks(content)
    if isinstance(content, str):
        has_marks = role != "assistant" and IMAGE_MARK in content
        # "<image>\nWhat ...": the line break after the mark is not a text
        pieces = map(str.strip, re.split(f"({IMAGE_MARK})", content)) if has_marks else [content]
        image = IMAGE_MARK if has_marks else None
        parts = [{"type": "image"} if p == image else {"type": "text", "text": p} for p in pieces if p]
        return {"role": role, "content": parts}
    if not isinstance(content, list):
        raise BadRow(f"the content of a turn is a text or a list of parts, found {type(content).__name__}")
    return {"role": role, "content": [_part(part, role) for part in content]}


def _check_media_marks(content):
    for text in (
        [content] if isinstance(content, str) else [part.get("text") for part in content if isinstance(part, dict)]
    ):
        marks = MEDIA_MARK.findall(text) if isinstance(text, str) else []
        if unknown := [mark for mark in marks if mark != IMAGE_MARK]:
            raise BadRow(
                f"its text has the mark {unknown[0]} of a medium; only {IMAGE_MARK} is known: mark images by it, or "
                "name a function in map"
            )


def _part(part, role: str) -> dict:
    part = _from_json(part)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise BadRow(f"a turn has a part of type {kind!r}, expected text or image")
    if role == "assistant":
        raise BadRow("an answer contains an image")
    given = [part[key] for key in ("image", "image_url", "path", "url", "bytes") if part.get(key) is not None]
    return {"type": "image", "image": given[0]} if given else {"type": "image"}


def _with_images(messages: list[dict], images: list[dict], locate) -> tuple[list[dict], list[dict]]:
    """Messages with bare image parts, and the images in their order; images without a place go before the question."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    bare = sum("image" not in part for part in parts)
    users = [message for message in messages if message["role"] == "user"]
    if not parts and images and users:
        users[0]["content"] = [{"type": "image"} for _ in images] + users[0]["content"]
        return messages, images
    if bare != len(images):
        raise BadRow(f"it has {bare} places for images but {len(images)} images")
    unplaced = iter(images)
    images = [locate(part.pop("image")) if "image" in part else next(unplaced) for part in parts]
    return messages, images


def _split_turns(messages: list[dict], first_target: int, images: list[dict], granularity) -> list[Turn]:
    """One `Turn` for each answer from `first_target` on; raises `BadRow` where a question has none."""
    roles = [message["role"] for message in messages]
    for index, role in enumerate(roles):
        if role == "assistant" and roles[index - 1 : index] != ["user"]:
            raise BadRow(f"turn {index} is an answer, but the turn before it is not a question")
    if not roles or roles[-1] != "assistant" or first_target >= len(roles):
        raise BadRow("it does not end with an answer")
    targets = [index for index, role in enumerate(roles) if role == "assistant" and index >= first_target]
    given = granularity if isinstance(granularity, list) else [granularity] * len(targets)
    if len(given) != len(targets):
        raise BadRow(f"it has {len(given)} levels for {len(targets)} answers")
    turns = []
    for index, level in zip(targets, given, strict=True):
        answer = "".join(part["text"] for part in messages[index]["content"])
        if not answer.strip():
            raise BadRow(f"turn {index} is an answer without text")
        prompt = messages[:index]
        shown = sum(part["type"] == "image" for message in prompt for part in message["content"])
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        if level is not None and not isinstance(level, str):
            raise BadRow(f"its level is {level!r}, expected a name")
        turns.append(Turn(prompt, completion, images[:shown], level or None))
    return turns


def without_bytes(value):
    """The value with the bytes replaced by their number."""
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return {key: without_bytes(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_bytes(entry) for entry in value]
    return value
