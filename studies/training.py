"""What the study trains: a projector fitted to words, then for each seed a model on all arms in turn.

Every arm's tokens are as frequent in training as another's, so that the model is as used to one source as to the next,
and all arms of a seed are read by the same weights.

Shapes by suffix: S scenes, B scenes of a batch, N patches, Q questions of a scene, A arms, G levels, W texts.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from granulon.evaluation.token_reduction import nearest_level, small_grid
from granulon.hub.assemble import CHAT_TEMPLATE, assemble
from granulon.hub.files import write_atomically
from granulon.hub.inference import load_model, load_processor
from granulon.hub.parts import fetch_part
from granulon.train import word_start
from granulon.train.controller.corpus import MEASURED, TEMPLATE, TRAIN, VALIDATION, corpus_row
from granulon.train.controller.fit import controller_logits, question_states, train_controller
from granulon.train.data.cutouts import LEVEL_OF, compose, patch_texts, questions
from granulon.train.data.scenes import LEVELS
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC
from modeling_granulon.vision_features import COLUMN_STRIDE, patch_size_of

from .arms import (
    ADATA,
    BUDGET_ARMS,
    BUDGETS,
    LARGE,
    LEVEL_ARMS,
    PART_ARMS,
    PIXEL_ARMS,
    SOURCES,
    Arm,
    Questions,
    Seen,
    aggregate,
    answer_log_probs,
    ask,
    embed,
)

LABELS = TEMPLATE, MEASURED  # of controllers
ASKED = 4  # questions of a scene: all scenes count the same
PIXEL_SHARE = 0.2  # of the batches read pixel tokens, with or without others
ADAPTER = LoraConfig(
    r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
LEARNING_RATE = 1e-3
TEXT_TOKENS = 16  # of a question and its answer, about
JOINT_WEIGHT = 0.5  # of the pixel and of the semantic view beside the full one (Eq. 10)
FULL_ARM = PIXEL_ARMS[1]


@dataclass(frozen=True)
class Scale:
    """Numbers of scenes, and steps; batches are scenes."""

    train: int = 2400
    validation: int = 80
    test: int = 120
    projector_scenes: int = 480
    projector_steps: int = 1500
    steps: int = 300
    batch: int = 8
    pixel_batch: int = 4  # whose prompts have 256 tokens more
    joint_tokens: int = 30_000  # that the two models with and without joint losses read in training
    measured: int = 160  # training scenes whose answers are scored at every level, for the controller


def cached(path: Path, make: Callable[[], object]):
    """What `torch.save` wrote to a file, made and saved first if the file does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start, content = time.perf_counter(), make()
        write_atomically(path, lambda draft: torch.save(content, draft))
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def assembled(folder: Path) -> Path:
    """The model before training: frozen tower, language model as published, levels of the method."""
    if not (folder / "base").exists():
        parts = [fetch_part(name) for name in ("dinov2-small", "smollm2-135m-instruct")]
        levels = [{**level, "view": SEMANTIC} for level in DEFAULT_GRANULARITIES]
        assemble(*parts, folder / "base", settings={"granularities": levels}, chat_template=CHAT_TEMPLATE)
    return folder / "base"


def scenes_of(split: str, count: int, base: Path) -> dict:
    """
    Scenes that have enough questions, as the tower sees them.

    Returns:
        dict: `seen`, `questions` (`ASKED` of each scene), `texts` that patches show, and which each does, `text_SN`.
    """
    model, numbers, asked, shown, parts = load_model(base), {}, [], [], []
    processor, candidate, pictures = load_processor(base, model.config), 0, []
    progress = tqdm(total=count, desc=f"{split} scenes", mininterval=10)
    while len(asked) < count:
        name = f"study {split} {candidate}"
        candidate, scene = candidate + 1, compose(name)
        own = questions(scene, name)
        if len(own) < ASKED:
            continue
        asked.append(Random(name).sample(own, ASKED))
        shown.append([numbers.setdefault(text, len(numbers)) for text in patch_texts(scene)])
        pictures.append(scene.picture)
        if len(pictures) == 32 or len(asked) == count:
            parts.append(see(model, processor, pictures))
            progress.update(len(pictures))
            pictures = []
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if isinstance(name, str)}
    small = {tokens: torch.cat([part[tokens] for part in parts]) for tokens in parts[0] if isinstance(tokens, int)}
    side = int(joined["features_SND"].shape[1] ** 0.5)
    seen = Seen(**joined, small=small, grid=(side, side))
    return {"seen": seen, "questions": asked, "texts": list(numbers), "text_SN": torch.tensor(shown)}


@torch.inference_mode()
def see(model, processor, pictures: list) -> dict:
    """Features of pictures: the fields of `Seen`, and by budget the features of smaller images."""

    def tower(**size):
        pixels = processor.image_processor(pictures, return_tensors="pt", **size)["pixel_values"]
        return model.model._vision(pixels.to(model.dtype))

    vision, patch = tower(), patch_size_of(model.config.vision_config)
    found = {
        "features_SND": vision.features.bfloat16(),
        "relation_SNC": vision.relation.profiles(COLUMN_STRIDE).half(),
        "received_SN": vision.relation.profiles(1).sum(1),
    }
    for tokens in (*BUDGETS, LARGE):
        height, width = (side * patch for side in small_grid(tokens))
        found[tokens] = tower(size={"height": height, "width": width}).features.bfloat16()
    return found


def fit_projector(base: Path, scenes: dict, scale: Scale) -> dict[str, Tensor]:
    """The projector's weights, fitted to words on the tokens of all sources and budgets, and on single patches."""
    model = load_model(base)
    processor, projector = load_processor(base, model.config), model.model.multi_modal_projector
    seen, text_SN = scenes["seen"].rows(slice(scale.projector_scenes)), scenes["text_SN"][: scale.projector_scenes]
    texts, tokens = scenes["texts"], {}
    for arm in (Arm(source, count) for count in (*BUDGETS, LARGE) for source in SOURCES):
        found = aggregate(arm, seen)
        label_SN = on_grid(found.assignment, seen.grid)
        shown_SK, share_SK = word_start.majority(label_SN, text_SN, found.tokens.shape[1], len(texts))
        used = share_SK > 0
        own = found.tokens[used].bfloat16(), found.geometry[used], shown_SK[used], share_SK[used]
        tokens.setdefault(nearest_level(model.config, arm.tokens), []).append(own)
    tokens = {level: tuple(map(torch.cat, zip(*parts))) for level, parts in tokens.items()}
    patches = seen.features_SND.flatten(0, 1)
    tokens[-1] = patches, None, text_SN.flatten(), torch.ones(len(patches))
    targets = (word_start.word_targets(model, processor, words) for words in (texts, word_start.PLACE_WORDS))
    torch.manual_seed(0)
    right = word_start.fit(projector.float(), tokens, *targets, scale.projector_steps, batch=256, rate=2e-3)
    print(f"projector: {right:.3f} of the tokens are nearest to the words for what they show")
    return projector.state_dict()


def on_grid(assignment_SHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """An assignment on the grid of patches, (S,N): of a smaller image, each patch has that of the place it lies at."""
    row_H, column_W = (torch.arange(side) * own // side for side, own in zip(grid, assignment_SHW.shape[1:]))
    return assignment_SHW[:, row_H[:, None], column_W].flatten(1)


def load_start(base: Path, projector: dict[str, Tensor], seed: int, adapters: dict[str, Tensor] | None = None):
    """Model and processor with the fitted projector and adapters, new ones of a seed if none are given."""
    model = load_model(base)
    model.model.multi_modal_projector.load_state_dict(projector)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    inject_adapter_in_model(ADAPTER, model.model.language_model)
    if adapters is not None:
        set_peft_model_state_dict(model.model.language_model, adapters)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, load_processor(base, model.config)


def write_model(model, processor, folder: Path):
    """A checkpoint of the model, whose adapters are merged, for `granulon-analyse budgets` and all else."""
    decoder = model.model.language_model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            decoder.set_submodule(name, module.base_layer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def draw_arms(random: Random) -> Arm:
    """An arm to train on: sources and budgets are equally frequent, AdaTA and its parts together as one source."""
    if random.random() < PIXEL_SHARE:
        return random.choice(PIXEL_ARMS)
    source, tokens = random.choice(SOURCES), random.choice((*BUDGETS, LARGE))
    if source == ADATA and tokens == PART_ARMS[0].tokens:
        return random.choice((Arm(ADATA, tokens), *PART_ARMS))
    return Arm(source, tokens)


def train_mixed(base: Path, projector: dict, scenes: dict, scale: Scale, seed: int) -> dict[str, Tensor]:
    """Adapters after `scale.steps` batches, each read with the image tokens of one arm."""
    model, processor = load_start(base, projector, seed)
    random = Random(f"arms {seed}")

    def batches():
        for _ in range(scale.steps):
            arm = draw_arms(random)
            yield {arm: 1.0}, scale.batch if arm.view == SEMANTIC else scale.pixel_batch

    fit(model, processor, scenes, batches(), scale.steps, random)
    return get_peft_model_state_dict(model.model.language_model)


def train_joint(
    base: Path, projector: dict, adapters: dict, scenes: dict, scale: Scale, seed: int, joint: bool
) -> dict[str, Tensor]:
    """Adapters after more training on pixels beside semantic tokens, with or without losses of the partial views.

    Both read about `scale.joint_tokens` tokens, of the same scenes in the same order.
    """
    model, processor = load_start(base, projector, seed, adapters)
    random, weights = Random(f"joint {seed}"), {FULL_ARM: 1.0}
    if joint:
        weights |= {replace(FULL_ARM, view=view): JOINT_WEIGHT for view in (PIXEL, SEMANTIC)}
    patches = scenes["seen"].features_SND.shape[1]
    images = {FULL: patches + FULL_ARM.tokens, PIXEL: patches, SEMANTIC: FULL_ARM.tokens}
    cost = scale.pixel_batch * sum(images[arm.view] + ASKED * TEXT_TOKENS for arm in weights)
    steps = max(1, scale.joint_tokens // cost)
    fit(model, processor, scenes, ((weights, scale.pixel_batch) for _ in range(steps)), steps, random)
    return get_peft_model_state_dict(model.model.language_model)


def fit(model, processor, scenes: dict, batches, steps: int, random: Random):
    """Train the adapters; `batches` yields the weight of each arm's loss and the number of scenes.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 30), steps)
    order, shown = [], 0.0
    for step, (weights, count) in enumerate(bar := tqdm(batches, total=steps, mininterval=30)):
        if len(order) < count:
            order = random.sample(range(len(scenes["questions"])), len(scenes["questions"]))
        rows, order = order[:count], order[count:]
        asked = Questions.of(processor, [scenes["questions"][row] for row in rows])
        seen = scenes["seen"].rows(torch.tensor(rows))
        for arm, weight in weights.items():
            log_BL, _ = answer_log_probs(model, asked, embed(model, arm, seen))
            loss = -log_BL.sum() / (asked.segment_BL >= 0).sum()
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of step {step} is not finite; lower the learning rate")
            (weight * loss).backward()
        shown = 0.95 * shown + 0.05 * loss.item() if step else loss.item()
        bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def evaluate(model, processor, scenes: dict, arms: tuple[Arm, ...], shift: int = 0, batch: int = 16) -> dict:
    """
    The answers of arms to all questions about scenes.

    Args:
        shift: the image is that of the scene so many places further on.

    Returns:
        dict: `right` bool and `nll` (A,S,Q).
    """
    found, count = [], len(scenes["questions"])
    for rows in torch.arange(count).split(batch):
        asked = Questions.of(processor, [scenes["questions"][row] for row in rows])
        seen = scenes["seen"].rows((rows + shift) % count)
        found.append(ask(model, arms, seen, asked))
    right_ASQ, nll_ASQ = (torch.cat(parts, dim=1) for parts in zip(*found))
    return {"right": right_ASQ, "nll": nll_ASQ}


def choose_levels(model, processor, measured: dict, validation: dict, test: dict) -> dict:
    """
    The level of each test question by controllers that were trained on labels of its kind and on measured ones.

    Args:
        measured: scenes on which levels are measured and controllers trained.

    Returns:
        dict: for each of `LABELS` the levels (S,Q); `validation`, the mean negative log-likelihood of each level (G).
    """
    nll_GSQ = evaluate(model, processor, measured, LEVEL_ARMS)["nll"]
    texts_SQ = [[question.text for question in row] for row in test["questions"]]
    distinct = sorted({text for row in texts_SQ for text in row})
    result = {"validation": evaluate(model, processor, validation, LEVEL_ARMS)["nll"].mean((1, 2))}
    for source in LABELS:
        rows = label_rows(source, measured["questions"], nll_GSQ)
        train_controller(model, processor, rows, epochs=30, patience=5)
        with torch.no_grad():
            logits = controller_logits(model.model.granularity_controller, question_states(model, processor, distinct))
        level_of = dict(zip(distinct, logits.argmax(-1).tolist()))
        result[source] = torch.tensor([[level_of[text] for text in row] for row in texts_SQ])
    return result


def label_rows(source: str, asked: list[list], nll_GSQ: Tensor) -> list[dict]:
    """A granularity corpus of questions about scenes."""
    rows = []
    for number, own in enumerate(asked):
        split = VALIDATION if number < max(1, len(asked) // 10) else TRAIN
        for place, question in enumerate(own):
            measured = (-nll_GSQ[:, number, place]).softmax(0).tolist()
            meant = [float(name == LEVEL_OF[question.kind]) for name in LEVELS]
            labels = dict(zip(LEVELS, measured if source == MEASURED else meant, strict=True))
            rows.append(corpus_row(question.text, labels, source, key=str(number), split=split, kind=question.kind))
    return rows


@dataclass(frozen=True)
class Study:
    """The files of a study: what was made is not made again."""

    folder: Path
    scale: Scale

    @property
    def base(self) -> Path:
        return assembled(self.folder)

    def scenes(self, split: str) -> dict:
        count = getattr(self.scale, split)
        return cached(self.folder / f"{split}.pt", lambda: scenes_of(split, count, self.base))

    def some(self, split: str, count: int) -> dict:
        """The first scenes of a split."""
        scenes = self.scenes(split)
        part = slice(count)
        return {**scenes, "seen": scenes["seen"].rows(part), "questions": scenes["questions"][part]}

    def projector(self) -> dict:
        return cached(self.folder / "projector.pt", lambda: fit_projector(self.base, self.scenes("train"), self.scale))

    def adapters(self, seed: int, joint: bool | None = None) -> dict:
        """Of the model trained on all arms; of those trained on with (True) or without (False) joint losses."""
        start = (self.base, self.projector())
        if joint is None:
            make = lambda: train_mixed(*start, self.scenes("train"), self.scale, seed)  # noqa: E731
            return cached(self.folder / f"adapters-{seed}.pt", make)
        name = f"adapters-{seed}-{'joint' if joint else 'full'}.pt"
        more = (self.adapters(seed), self.scenes("train"), self.scale, seed, joint)
        return cached(self.folder / name, lambda: train_joint(*start, *more))

    def result(self, seed: int, split: str = "test") -> dict:
        """Answers of a seed's models to the questions of a split."""
        return cached(self.folder / f"{split}-{seed}.pt", lambda: self._measure(seed, split))

    def _measure(self, seed: int, split: str) -> dict:
        scenes, arms = self.scenes(split), (*BUDGET_ARMS, *PART_ARMS, *PIXEL_ARMS)
        model, processor = load_start(self.base, self.projector(), seed, self.adapters(seed))
        found = evaluate(model, processor, scenes, arms)
        other = evaluate(model, processor, scenes, LEVEL_ARMS[1:2], shift=1)["right"][0]
        chosen = choose_levels(
            model, processor, self.some("train", self.scale.measured), self.scenes("validation"), scenes
        )
        views = {}
        for joint in (False, True):
            model, _ = load_start(self.base, self.projector(), seed, self.adapters(seed, joint))
            own = tuple(replace(FULL_ARM, view=view) for view in (FULL, PIXEL, SEMANTIC))
            views[joint] = evaluate(model, processor, scenes, own)["right"]
        return {
            "arms": [arm.name for arm in arms],
            **found,
            "other_image": other,
            "chosen": chosen,
            "joint": views,
        } | {
            "kinds": [[question.kind for question in row] for row in scenes["questions"]],
            "scale": asdict(self.scale),
        }
