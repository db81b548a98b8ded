"""What a training of Granulon takes beyond TRL's own settings."""

from dataclasses import dataclass, field

from trl import SFTConfig

from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC


@dataclass
class GranulonSFTConfig(SFTConfig):
    """
    TRL's `SFTConfig` with the weights of the joint objective (Eq. 9-11).

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
        default=0.0,
        metadata={"help": "lambda_g: weight of the controller's loss: levels that answer well, and known levels"},
    )
    level_exploration: float = field(
        default=0.1, metadata={"help": "share of the semantic loss that is divided equally among all levels"}
    )
    token_cost: float = field(
        default=0.0, metadata={"help": "mu: nats that a level with the most semantic tokens costs the controller"}
    )
    levels_per_step: int | None = field(
        default=None, metadata={"help": "levels drawn for the semantic loss of a step; all of them by default"}
    )
    visual_view: str = field(
        default="full",
        metadata={"help": "image tokens of the prompts: 'full'; 'pixel' or 'semantic' alone, without partial views"},
    )
    level_from_rows: bool = field(
        default=False,
        metadata={"help": "read a row at the level that it names instead of the controller's choice"},
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps what the frozen tower says of each image"}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "of the tower's blocks that are trained; learning_rate by default"}
    )
    eval_answers: int = field(
        default=0, metadata={"help": "evaluation rows that are also answered, for eval_exact_match; 0 for none"}
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
        if self.visual_view not in (FULL, PIXEL, SEMANTIC):
            raise ValueError(f"visual_view is {self.visual_view!r}; choose one of {(FULL, PIXEL, SEMANTIC)}")
        if self.visual_view != FULL and max(weights[:2]) > 0:
            raise ValueError(
                f"visual_view is {self.visual_view!r}, which has no partial views; set pixel_loss_weight and "
                "semantic_loss_weight to 0"
            )
        if not 0 <= self.level_exploration <= 1 or self.token_cost < 0:
            raise ValueError(
                f"level_exploration is {self.level_exploration} and token_cost {self.token_cost}; expected a share "
                "from 0 to 1, and a value of at least 0"
            )
        if self.levels_per_step is not None and self.levels_per_step < 2:
            raise ValueError(f"levels_per_step is {self.levels_per_step}; the controller compares at least 2 levels")
        if self.remove_unused_columns or self.packing:
            raise ValueError("remove_unused_columns and packing must be False: images and levels belong to their row")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                f"loss_type is {self.loss_type!r} and label_smoothing_factor {self.label_smoothing_factor}; the joint "
                "objective adds log-likelihoods: leave them at 'nll' and 0"
            )
        super().__post_init__()
