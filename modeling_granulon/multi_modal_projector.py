"""The projector: features of patches and clusters become tokens of the language model (Eq. 8).

Shapes: I images, S patches or clusters, D vision width, E text width.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_granulon import GranulonConfig
from .vision_features import feature_width_of

GEOMETRY = 5  # numbers that AggregationOutput.geometry has of each cluster


class GranulonMultiModalProjector(nn.Module):
    """Llava's two-layer projector, shared by pixel and semantic tokens, and what each level adds to it (Eq. 8).

    A level has a gain for pixel and one for semantic tokens; a semantic token also gets an embedding of its level and
    of its cluster's place, spread and size. All of these start without effect. Gains are stored as their difference
    from 1, so that small changes survive bfloat16.
    """

    def __init__(self, config: GranulonConfig):
        super().__init__()
        vision_width, text_width = feature_width_of(config.vision_config), config.text_config.hidden_size
        self.linear_1 = nn.Linear(vision_width, text_width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=config.multimodal_projector_bias)
        self.has_levels = bool(config.granularities)
        if self.has_levels:
            levels = len(config.granularities)
            self.gain_offsets = nn.Parameter(torch.zeros(levels, 2))
            self.level_embedding = nn.Parameter(torch.zeros(levels, vision_width))
            self.cluster_embedding = nn.Parameter(torch.zeros(GEOMETRY, vision_width))

    def forward(
        self,
        features: torch.Tensor,
        level_I: torch.Tensor | None = None,
        geometry_IK5: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features (I,S,D) become tokens (I,S,E) with the gains of each image's level.

        Args:
            level_I: long; None for the plain encoder, which has no gains.
            geometry_IK5: of the clusters, for semantic tokens; None for pixel tokens.
        """
        features = features.to(self.linear_1.weight.dtype)
        if geometry_IK5 is not None:
            level_I1D = self.level_embedding[level_I].unsqueeze(1)
            features = features + level_I1D + geometry_IK5.to(features.dtype) @ self.cluster_embedding
        tokens_ISE = self.linear_2(self.act(self.linear_1(features)))
        if level_I is None:
            return tokens_ISE
        # Eq. 8: Phi_gamma with the gamma of the acting level
        gain_I = 1 + self.gain_offsets[level_I, 0 if geometry_IK5 is None else 1].float()
        return (tokens_ISE.float() * gain_I[:, None, None]).to(tokens_ISE.dtype)
