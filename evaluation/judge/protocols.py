"""How answers are judged: our protocol, and that of the authors' published code, whose prompt is in our words."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from granulon.evaluation.protocols import AUTHORS, OURS

from .reply import EMPTY_VERDICT, SegmentVerdict, Verdict, segments


@dataclass(frozen=True)
class JudgeProtocol:
    """
    Args:
        prompt: file with the judge's instructions.
        schema: of a reply; its `statistics` turns one into statistics.
        content: what the judge reads, by name, of question, answer, and reference (None if it is not shown).
        messages: of a call, from the instructions, the content as JSON, and parts with images.
        sees_reference: whether the judge can be shown the reference.
        empty: the reply to an empty answer, which then needs no call; None if it is judged as any other.
        image_side: pixels of the longer side; larger images are scaled down.
        image_detail: OpenAI's; "low" is 512 pixels.
        image_tokens: expected for an image, gpt-4o's of a square one.
        reply_tokens: expected.
        request: further options of a call.
    """

    prompt: Path
    schema: type[BaseModel]
    content: Callable[[str, str, str | None], dict[str, str]]
    messages: Callable[[str, str, list[dict]], list[dict]]
    sees_reference: bool
    empty: dict | None
    image_side: int
    image_detail: str
    image_tokens: int
    reply_tokens: int
    request: dict = field(default_factory=dict)


def _answer(question: str, answer: str, reference: str | None) -> dict[str, str]:
    return {"question": question, **({} if reference is None else {"reference": reference}), "answer": answer}


def _segments(question: str, answer: str, reference: str | None) -> dict[str, str]:
    return {f"segment_{number}": part for number, part in enumerate(segments(answer), 1)}


def _instructions_apart(prompt: str, text: str, images: list[dict]) -> list[dict]:
    content = [*images, {"type": "text", "text": text}] if images else text
    return [{"role": "system", "content": prompt}, {"role": "user", "content": content}]


def _one_message(prompt: str, text: str, images: list[dict]) -> list[dict]:
    parts = "\n\n".join(f"Segment {number}: {part}" for number, part in enumerate(json.loads(text).values(), 1))
    return [{"role": "user", "content": [{"type": "text", "text": f"{prompt}\n{parts}\n"}, *images]}]


PROTOCOLS = {
    OURS: JudgeProtocol(
        prompt=Path(__file__).with_name("prompt.md"),
        schema=Verdict,
        content=_answer,
        messages=_instructions_apart,
        sees_reference=True,
        empty=EMPTY_VERDICT,
        image_side=512,
        image_detail="low",
        image_tokens=85,
        reply_tokens=60,
    ),
    AUTHORS: JudgeProtocol(
        prompt=Path(__file__).with_name("prompt_authors.md"),
        schema=SegmentVerdict,
        content=_segments,
        messages=_one_message,
        sees_reference=False,
        empty=None,
        image_side=2048,  # of more pixels "high" makes as many
        image_detail="high",
        image_tokens=765,
        reply_tokens=120,
        request={"temperature": 0.1, "response_format": {"type": "json_object"}},
    ),
}
