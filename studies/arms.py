"""The study's arms: Granulon models that differ only in how their image tokens are made.

The tower is frozen, so its features are read from a file. All questions about a scene follow one copy of its image
tokens and do not attend to each other: the answers are those of single prompts at a fraction of the cost. An answer is
one word, the greedy next token.

Shapes by suffix: S scenes, B scenes of a batch, N patches, K token slots, R image tokens of a row, Q questions of a
scene, L tokens of a question, T = Q * L, P = R + T, D vision width, E text width, G levels.
"""

from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.adaptive_token_aggregation import AggregationOutput, kept_tokens
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC

from . import world
from .encoders import DEVICE, Features, make_encoder
from .tokens import COLOUR, GRID, MODULES, RANDOM
from .tokens import SEMANTIC as CLUSTERS

BUDGETS = (4, 8, 16, 32)
K = 16  # tokens, where their number is not studied
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
        source: of the K tokens, one of tokens.SOURCES; None for pixel tokens alone.
        levels: (stride, clusters, keep) of each level; with several, training draws one at random for each batch.
        view: what the prompt shows: the K tokens ("semantic"), the patches ("pixel"), or both ("full").
        joint: weight of the losses of the two partial views (Eq. 10).
        relation_weight, iterations, refinement: of the method's clustering.
    """

    name: str
    source: str | None
    levels: tuple[tuple[int, int, int], ...]
    view: str = SEMANTIC
    joint: float = 0.0
    relation_weight: float = 3.0
    iterations: int = 2
    refinement: int = 2

    @property
    def views(self) -> tuple[str, ...]:
        """The views that a prompt of the arm can be read in."""
        return (FULL, PIXEL, SEMANTIC) if self.view == FULL else (self.view,)

    @property
    def slots(self) -> int:
        """Semantic slots of an image."""
        return max((keep for *_, keep in self.levels), default=0)


def one_level(tokens: int) -> tuple[tuple[int, int, int], ...]:
    """A single level that keeps so many tokens."""
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
    *(Arm(f"pixels + {source}", source, one_level(K), FULL) for source in (CLUSTERS, GRID)),
)
LEVEL_ARMS = (
    # Stride 4 leaves 9 cells of 12 x 12 patches, so all three levels can keep 8.
    Arm("levels, equal K", CLUSTERS, ((4, 9, 8), (2, 10, 8), (1, 10, 8))),
    Arm("levels, default K", CLUSTERS, ((4, 6, 5), (2, 12, 10), (1, 24, 20))),
)
JOINT_ARM = replace(VIEW_ARMS[1], name="pixels + semantic, joint", joint=0.5)
PART_ARMS = (
    replace(BASE, name="attention 0", relation_weight=0.0),
    replace(BASE, name="attention 1", relation_weight=1.0),
    replace(BASE, name="no filter", levels=((1, K, K),)),
    replace(BASE, name="1 round", iterations=1, refinement=0),
    replace(BASE, name="8 rounds", refinement=6),
)
ARMS = {arm.name: arm for arm in (*BUDGET_ARMS, *VIEW_ARMS, *LEVEL_ARMS, JOINT_ARM, *PART_ARMS)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the world."""
    scenes = world.make_scenes("train", 400)
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
    """The processor of an arm's model."""
    size = {"height": world.SIZE, "width": world.SIZE}
    image_processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return GranulonProcessor(image_processor, tokenizer, world.PATCH, arm.slots, IMAGE_TOKEN, CHAT_TEMPLATE)


def make_model(tokenizer, arm: Arm, seed: int = 0) -> GranulonForConditionalGeneration:
    """The arm's model with random weights, the aggregation replaced where the arm has another source."""
    text_config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    names = world.LEVELS[:3] if len(arm.levels) == 3 else ("only",)
    config = GranulonConfig(
        vision_config=make_encoder().config, text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        granularities=[
            {"name": name, "stride": stride, "clusters": clusters, "keep": keep, "view": arm.view}
            for name, (stride, clusters, keep) in zip(names, arm.levels)
        ],
        relation_weight=arm.relation_weight, cluster_iterations=arm.iterations,
        refinement_iterations=arm.refinement, controller_hidden_size=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GranulonForConditionalGeneration(config).eval()
    if arm.source in MODULES:
        model.model.aggregation = MODULES[arm.source]()
    return model.to(DEVICE)


@dataclass
class Questions:
    """Questions about scenes: ids_SQL, padded on the right; length_SQ in tokens; answer_SQ, the answers' ids."""

    ids_SQL: torch.Tensor
    length_SQ: torch.Tensor
    answer_SQ: torch.Tensor

    @classmethod
    def of(cls, scenes: list[world.Scene], tokenizer) -> "Questions":
        """The questions about scenes, one of each kind."""
        questions = [question for scene in scenes for question in world.make_questions(scene)]
        shape = len(scenes), len(world.KINDS)
        encoded = tokenizer([q.text for q in questions], padding=True, padding_side="right", return_tensors="pt")
        answer_SQ = torch.tensor([tokenizer.convert_tokens_to_ids(q.answer) for q in questions]).view(shape)
        return cls(encoded.input_ids.view(*shape, -1), encoded.attention_mask.sum(1).view(shape), answer_SQ)

    def rows(self, rows) -> "Questions":
        """Of some scenes, on the device of the model."""
        return Questions(*(value[rows].to(DEVICE) for value in vars(self).values()))


def answer_logits(model, questions: Questions, image_embeds: torch.Tensor, visible_BR: torch.Tensor) -> torch.Tensor:
    """
    Next-token logits (B,Q,vocabulary) at the end of each question.

    The questions follow image tokens (B,R,E), of which `visible_BR` are used: each attends to these and to itself, at
    the positions that it has in a prompt of its own.
    """
    (_, count, length), slots = questions.ids_SQL.shape, visible_BR.shape[1]
    visible_BR = visible_BR.to(DEVICE)
    slots_BR = torch.full_like(visible_BR, model.config.image_token_id, dtype=torch.long)
    place_T = torch.arange(count * length, device=DEVICE)
    own_TT = place_T.unsqueeze(1) // length == place_T // length
    mask_BPP = F.pad(own_TT, (slots, 0, slots, 0)).repeat(len(visible_BR), 1, 1)
    mask_BPP[:, :, :slots] = visible_BR.unsqueeze(1)
    eye_PP = torch.eye(mask_BPP.shape[1], dtype=torch.bool, device=DEVICE)
    mask_BPP = mask_BPP & torch.ones_like(eye_PP).tril() | eye_PP  # every token attends at least to itself
    positions = [(visible_BR.cumsum(1) - 1).clamp_min(0), visible_BR.sum(1, keepdim=True) + place_T % length]
    last_BQ = length * torch.arange(count, device=DEVICE) + questions.length_SQ - 1
    states_BQE = model.model(
        input_ids=torch.cat([slots_BR, questions.ids_SQL.flatten(1)], dim=1),
        attention_mask=mask_BPP.unsqueeze(1),
        position_ids=torch.cat(positions, dim=1),
        image_embeds=image_embeds,
        predict=slots + last_BQ + 1,
    ).last_hidden_state
    return model.lm_head(states_BQE)


def answer_loss(model, questions: Questions, image_embeds: torch.Tensor, visible_BR: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answers."""
    logits_BQV = answer_logits(model, questions, image_embeds, visible_BR)
    return F.cross_entropy(logits_BQV.flatten(0, 1), questions.answer_SQ.flatten())


@torch.no_grad()
def aggregate(model, arm: Arm, seen: Features, level: int = 0) -> AggregationOutput:
    """The K tokens of scenes at a level."""
    stride, clusters, keep = arm.levels[level]
    grid, attention = (world.GRID, world.GRID), None
    if arm.source == COLOUR:
        model.model.aggregation.colours = seen.colours_SN3.to(DEVICE)
    elif arm.source == CLUSTERS:  # only the method reads the relation map
        attention = seen.relation_SNC.to(DEVICE)
    features_BND, used = seen.features_SND.float().to(DEVICE), kept_tokens(grid, stride, clusters, keep)
    return model.model.aggregation(features_BND, attention, stride, clusters, grid=grid, top_k=used)


def embed(model, arm: Arm, seen: Features, view: str, level: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected image tokens of a view of scenes (B,R,E), and which are used (B,R): unused semantic slots first."""
    project = model.model.multi_modal_projector
    level_B = torch.full((len(seen),), level, device=DEVICE) if arm.levels else None
    embeds, visible = [], []
    if view != SEMANTIC:
        embeds.append(project(seen.features_SND.float().to(DEVICE), level_B))
        visible.append(torch.ones(embeds[0].shape[:2], dtype=torch.bool, device=DEVICE))
    if view != PIXEL:
        found = aggregate(model, arm, seen, level)
        unused = arm.slots - found.mask.shape[1]
        tokens_BKD, geometry_BK5 = (F.pad(field, (0, 0, unused, 0)) for field in (found.tokens, found.geometry))
        embeds.append(project(tokens_BKD, level_B, geometry_BK5))
        visible.append(F.pad(found.mask, (unused, 0)))
    return torch.cat(embeds, dim=1), torch.cat(visible, dim=1)


@torch.no_grad()
def ask(
    model, arm: Arm, seen: Features, questions: Questions, view: str, level: int = 0, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The answers' ids (S,Q) and the negative log-likelihood of the right ones (S,Q).

    Args:
        shift: ask each scene's questions about the scene that many places further on.
    """
    answers, nll = [], []
    for rows in torch.arange(len(seen)).split(50):
        own, shown = questions.rows(rows), seen.rows((rows + shift) % len(seen))
        logits_BQV = answer_logits(model, own, *embed(model, arm, shown, view, level))
        answers.append(logits_BQV.argmax(-1).cpu())
        nll.append(-logits_BQV.log_softmax(-1).gather(-1, own.answer_SQ.unsqueeze(-1)).squeeze(-1).cpu())
    return torch.cat(answers), torch.cat(nll)
