"""A conversation as the language model reads it: what stands before each answer, and the answer."""

from typing import NamedTuple

from trl import apply_chat_template


class Rendered(NamedTuple):
    """An answer and all that stands before it, as the chat template writes them."""

    prompt: str
    answer: str

    def continues(self, earlier: "Rendered") -> bool:
        """Whether the prompt begins with an earlier turn, so that both can share a row."""
        return self.prompt.startswith(earlier.prompt + earlier.answer)

    def after(self, earlier: "Rendered | None") -> str:
        """What the prompt adds to an earlier turn of the row."""
        return self.prompt if earlier is None else self.prompt[len(earlier.prompt + earlier.answer) :]


def render(processor, prompt, completion) -> Rendered:
    """The prompt and its one answer, both messages or both texts."""
    texts = {"prompt": prompt, "completion": completion}
    if not isinstance(prompt, str):
        texts = apply_chat_template(texts, processor)
    return Rendered(texts["prompt"], texts["completion"])


def render_answers(processor, prompt, completion) -> list[Rendered]:
    """
    Every answer of a row, in order.

    Args:
        prompt, completion: messages, the completion ending with an answer and with questions between its answers; or
            two texts.

    Raises:
        ValueError: a chat template that writes earlier turns differently once there are later ones: its answers cannot
            share a row.
    """
    if isinstance(completion, str):
        return [render(processor, prompt, completion)]
    answers = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
    rendered = [render(processor, prompt + completion[:place], completion[place : place + 1]) for place in answers]
    for earlier, later in zip(rendered, rendered[1:]):
        if not later.continues(earlier):
            raise ValueError(
                "the chat template writes a turn differently once another follows, so that the answers of a "
                "conversation cannot share a row; set answers_per_row to 1"
            )
    return rendered
