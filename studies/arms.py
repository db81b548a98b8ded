"""The study's arms: the image tokens that one model reads, made in different ways, and packed questions about them.

The tower is frozen, so that what it sees of a scene is read from a file. All questions about a scene follow one copy
of its image tokens, do not attend to each other and have the positions of prompts of their own: the answers are those
of single prompts at a fraction of the cost. An answer is right if each of its tokens and the end are the likeliest
next token, which is when greedy decoding gives it.

Shapes by suffix: S scenes, B scenes of a batch, N patches, K tokens, R image tokens, T text tokens, L answer tokens,
Q questions of a scene, D vision width, E text width.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from granulon.evaluation.token_reduction import METHODS, SMALLER, Reduction, nearest_level, small_grid
from granulon.hub.inference import question_about
from modeling_granulon import AdaptiveTokenAggregation
from modeling_granulon.adaptive_token_aggregation import AggregationOutput
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC

ADATA = "AdaTA"
BUDGETS = (5, 10, 20)
LARGE = 64  # tokens: trained and not compared, so that checkpoints of the study can be asked at this budget too
STRIDE, SPARE = 2, 1.2  # of the aggregation's own levels: pooling, and clusters for each kept token
PARTS = {  # AdaTA without one of its parts: (settings of the module, clusters for each kept token)
    ADATA: ({}, SPARE),
    "AdaTA, no relation": ({"relation_weight": 0.0}, SPARE),
    "AdaTA, no filter": ({}, 1.0),
    "AdaTA, no refinement": ({"iterations": 5, "refinement_iterations": 0}, SPARE),
}


@dataclass(frozen=True)
class Arm:
    """Image tokens: `tokens` of a source (a key of `PARTS` or of `METHODS`), the pixel tokens, or both."""

    source: str | None
    tokens: int = 10
    view: str = SEMANTIC

    @property
    def name(self) -> str:
        own = f"{self.source}, {self.tokens}" if self.source else ""
        return {SEMANTIC: own, PIXEL: "pixels", FULL: f"pixels + {own}"}[self.view]


SOURCES = (ADATA, *METHODS)
BUDGET_ARMS = tuple(Arm(source, tokens) for tokens in BUDGETS for source in SOURCES)
LEVEL_ARMS = tuple(Arm(ADATA, tokens) for tokens in BUDGETS)  # the levels of the method
PART_ARMS = tuple(Arm(source) for source in PARTS if source != ADATA)
PIXELS = Arm(None, view=PIXEL)
PIXEL_ARMS = (PIXELS, Arm(ADATA, view=FULL), Arm("average pooling", view=FULL))


@dataclass
class Seen:
    """What the tower sees of scenes.

    Features (S,N,D) in bfloat16, the relation map with summed columns (S,N,C), how much each patch is attended to
    (S,N), and by number of tokens the features of images with as many patches.
    """

    features_SND: Tensor
    relation_SNC: Tensor
    received_SN: Tensor
    small: dict[int, Tensor]
    grid: tuple[int, int]

    def rows(self, rows) -> "Seen":
        small = {tokens: own[rows] for tokens, own in self.small.items()}
        return Seen(self.features_SND[rows], self.relation_SNC[rows], self.received_SN[rows], small, self.grid)


@torch.no_grad()
def aggregate(arm: Arm, seen: Seen) -> AggregationOutput:
    """The tokens of an arm's source; `assignment` is -1 for patches that went to none."""
    features_BND, relation_BNC, grid = seen.features_SND.float(), seen.relation_SNC.float(), seen.grid
    if arm.source in PARTS:
        settings, spare = PARTS[arm.source]
        clusters = round(spare * arm.tokens)
        return AdaptiveTokenAggregation(**settings)(features_BND, relation_BNC, STRIDE, clusters, grid, arm.tokens)
    if arm.source == SMALLER:
        features_BND, grid = seen.small[arm.tokens].float(), small_grid(arm.tokens)
    tokens = min(arm.tokens, features_BND.shape[1])
    return Reduction(arm.source)(features_BND, seen.received_SN[:, None], 1, tokens, grid, tokens)


@torch.no_grad()
def embed(model, arm: Arm, seen: Seen) -> Tensor:
    """Projected image tokens of scenes, (B,R,E); the projector does not learn here."""
    project, parts = model.model.multi_modal_projector, []
    level_B = torch.full((len(seen.features_SND),), nearest_level(model.config, arm.tokens))
    if arm.view != SEMANTIC:
        parts.append(project(seen.features_SND, level_B))
    if arm.view != PIXEL:
        found = aggregate(arm, seen)
        parts.append(project(found.tokens, level_B, found.geometry))
    return torch.cat(parts, dim=1).to(model.dtype)


@dataclass
class Questions:
    """Packed questions of some scenes, padded on the right.

    prefix_T: ids before the image. ids_BT: ids of all questions and answers; segment_BT: the question that a token
    belongs to, -1 for padding; offset_BT: its place in it. place_BL: where in ids_BT the answers' tokens are, and
    segment_BL whose they are, -1 for padding.
    """

    prefix_T: Tensor
    ids_BT: Tensor
    segment_BT: Tensor
    offset_BT: Tensor
    place_BL: Tensor
    segment_BL: Tensor

    @classmethod
    def of(cls, processor, scenes: list[list]) -> "Questions":
        """The questions about scenes, each with `text` and `answer`."""
        rows, prefix = [], None
        for questions in scenes:
            row = {field.name: [] for field in fields(cls)[1:]}
            for number, question in enumerate(questions):
                prefix, asked, answer = _ids(processor, question)
                start = len(row["ids_BT"])
                row["place_BL"] += range(start + len(asked), start + len(asked) + len(answer))
                row["segment_BL"] += [number] * len(answer)
                row["ids_BT"] += asked + answer
                row["segment_BT"] += [number] * len(asked + answer)
                row["offset_BT"] += range(len(asked + answer))
            rows.append(row)
        columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
        padding = {name: -1 if "segment" in name else 0 for name in columns}
        padded = {name: torch.nn.utils.rnn.pad_sequence(own, True, padding[name]) for name, own in columns.items()}
        return cls(torch.tensor(prefix), **padded)

    @property
    def answer_BL(self) -> Tensor:
        """The answers' ids."""
        return self.ids_BT.gather(1, self.place_BL)


def _ids(processor, question) -> tuple[list[int], list[int], list[int]]:
    """Ids before the image, of the question with what the chat template puts around it, of the answer with its end."""
    text = processor.apply_chat_template(
        question_about("image", question.text), add_generation_prompt=True, tokenize=False
    )
    before, after = text.split(processor.image_token)
    tokenizer = processor.tokenizer
    encode = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    answer = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
    return *encode, [*answer, tokenizer.eos_token_id]


def answer_log_probs(model, questions: Questions, image_BRE: Tensor) -> tuple[Tensor, Tensor]:
    """Of the answers' tokens: their log-probabilities (B,L), 0 for padding, and whether each is the likeliest."""
    batch = len(questions.ids_BT)
    start = len(questions.prefix_T) + image_BRE.shape[1]
    ids_BP = torch.cat(
        [
            questions.prefix_T.expand(batch, -1),
            torch.full((batch, image_BRE.shape[1]), model.config.image_token_id),
            questions.ids_BT,
        ],
        dim=1,
    )
    own_BTT = questions.segment_BT[:, :, None] == questions.segment_BT[:, None]
    mask_BPP = F.pad(own_BTT, (start, 0, start, 0), value=True).tril()
    place_BP = torch.cat([torch.arange(start).expand(batch, -1), start + questions.offset_BT], dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        states_BLE = model.model(
            input_ids=ids_BP,
            attention_mask=mask_BPP.unsqueeze(1),
            position_ids=place_BP,
            image_embeds=image_BRE,
            predict=start + questions.place_BL,
        ).last_hidden_state
        logits_BLV = model.lm_head(states_BLE).float()
    target_BL = questions.answer_BL
    log_BL = -F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none").view(target_BL.shape)
    return log_BL * (questions.segment_BL >= 0), logits_BLV.argmax(-1) == target_BL


@torch.no_grad()
def ask(model, arms: tuple[Arm, ...], seen: Seen, questions: Questions) -> tuple[Tensor, Tensor]:
    """Whether each answer (B,Q) would be given, and its negative log-likelihood in nats; of several arms the next
    dimension is theirs, (A,B,Q)."""
    found = []
    for arm in arms:
        log_BL, hit_BL = answer_log_probs(model, questions, embed(model, arm, seen))
        own_BLQ = questions.segment_BL[..., None] == torch.arange(int(questions.segment_BL.max()) + 1)
        right_BQ = (hit_BL[..., None] | ~own_BLQ).all(1)
        found.append((right_BQ, -(log_BL[..., None] * own_BLQ).sum(1)))
    return tuple(map(torch.stack, zip(*found)))
