"""The study's encoder: a small DINOv3, pretrained on drawn scenes without labels, then frozen.

Half of the patches are masked, and one linear layer restores all of them from the features that are left.

Shapes by suffix: S scenes, B scenes of a batch, N patches, P pixel values of a patch, D width.
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

MASKED_SHARE = 0.5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_encoder(seed: int = 0) -> DINOv3ViTModel:
    """The encoder with random weights, in eval mode: in train mode its position embedding would jitter."""
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        image_size=world.SIZE, patch_size=world.PATCH, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_register_tokens=1, layerscale_value=0.5, initializer_range=0.05,
    )  # fmt: skip
    return DINOv3ViTModel(config).eval()


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """(B,h,w,3) uint8 -> (B,3,h,w) in [-1, 1]."""
    return torch.from_numpy(pictures).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_encoder(pictures: np.ndarray, steps: int, batch: int) -> DINOv3ViTModel:
    """Pretrain an encoder to restore masked patches of pictures (S,h,w,3) uint8."""
    encoder = make_encoder().to(DEVICE)
    decoder = nn.Linear(encoder.config.hidden_size, 3 * world.PATCH**2).to(DEVICE)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixels_B3hw = as_pixels(pictures[rows.numpy()])
        target_BNP = F.unfold(pixels_B3hw, world.PATCH, stride=world.PATCH).mT
        target_BNP = target_BNP - target_BNP.mean((1, 2), keepdim=True)
        target_BNP = target_BNP / target_BNP.std((1, 2), keepdim=True)
        masked_BN = torch.rand(target_BNP.shape[:2], device=DEVICE) < MASKED_SHARE
        states = encoder(pixels_B3hw, bool_masked_pos=masked_BN).last_hidden_state
        return F.mse_loss(decoder(states[:, -(world.GRID**2) :]), target_BNP)

    fit(loss_of, [*encoder.parameters(), *decoder.parameters()], len(pictures), steps, batch, lr=1.5e-3)
    return encoder


def fit(
    loss_of: Callable[[torch.Tensor], torch.Tensor], parameters: list, rows: int, steps: int, batch: int, lr: float
):
    """AdamW with one cycle of the learning rate; `loss_of` gets the indices of a random batch of rows.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step in tqdm(range(steps), unit="step", mininterval=10, leave=False, disable=None):
        loss = loss_of(torch.randint(rows, (batch,)))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of step {step} is not finite; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@dataclass
class Features:
    """What an encoder sees of scenes: patch features (S,N,D) and relation maps (S,N,C) in fp16; colours (S,N,3)."""

    features_SND: torch.Tensor
    relation_SNC: torch.Tensor
    colours_SN3: torch.Tensor

    def __len__(self) -> int:
        return len(self.features_SND)

    def rows(self, rows) -> "Features":
        """Of some scenes: a tensor of indices, or a slice."""
        return Features(*(value[rows] for value in vars(self).values()))


@torch.no_grad()
def encode(encoder: DINOv3ViTModel, scenes: list[world.Scene], batch: int = 100) -> Features:
    """The frozen encoder over all scenes, read as the model reads its tower."""
    parts = []
    for start in range(0, len(scenes), batch):
        pictures = world.draw_all(scenes[start : start + batch])
        seen = vision_features(encoder, as_pixels(pictures))
        relation = seen.relation.profiles(COLUMN_STRIDE)
        colours = torch.from_numpy(world.patch_colours(pictures))
        parts.append((seen.features.half().cpu(), relation.half().cpu(), colours))
    return Features(*map(torch.cat, zip(*parts)))
