"""The study's arms: one Granulon each, the same but for how image tokens are made, trained and asked in the same way.

The tower is frozen, so its features are read from a cache, and where an arm's tokens hold nothing that learns, they
are made once. All questions about a scene stand behind one copy of its image tokens, each blind to the others: the
answers are those of single prompts, at a fraction of the cost. An answer is one word, the greedy next token.

Shapes by suffix: S scenes, B scenes of a batch, N patches, K token slots, R image tokens of a row, Q questions of a
scene, T tokens of all its questions, P = R + T, D vision width, E text width, G levels.
"""

import time
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.adaptive_token_aggregation import AggregationOutput, kept_tokens
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC

from . import world
from .encoders import CONTRASTIVE, DEVICE, MASKED, Features
from .tokens import COLOUR, GRID, LEARNED, RANDOM, make_aggregation
from .tokens import SEMANTIC as CLUSTERS

BUDGETS = (4, 8, 16, 32)
K = 16  # where the number of tokens is not what is studied
SPARE = 1.2  # clusters per kept token, as in the method's own levels
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %} <end> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@dataclass(frozen=True)
class Arm:
    """
    What an arm does differently.

    Args:
        source: of the K tokens, of study_tokens; None for pixel tokens alone.
        levels: (stride, clusters, keep) of each level; with several, a training step draws one for each scene.
        view: what the prompt shows: the K tokens ("semantic"), the patches ("pixel"), or both ("full").
        joint: weight of the losses of the two partial views (Eq. 10).
        relation_weight, iterations, refinement: of the method's clustering; rounds on cells, then on patches.
    """

    name: str
    source: str | None
    levels: tuple[tuple[int, int, int], ...]
    view: str = SEMANTIC
    encoder: str = MASKED
    joint: float = 0.0
    relation_weight: float = 3.0
    iterations: int = 2
    refinement: int = 2

    @property
    def views(self) -> tuple[str, ...]:
        return (FULL, PIXEL, SEMANTIC) if self.view == FULL else (self.view,)

    @property
    def slots(self) -> int:
        return max((keep for *_, keep in self.levels), default=0)


def one_level(tokens: int) -> tuple[tuple[int, int, int], ...]:
    return ((1, round(SPARE * tokens), tokens),)


PIXELS = Arm("pixels", None, (), PIXEL)
BUDGET_ARMS = tuple(
    Arm(f"{source} {tokens}", source, one_level(tokens))
    for tokens in BUDGETS
    for source in (CLUSTERS, GRID, RANDOM, COLOUR)
)
BASE = next(arm for arm in BUDGET_ARMS if arm.name == f"{CLUSTERS} {K}")
VIEW_ARMS = (
    PIXELS,
    *(Arm(f"pixels + {source}", source, one_level(K), FULL) for source in (CLUSTERS, GRID, LEARNED)),
)
LEVEL_ARMS = (
    # Stride 4 leaves 9 cells of 12 x 12 patches, so that 8 is what all three can keep.
    Arm("levels, equal K", CLUSTERS, ((4, 9, 8), (2, 10, 8), (1, 10, 8))),
    Arm("levels, default K", CLUSTERS, ((4, 6, 5), (2, 12, 10), (1, 24, 20))),
)
JOINT_ARMS = (replace(VIEW_ARMS[1], name="pixels + semantic, joint", joint=0.5),)
ENCODER_ARMS = tuple(
    replace(arm, name=f"{arm.name}, {CONTRASTIVE}", encoder=CONTRASTIVE)
    for arm in (PIXELS, BASE, next(arm for arm in BUDGET_ARMS if arm.name == f"{GRID} {K}"))
)
PART_ARMS = (
    replace(BASE, name="attention 0", relation_weight=0.0),
    replace(BASE, name="attention 1", relation_weight=1.0),
    replace(BASE, name="no filter", levels=((1, K, K),)),
    replace(BASE, name="1 round", iterations=1, refinement=0),
    replace(BASE, name="8 rounds", refinement=6),
)
ARMS = {
    arm.name: arm
    for arm in (*BUDGET_ARMS, *VIEW_ARMS, *LEVEL_ARMS, *JOINT_ARMS, *ENCODER_ARMS, *PART_ARMS)
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the world."""
    scenes = [world.make_scene(seed) for seed in world.seeds("train", 400)]
    texts = [sentence for scene in scenes for sentence in world.sentences(scene)]
    texts += [f"{q.text} {q.answer}" for scene in scenes for q in world.make_questions(scene)]
    words = sorted({word for text in texts for word in text.split()} | {"user", "assistant", ":"})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", IMAGE_TOKEN, "<unknown>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>",
        additional_special_tokens=[IMAGE_TOKEN], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_processor(tokenizer, arm: Arm) -> GranulonProcessor:
    image_processor = ViTImageProcessorPil(
        size={"height": world.SIZE, "width": world.SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return GranulonProcessor(image_processor, tokenizer, world.PATCH, arm.slots, IMAGE_TOKEN, CHAT_TEMPLATE)


def make_model(tokenizer, vision_config, arm: Arm, seed: int) -> GranulonForConditionalGeneration:
    """The arm's model with random weights, its own module in place of the aggregation."""
    torch.manual_seed(seed)
    text_config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    names = ("coarse", "medium", "fine") if len(arm.levels) == 3 else ("only",)
    config = GranulonConfig(
        vision_config=vision_config, text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        granularities=[
            {"name": name, "stride": stride, "clusters": clusters, "keep": keep, "view": arm.view}
            for name, (stride, clusters, keep) in zip(names, arm.levels)
        ],
        relation_weight=arm.relation_weight, cluster_iterations=arm.iterations,
        refinement_iterations=arm.refinement, controller_hidden_size=64,
    )  # fmt: skip
    model = GranulonForConditionalGeneration(config).eval()
    if arm.source not in (None, CLUSTERS):
        model.model.aggregation = make_aggregation(arm.source, vision_config.hidden_size, arm.slots)
    return model.to(DEVICE)


@dataclass
class Questions:
    """
    The questions about scenes, ready to stand behind image tokens.

    ids_ST: the questions' tokens one after another; question_ST: which one a token belongs to, -1 on padding.
    place_ST: a token's place in its own question. last_SQ: where each question's last token stands.
    answer_SQ: the answer's token. kinds: of the Q questions.
    """

    ids_ST: torch.Tensor
    question_ST: torch.Tensor
    place_ST: torch.Tensor
    last_SQ: torch.Tensor
    answer_SQ: torch.Tensor
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, scenes: list[world.Scene], tokenizer, kinds: tuple[str, ...]) -> "Questions":
        asked = [[q for q in world.make_questions(scene) if q.kind in kinds] for scene in scenes]
        word = tokenizer.get_vocab()
        ids = [[[word[token] for token in q.text.split()] for q in row] for row in asked]
        pad = torch.nn.utils.rnn.pad_sequence
        lengths_SQ = torch.tensor([[len(question) for question in row] for row in ids])

        def column(values, padding):
            return pad([torch.tensor(sum(row, [])) for row in values], batch_first=True, padding_value=padding)

        return cls(
            ids_ST=column(ids, tokenizer.pad_token_id),
            question_ST=column([[[n] * len(x) for n, x in enumerate(row)] for row in ids], -1),
            place_ST=column([[list(range(len(x))) for x in row] for row in ids], 0),
            last_SQ=lengths_SQ.cumsum(1) - 1,
            answer_SQ=torch.tensor([[word[q.answer] for q in row] for row in asked]),
            kinds=tuple(q.kind for q in asked[0]),
        )

    def first(self, scenes: int) -> "Questions":
        tensors = {name: value[:scenes] for name, value in vars(self).items() if name != "kinds"}
        return Questions(**tensors, kinds=self.kinds)

    def rows(self, rows: torch.Tensor) -> "Questions":
        """Of some scenes, on the device where the model is."""
        tensors = {name: value[rows].to(DEVICE) for name, value in vars(self).items() if name != "kinds"}
        return Questions(**tensors, kinds=self.kinds)


def answer_logits(
    model: GranulonForConditionalGeneration,
    questions: Questions,
    image_embeds: torch.Tensor | None = None,
    visible_BR: torch.Tensor | None = None,
    prefix_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Next-token logits (B,Q,vocabulary) at the end of each question.

    The questions stand behind image tokens (B,R,E), of which `visible_BR` are there, or behind words (B,R): each sees
    these and itself, at the positions that it has in a prompt of its own.
    """
    visible_BR = visible_BR.to(DEVICE)
    if prefix_ids is None:
        prefix_ids = torch.full_like(visible_BR, model.config.image_token_id, dtype=torch.long)
    length = prefix_ids.shape[1]
    own_BTT = questions.question_ST.unsqueeze(2) == questions.question_ST.unsqueeze(1)
    both_BPP = F.pad(own_BTT, (length, 0, length, 0))
    both_BPP[:, :, :length] = visible_BR.unsqueeze(1)
    eye_PP = torch.eye(both_BPP.shape[1], dtype=torch.bool, device=DEVICE)
    mask_BPP = both_BPP & torch.ones_like(eye_PP).tril() | eye_PP  # every token sees at least itself
    seen_B1 = visible_BR.sum(1, keepdim=True)
    positions = torch.cat([(visible_BR.cumsum(1) - 1).clamp_min(0), seen_B1 + questions.place_ST], dim=1)
    states_BQE = model.model(
        input_ids=torch.cat([prefix_ids, questions.ids_ST], dim=1),
        attention_mask=mask_BPP.unsqueeze(1),
        position_ids=positions,
        image_embeds=image_embeds,
        predict=length + questions.last_SQ + 1,
    ).last_hidden_state
    return model.lm_head(states_BQE)


class ImageTokens:
    """
    The K tokens and the patches of scenes for an arm: `semantic(rows, level_B)` and `patches(rows)`.

    What a frozen source makes of every scene at every level is made once; learned tokens are made on each call.
    """

    def __init__(self, model: GranulonForConditionalGeneration, arm: Arm, features: Features, batch: int = 200):
        self.base, self.arm, self.features = model.model, arm, features
        self.cached = None
        if arm.source not in (None, LEARNED):
            rows = torch.arange(len(features)).split(batch)
            with torch.no_grad():
                levels = [[self._aggregate(part, level) for part in rows] for level in range(len(arm.levels))]
            self.cached = [tuple(torch.cat(parts).cpu() for parts in zip(*level)) for level in levels]

    def semantic(self, rows: torch.Tensor, level_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B,K,D), their geometry (B,K,5) and which are there (B,K), unused slots first, as in the model."""
        if self.cached is None:
            return self._aggregate(rows, 0)
        every = [torch.stack([field[rows] for field in fields]) for fields in zip(*self.cached)]  # (G,B,K,...)
        return tuple(field[level_B, torch.arange(len(rows))].to(DEVICE) for field in every)

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        return self.features.features_SND[rows].float().to(DEVICE)

    def groups(self, batch: int = 200) -> np.ndarray:
        """Of which token each patch of each scene is a part, (S,N); at the first level."""
        parts = torch.arange(len(self.features)).split(batch)
        return torch.cat([self._found(rows, 0).assignment.flatten(1).cpu() for rows in parts]).numpy()

    def first(self, scenes: int) -> "ImageTokens":
        part = copy(self)
        part.features = self.features.first(scenes)
        return part

    def _aggregate(self, rows: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self._found(rows, level)
        unused = self.arm.slots - found.mask.shape[1]
        tokens_BKD, geometry_BK5 = (F.pad(field, (0, 0, unused, 0)) for field in (found.tokens, found.geometry))
        return tokens_BKD, geometry_BK5, F.pad(found.mask, (unused, 0))

    def _found(self, rows: torch.Tensor, level: int) -> AggregationOutput:
        """The clusters of the model's own aggregation at a level, all of them used."""
        stride, clusters, keep = self.arm.levels[level]
        grid, attention = (world.GRID, world.GRID), None
        if self.arm.source == COLOUR:
            self.base.aggregation.colours = self.features.colours_SN3[rows].to(DEVICE)
        elif self.arm.source == CLUSTERS:  # only the method reads the relation map
            attention = self.features.relation_SNC[rows].to(DEVICE)
        used = kept_tokens(grid, stride, clusters, keep)
        return self.base.aggregation(self.patches(rows), attention, stride, clusters, grid=grid, top_k=used)


def embed(
    model: GranulonForConditionalGeneration, tokens: ImageTokens, view: str, rows: torch.Tensor, level_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected image tokens of a view (B,R,E), and which are there (B,R)."""
    projector, level_B = model.model.multi_modal_projector, level_B if model.config.granularities else None
    parts, seen = [], []
    if view != SEMANTIC:
        pixel_BND = tokens.patches(rows)
        parts.append(projector(pixel_BND, None if level_B is None else level_B.to(DEVICE)))
        seen.append(torch.ones(pixel_BND.shape[:2], dtype=torch.bool, device=DEVICE))
    if view != PIXEL:
        semantic_BKD, geometry_BK5, mask_BK = tokens.semantic(rows, level_B)
        parts.append(projector(semantic_BKD, level_B.to(DEVICE), geometry_BK5))
        seen.append(mask_BK)
    return torch.cat(parts, dim=1), torch.cat(seen, dim=1)


@dataclass(frozen=True)
class Recipe:
    """How arms are trained; chosen on validation data (docs/study.md)."""

    steps: int
    batch: int = 16
    lr: float = 1e-3
    watch_every: int = 50
    threshold: float = 0.75  # of validation accuracy, for steps to a threshold


def train_arm(model, arm: Arm, tokens: ImageTokens, questions: Questions, recipe: Recipe, seed: int, watch) -> dict:
    """
    Projector, language model and whatever of the aggregation learns, on the answers of all views.

    watch: called every `recipe.watch_every` steps, gives the validation accuracy.

    Returns:
        dict: `history` of (step, validation accuracy), `seconds` of training alone, `loss` at the end.
    """
    random = torch.Generator().manual_seed(seed)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "controller" not in name]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps + 1, pct_start=0.1)
    weights = {arm.view: 1.0} | ({PIXEL: arm.joint, SEMANTIC: arm.joint} if arm.joint else {})
    history, seconds = [], 0.0
    for step in range(1, recipe.steps + 1):
        start = time.perf_counter()
        rows = torch.randint(len(tokens.features), (recipe.batch,), generator=random)
        level_B = torch.randint(max(len(arm.levels), 1), (recipe.batch,), generator=random)
        asked = questions.rows(rows)
        loss = sum(
            weight * answer_loss(model, asked, *embed(model, tokens, view, rows, level_B))
            for view, weight in weights.items()
        )
        if not loss.isfinite():
            raise FloatingPointError(f"{arm.name}, seed {seed}: the loss of step {step} is not finite")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % recipe.watch_every == 0 or step == recipe.steps:
            history.append((step, watch()))
    return {"history": history, "seconds": seconds, "loss": loss.item()}


def answer_loss(model, questions: Questions, image_embeds: torch.Tensor, visible_BR: torch.Tensor) -> torch.Tensor:
    logits_BQV = answer_logits(model, questions, image_embeds, visible_BR)
    return F.cross_entropy(logits_BQV.flatten(0, 1), questions.answer_SQ.flatten().to(DEVICE))


@torch.no_grad()
def ask(
    model, tokens: ImageTokens, questions: Questions, view: str, level: int = 0, shift: int = 0, batch: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """
    The answers' tokens (S,Q) and the negative log-likelihood of the right ones (S,Q).

    shift: each scene's questions are asked about the scene so many places further on.
    """
    scenes, said, nll = len(tokens.features), [], []
    for rows in torch.arange(scenes).split(batch):
        level_B = torch.full((len(rows),), level)
        asked = questions.rows(rows)
        embeds = embed(model, tokens, view, (rows + shift) % scenes, level_B)
        logits_BQV = answer_logits(model, asked, *embeds)
        said.append(logits_BQV.argmax(-1).cpu())
        nll.append(-logits_BQV.log_softmax(-1).gather(-1, asked.answer_SQ.unsqueeze(-1)).squeeze(-1).cpu())
    return torch.cat(said).numpy(), torch.cat(nll).numpy()
