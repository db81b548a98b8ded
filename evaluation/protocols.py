"""How a benchmark is asked and scored: our protocol, and that of the authors' published code.

What is asked and which figures there are stands here; what the judge sees and returns in judge/protocols.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .metrics import BERTSCORE, JUDGED, JUDGED_SEGMENTS, LETTERS


@dataclass(frozen=True)
class Protocol:
    """
    Args:
        note: what a column of a table follows, for the note below it.
        tasks: the tasks of the protocol, each with the task file that asks its questions; None for all, as they are.
        figures: names of the figures that it has; None for all but `no_figures`.
        options: of generation, instead of a task's own.
        question_first: whether the question stands before the image.
        limit: number of samples, instead of a task's own.
    """

    note: str
    tasks: dict[str, str] | None = None
    figures: tuple[str, ...] | None = None
    no_figures: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    question_first: bool = False
    limit: int | None = None

    def has(self, task: str, figure: str | None = None) -> bool:
        """Whether a task, and a figure of it, is part of the protocol."""
        known = figure is None or (figure in self.figures if self.figures else figure not in self.no_figures)
        return known and (self.tasks is None or task in self.tasks)


def question_with_options(question: str, choices: Sequence[str]) -> str:
    """A question of multiple choice as the authors write it."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
    return f"{question.strip()}\nOptions:{options}\n(Answer with the option content)"


OURS, AUTHORS = "ours", "authors"
PROTOCOLS = {
    OURS: Protocol(
        "questions without options in the prompt unless a letter is asked for; recall beside exact match; the judge "
        "scores whole answers, and empty ones get 0 without it",
        no_figures=JUDGED_SEGMENTS,
    ),
    AUTHORS: Protocol(
        "as in the authors' published code: options in the prompt, whose content is the answer; recall of distinct "
        "words; GPTscore is the mean over five segments of an answer, empty ones included; 39 samples, since all "
        "published GPTscores are multiples of 1/39",
        tasks={
            "granulon_seedbench_recall": "granulon_seedbench_recall_authors",
            "granulon_aokvqa_direct": "granulon_aokvqa_direct_authors",
        }
        | {
            task: task
            for task in (
                "granulon_cc12m",
                "granulon_imagenet21k_recap",
                "granulon_flux_reason",
                "granulon_surgvlm_phase",
                "granulon_surgvlm_instrument",
            )
        },
        figures=("recall", BERTSCORE, *JUDGED[:2], *JUDGED_SEGMENTS),
        question_first=True,
        options={"max_new_tokens": 256, "do_sample": False, "until": []},
        limit=39,
    ),
}
