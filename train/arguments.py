"""What a training of Granulon takes beyond TRL's own settings."""

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class GranulonSFTConfig(SFTConfig):
    """
    TRL's `SFTConfig` with the weights of the joint objective (Eq. 9).

    Of prompts and completions the completions are learned; of conversations, with `assistant_only_loss`, the answers.
    A row is never cut: one of more than `max_length` tokens, image tokens included, is refused.

    Raises:
        ValueError: a negative weight, `packing`, another loss than the likelihood, or a setting that would drop what
            the trainer needs.
    """

    pixel_loss_weight: float = field(
        default=0.5, metadata={"help": "lambda_d: weight of the answers' loss given the pixel tokens alone"}
    )
    semantic_loss_weight: float = field(
        default=0.5, metadata={"help": "lambda_t: weight of the answers' loss given the semantic tokens alone"}
    )
    granularity_loss_weight: float = field(
        default=0.0, metadata={"help": "lambda_g: weight of the controller's cross-entropy where rows name a level"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "longest row in tokens, image tokens included; longer ones are refused"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay False: the rows' levels would be dropped"}
    )

    def __post_init__(self):
        weights = (self.pixel_loss_weight, self.semantic_loss_weight, self.granularity_loss_weight)
        if min(weights) < 0:
            raise ValueError(f"the loss weights (pixel, semantic, granularity) are {weights}; give none below 0")
        if self.remove_unused_columns or self.packing:
            raise ValueError("remove_unused_columns and packing must be False: images and levels belong to their row")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                f"loss_type is {self.loss_type!r} and label_smoothing_factor {self.label_smoothing_factor}; the joint "
                "objective adds log-likelihoods: leave them at 'nll' and 0"
            )
        super().__post_init__()
