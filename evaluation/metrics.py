"""Metrics as the paper reports them, each a function of sums over samples, so that a bootstrap can resample the sums.

A metric consists of statistics of one answer (numbers, additive over samples) and a value computed from their sums:
recall is (recall of this answer, 1) and the first sum over the second. Values are per cent, except BLEU, which has its
own scale of 100.

docs/evaluation.md explains each metric under "Metrics".

Shapes: N samples, S statistics, R resamples.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from granulon.hub.text import content_words, exact_match, first_line, usable_references, words

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BERTSCORE = "bertscore"  # computed in batches after a run; samples hold the texts until then
BERTSCORE_MODEL = "roberta-large"
BERTSCORE_LAYERS = {"roberta-large": 17}  # the hidden state that bert-score uses; of other encoders the last
BERTSCORE_BATCH = 32  # pairs in one pass
BLEU_ORDERS = 4
JUDGED = ("gptscore", "gpt_hallucination", "gpt_granularity")  # of an answer
SEGMENTS = 5  # of an answer in the authors' protocol
JUDGED_SEGMENTS = tuple(f"{name}_{number}" for name in JUDGED[:2] for number in range(1, SEGMENTS + 1))


@dataclass(frozen=True)
class Metric:
    """
    A metric as statistics of samples and a function of their sums.

    Args:
        statistics: function of an answer and its references that returns S numbers; None for metrics that need
            other inputs (choices, a truth value) or a batch (BERTScore).
        value: function of sums (R,S) that returns (R,), nan if nothing was counted.
        higher_is_better: decides the bold figure of a table; None for neither.
        proportion: whether the first statistic is 0 or 1 and the value its share, as McNemar's test needs.
    """

    statistics: Callable[[str, Sequence[str]], Sequence[float]] | None
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool | None = True
    proportion: bool = False


def recall(answer: str, reference: str) -> float:
    """The share of the reference's distinct words that occur in the answer; nan for a reference without words."""
    wanted = set(words(reference))
    return len(wanted & set(words(answer))) / len(wanted) if wanted else float("nan")


def best_recall(answer: str, references: Sequence[str]) -> float:
    """The highest recall over the references; raises `ValueError` where none has words."""
    return max(recall(answer, reference) for reference in usable_references(references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """A-OKVQA's accuracy of a direct answer: matches among the annotators' answers over 3, at most 1."""
    matches = sum(content_words(answer) == content_words(reference) for reference in usable_references(references))
    return min(1.0, matches / 3)


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that the first of `CHOICE_READINGS` with a single one finds; None if none does."""
    for reading in CHOICE_READINGS.values():
        found = reading(answer, choices)
        if len(found) == 1:
            return found.pop()
    return None


def read_yes_no(answer: str) -> bool | None:
    """The first yes (True) or no (False) of an answer, None if it has neither."""
    return next((word == "yes" for word in words(answer) if word in ("yes", "no")), None)


def choice_statistics(answer: str, choices: Sequence[str], right: int) -> dict[str, list[float]]:
    """The statistics of `choice_accuracy` and `choice_unclear`."""
    read = read_choice(answer, choices)
    return {"choice_accuracy": [float(read == right), 1.0], "choice_unclear": [float(read is None), 1.0]}


def yes_no_statistics(answer: str, truth: bool) -> list[float]:
    """(correct, predicted yes, true yes, true positive, unclear, 1) of an answer to a yes/no question."""
    read = read_yes_no(answer)
    return [float(entry) for entry in (read is truth, read is True, truth, read is True and truth, read is None, 1)]


def chair_statistics(mentioned: Sequence[str], present: Sequence[str]) -> list[float]:
    """(hallucinated mentions, mentions, has a hallucination, 1, true objects mentioned, true objects)."""
    hallucinated = sum(thing not in present for thing in mentioned)
    covered = len(set(mentioned) & set(present))
    return [float(entry) for entry in (hallucinated, len(mentioned), hallucinated > 0, 1, covered, len(set(present)))]


def bleu_statistics(answer: str, references: Sequence[str]) -> list[float]:
    """Matches and candidates for 1- to 4-grams, length of the answer and of the closest reference."""
    score = _bleu().corpus_score([answer], [[reference] for reference in usable_references(references)])
    return [float(entry) for entry in (*score.counts, *score.totals, score.sys_len, score.ref_len)]


def bertscore_statistics(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: str = BERTSCORE_MODEL, device=None
) -> list[list[float]]:
    """
    (F1, 1) of each answer against the best of its references; an empty answer has 0.

    Args:
        model: Hub id or folder of the encoder.

    Raises:
        ValueError: the model was not found, or references are missing.
    """
    pairs = [
        (number, answer, reference)
        for number, (answer, own) in enumerate(zip(answers, references, strict=True))
        for reference in usable_references(own)
    ]
    pairs.sort(key=lambda pair: len(pair[1]) + len(pair[2]))  # little padding
    best = [0.0] * len(answers)
    score = _bertscorer(model, device) if pairs else None
    for start in range(0, len(pairs), BERTSCORE_BATCH):
        numbers, predictions, targets = zip(*pairs[start : start + BERTSCORE_BATCH])
        for number, f1 in zip(numbers, score(predictions, targets), strict=True):
            best[number] = max(best[number], f1)
    return [[f1, 1.0] for f1 in best]


def _bertscorer(model: str, device) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """
    BERTScore's F1 of pairs, as the library bert-score computes it without idf weights and rescaling.

    Each token is matched with the most similar one of the other text, special tokens included; in the two means the
    special tokens do not count. Shapes: B pairs, T and R tokens of the two texts, D the encoder's width.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        encoder, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"the BERTScore model {model} was not found: {first_line(error)}") from error
    encoder = encoder.eval().to(device or "cpu")
    if (layers := BERTSCORE_LAYERS.get(model)) is not None:
        encoder.encoder.layer = encoder.encoder.layer[:layers]
    longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings - 2)
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=encoder.device)

    def embed(texts):
        # RoBERTa has other tokens for a word after a space; bert-score adds one to texts that are not empty.
        texts = [f" {text.strip()}" if text.strip() else "" for text in texts]
        tokens = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        ids_BT, mask_BT = tokens["input_ids"].to(encoder.device), tokens["attention_mask"].to(encoder.device)
        states_BTD = encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        return torch.nn.functional.normalize(states_BTD, dim=-1), mask_BT > 0, mask_BT * ~torch.isin(ids_BT, special)

    @torch.no_grad()
    def score(predictions, targets):
        (states_BTD, mask_BT, counts_BT), (states_BRD, mask_BR, counts_BR) = embed(predictions), embed(targets)
        is_pair_BTR = mask_BT[:, :, None] & mask_BR[:, None, :]
        cosine_BTR = (states_BTD @ states_BRD.mT).masked_fill(~is_pair_BTR, -1.0)
        precision_B = (cosine_BTR.amax(2) * counts_BT).sum(1) / counts_BT.sum(1)
        recall_B = (cosine_BTR.amax(1) * counts_BR).sum(1) / counts_BR.sum(1)
        f1_B = 2 * precision_B * recall_B / (precision_B + recall_B)
        return f1_B.nan_to_num(0.0).tolist()  # an empty text has no tokens that count

    return score


def statistics(names: Sequence[str], answer: str, references: Sequence[str]) -> dict[str, list[float]]:
    """
    The statistics of several metrics for one answer; for `bertscore`, which is computed in batches, the texts.

    Raises:
        ValueError: references without words.
    """
    pair = {"answer": answer, "references": list(usable_references(references))}
    return {
        name: pair if METRICS[name].statistics is None else list(METRICS[name].statistics(answer, references))
        for name in names
    }


def value(name: str, statistics_NS: Sequence[Sequence[float]]) -> float:
    """The value of a metric over samples; nan for none."""
    if len(statistics_NS) == 0:
        return float("nan")
    return float(METRICS[name].value(np.asarray(statistics_NS, dtype=float).sum(0, keepdims=True))[0])


def _ratio(numerator_R: np.ndarray, denominator_R: np.ndarray) -> np.ndarray:
    """nan where the denominator is 0."""
    return np.divide(numerator_R, denominator_R, out=np.full(len(numerator_R), np.nan), where=denominator_R > 0)


def _share(numerator: int, denominator: int, scale: float = 100.0) -> Callable[[np.ndarray], np.ndarray]:
    """The value that is one sum over another."""
    return lambda sums_RS: scale * _ratio(sums_RS[:, numerator], sums_RS[:, denominator])


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda answer, references: [score(answer, references), 1.0]


def _f1(sums_RS: np.ndarray) -> np.ndarray:
    """2 x true positives over (predicted yes + true yes)."""
    return 200 * _ratio(sums_RS[:, 3], sums_RS[:, 1] + sums_RS[:, 2])


def _corpus_bleu(sums_RS: np.ndarray) -> np.ndarray:
    """Corpus BLEU of summed counts, by sacrebleu itself."""
    compute, orders = type(_bleu()).compute_bleu, BLEU_ORDERS
    return np.array(
        [
            compute(row[:orders], row[orders : 2 * orders], row[-2], row[-1], smooth_method="exp").score
            for row in sums_RS.astype(int).tolist()
        ]
    )


def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU()


def _is_choice(answer: str, choices: Sequence[str]) -> set[int]:
    """The choices whose words are those of an answer."""
    content = content_words(answer)
    return {index for index, choice in enumerate(choices) if content and content_words(choice) == content}


def _contains_choice(answer: str, choices: Sequence[str]) -> set[int]:
    """The choices whose words occur in an answer."""
    content, texts = f" {content_words(answer)} ", [f" {content_words(choice)} " for choice in choices]
    inside = {index for index, text in enumerate(texts) if text.strip() and text in content}
    # "tennis racket" contains "tennis": the longer choice counts.
    return {index for index in inside if not any(texts[index] in texts[other] for other in inside - {index})}


def _letters(pattern: str) -> Callable[[str, Sequence[str]], set[int]]:
    """A reading of letters by a pattern in which CAPITAL, LETTER and ALONE stand for the patterns below."""
    return lambda answer, choices: {
        LETTERS.index(match[match.lastindex].upper()) for match in _compiled(pattern, len(choices)).finditer(answer)
    }


@lru_cache
def _compiled(pattern: str, choices: int) -> re.Pattern:
    letters = LETTERS[:choices]
    # "A dog" and "I see" start with a word.
    capital = rf"([{letters}])(?![\w'’])(?!(?<=[AI])\s+(?!because|since|and|or)[a-z])"
    # A small letter must be followed by punctuation or the end.
    letter = rf"(?:{capital}|([{letters.lower()}])(?=\s*(?:[).:,]|$)))"
    alone = rf"(?!\W+(?:and|or)\W+[{letters}]\b)"  # not "A or B"
    return re.compile(pattern.replace("CAPITAL", capital).replace("LETTER", letter).replace("ALONE", alone))


CHOICE_READINGS = {
    # "a tennis racket", of the choice "tennis racket"
    "is a choice": _is_choice,
    # "B", "(b)", "B. tennis", "A because of it"
    "begins with a letter": _letters(r"\A\W*LETTERALONE"),
    # "The answer is C.", "option (c)", "Answer: B. A and C are wrong.", "I take (B)"
    "states a letter": _letters(
        r"(?i:\b(?:answer|option|choice)(?:\s+(?:is|was))?\s*:?\s*)[(\"'“]?LETTERALONE|\(LETTER"
    ),
    # "It is a tennis racket."
    "contains a choice": _contains_choice,
    # "It must be D, I think", but not "D.C." and not "D-sized"
    "contains a capital": _letters(r"(?<![\w'’.-])CAPITAL(?![.-]\w)"),
}
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
        name: Metric(None, _share(0, 1, scale=1.0), higher_is_better=not name.startswith("gpt_hallucination"))
        for name in (*JUDGED, *JUDGED_SEGMENTS)
    },
}
