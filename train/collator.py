"""Batches for the joint objective: rows of prompts and completions, whose completion may be a conversation."""

from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from granulon.train.data.conversations import Rendered, render_answers
from modeling_granulon.image_tokens import FULL


@dataclass
class GranulonCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator for rows that may have several answers; it cuts nothing.

    A completion of several messages is the rest of a conversation: every answer in it is learned, and has a question
    and a level of its own. A row of `messages` counts as one answer with its latest question.

    Adds to TRL's batch (A answers of all rows):
        answer_ids: (B,T) long, number of the answer that each learned token belongs to, -1 on other tokens; only if a
            row has several answers.
        granularity_labels: (A,) long, -100 where a row names no level for an answer.
        question_input_ids, question_attention_mask: (A,Tq), if there are images.

    Args:
        levels: names of the model's levels; without any, the rows' levels are left aside.
        visual_view: "full", "pixel" or "semantic": which image tokens the prompts have slots for.
        longest: the most tokens that a row may have.

    Raises:
        ValueError: a row that is too long, names a level that the model does not have, or has another number of levels
            than answers.
    """

    levels: list[str] = field(default_factory=list)
    longest: int | None = None
    visual_view: str = FULL

    def __post_init__(self):
        self.processor = self.processor.for_view(self.visual_view)

    def torch_call(self, examples: list[dict]) -> dict:
        examples = [dict(example) for example in examples]  # upstream changes them
        named = [example.pop("granularity", None) for example in examples]
        batch = super().torch_call(examples)
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            if self.longest is not None and length > self.longest:
                raise ValueError(
                    f"row {row} of a batch has {length} tokens and max_length is {self.longest}; rows are never cut: "
                    "raise max_length, or leave the row out (load_rows with max_length does)"
                )
        answers = [1] * len(examples)
        if "answer_ids" in batch:
            answers = (batch["answer_ids"].amax(-1) + 1).diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
        labels = [self._levels(row, *entry) for row, entry in enumerate(zip(named, answers, strict=True))]
        batch["granularity_labels"] = torch.tensor([level for row in labels for level in row])
        return batch

    def _collate_prompt_completion(self, examples: list[dict]) -> dict:
        """As upstream, of completions with one answer or several."""
        texts, images, answer_of_text, row_of_text, prompts = [], [], [], [], []
        for row, example in enumerate(examples):
            earlier, unseen = None, list(example["images"])
            for turn in self._rendered(example):
                added = turn.after(earlier)
                shown = added.count(self.processor.image_token)
                texts += [added, turn.answer]
                images += [unseen[:shown], []]
                answer_of_text += [-1, len(prompts)]
                row_of_text += [row, row]
                prompts.append(turn.prompt)
                earlier, unseen = turn, unseen[shown:]
            if unseen:
                raise ValueError(f"row {row} of a batch has {len(unseen)} images without a place in its messages")
        processed = self.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors=self.return_tensors,
            add_special_tokens=False,  # the chat template writes them
        )
        ids, answers = ([[] for _ in examples] for _ in range(2))
        masks = processed["attention_mask"].bool()
        for text_ids, mask, answer, row in zip(
            processed["input_ids"], masks, answer_of_text, row_of_text, strict=True
        ):
            ids[row].append(text_ids[mask])
            answers[row].append(torch.full_like(ids[row][-1], answer))
        input_ids, answer_ids, attention_mask = (
            pad_sequence([torch.cat(row) for row in rows], batch_first=True, padding_value=padding)
            for rows, padding in (
                (ids, self.processor.tokenizer.pad_token_id or 0),
                (answers, -1),
                ([[torch.ones_like(part) for part in row] for row in ids], 0),
            )
        )
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch["labels"] = input_ids.masked_fill(answer_ids < 0, -100)
        if len(prompts) > len(examples):
            batch["answer_ids"] = answer_ids
        if "pixel_values" in processed:
            batch["pixel_values"] = processed["pixel_values"]
            batch |= self.processor.question_inputs(prompts, input_ids)
        return batch

    def _rendered(self, example: dict) -> list[Rendered]:
        prompt, completion = example["prompt"], example["completion"]
        if not isinstance(prompt, str):
            messages = prepare_multimodal_messages(prompt + completion, images=example["images"])
            prompt, completion = messages[: len(prompt)], messages[len(prompt) :]
        return render_answers(self.processor, prompt, completion)

    def _levels(self, row: int, named, answers: int) -> list[int]:
        """The level of each of a row's answers, -100 for none."""
        named = named if isinstance(named, list) else [named] * answers
        if len(named) != answers:
            raise ValueError(f"row {row} of a batch names {len(named)} levels for {answers} answers")
        for name in named:
            if name is not None and self.levels and name not in self.levels:
                raise ValueError(f"row {row} of a batch names the level {name!r}; the model has {self.levels}")
        return [self.levels.index(name) if name is not None and self.levels else -100 for name in named]
