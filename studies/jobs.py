"""The study's jobs: each makes one file from the files of others, whole or not at all, and is not made twice.

    encoder -> features -> probes -> gate      text -> start (aligned projector) -> arm, seed by seed

The test split's scenes are drawn in one place, `open_test_split`, which refuses before the gate has been written: the
kinds, the recipe and all constants are then settled.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import DINOv3ViTModel

from granulon.hub.files import write_atomically

from . import world
from .arms import (
    ARMS,
    BASE,
    BUDGET_ARMS,
    PIXELS,
    VIEW_ARMS,
    Arm,
    ImageTokens,
    K,
    Questions,
    Recipe,
    answer_logits,
    answer_loss,
    ask,
    embed,
    make_model,
    make_tokenizer,
    train_arm,
)
from .encoders import (
    DEVICE,
    MASKED,
    Features,
    captions,
    decodable_kinds,
    encode,
    fit,
    make_encoder,
    probe_kinds,
    train_contrastive,
    train_masked,
)
from .levels import level_answers
from .tokens import GRID, LEARNED, separation
from .tokens import SEMANTIC as CLUSTERS

SHARED_PARTS = ("model.language_model.", "lm_head.", "model.multi_modal_projector.linear_")
# Pixels and pixels beside tokens as often as each number of tokens.
SHARED_ARMS = (*BUDGET_ARMS, PIXELS, PIXELS, *(arm for arm in VIEW_ARMS if arm.source in (CLUSTERS, GRID)))
FUNCTION_WORDS = frozenset("a the it is in with and has . ?".split())
TEXT_FIRST = 1_000_000  # of the train split: the language model reads about scenes that no arm sees


@dataclass(frozen=True)
class Scale:
    """How much of everything. The seeds are those of the arms; choosing uses others."""

    train_scenes: int
    validation_scenes: int
    test_scenes: int
    probe_scenes: int
    watch_scenes: int
    encoder_steps: int
    text_steps: int
    align_steps: int
    shared_steps: int
    recipe: Recipe
    encoder_batch: int = 32
    text_batch: int = 16
    gate_margin: float = 0.4


def once(path: Path, make: Callable[[], object]):
    """Make and save what is not there yet: JSON, or tensors for a path that ends in .pt. Says how long it took."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    content = make()
    seconds = time.perf_counter() - start
    if path.suffix == ".json":
        write_atomically(path, json.dumps({**content, "job_seconds": round(seconds, 1)}))
    else:
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        torch.save(content, draft)
        draft.replace(path)
        write_atomically(path.with_suffix(".time.json"), json.dumps({"job_seconds": round(seconds, 1)}))
    print(f"{path.relative_to(path.parents[1])}: {seconds:.0f} s", flush=True)


def scenes_of(split: str, count: int, first: int = 0) -> list[world.Scene]:
    return [world.make_scene(seed) for seed in world.seeds(split, count, first)]


def encoder_job(folder: Path, scale: Scale, name: str):
    def make():
        scenes = scenes_of("train", scale.train_scenes)
        pictures, amount = world.draw_all(scenes), (scale.encoder_steps, scale.encoder_batch)
        if name == MASKED:
            return train_masked(pictures, *amount, seed=0).state_dict()
        words = captions(scenes, make_tokenizer().get_vocab())
        return train_contrastive(pictures, words, *amount, seed=0).state_dict()

    once(folder / f"encoder-{name}.pt", make)


def load_encoder(folder: Path, name: str) -> DINOv3ViTModel:
    encoder = make_encoder(seed=0)
    encoder.load_state_dict(torch.load(folder / f"encoder-{name}.pt"))
    return encoder.to(DEVICE)


def features_job(folder: Path, scale: Scale, name: str):
    for split, count in (("train", scale.train_scenes), ("validation", scale.validation_scenes)):
        once(
            features_path(folder, name, split),
            lambda split=split, count=count: vars(encode(load_encoder(folder, name), scenes_of(split, count))),
        )
    once(folder / f"probes-{name}.json", lambda: _probe(folder, scale, name))


def _probe(folder: Path, scale: Scale, name: str) -> dict:
    sides = []
    for split, count in (("train", scale.probe_scenes), ("validation", scale.validation_scenes)):
        count = min(count, scale.train_scenes)
        sides += [load_features(folder, name, split).first(count), scenes_of(split, count)]
    return {"kinds": probe_kinds(*sides), "separation": _separation(*sides[2:])}


def _separation(features: Features, scenes: list[world.Scene]) -> dict[str, float]:
    """Of the arms that have K tokens of frozen groups, all else being equal."""
    tokenizer, config = make_tokenizer(), make_encoder(0).config
    arms = [arm for arm in BUDGET_ARMS if arm.slots == K]
    tokens = {arm.source: ImageTokens(make_model(tokenizer, config, arm, 0), arm, features) for arm in arms}
    return {source: separation(made.groups(), scenes) for source, made in tokens.items()}


def gate_job(folder: Path, scale: Scale):
    """The kinds that stay, from the masked encoder's probes, and everything that is settled before the test split."""

    def make():
        probes = json.loads((folder / f"probes-{MASKED}.json").read_text())["kinds"]
        kinds = decodable_kinds(probes, scale.gate_margin)
        if not kinds:
            raise RuntimeError(f"no kind of question is decodable from the masked encoder's features: {probes}")
        return {"kinds": kinds, "scale": asdict(scale)}

    once(folder / "gate.json", make)


def kinds_of(folder: Path) -> tuple[str, ...]:
    return tuple(json.loads((folder / "gate.json").read_text())["kinds"])


def open_test_split(folder: Path, scale: Scale, name: str):
    """The one place where scenes of the test split are drawn.

    Raises:
        RuntimeError: before the gate is written, or after the scale was changed behind it.
    """
    gate = folder / "gate.json"
    settled = json.loads(gate.read_text())["scale"] if gate.exists() else None
    if settled != json.loads(json.dumps(asdict(scale))):
        raise RuntimeError(
            f"the test split stays shut: {gate} does not settle what is about to run; run the stages in order, and a "
            "new folder for other settings"
        )
    once(
        features_path(folder, name, "test"),
        lambda: vars(encode(load_encoder(folder, name), scenes_of("test", scale.test_scenes))),
    )


def features_path(folder: Path, name: str, split: str) -> Path:
    return folder / f"features-{name}-{split}.pt"


def load_features(folder: Path, name: str, split: str) -> Features:
    return Features(**torch.load(features_path(folder, name, split), mmap=True))


def text_job(folder: Path, scale: Scale):
    """The language model reads scenes in words and answers; every other step the words come as pooled vectors."""

    def make():
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, make_encoder(0).config, BASE, seed=0)
        scenes = scenes_of("train", scale.train_scenes, TEXT_FIRST)
        questions = Questions.of(scenes, tokenizer, tuple(world.ANSWERS))
        random = Random(0)

        def loss_of(rows: torch.Tensor) -> torch.Tensor:
            told = [scenes[row] for row in rows.tolist()]
            read = pooled_prefix if random.random() < 0.5 else word_prefix
            asked = questions.rows(rows)
            logits_BQV = answer_logits(model, asked, **read(model, tokenizer, told, random))
            return torch.nn.functional.cross_entropy(logits_BQV.flatten(0, 1), asked.answer_SQ.flatten())

        torch.manual_seed(0)
        parameters = list(model.model.language_model.parameters())
        fit(loss_of, parameters, len(scenes), scale.text_steps, scale.text_batch, "language model", lr=2e-3)
        return shared_weights(model)

    once(folder / "text.pt", make)


def word_prefix(model, tokenizer, scenes: list[world.Scene], random: Random) -> dict:
    """Sentences in random order, each once or twice: neither a list of K items nor a grid."""
    word, rows = tokenizer.get_vocab(), []
    for scene in scenes:
        told = [sentence for sentence in world.sentences(scene) for _ in range(random.choice((1, 2)))]
        random.shuffle(told)
        rows.append(torch.tensor([word[w] for sentence in told for w in sentence.split()]))
    prefix_BR = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    return {"prefix_ids": prefix_BR.to(DEVICE), "visible_BR": prefix_BR != tokenizer.pad_token_id}


def pooled_prefix(model, tokenizer, scenes: list[world.Scene], random: Random) -> dict:
    """
    A sentence as one vector, the mean of its words, as a token of an image is the mean of its patches.

    Sentences come one to four times, in random order, and half of them mixed with another one about the scene, as a
    region may hold part of the ground: the number of vectors says nothing, nor does their purity.
    """
    word, embed_words = tokenizer.get_vocab(), model.get_input_embeddings()
    slots = []
    for scene in scenes:
        told = world.sentences(scene)
        about_scene = [sentence for sentence in told if not set(sentence.split()) & set(world.SHAPES)]
        told = [sentence for sentence in told for _ in range(random.randint(1, 4))]
        mixed = [f"{s} {random.choice(about_scene)}" if random.random() < 0.5 else s for s in told]
        random.shuffle(mixed)
        slots.append([[word[w] for w in sentence.split() if w not in FUNCTION_WORDS] for sentence in mixed])
    longest, most = max(map(len, slots)), max(len(slot) for row in slots for slot in row)
    ids_BRW = torch.full((len(slots), longest, most), tokenizer.pad_token_id)
    for row, told in enumerate(slots):
        for place, ids in enumerate(told, longest - len(told)):
            ids_BRW[row, place, : len(ids)] = torch.tensor(ids)
    there_BRW = (ids_BRW != tokenizer.pad_token_id).to(DEVICE)
    count_BR1 = there_BRW.sum(-1, keepdim=True)
    sums_BRE = (embed_words(ids_BRW.to(DEVICE)) * there_BRW.unsqueeze(-1)).sum(2)
    return {"image_embeds": sums_BRE / count_BR1.clamp_min(1), "visible_BR": count_BR1.squeeze(-1) > 0}


def start_path(folder: Path, encoder: str, seed: int) -> Path:
    return folder / f"start-{encoder}-{seed}.pt"


def start_job(folder: Path, scale: Scale, encoder: str, seeds: tuple[int, ...]):
    """Where all arms of an encoder and a seed start: an aligned projector, and a model that knows every frozen kind
    of token: the arms have these in turn, so that none is favoured."""
    left = [seed for seed in seeds if not start_path(folder, encoder, seed).exists()]
    if not left:
        return
    tokenizer, config = make_tokenizer(), make_encoder(0).config
    features = load_features(folder, encoder, "train").first(scale.probe_scenes)
    scenes = scenes_of("train", len(features))
    questions = Questions.of(scenes, tokenizer, kinds_of(folder))
    arms = [ImageTokens(make_model(tokenizer, config, arm, 0), arm, features) for arm in SHARED_ARMS]

    def make(seed: int):
        model = make_model(tokenizer, config, BASE, seed)
        model.load_state_dict(torch.load(folder / "text.pt", map_location=DEVICE), strict=False)
        torch.manual_seed(seed)
        align_projector(model, tokenizer, features, scenes, scale)
        turn = Random(seed)

        def loss_of(rows: torch.Tensor) -> torch.Tensor:
            tokens = turn.choice(arms)
            embeds = embed(model, tokens, tokens.arm.view, rows, torch.zeros_like(rows))
            return answer_loss(model, questions.rows(rows), *embeds)

        weights = [p for name, p in model.named_parameters() if name.startswith(SHARED_PARTS)]
        fit(
            loss_of,
            weights,
            len(features),
            scale.shared_steps,
            scale.recipe.batch,
            f"start {seed}, {encoder}",
            lr=1e-3,
        )
        return shared_weights(model)

    for seed in left:
        once(start_path(folder, encoder, seed), lambda seed=seed: make(seed))


def align_projector(model, tokenizer, features: Features, scenes: list[world.Scene], scale: Scale):
    """All else frozen, each projected patch comes near to the mean embedding of the words for what it shows.

    Ground, objects and marks weigh the same, however many patches they take. No kind of token is involved.
    """
    word, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    rows_SN = [scene.patch_words() for scene in scenes]
    ids_SN3 = torch.tensor([[[word[w] for w in words] + [pad] * (3 - len(words)) for words in row] for row in rows_SN])
    group_SN = torch.tensor([[("ground" in words) + 2 * ("tiny" in words) for words in row] for row in rows_SN])
    count_3 = group_SN.flatten().bincount(minlength=3).float()
    weight_3 = (count_3.sum() / 3 / count_3).to(DEVICE)
    embeddings = model.get_input_embeddings().weight.detach()
    projector = model.model.multi_modal_projector

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        patches_BND = features.features_SND[rows].float().to(DEVICE)
        seen_BNE = projector(patches_BND)
        ids_BN3 = ids_SN3[rows].to(DEVICE)
        there_BN31 = (ids_BN3 != pad).unsqueeze(-1)
        target_BNE = (embeddings[ids_BN3] * there_BN31).sum(2) / there_BN31.sum(2)
        return ((seen_BNE - target_BNE).square().sum(-1) * weight_3[group_SN[rows].to(DEVICE)]).mean()

    parameters = [*projector.linear_1.parameters(), *projector.linear_2.parameters()]
    fit(loss_of, parameters, len(scenes), scale.align_steps, 4 * scale.recipe.batch, "projector", lr=3e-3)


def shared_weights(model) -> dict[str, torch.Tensor]:
    """Of the language model and the projector; gains, controller and learned tokens are each arm's own."""
    return {name: weight for name, weight in model.state_dict().items() if name.startswith(SHARED_PARTS)}


def arm_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "arms" / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"


def arm_job(
    folder: Path, scale: Scale, name: str, seeds: tuple[int, ...], split: str = "test", output: Path | None = None
):
    """Train an arm and ask it about a split, seed by seed; results go to the output folder, by default the same."""
    paths = {seed: arm_path(output or folder, name, seed) for seed in seeds}
    left = [seed for seed in seeds if not paths[seed].exists()]
    if not left:
        return
    bench = Bench.of(folder, scale, ARMS[name], split)
    for seed in left:
        once(paths[seed], lambda seed=seed: bench.run(seed))


@dataclass
class Bench:
    """What all seeds of an arm share: tokens of frozen sources, questions, and where they start."""

    arm: Arm
    scale: Scale
    tokenizer: object
    folder: Path
    features: dict[str, Features]
    questions: dict[str, Questions]
    scenes: dict[str, list[world.Scene]]
    tokens: dict[str, ImageTokens]
    split: str

    @classmethod
    def of(cls, folder: Path, scale: Scale, arm: Arm, split: str) -> "Bench":
        tokenizer, kinds = make_tokenizer(), kinds_of(folder)
        counts = {
            "train": scale.train_scenes, "validation": scale.validation_scenes,
            "test": scale.test_scenes if split == "test" else 0,
        }  # fmt: skip
        scenes = {name: scenes_of(name, count) for name, count in counts.items() if count}
        features = {name: load_features(folder, arm.encoder, name) for name in scenes}
        return cls(
            arm=arm,
            scale=scale,
            tokenizer=tokenizer,
            folder=folder,
            features=features,
            questions={name: Questions.of(scenes[name], tokenizer, kinds) for name in scenes},
            scenes=scenes,
            tokens={},
            split=split,
        )

    def run(self, seed: int) -> dict:
        model = make_model(self.tokenizer, make_encoder(0).config, self.arm, seed)
        start = torch.load(start_path(self.folder, self.arm.encoder, seed), map_location=DEVICE)
        model.load_state_dict(start, strict=False)
        if not self.tokens or self.arm.source == LEARNED:
            self.tokens = {name: ImageTokens(model, self.arm, seen) for name, seen in self.features.items()}
        watched = min(self.scale.watch_scenes, len(self.features["validation"]))
        watch_tokens = self.tokens["validation"].first(watched)
        watch_questions = self.questions["validation"].first(watched)

        def watch() -> float:
            # Where a level is drawn in training, the middle one is watched.
            said_SQ, _ = ask(model, watch_tokens, watch_questions, self.arm.view, level=len(self.arm.levels) // 2)
            return float((said_SQ == watch_questions.answer_SQ.numpy()).mean())

        trained = train_arm(
            model, self.arm, self.tokens["train"], self.questions["train"], self.scale.recipe, seed, watch
        )
        return {
            "arm": self.arm.name, "seed": seed, "split": self.split, "kinds": list(self.questions["train"].kinds),
            **trained, "steps_to_threshold": first_step(trained["history"], self.scale.recipe.threshold),
            **self._ask(model),
        }  # fmt: skip

    def _ask(self, model) -> dict:
        tokens, questions = self.tokens[self.split], self.questions[self.split]
        levels = range(max(len(self.arm.levels), 1))
        start = time.perf_counter()
        answers = {}
        for view in self.arm.views:
            answers[view] = [self._told(ask(model, tokens, questions, view, level), questions) for level in levels]
        seconds = time.perf_counter() - start
        shuffled_SQ, _ = ask(model, tokens, questions, self.arm.view, len(self.arm.levels) // 2, shift=1)
        result = {
            "answers": answers,
            "truth_yes": digits(questions.answer_SQ.numpy() == self.tokenizer.convert_tokens_to_ids("yes")),
            "shuffled": digits(shuffled_SQ == questions.answer_SQ.numpy()),
            "image_tokens": [self._image_tokens(model, tokens, level) for level in levels],
            "ask_seconds": seconds,
        }
        if len(self.arm.levels) > 1:
            result["chosen"] = level_answers(
                model, self.arm, self.tokenizer, self.tokens["validation"], self.questions["validation"],
                self.scenes["validation"], self.scenes[self.split],
            )  # fmt: skip
        return result

    def _image_tokens(self, model, tokens: ImageTokens, level: int) -> float:
        """How many image tokens a prompt holds in the mean, over at most 100 scenes."""
        rows = torch.arange(min(100, len(tokens.features)))
        _, seen_BR = embed(model, tokens, self.arm.view, rows, torch.full_like(rows, level))
        return seen_BR.sum(1).float().mean().item()

    def _told(self, told: tuple[np.ndarray, np.ndarray], questions: Questions) -> dict:
        said_SQ, nll_SQ = told
        yes = self.tokenizer.convert_tokens_to_ids("yes")
        result = {"right": digits(said_SQ == questions.answer_SQ.numpy()), "yes": digits(said_SQ == yes)}
        if len(self.arm.levels) > 1:
            result["nll"] = nll_SQ.round(3).tolist()
        return result


def first_step(history: list[tuple[int, float]], threshold: float) -> int | None:
    return next((step for step, accuracy in history if accuracy >= threshold), None)


def digits(values_SQ: np.ndarray) -> list[str]:
    """One word of digits for each scene."""
    return ["".join(map(str, row)) for row in np.asarray(values_SQ).astype(int).tolist()]


def numbers(words: list[str]) -> np.ndarray:
    """(S,Q) of what `digits` wrote."""
    return np.array([[int(digit) for digit in word] for word in words])
