"""The study's encoders: two small DINOv3 of one architecture, pretrained on drawn scenes, frozen, and probed.

They differ in their objective alone. The masked one sees pictures without labels and restores all their patches from
those that were left; the contrastive one matches the pooled picture with its caption. What they have learned is told
by linear probes, one for each kind of question.

Shapes by suffix: S scenes, B scenes of a batch, N patches, P pixel values of a patch, D width, T words, Q questions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from modeling_granulon.vision_features import COLUMN_STRIDE, vision_features

from . import world

MASKED, CONTRASTIVE = ENCODERS = "masked", "contrastive"
MASKED_SHARE = 0.5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What has to be decodable for a kind to be answerable; the others are decodable themselves.
PROBED_BY = {
    "has_shape": ("shape_of",), "has_pattern": ("pattern_of",), "has_pair": ("shape_of", "pattern_of"),
    "has_mark": ("mark",),
}  # fmt: skip


def make_encoder(seed: int) -> DINOv3ViTModel:
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        image_size=world.SIZE, patch_size=world.PATCH, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_register_tokens=1, layerscale_value=0.5, initializer_range=0.05,
    )  # fmt: skip
    return DINOv3ViTModel(config).eval()  # in train mode the position embedding would jitter


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(B,h,w,3) uint8 -> (B,3,h,w) in [-1, 1]."""
    return torch.from_numpy(pictures).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_pixels(pixels_B3hw: torch.Tensor) -> torch.Tensor:
    """The pixels of each patch, (B,N,P)."""
    return F.unfold(pixels_B3hw, world.PATCH, stride=world.PATCH).mT


def train_masked(pictures: np.ndarray, steps: int, batch: int, seed: int) -> DINOv3ViTModel:
    """Half of the patches are masked; all patches are restored from the final features by one linear layer."""
    encoder = make_encoder(seed).to(DEVICE)
    decoder = nn.Linear(encoder.config.hidden_size, 3 * world.PATCH**2).to(DEVICE)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixels_B3hw = as_pixels(pictures[rows.numpy()])
        target_BNP = patch_pixels(pixels_B3hw)
        target_BNP = target_BNP - target_BNP.mean((1, 2), keepdim=True)
        target_BNP = target_BNP / target_BNP.std((1, 2), keepdim=True)
        masked_BN = torch.rand(target_BNP.shape[:2], device=DEVICE) < MASKED_SHARE
        features_BND = patch_features(encoder(pixels_B3hw, bool_masked_pos=masked_BN))
        return F.mse_loss(decoder(features_BND), target_BNP)

    fit(loss_of, [*encoder.parameters(), *decoder.parameters()], len(pictures), steps, batch, "masked encoder")
    return encoder


class CaptionEncoder(nn.Module):
    """Word embeddings, one transformer layer, and the mean over words: (B,T) ids to (B,D)."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        empty_BT = ids_BT == 0
        states_BTD = self.layer(self.embed(ids_BT), src_key_padding_mask=empty_BT)
        weights_BT1 = (~empty_BT).float().unsqueeze(-1)
        return (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)


def train_contrastive(
    pictures: np.ndarray, caption_ids: torch.Tensor, steps: int, batch: int, seed: int
) -> DINOv3ViTModel:
    """CLIP's objective: the pooled token (CLS) of a picture and its caption find each other within a batch.

    caption_ids: (S,T) long, 0 is padding.
    """
    encoder = make_encoder(seed).to(DEVICE)
    width = encoder.config.hidden_size
    reader = CaptionEncoder(int(caption_ids.max()) + 1, width).to(DEVICE)
    project = nn.Linear(width, width, bias=False).to(DEVICE)
    log_scale = nn.Parameter(torch.tensor(2.0, device=DEVICE))

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        seen_BD = F.normalize(project(encoder(as_pixels(pictures[rows.numpy()])).pooler_output), dim=-1)
        read_BD = F.normalize(reader(caption_ids[rows].to(DEVICE)), dim=-1)
        logits_BB = log_scale.exp().clamp_max(50) * seen_BD @ read_BD.mT
        own_B = torch.arange(len(rows), device=DEVICE)
        return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.mT, own_B)) / 2

    parameters = [*encoder.parameters(), *reader.parameters(), *project.parameters(), log_scale]
    fit(loss_of, parameters, len(pictures), steps, batch, "contrastive encoder")
    return encoder


def fit(
    loss_of: Callable[[torch.Tensor], torch.Tensor], parameters: list, rows: int, steps: int, batch: int, name: str,
    lr: float = 1.5e-3,
):  # fmt: skip
    """AdamW with one cycle of the learning rate over random rows.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc=name, unit="step", mininterval=10)):
        loss = loss_of(torch.randint(rows, (batch,)))
        if not loss.isfinite():
            raise FloatingPointError(f"{name}: the loss of step {step} is not finite; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def patch_features(outputs) -> torch.Tensor:
    return outputs.last_hidden_state[:, -(world.GRID**2) :]


@dataclass
class Features:
    """What an encoder sees of scenes: patch features (S,N,D) and relation maps (S,N,C) in fp16; colours (S,N,3)."""

    features_SND: torch.Tensor
    relation_SNC: torch.Tensor
    colours_SN3: torch.Tensor

    def __len__(self) -> int:
        return len(self.features_SND)

    def first(self, scenes: int) -> "Features":
        return Features(*(value[:scenes] for value in vars(self).values()))


@torch.no_grad()
def encode(encoder: DINOv3ViTModel, scenes: list[world.Scene], batch: int = 100) -> Features:
    """The frozen encoder over all scenes, as the model itself reads its tower."""
    features, relations, colours = [], [], []
    for start in range(0, len(scenes), batch):
        pictures = world.draw_all(scenes[start : start + batch])
        seen = vision_features(encoder, as_pixels(pictures))
        features.append(seen.features.half().cpu())
        relations.append(seen.relation.profiles(COLUMN_STRIDE).half().cpu())
        colours.append(torch.from_numpy(world.patch_colours(pictures)))
    return Features(torch.cat(features), torch.cat(relations), torch.cat(colours))


def captions(scenes: list[world.Scene], vocabulary: dict[str, int]) -> torch.Tensor:
    """All sentences about each scene as one row of words, (S,T) long; 0 is padding."""
    rows = [
        torch.tensor([vocabulary[word] for sentence in world.sentences(scene) for word in sentence.split()])
        for scene in scenes
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def probe_kinds(
    train: Features, train_scenes: list[world.Scene], held_out: Features, held_out_scenes: list[world.Scene]
) -> dict[str, dict[str, float]]:
    """
    For each kind with an answer of its own, how often linear probes of held-out scenes are right.

    A probe reads the mean over the patches that the question is about. `features` is that of the encoder, `colour`
    that of the patches' mean colours alone; `chance` is one in so many answers.
    """
    report = {}
    for kind, answers in world.ANSWERS.items():
        if kind in PROBED_BY:
            continue
        report[kind] = {"chance": 1 / len(answers), "scenes": len(held_out_scenes)}
        for name in ("features", "colour"):
            sides = [
                probe_rows(seen.features_SND if name == "features" else seen.colours_SN3, scenes, kind)
                for seen, scenes in ((train, train_scenes), (held_out, held_out_scenes))
            ]
            report[kind][name] = linear_probe(*sides[0], *sides[1], len(answers))
    return report


def probe_rows(values_SND: torch.Tensor, scenes: list[world.Scene], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the patches that each scene's question of a kind is about (Q,D), and the answer's index (Q,)."""
    means, answers = [], []
    for values_ND, scene in zip(values_SND, scenes, strict=True):
        question = next(q for q in world.make_questions(scene) if q.kind == kind)
        means.append(values_ND[scene.patches(kind, question.subject)].float().mean(0))
        answers.append(world.ANSWERS[kind].index(question.answer))
    return torch.stack(means), torch.tensor(answers)


def linear_probe(
    train_QD: torch.Tensor, train_Q: torch.Tensor, test_QD: torch.Tensor, test_Q: torch.Tensor, answers: int
) -> float:
    """Accuracy of a logistic regression on standardised features."""
    mean_D, deviation_D = train_QD.mean(0), train_QD.std(0) + 1e-6
    train_QD, test_QD = (train_QD - mean_D) / deviation_D, (test_QD - mean_D) / deviation_D
    head = nn.Linear(train_QD.shape[1], answers)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train_QD), train_Q) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (head(test_QD).argmax(-1) == test_Q).float().mean().item()


def decodable_kinds(probes: dict[str, dict[str, float]], margin: float) -> list[str]:
    """
    The kinds that stay: what has to be read for an answer is decoded above chance by the margin.

    margin: share of the way from chance to always right, such as 0.4.
    """

    def decoded(kind: str) -> bool:
        chance = probes[kind]["chance"]
        return probes[kind]["features"] >= chance + margin * (1 - chance)

    return [kind for kind in world.ANSWERS if all(decoded(needed) for needed in PROBED_BY.get(kind, (kind,)))]
