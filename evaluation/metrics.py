"""Metrics as the paper reports them, each a function of sums over samples, so that a bootstrap can resample the sums.

A metric is a few statistics of one answer and its references (numbers, additive over samples) and the value that their
sums have: recall is (recall of this answer, 1) and the first sum over the second. Values are per cent, except BLEU,
which has its own scale of 100.

What is counted:

- `recall`, the authors' definition: the share of the reference's distinct words that occur in the answer. Words are
  runs of letters and digits in lower case; with several references the best one counts **(ours)**.
- `exact_match`: the answer has the words of a reference, articles left out.
- `vqa_accuracy`: A-OKVQA's own for direct answers: a third for each of the ten annotators who gave this answer, 1 at
  most.
- `choice_accuracy`: the letter or the words of one choice are read off the answer; an answer from which no single
  choice can be read is wrong and is counted in `choice_unclear`.
- `bleu`: sacrebleu's corpus BLEU (13a tokenizer). The authors used pycocoevalcap's, which needs Java.
- `bertscore`: F1 of torchmetrics, not rescaled, as the authors' figures above 90 show.
- `yes_no_*`: for questions about what is there (POPE). The answer is its first yes or no; an answer with neither is
  wrong, and counted in `yes_no_unclear`. `yes_no_always_yes` is what a model scores that says yes to everything.
- `chair_*`: hallucinated objects among the mentioned ones, captions with at least one, and share of the true objects
  that are mentioned.
- `gptscore`, `gpt_hallucination`, `gpt_granularity`: a judge's scores of the whole answer, 0 to 100 (judge/); with
  `_1` to `_5` behind, those of a segment, as the authors have them.

Shapes: N samples, S statistics, R resamples.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WORD = re.compile(r"\w+")
ARTICLES = {"a", "an", "the"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BERTSCORE_MODEL = "roberta-large"
BERTSCORE_LAYER = 17  # of roberta-large, the one that bert-score chose for it
# torchmetrics (1.9) sorts answers and references by length, each on their own, and does not restore their order: with
# three pairs or more, answers are compared with the references of others.
BERTSCORE_AT_ONCE = 2
BLEU_ORDERS = 4
SEGMENTS = 5  # of an answer, for a judge
JUDGED = ("gptscore", "gpt_hallucination", "gpt_granularity")  # of the whole; those of a segment end in its number


@dataclass(frozen=True)
class Metric:
    """
    Args:
        statistics: of an answer and its references: S numbers. None where they come from something else than texts
            alone: a choice, a truth, a batch (BERTScore).
        value: of sums (R,S): (R,), nan where nothing was counted.
        higher_is_better: for the tables' bold figure; None where neither is.
        proportion: the first statistic is 0 or 1 and the value its share, so that McNemar's test fits.
    """

    statistics: Callable[[str, Sequence[str]], Sequence[float]] | None
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool | None = True
    proportion: bool = False


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and in order."""
    return WORD.findall(text.lower())


def recall(answer: str, reference: str) -> float:
    """Share of the reference's distinct words that occur in the answer; nan for a reference without words."""
    wanted = set(words(reference))
    return len(wanted & set(words(answer))) / len(wanted) if wanted else float("nan")


def best_recall(answer: str, references: Sequence[str]) -> float:
    """The highest recall over the references; raises `ValueError` where none has words."""
    return max(recall(answer, reference) for reference in _usable(references))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer has the words of a reference, in order and articles left out."""
    return float(any(_content(answer) == _content(reference) for reference in _usable(references)))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """A-OKVQA's accuracy of a direct answer: matches among the annotators' answers over 3, at most 1."""
    matches = sum(_content(answer) == _content(reference) for reference in _usable(references))
    return min(1.0, matches / 3)


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """
    Which of the choices an answer names, or None where it names none or more than one.

    Read in this order: the answer is a choice's words; it begins with a letter that stands alone ("B", "(b)", "B.
    tennis"); it says "answer is B", "option B" or "(B)"; a single choice's words stand in it; one capital letter
    stands alone in it. "B or C" names two.
    """
    content = _content(answer)
    matches = [index for index, choice in enumerate(choices) if _content(choice) == content]
    if content and len(matches) == 1:
        return matches[0]
    begins, says, stands = _letter_patterns(len(choices))
    for pattern in (begins, says):
        if (named := _single_letter(pattern, answer)) is not None:
            return named
    inside = _choices_inside(content, choices)
    return inside[0] if len(inside) == 1 else _single_letter(stands, answer)


def read_yes_no(answer: str) -> bool | None:
    """The first yes or no of an answer, None where it has neither."""
    return next((word == "yes" for word in words(answer) if word in ("yes", "no")), None)


def choice_statistics(answer: str, choices: Sequence[str], right: int) -> dict[str, list[float]]:
    """The statistics of `choice_accuracy` and `choice_unclear`."""
    read = read_choice(answer, choices)
    return {"choice_accuracy": [float(read == right), 1.0], "choice_unclear": [float(read is None), 1.0]}


def yes_no_statistics(answer: str, truth: bool) -> list[float]:
    """(right, said yes, is yes, said yes and is yes, unclear, 1) of an answer to a yes/no question."""
    said = read_yes_no(answer)
    return [float(entry) for entry in (said is truth, said is True, truth, said is True and truth, said is None, 1)]


def chair_statistics(mentioned: Sequence[str], present: Sequence[str]) -> list[float]:
    """(hallucinated mentions, mentions, has a hallucination, 1, true objects mentioned, true objects)."""
    hallucinated = sum(thing not in present for thing in mentioned)
    covered = len(set(mentioned) & set(present))
    return [float(entry) for entry in (hallucinated, len(mentioned), hallucinated > 0, 1, covered, len(set(present)))]


def bleu_statistics(answer: str, references: Sequence[str]) -> list[float]:
    """Matches and candidates for 1- to 4-grams, length of the answer and of the closest reference."""
    score = _bleu().corpus_score([answer], [[reference] for reference in _usable(references)])
    return [float(entry) for entry in (*score.counts, *score.totals, score.sys_len, score.ref_len)]


def bertscore_statistics(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    model: str = BERTSCORE_MODEL,
    layer: int | None = BERTSCORE_LAYER,
    device=None,
) -> list[list[float]]:
    """
    (F1, 1) of each answer against the best of its references; an empty answer has 0.

    Args:
        model: Hub id or folder of the encoder; a result says which.
        layer: its hidden state; None is the last.

    Raises:
        ValueError: the model cannot be had, or references are missing.
    """
    pairs = [
        (row, answer, reference)
        for row, (answer, own) in enumerate(zip(answers, references, strict=True))
        for reference in _usable(own)
        if words(answer)
    ]
    best = [0.0] * len(answers)
    score = _bertscorer(model, layer, device) if pairs else None
    for start in range(0, len(pairs), BERTSCORE_AT_ONCE):
        rows, predictions, targets = zip(*pairs[start : start + BERTSCORE_AT_ONCE])
        for row, f1 in zip(rows, score(list(predictions), list(targets)), strict=True):
            best[row] = max(best[row], f1)
    return [[f1, 1.0] for f1 in best]


def _bertscorer(model: str, layer: int | None, device) -> Callable[[list[str], list[str]], list[float]]:
    """torchmetrics' BERTScore by an encoder that is loaded once."""
    from torchmetrics.functional.text.bert import bert_score  # takes seconds to import
    from transformers import AutoModel, AutoTokenizer

    try:
        encoder, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the BERTScore model {model} cannot be had: {reason}") from error

    def score(predictions: list[str], targets: list[str]) -> list[float]:
        settings = {"model": encoder, "user_tokenizer": tokenizer, "num_layers": layer, "truncation": True}
        found = bert_score(predictions, targets, batch_size=BERTSCORE_AT_ONCE, device=device, **settings)["f1"]
        return np.atleast_1d(np.asarray(found, dtype=float)).tolist()

    return score


def statistics(names: Sequence[str], answer: str, references: Sequence[str]) -> dict[str, list[float]]:
    """
    The statistics of several metrics for one answer; for `bertscore`, which is scored in batches, the texts.

    Raises:
        ValueError: references without words.
    """
    pair = {"answer": answer, "references": list(_usable(references))}
    return {
        name: pair if METRICS[name].statistics is None else list(METRICS[name].statistics(answer, references))
        for name in names
    }


def value(name: str, statistics_NS: Sequence[Sequence[float]]) -> float:
    """The value of a metric over samples; nan for none."""
    if len(statistics_NS) == 0:
        return float("nan")
    return float(METRICS[name].value(np.asarray(statistics_NS, dtype=float).sum(0, keepdims=True))[0])


def _share(top: int, bottom: int, scale: float = 100.0):
    """The value that is one sum over another."""

    def share(sums_RS: np.ndarray) -> np.ndarray:
        top_R, bottom_R = sums_RS[:, top], sums_RS[:, bottom]
        return scale * np.divide(top_R, bottom_R, out=np.full(len(sums_RS), np.nan), where=bottom_R > 0)

    return share


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda answer, references: [score(answer, references), 1.0]


def _f1(sums_RS: np.ndarray) -> np.ndarray:
    """2 x said and is yes over (said yes + is yes)."""
    said_or_is_R = sums_RS[:, 1] + sums_RS[:, 2]
    return 200 * np.divide(sums_RS[:, 3], said_or_is_R, out=np.full(len(sums_RS), np.nan), where=said_or_is_R > 0)


def _corpus_bleu(sums_RS: np.ndarray) -> np.ndarray:
    """Corpus BLEU of summed counts, by sacrebleu itself."""
    counts_RS = sums_RS.astype(int)
    return np.array(
        [
            type(_bleu())
            .compute_bleu(
                correct=row[:BLEU_ORDERS].tolist(),
                total=row[BLEU_ORDERS : 2 * BLEU_ORDERS].tolist(),
                sys_len=int(row[-2]),
                ref_len=int(row[-1]),
                smooth_method="exp",
            )
            .score
            for row in counts_RS
        ]
    )


def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU()


@lru_cache
def _letter_patterns(choices: int) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """What finds a choice's letter: at the start of an answer; behind "answer is", "option" or a bracket; anywhere."""
    letters = LETTERS[:choices]
    # "A dog" and "I see" begin with a word; a small letter needs a mark behind it, or nothing.
    capital = rf"([{letters}])(?![\w'’])(?!(?<=[AI])\s+(?!because|since|and|or)[a-z])"
    letter = rf"(?:{capital}|([{letters.lower()}])(?=\s*(?:[).:,]|$)))"
    not_several = rf"(?!\W+(?:and|or)\W+[{letters}]\b)"
    behind = r"(?i:\b(?:answer|option|choice)(?:\s+(?:is|was))?\s*:?\s*)[(\"'“]?"
    return (
        re.compile(rf"\A\W*{letter}{not_several}"),
        re.compile(rf"{behind}{letter}{not_several}|\({letter}"),
        re.compile(rf"(?<![\w'’.-]){capital}(?![.-]\w)"),  # not of "D.C." or "D-sized"
    )


def _single_letter(pattern: re.Pattern, answer: str) -> int | None:
    """Index of the letter that the pattern finds, if it is the only one."""
    letters = {match[match.lastindex].upper() for match in pattern.finditer(answer)}
    return LETTERS.index(letters.pop()) if len(letters) == 1 else None


def _choices_inside(content: list[str], choices: Sequence[str]) -> list[int]:
    """The choices whose words stand in an answer's."""
    inside = [index for index, choice in enumerate(choices) if _contains(content, _content(choice))]
    # "tennis racket" contains "tennis": the longer choice is meant.
    parts = {
        index
        for index in inside
        for other in inside
        if _contains(_content(choices[other]), _content(choices[index])) and other != index
    }
    return [index for index in inside if index not in parts]


def _content(text: str) -> list[str]:
    return [word for word in words(text) if word not in ARTICLES]


def _contains(sequence: list[str], part: list[str]) -> bool:
    """Whether the part stands in the sequence, word by word."""
    starts = range(len(sequence) - len(part) + 1)
    return bool(part) and any(sequence[start : start + len(part)] == part for start in starts)


def _usable(references: Sequence[str]) -> list[str]:
    if isinstance(references, str):
        references = [references]
    usable = [reference for reference in references if isinstance(reference, str) and words(reference)]
    if not usable:
        raise ValueError(f"a sample has no reference with words in it, found {list(references)!r}")
    return usable


METRICS = {
    "recall": Metric(_mean_of(best_recall), _share(0, 1)),
    "exact_match": Metric(_mean_of(exact_match), _share(0, 1), proportion=True),
    "vqa_accuracy": Metric(_mean_of(vqa_accuracy), _share(0, 1)),
    "bleu": Metric(bleu_statistics, _corpus_bleu),
    "bertscore": Metric(None, _share(0, 1)),
    "choice_accuracy": Metric(None, _share(0, 1), proportion=True),
    "choice_unclear": Metric(None, _share(0, 1), higher_is_better=False, proportion=True),
    "yes_no_accuracy": Metric(None, _share(0, 5), proportion=True),
    "yes_no_f1": Metric(None, _f1),
    "yes_no_precision": Metric(None, _share(3, 1)),
    "yes_no_recall": Metric(None, _share(3, 2)),
    "yes_no_yes_rate": Metric(None, _share(1, 5), higher_is_better=None),
    "yes_no_always_yes": Metric(None, _share(2, 5), higher_is_better=None),
    "yes_no_unclear": Metric(None, _share(4, 5), higher_is_better=False),
    "chair_i": Metric(None, _share(0, 1), higher_is_better=False),
    "chair_s": Metric(None, _share(2, 3), higher_is_better=False),
    "chair_cover": Metric(None, _share(4, 5)),
    "accuracy": Metric(None, _share(0, 1), proportion=True),
    "mean": Metric(None, _share(0, 1, scale=1.0)),
    "ratio": Metric(None, _share(0, 1)),
    "ratio_wrong": Metric(None, _share(0, 1), higher_is_better=False),
    **{
        f"{figure}{segment}": Metric(None, _share(0, 1, scale=1.0), higher_is_better=figure != "gpt_hallucination")
        for figure in JUDGED
        for segment in ("", *(f"_{number}" for number in range(1, SEGMENTS + 1)))
    },
}
