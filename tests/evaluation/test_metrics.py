"""Metrics, intervals and paired tests: equal to the libraries', and to the authors' definitions on worked examples."""

import re
from itertools import product

import numpy as np
import pytest
import sacrebleu
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from granulon.evaluation.metrics import (
    BERTSCORE_LAYERS,
    METRICS,
    bertscore_statistics,
    best_recall,
    bleu_statistics,
    chair_statistics,
    exact_match,
    read_choice,
    read_yes_no,
    recall,
    value,
    vqa_accuracy,
    yes_no_statistics,
)
from granulon.evaluation.scoring import choice_scores, figures, text_scores, units
from granulon.evaluation.statistics import holm, interval, mcnemar, paired

ANSWERS = [
    "A brown dog runs over the green field.",
    "Two people sit on a bench, and a bird is above them!",
    "no idea",
    "",
    "the the the the",
]
REFERENCES = [
    ["A dog is running over a green field.", "A brown dog on grass."],
    ["Two persons are sitting on a bench; a bird flies above them."],
    ["A red car in front of a house"],
    ["A cat."],
    ["the cat is on the mat"],
]
BOATS = ["tennis", "tennis racket", "a dog", "red"]


def test_recall_is_the_share_of_the_references_distinct_words_that_occur_in_the_answer():
    assert recall("A dog and a dog.", "The dog, the cat!") == 1 / 3  # the, dog, cat: dog
    assert recall("dog", "Dog dog DOG") == 1
    assert recall("", "a cat") == 0
    assert np.isnan(recall("a cat", "..."))


def test_recall_is_what_the_authors_code_computes():
    def authors(prediction, reference):
        said, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
        return len(set(said) & set(wanted)) / len(set(wanted))

    for answer, references in zip(ANSWERS, REFERENCES):
        assert recall(answer, references[0]) == authors(answer, references[0])
        assert best_recall(answer, references) == max(authors(answer, reference) for reference in references)


def test_bleu_of_summed_statistics_is_sacrebleus_corpus_bleu():
    statistics = [bleu_statistics(answer, own) for answer, own in zip(ANSWERS, REFERENCES)]
    width = max(map(len, REFERENCES))
    streams = [[own[place] if place < len(own) else None for own in REFERENCES] for place in range(width)]
    assert value("bleu", statistics) == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams).score, abs=1e-9)
    assert value("bleu", statistics[:1]) == pytest.approx(
        sacrebleu.corpus_bleu(ANSWERS[:1], [[reference] for reference in REFERENCES[0]]).score
    )


def make_bert(folder):
    """A small random encoder that reads any text letter by letter."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizerFast(vocab={token: number for number, token in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(vocabulary), **settings)).eval().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@torch.no_grad()
def bertscore_of_a_pair(folder, layer, answer, reference):
    """BERTScore's F1 from its definition: greedy matching token by token, special tokens matched but not counted."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def read(text):
        tokens = tokenizer(text, return_tensors="pt")
        states = model(**tokens, output_hidden_states=True).hidden_states[layer][0].double()
        words = [token not in tokenizer.all_special_ids for token in tokens["input_ids"][0].tolist()]
        return [state / state.norm() for state in states], words

    def share_found(ours, theirs):
        best = [max(float(one @ other) for other in theirs[0]) for one, counts in zip(*ours) if counts]
        return sum(best) / len(best)

    said, wanted = read(answer), read(reference)
    precision, recall = share_found(said, wanted), share_found(wanted, said)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [2, None])
def test_bertscore_is_its_definition_with_the_best_of_several_references(bert, layer, monkeypatch):
    monkeypatch.setitem(BERTSCORE_LAYERS, bert, layer)
    found = bertscore_statistics(ANSWERS, REFERENCES, bert)
    for (score, one), answer, references in zip(found, ANSWERS, REFERENCES):
        assert one == 1
        if not answer:
            assert score == 0
            continue
        expected = [bertscore_of_a_pair(bert, layer or -1, answer, reference) for reference in references]
        assert score == pytest.approx(max(expected), abs=1e-5)
    assert value("bertscore", found) == pytest.approx(100 * np.mean([score for score, _ in found]))


def test_the_bertscore_of_an_answer_does_not_depend_on_the_others(bert):
    answers = [answer for answer in ANSWERS if answer]
    references = [own for answer, own in zip(ANSWERS, REFERENCES) if answer]
    together = bertscore_statistics(answers, references, bert)
    alone = [bertscore_statistics([answer], [own], bert)[0] for answer, own in zip(answers, references)]
    assert np.array(together) == pytest.approx(np.array(alone), abs=1e-5)
    backwards = bertscore_statistics(answers[::-1], references[::-1], bert)[::-1]
    assert np.array(together) == pytest.approx(np.array(backwards), abs=1e-5)


def test_a_text_without_words_has_a_bertscore_and_only_an_empty_one_has_none(bert):
    found = bertscore_statistics(["...", " \n", ""], [["a cat."]] * 3, bert)
    assert found[0][0] == pytest.approx(bertscore_of_a_pair(bert, -1, "...", "a cat."), abs=1e-5)
    assert [score for score, _ in found[1:]] == [0, 0]


def test_bertscore_reads_the_first_word_as_after_a_space_and_cuts_long_texts(tmp_path):
    """As bert-score does: a byte-level tokenizer, as RoBERTa's, has other tokens for a word after a space."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a dog a dog a dog"], special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer", "model_max_length": 30}')
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    size = tokenizer.get_vocab_size()
    RobertaModel(RobertaConfig(vocab_size=size, max_position_embeddings=32, **settings)).save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("dog").input_ids
        != AutoTokenizer.from_pretrained(tmp_path)(" dog").input_ids
    )
    ((score, _), (long, _)) = bertscore_statistics(["dog a", "dog a " * 100], [["a dog"]] * 2, str(tmp_path))
    assert score == pytest.approx(bertscore_of_a_pair(tmp_path, -1, " dog a", " a dog"), abs=1e-5)
    assert 0 < long < 1


def test_a_missing_bertscore_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="the BERTScore model .*nowhere was not found"):
        bertscore_statistics(["a"], [["b"]], str(tmp_path / "nowhere"))


def test_yes_no_figures_are_those_of_scikit_learn():
    draws = np.random.default_rng(0)
    truth = draws.random(200) < 0.4
    said = np.where(draws.random(200) < 0.8, truth, ~truth)
    statistics = [yes_no_statistics("Yes, it is." if yes else "no", bool(is_so)) for yes, is_so in zip(said, truth)]
    expected = {"accuracy": accuracy_score, "f1": f1_score, "precision": precision_score, "recall": recall_score}
    for name, function in expected.items():
        assert value(f"yes_no_{name}", statistics) == pytest.approx(100 * function(truth, said))
    assert value("yes_no_yes_rate", statistics) == pytest.approx(100 * said.mean())
    assert value("yes_no_always_yes", statistics) == pytest.approx(100 * truth.mean())


@pytest.mark.parametrize(
    "answer, read",
    [("Yes.", True), ("no, yes", False), ("It is not there", None), ("", None), ("NO", False), ("yesterday", None)],
)
def test_the_first_yes_or_no_counts_and_anything_else_is_unclear_and_wrong(answer, read):
    assert read_yes_no(answer) is read
    if read is None:
        assert yes_no_statistics(answer, True)[0] == yes_no_statistics(answer, False)[0] == 0
        assert yes_no_statistics(answer, True)[4] == 1


@pytest.mark.parametrize(
    "answer, read",
    [
        ("B", 1), ("(b)", 1), ("b.", 1), ("B. tennis", 1), ("The answer is C.", 2), ("answer: (D)", 3),
        ("Option C", 2), ("C) a dog", 2), ("the correct choice is D", 3), ("A", 0), ("A.", 0), ("A because of it", 0),
        ("A dog is here", 2), ("tennis", 0), ("It is a tennis racket.", 1), ("The answer is a dog", 2),
        ("red or tennis", None), ("", None), ("Dogs", None), ("A or B? (A) or (B)", None), ("E", None),
        ("I see red", 3), ("B\nbecause red", 1),
        ("I think it is B", 1), ("Answer: **B**", 1), ("I would say C.", 2), ("It is A, I think", 0),
        ("It must be D because A is wrong", 3), ("It is either B or C", None), ("B and C", None), ("(A) or (B)", None),
        ("B and a dog", 1), ("A man. A woman too.", None), ("a T-shirt, D-sized", None),
        ("The answer is B or C", None),
        ("The answer is A or B.", None), ("A or B", None), ("Answer: B. A and C are wrong.", 1),
        ("from Washington D.C.", None), ("it is b", None), ("the letter E", None),
    ],
)  # fmt: skip
def test_a_choice_is_read_by_letter_or_by_words(answer, read):
    assert read_choice(answer, BOATS) == read


def test_the_pronoun_i_is_not_a_letter_of_nine_choices():
    choices = [f"thing {number}" for number in range(9)]
    assert read_choice("Well, I think so", choices) is None and read_choice("I'd say so", choices) is None
    assert read_choice("Well, I think it is B", choices) == 1 and read_choice("It must be I.", choices) == 8


def test_an_answer_without_a_single_choice_is_wrong_and_counted_as_unclear():
    found = choice_scores("red or tennis", BOATS, 3)
    assert found == {"choice_accuracy": [0.0, 1.0], "choice_unclear": [1.0, 1.0]}
    assert "unscored" in choice_scores("B", BOATS, 4) and "unscored" in choice_scores("B", BOATS, None)


def test_figures_of_right_or_wrong_are_the_share_of_ones_among_their_first_statistics():
    """McNemar's test reads those."""
    of_pope = [yes_no_statistics(answer, truth) for answer, truth in (("yes", True), ("no", True), ("maybe", False))]
    pairs = [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    found = {name for name, metric in METRICS.items() if metric.proportion}
    assert found == {"exact_match", "choice_accuracy", "choice_unclear", "yes_no_accuracy", "accuracy"}
    for name in found:
        assert value(name, of_pope if name == "yes_no_accuracy" else pairs) == pytest.approx(100 / 3)
    assert [right for right, *_ in of_pope] == [1, 0, 0]


def test_a_higher_yes_rate_is_neither_better_nor_worse():
    neither = {name for name, metric in METRICS.items() if metric.higher_is_better is None}
    assert neither == {"yes_no_yes_rate", "yes_no_always_yes"}


def test_direct_answers_get_a_third_for_each_annotator_and_no_more_than_one():
    annotators = ["dog"] * 2 + ["the cat"] * 7 + ["horse"]
    assert [vqa_accuracy(answer, annotators) for answer in ("A dog.", "cat", "horse", "cow")] == [2 / 3, 1, 1 / 3, 0]
    assert exact_match("The Dog!", annotators) == 1 and exact_match("dogs", annotators) == 0


def test_chair_counts_mentions_captions_and_covered_objects():
    statistics = [
        chair_statistics(["dog", "cat", "dog"], ["dog", "boat"]),  # one of three is made up; one of two is covered
        chair_statistics(["boat"], ["boat"]),
        chair_statistics([], ["bird"]),
    ]
    assert value("chair_i", statistics) == pytest.approx(100 * 1 / 4)
    assert value("chair_s", statistics) == pytest.approx(100 * 1 / 3)
    assert value("chair_cover", statistics) == pytest.approx(100 * 2 / 4)


@pytest.mark.parametrize("references", [[], [""], ["..."], [None]])
def test_a_sample_without_a_reference_has_no_score_and_raises_nothing(references):
    found = text_scores(["recall", "bleu", "bertscore"], "a dog", references)
    assert list(found) == ["unscored"] and "no reference" in found["unscored"]
    samples = [
        {"id": 0, "statistics": {"recall": [1.0, 1.0]}},
        {"id": 1, "statistics": {}},
    ]
    assert figures(samples)["recall"]["value"] == 100 and figures(samples)["recall"]["n"] == 1


def test_an_answer_of_thousands_of_words_and_an_empty_one_are_scored():
    long = "dog " * 5000
    for answer, expected in ((long, 1.0), ("", 0.0)):
        found = text_scores(["recall", "bleu", "exact_match"], answer, ["dog"])
        assert found["recall"] == [expected, 1.0] and found["exact_match"][0] == 0
        assert value("bleu", [found["bleu"]]) < 100


def test_a_group_is_correct_if_all_of_its_samples_are():
    samples = [
        {"id": number, "statistics": {"qAcc": [float(right), 1.0]}, "groups": {"qAcc": group}}
        for number, (right, group) in enumerate([(1, "a"), (1, "a"), (1, "b"), (0, "b")])
    ]
    assert units(samples, "qAcc") == {"a": [1.0, 1.0], "b": [0.0, 1.0]}
    assert figures(samples)["qAcc"]["value"] == 50


def test_the_bootstrap_interval_of_a_mean_is_the_known_one():
    draws = np.random.default_rng(0)
    values = draws.normal(0.5, 0.2, size=400)
    statistics_NS = np.stack([values, np.ones(400)], axis=1)
    low, high = interval(METRICS["mean"].value, statistics_NS, resamples=4000)
    known = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - known, values.mean() + known), abs=0.0015)
    assert interval(METRICS["mean"].value, statistics_NS, seed=3) == interval(
        METRICS["mean"].value, statistics_NS, seed=3
    )


def test_the_number_of_resamples_is_the_requested_one():
    statistics_NS = np.array([[0.0, 1.0], [1.0, 1.0]])
    drawn = []

    def counted(sums_RS):
        drawn.append(len(sums_RS))
        return METRICS["mean"].value(sums_RS)

    interval(counted, statistics_NS, resamples=7)
    assert sum(drawn) == 7


def test_a_95_per_cent_interval_covers_the_truth_about_that_often():
    draws = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        right_N = (draws.random(80) < 0.6).astype(float)
        low, high = interval(METRICS["accuracy"].value, np.stack([right_N, np.ones(80)], 1), trial, resamples=300)
        hits += low <= 60 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_paired_test_sees_a_difference_that_two_intervals_hide_and_none_where_there_is_none():
    draws = np.random.default_rng(0)
    hard_N = draws.random(300)  # how hard a sample is, for both systems
    ours = np.stack([hard_N + 0.02 + draws.normal(0, 0.05, 300), np.ones(300)], 1)
    theirs = np.stack([hard_N + draws.normal(0, 0.05, 300), np.ones(300)], 1)
    test = paired(METRICS["mean"].value, ours, theirs)
    assert test["p"] < 0.05 and 0 < test["low"] < test["difference"] < test["high"]
    assert interval(METRICS["mean"].value, ours)[0] < interval(METRICS["mean"].value, theirs)[1]
    assert paired(METRICS["mean"].value, ours, ours)["p"] == 1


def test_flipped_signs_give_the_exact_p_of_a_small_sample():
    ours = np.array([[3.0, 1], [2, 1], [5, 1], [1, 1], [4, 1]])
    theirs = np.array([[1.0, 1], [1, 1], [2, 1], [2, 1], [1, 1]])
    differences = (ours - theirs)[:, 0]
    exact = np.mean(
        [
            abs(sum(s * d for s, d in zip(signs, differences))) >= abs(differences.sum())
            for signs in product((1, -1), repeat=5)
        ]
    )
    assert paired(METRICS["mean"].value, ours, theirs)["p"] == pytest.approx(exact, abs=0.015)


def test_the_smallest_p_falls_below_one_per_cent_after_any_correction():
    ours, theirs = np.stack([np.ones(40), np.ones(40)], 1), np.stack([np.zeros(40), np.ones(40)], 1)
    for comparisons in (1, 40, 200):
        assert paired(METRICS["mean"].value, ours, theirs, comparisons=comparisons)["p"] * comparisons < 0.01


def test_no_more_than_five_per_cent_are_found_without_a_difference():
    draws, found = np.random.default_rng(3), 0
    for trial in range(200):
        pair = [np.stack([draws.normal(0, 1, 40), np.ones(40)], 1) for _ in range(2)]
        found += paired(METRICS["mean"].value, *pair, seed=trial, resamples=50)["p"] < 0.05
    assert found / 200 <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5


def test_mcnemars_test_is_the_exact_binomial_one_of_the_samples_that_differ():
    ours, theirs = [1] * 30 + [1] * 12 + [0] * 3 + [0] * 20, [1] * 30 + [0] * 12 + [1] * 3 + [0] * 20
    assert mcnemar(ours, theirs) == pytest.approx(binomtest(12, 15, 0.5).pvalue)
    assert mcnemar(ours, ours) == 1


def test_holms_correction_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.5, float("nan"), 0.9])
    assert corrected[0] == 1 and np.isnan(corrected[1]) and corrected[2] == 1 and holm([]) == []


def test_unequal_numbers_of_samples_are_refused_with_both_numbers():
    for test in (lambda a, b: paired(METRICS["mean"].value, a, b), lambda a, b: mcnemar(a[:, 0], b[:, 0])):
        with pytest.raises(ValueError, match="3 samples on one side and 2 on the other"):
            test(np.ones((3, 2)), np.ones((2, 2)))
