"""What is trained before the arms, and the training and evaluation of one arm; `cached` keeps each result in a file.

Encoder and language model come first, then for each seed a start that all arms share: the projector is aligned patch
by patch with words, then projector and language model learn all kinds of tokens in turn, so that none is favoured.

Shapes by suffix: S scenes, B scenes of a batch, N patches, Q questions, E text width, V views, G levels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch.nn.utils.rnn import pad_sequence

from granulon.hub.files import write_atomically
from granulon.train.controller.corpus import MEASURED, TEMPLATE, TRAIN, VALIDATION, corpus_row
from granulon.train.controller.fit import controller_logits, question_states, train_controller
from modeling_granulon.image_tokens import PIXEL, SEMANTIC

from . import world
from .arms import (
    BASE,
    BUDGET_ARMS,
    PIXELS,
    VIEW_ARMS,
    Arm,
    K,
    Questions,
    aggregate,
    answer_loss,
    ask,
    embed,
    make_model,
    make_processor,
    make_tokenizer,
)
from .encoders import DEVICE, Features, encode, fit, make_encoder, train_encoder
from .tokens import separation

LABELS = TEMPLATE, MEASURED  # of controllers
SHARED_PARTS = ("model.language_model.", "lm_head.", "model.multi_modal_projector.linear_")
# Pixels and pixels beside tokens as often as each number of tokens.
SHARED_ARMS = (*BUDGET_ARMS, PIXELS, *VIEW_ARMS)
FUNCTION_WORDS = frozenset("a the it is in with and has . ?".split())
TEXT_FIRST = 1_000_000  # of the train split: the language model reads about scenes that no arm sees


@dataclass(frozen=True)
class Scale:
    """Numbers of scenes and steps; batches are scenes."""

    train_scenes: int = 4000
    validation_scenes: int = 400
    test_scenes: int = 400
    encoder_steps: int = 600
    text_steps: int = 1200
    start_steps: int = 600
    arm_steps: int = 160
    batch: int = 16

    def scenes(self, split: str) -> list[world.Scene]:
        """All scenes of a split."""
        return world.make_scenes(split, getattr(self, f"{split}_scenes"))


def cached(path: Path, make: Callable[[], object]):
    """What `torch.save` wrote to a file, made and saved first if the file does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start, content = time.perf_counter(), make()
        write_atomically(path, lambda draft: torch.save(content, draft))
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    return torch.load(path, map_location="cpu")


def features_of(folder: Path, scale: Scale, split: str) -> Features:
    """The features of a split's scenes from the study's encoder."""

    def pretrain():
        pictures = world.draw_all(scale.scenes("train"))
        return train_encoder(pictures, scale.encoder_steps, 2 * scale.batch).state_dict()

    def read():
        encoder = make_encoder()
        encoder.load_state_dict(cached(folder / "encoder.pt", pretrain))
        return vars(encode(encoder.to(DEVICE), scale.scenes(split)))

    return Features(**cached(folder / f"features-{split}.pt", read))


def separations(folder: Path, scale: Scale) -> dict[str, float]:
    """How well groups of K tokens follow what patches show, by source, on validation scenes."""
    features, scenes, tokenizer = (
        features_of(folder, scale, "validation"),
        scale.scenes("validation"),
        make_tokenizer(),
    )
    found = {}
    for arm in (arm for arm in BUDGET_ARMS if arm.slots == K):
        assignment_SHW = aggregate(make_model(tokenizer, arm), arm, features).assignment
        found[arm.source] = separation(assignment_SHW.flatten(1).cpu().numpy(), scenes)
    return found


def train_text(scale: Scale) -> dict[str, torch.Tensor]:
    """The language model learns to answer from sentences about scenes, each pooled to one vector."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, BASE)
    scenes = world.make_scenes("train", scale.train_scenes, TEXT_FIRST)
    questions, random = Questions.of(scenes, tokenizer), Random(0)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        texts = [world.sentences(scenes[row]) for row in rows.tolist()]
        return answer_loss(model, questions.rows(rows), *pooled_sentences(model, tokenizer, texts, random))

    torch.manual_seed(0)
    parameters = list(model.model.language_model.parameters())
    fit(loss_of, parameters, len(scenes), scale.text_steps, scale.batch, lr=2e-3)
    return shared_weights(model)


def pooled_sentences(model, tokenizer, texts: list[list[str]], random: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A vector per sentence, the mean of its words, as an image token is the mean of its patches: (B,R,E) and (B,R).

    Sentences come one to four times, in random order, and half of them mixed with one about the whole scene, as a
    region may contain part of the ground: number and purity of the vectors are those of no kind of token.
    """
    word, embed_words = tokenizer.get_vocab(), model.get_input_embeddings()
    rows = []
    for sentences in texts:
        about_scene = [sentence for sentence in sentences if not set(sentence.split()) & set(world.SHAPES)]
        repeated = [sentence for sentence in sentences for _ in range(random.randint(1, 4))]
        mixed = [f"{s} {random.choice(about_scene)}" if random.random() < 0.5 else s for s in repeated]
        random.shuffle(mixed)
        ids = [[word[w] for w in sentence.split() if w not in FUNCTION_WORDS] for sentence in mixed]
        rows.append(torch.stack([embed_words(torch.tensor(x, device=DEVICE)).mean(0) for x in ids]))
    visible_BR = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True, padding_side="left")
    return pad_sequence(rows, True, padding_side="left"), visible_BR


def start_path(folder: Path, seed: int) -> Path:
    """The file of a seed's start."""
    return folder / f"start-{seed}.pt"


def train_start(folder: Path, scale: Scale, seed: int) -> dict[str, torch.Tensor]:
    """Projector and language model from which all arms of a seed start, from half of the training scenes."""
    tokenizer, half = make_tokenizer(), slice(scale.train_scenes // 2)
    features, scenes = features_of(folder, scale, "train").rows(half), scale.scenes("train")[half]
    questions = Questions.of(scenes, tokenizer)
    model = make_model(tokenizer, BASE, seed)
    model.load_state_dict(cached(folder / "text.pt", lambda: train_text(scale)), strict=False)
    torch.manual_seed(seed)
    align_projector(model, tokenizer, features, scenes, scale)
    random, own_aggregation = Random(seed), model.model.aggregation
    aggregations = {arm: make_model(tokenizer, arm).model.aggregation for arm in SHARED_ARMS}

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        arm = random.choice(SHARED_ARMS)
        model.model.aggregation = aggregations[arm]
        return answer_loss(model, questions.rows(rows), *embed(model, arm, features.rows(rows), arm.view))

    weights = [p for name, p in model.named_parameters() if name.startswith(SHARED_PARTS)]
    fit(loss_of, weights, len(features), scale.start_steps, scale.batch, lr=1e-3)
    model.model.aggregation = own_aggregation
    return shared_weights(model)


def align_projector(model, tokenizer, features: Features, scenes: list[world.Scene], scale: Scale):
    """Bring each projected patch near the mean embedding of the words for what it shows.

    Ground, objects and marks have the same total weight. No kind of token is involved.
    """
    word, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    words_SN = [scene.patch_words() for scene in scenes]
    ids_SN3 = torch.tensor([[[word[w] for w in x] + [pad] * (3 - len(x)) for x in row] for row in words_SN])
    group_SN = torch.tensor([[("ground" in x) + 2 * ("tiny" in x) for x in row] for row in words_SN])
    count_3 = group_SN.flatten().bincount(minlength=3).float()
    weight_SN = (count_3.sum() / 3 / count_3)[group_SN]
    embeddings = model.get_input_embeddings().weight.detach()
    projector = model.model.multi_modal_projector

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        seen_BNE = projector(features.features_SND[rows].float().to(DEVICE))
        ids_BN3 = ids_SN3[rows].to(DEVICE)
        used_BN31 = (ids_BN3 != pad).unsqueeze(-1)
        target_BNE = (embeddings[ids_BN3] * used_BN31).sum(2) / used_BN31.sum(2)
        return ((seen_BNE - target_BNE).square().sum(-1) * weight_SN[rows].to(DEVICE)).mean()

    parameters = [*projector.linear_1.parameters(), *projector.linear_2.parameters()]
    fit(loss_of, parameters, len(scenes), scale.start_steps, 4 * scale.batch, lr=3e-3)


def shared_weights(model) -> dict[str, torch.Tensor]:
    """Of the language model and the projector; gains and controller are each arm's own."""
    return {name: weight for name, weight in model.state_dict().items() if name.startswith(SHARED_PARTS)}


def run_arm(folder: Path, scale: Scale, arm: Arm, seed: int) -> dict:
    """Train an arm, and `evaluate` it on the test split; with `seconds`, the time of training."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arm, seed)
    model.load_state_dict(torch.load(start_path(folder, seed), map_location=DEVICE), strict=False)
    features, questions = features_of(folder, scale, "train"), Questions.of(scale.scenes("train"), tokenizer)
    weights = {arm.view: 1.0} | ({PIXEL: arm.joint, SEMANTIC: arm.joint} if arm.joint else {})
    random = Random(seed)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        level, own, seen = random.randrange(max(1, len(arm.levels))), questions.rows(rows), features.rows(rows)
        losses = (
            weight * answer_loss(model, own, *embed(model, arm, seen, x, level)) for x, weight in weights.items()
        )
        return sum(losses)

    torch.manual_seed(seed)
    start = time.perf_counter()
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "controller" not in name]
    fit(loss_of, parameters, len(features), scale.arm_steps, scale.batch, lr=1e-3)
    seconds = time.perf_counter() - start
    splits = {split: (features_of(folder, scale, split), scale.scenes(split)) for split in ("validation", "test")}
    return {**evaluate(model, arm, tokenizer, splits), "seconds": seconds}


def evaluate(model, arm: Arm, tokenizer, splits: dict[str, tuple[Features, list[world.Scene]]]) -> dict:
    """
    The answers of an arm in all its views and at all its levels.

    Returns:
        dict: `right` and `nll` (V,G,S,Q) of the test questions; `other_image` (S,Q), right answers with the next
        scene's image; `image_tokens`, the mean at each level; for arms with several levels `chosen`, see
        `levels.choose_levels`.
    """
    levels = range(max(len(arm.levels), 1))
    features, scenes = splits["test"]
    questions = Questions.of(scenes, tokenizer)
    answers = [[ask(model, arm, features, questions, view, level) for level in levels] for view in arm.views]
    answer_VGSQ, nll_VGSQ = (
        torch.stack([torch.stack([at_level[place] for at_level in view]) for view in answers]) for place in (0, 1)
    )
    other_SQ, _ = ask(model, arm, features, questions, arm.view, len(levels) // 2, shift=1)
    shown = [embed(model, arm, features.rows(slice(100)), arm.view, level)[1] for level in levels]
    result = {
        "right": answer_VGSQ == questions.answer_SQ,
        "nll": nll_VGSQ,
        "other_image": other_SQ == questions.answer_SQ,
        "image_tokens": [visible_BR.sum(1).float().mean().item() for visible_BR in shown],
    }
    if len(levels) > 1:
        result["chosen"] = choose_levels(model, arm, tokenizer, *splits["validation"], scenes)
    return result


def choose_levels(
    model, arm: Arm, tokenizer, features: Features, scenes: list[world.Scene], test_scenes: list[world.Scene]
) -> dict:
    """
    The level of each question about `test_scenes` by controllers trained on template labels and on measured labels.

    The model was trained with random levels, so that every policy can be compared on the same weights.

    Args:
        features, scenes: those on which levels are measured and controllers trained.

    Returns:
        dict: for "template" and "measured" the levels (S,Q); `nll` (G,Q), the mean over the measured scenes of the
        negative log-likelihood of the right answers.
    """
    questions, levels = Questions.of(scenes, tokenizer), range(len(arm.levels))
    nll_GSQ = torch.stack([ask(model, arm, features, questions, arm.view, level)[1] for level in levels])
    processor = make_processor(tokenizer, arm)
    texts_SQ = [[question.text for question in world.make_questions(scene)] for scene in test_scenes]
    distinct = sorted({text for row in texts_SQ for text in row})
    result = {"nll": nll_GSQ.mean(1)}
    for source in LABELS:
        rows = label_rows(source, model.config.granularity_names, scenes, nll_GSQ)
        train_controller(model, processor, rows, epochs=20, patience=5)
        level_of = dict(zip(distinct, predicted_levels(model, processor, distinct)))
        result[source] = torch.tensor([[level_of[text] for text in row] for row in texts_SQ])
    return result


def label_rows(source: str, names: list[str], scenes: list[world.Scene], nll_GSQ: torch.Tensor) -> list[dict]:
    """A granularity corpus of the questions about scenes."""
    probs_SQG = (-nll_GSQ).softmax(0).permute(1, 2, 0).tolist()
    rows = []
    for number, scene in enumerate(scenes):
        split = VALIDATION if number < max(1, 0.1 * len(scenes)) else TRAIN
        for question, measured in zip(world.make_questions(scene), probs_SQG[number], strict=True):
            probs = measured if source == MEASURED else [float(name == template_level(question)) for name in names]
            labels = dict(zip(names, probs, strict=True))
            key = str(scene.seed)
            rows.append(corpus_row(question.text, labels, source, key=key, split=split, kind=question.kind))
    return rows


def template_level(question: world.Question) -> str:
    """The label that a person would write: the question's level, the finest for what only pixels show."""
    return "fine" if question.level == "pixel" else question.level


@torch.no_grad()
def predicted_levels(model, processor, texts: list[str]) -> list[int]:
    """The controller's level of each question."""
    states_QE = question_states(model, processor, texts)
    return controller_logits(model.model.granularity_controller, states_QE).argmax(-1).tolist()
