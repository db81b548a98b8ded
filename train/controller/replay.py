"""Labelled questions that the controller keeps training on while the language model changes.

The controller reads the first layers of the language model. Fine-tuning changes these layers, and the controller
forgets the corpus it was trained on; replaying some of its questions in every batch prevents that.

Shapes: Q questions of a batch, T question tokens, G levels.
"""

import torch

from modeling_granulon import GranulonProcessor

from .corpus import ANNOTATED, TRAIN, check_rows, read_corpus
from .templates import seed_corpus

SEED_CORPUS = "seed"  # the name of the corpus that ships with the package


def load_corpus(name: str) -> list[dict]:
    """The rows of a granularity corpus: a JSON Lines file, a folder of such, or "seed", the one from templates."""
    return seed_corpus() if name == SEED_CORPUS else read_corpus(name)


def annotators_of(rows: list[dict]) -> list[str]:
    """The models that labelled rows; their licences restrict the name of models trained on these."""
    return sorted({row["annotator"]["model"] for row in rows if row.get("source") == ANNOTATED})


class QuestionReplay:
    """Samples questions and level probabilities of a granularity corpus, the same ones for the same seed.

    Args:
        rows: of a corpus (see corpus.py); only those of its train split are used.
        levels: names of the model's levels.
        batch_size: questions of a batch.

    Raises:
        ValueError: invalid rows, or none in the train split.
    """

    def __init__(self, rows: list[dict], processor: GranulonProcessor, levels: list[str], batch_size: int = 64):
        self.annotators = annotators_of(rows)
        rows = [row for row in check_rows(rows, levels) if row["split"] == TRAIN]
        if not rows:
            raise ValueError(f"the corpus has no rows of the split {TRAIN!r}, so that the controller can replay none")
        self.tokenizer, self.batch_size = processor.tokenizer, batch_size
        self.questions = [row["question"] for row in rows]
        self.target = torch.tensor([[row["level_probs"][name] for name in levels] for row in rows])

    def sample(self, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (Q,T) long, mask (Q,T) and probabilities (Q,G) of the questions drawn with a seed."""
        random = torch.Generator().manual_seed(seed)
        index_Q = torch.randint(len(self.questions), (self.batch_size,), generator=random)
        tokens = self.tokenizer(
            [self.questions[index] for index in index_Q.tolist()],
            padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt",
        ).to(device)  # fmt: skip
        return tokens["input_ids"], tokens["attention_mask"], self.target[index_Q].to(device)
