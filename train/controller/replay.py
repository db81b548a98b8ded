"""Questions with known levels that the controller goes on learning while the language model changes under it.

The controller reads the language model's own first layers. Fine-tuning moves these layers, and a controller that has
learned a corpus of questions forgets it; a few of its questions in every batch prevent that.

Shapes: Q questions of a batch, T question tokens, G levels.
"""

import torch

from modeling_granulon import GranulonProcessor

from .corpus import ANNOTATED, TRAIN, check_rows, read_corpus
from .templates import seed_corpus

SEED_CORPUS = "seed"  # the name of the corpus that ships with the package


def load_corpus(name: str) -> list[dict]:
    """The rows of a granularity corpus: of a JSONL file, a folder of such, or "seed", the one made from templates."""
    return seed_corpus() if name == SEED_CORPUS else read_corpus(name)


def annotators_of(rows: list[dict]) -> list[str]:
    """The models that labelled rows; their licences decide under which name what learned from them is published."""
    return sorted({row["annotator"]["model"] for row in rows if row.get("source") == ANNOTATED})


class QuestionReplay:
    """Draws questions and level probabilities of a granularity corpus, the same ones for the same step.

    Args:
        rows: of a corpus (see corpus.py); those of its train split are used.
        levels: names of the model's levels.
        batch_size: questions of a batch.

    Raises:
        ValueError: rows that cannot be used, or none in the train split.
    """

    def __init__(self, rows: list[dict], processor: GranulonProcessor, levels: list[str], batch_size: int = 64):
        self.annotators = annotators_of(rows)
        rows = [row for row in check_rows(rows, levels) if row["split"] == TRAIN]
        if not rows:
            raise ValueError(f"the corpus has no rows of the split {TRAIN!r}; the controller could not replay any")
        self.tokenizer, self.batch_size = processor.tokenizer, batch_size
        self.questions = [row["question"] for row in rows]
        self.target = torch.tensor([[row["level_probs"][name] for name in levels] for row in rows])

    def sample(self, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (Q,T) long, mask (Q,T) and probabilities (Q,G) of the questions that belong to a seed."""
        random = torch.Generator().manual_seed(seed)
        index_Q = torch.randint(len(self.questions), (self.batch_size,), generator=random)
        tokens = self.tokenizer(
            [self.questions[index] for index in index_Q.tolist()],
            padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt",
        ).to(device)  # fmt: skip
        return tokens["input_ids"], tokens["attention_mask"], self.target[index_Q].to(device)
