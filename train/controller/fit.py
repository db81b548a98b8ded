"""`granulon-train-controller`: the controller learns the levels of a granularity corpus, all else frozen.

The controller reads the mean of a question's states in the language model (Eq. 2). The language model is frozen, so
that mean is computed once per distinct question and kept on the CPU, one fp32 vector each; an epoch then costs next to
nothing. Every score stands beside chance, the commonest level, and logistic regression on a bag of words, which has
never seen a language model, on each test split of the corpus.

Shapes: B rows, Q distinct questions, T question tokens, E text width, G levels.
"""

import json
import shutil
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser

from granulon.hub.assemble import complete_or_absent
from granulon.hub.licences import public_name
from granulon.train.checkpoints import tell_training
from granulon.train.stages import load_model, load_processor
from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.granularity_controller import GranularityController
from modeling_granulon.granularity_controller import question_states as read_questions

from .corpus import TEST, TRAIN, VALIDATION, check_rows
from .level_scores import draw_confusions, scores
from .measure import compare_levels
from .replay import SEED_CORPUS, annotators_of, load_corpus

REPORT, PICTURE = "controller_report.json", "controller_confusion.png"
PREFIX = "model.granularity_controller."
# Files of a training checkpoint that belong to the run and are not copied.
TRAINING_STATE_FILES = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "complete.json")
# The column that names what is new in a test split; the bootstrap draws whole groups of it.
GROUP_OF_SPLIT = {"test_kinds": "kind"}
MOST_WORDS = 5000
INVERSE_L2 = (0.1, 1.0, 10.0)  # C of the bag of words' regression; the validation split chooses


@dataclass
class ControllerArguments:
    model: str = field(metadata={"help": "checkpoint: a folder, or a repository of the Hub"})
    output: str = field(metadata={"help": "folder to write the checkpoint to; must not exist yet"})
    corpus: str = field(
        default=SEED_CORPUS,
        metadata={"help": "JSONL file or folder of such; 'seed' is the corpus made from templates"},
    )
    hard: bool = field(default=False, metadata={"help": "learn the level alone, not the probabilities of all levels"})
    epochs: int = field(default=100, metadata={"help": "at most; training stops when validation no longer improves"})
    learning_rate: float = field(default=3e-4, metadata={"help": "of AdamW"})
    batch_size: int = field(default=64, metadata={"help": "questions per step"})
    seed: int = field(default=0, metadata={"help": "of the controller's first weights and of the order of rows"})


@dataclass
class Labelled:
    """Rows of a corpus as tensors: question_B indexes the distinct `questions`, target_BG are the labels to learn."""

    rows: list[dict]
    questions: list[str]
    question_B: torch.Tensor
    level_B: torch.Tensor
    target_BG: torch.Tensor

    @classmethod
    def of(cls, rows: list[dict], levels: list[str], soft: bool) -> "Labelled":
        questions = list(dict.fromkeys(row["question"] for row in rows))
        number = {question: index for index, question in enumerate(questions)}
        level_B = torch.tensor([levels.index(row["level"]) for row in rows])
        soft_BG = torch.tensor([[row["level_probs"][name] for name in levels] for row in rows])
        return cls(
            rows=rows,
            questions=questions,
            question_B=torch.tensor([number[row["question"]] for row in rows]),
            level_B=level_B,
            target_BG=soft_BG if soft else nn.functional.one_hot(level_B, len(levels)).float(),
        )

    def places(self, split: str) -> torch.Tensor:
        return torch.tensor([place for place, row in enumerate(self.rows) if row["split"] == split], dtype=torch.long)


def train_controller(
    model: GranulonForConditionalGeneration,
    processor: GranulonProcessor,
    rows: list[dict],
    *,
    epochs: int = 100,
    lr: float = 3e-4,
    batch_size: int = 64,
    seed: int = 0,
    soft: bool = True,
    patience: int = 10,
) -> dict:
    """
    Teach the model's controller the levels of a corpus; no other weight changes.

    The controller starts anew, from the seed. After each epoch the validation split's cross-entropy is measured; the
    best weights stay, and training stops after `patience` epochs without a better one. Without validation rows all
    epochs run. The global random state is left alone.

    Args:
        rows: of the corpus, see corpus.py.
        soft: learn `level_probs`; else the level alone.

    Returns:
        dict: what was trained and, for each test split, the scores of the controller and of the baselines.

    Raises:
        ValueError: the model has no controller that learns, or rows that cannot be used.
        FloatingPointError: a loss that is not finite; the model is as it was.
    """
    levels = model.config.granularity_names
    if model.model.granularity_controller is None:
        raise ValueError(
            f"the model has no controller that learns (controller is {model.config.controller!r}, levels {levels}); "
            "take a checkpoint with controller='learned' and at least two levels"
        )
    data = Labelled.of(check_rows(rows, levels), levels, soft)
    if not len(data.places(TRAIN)):
        raise ValueError(f"the corpus has no rows of the split {TRAIN!r}: {dict(_split_sizes(data))}")
    states_QE = question_states(model, processor, data.questions)
    controller = _fresh_controller(model, seed)
    training = fit(controller, states_QE, data, epochs, lr, batch_size, seed, patience)
    model.model.granularity_controller.load_state_dict(controller.state_dict())
    with torch.no_grad():
        probs_QG = controller_logits(model.model.granularity_controller, states_QE).softmax(-1)
    words_QG = bag_of_words(data)
    splits = {
        split: _split_report(data, split, {"controller": probs_QG, "bag_of_words": words_QG}, seed)
        for split in sorted(_split_sizes(data))
        if split.startswith(TEST)
    }
    # Whose outputs these were decides under which name and licence the model may be published.
    annotators = annotators_of(rows)
    sizes = dict(_split_sizes(data))
    return {"levels": levels, "rows": sizes, "annotators": annotators, **training, "splits": splits}


@torch.no_grad()
def question_states(model, processor, questions: list[str], batch_size: int = 64) -> torch.Tensor:
    """What the controller reads of each question: the standardised mean of its states (Eq. 2), (Q,E) fp32, CPU."""
    base = model.model
    pooled = []
    for start in tqdm(range(0, len(questions), batch_size), desc="questions", leave=False, disable=None):
        texts = [as_asked(processor, question) for question in questions[start : start + batch_size]]
        inputs = processor.tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        ).to(base.device)
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        states_BTE = read_questions(base.language_model, ids_BT, mask_BT, model.config.controller_layers)
        pooled.append(base.granularity_controller.pool(states_BTE, mask_BT).cpu())
    return torch.cat(pooled)


def as_asked(processor: GranulonProcessor, question: str) -> str:
    """The text that the controller reads when the question is asked through the chat template."""
    message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return processor.question(processor.apply_chat_template(message, add_generation_prompt=True))


def controller_logits(controller: GranularityController, states_BE: torch.Tensor) -> torch.Tensor:
    """Logits (B,G) fp32 of pooled questions."""
    return controller.classify(states_BE.to(controller.projection.weight.device)).float().cpu()


def fit(controller, states_QE, data: Labelled, epochs=100, lr=3e-4, batch_size=64, seed=0, patience=10) -> dict:
    """Train a controller in fp32 (bf16 would lose the steps of the optimizer) and return settings and history."""
    optimizer = torch.optim.AdamW(controller.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    train_B, validation_B = data.places(TRAIN), data.places(VALIDATION)

    def loss_of(places_B):
        logits_BG = controller_logits(controller, states_QE[data.question_B[places_B]])
        return nn.functional.cross_entropy(logits_BG, data.target_BG[places_B])

    best, best_loss, best_epoch, history = deepcopy(controller.state_dict()), float("inf"), 0, []
    for epoch in (bar := tqdm(range(1, epochs + 1), desc="controller", unit="epoch", leave=False, disable=None)):
        for batch_B in train_B[torch.randperm(len(train_B), generator=order)].split(batch_size):
            loss = loss_of(batch_B)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"epoch {epoch}: the controller's loss is not finite; lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            watched = loss_of(validation_B).item() if len(validation_B) else -epoch
        history.append(
            {"epoch": epoch, "loss": loss.item(), "validation_loss": watched if len(validation_B) else None}
        )
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if watched < best_loss:
            best, best_loss, best_epoch = deepcopy(controller.state_dict()), watched, epoch
        elif epoch - best_epoch >= patience:
            break
    controller.load_state_dict(best)
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "patience": patience}
    return {"settings": settings, "best_epoch": best_epoch, "history": history}


def _fresh_controller(model, seed: int) -> GranularityController:
    config, old = model.config, model.model.granularity_controller
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        controller = GranularityController(
            config.text_config.hidden_size,
            config.controller_hidden_size,
            len(config.granularities),
            config.projector_hidden_act,
        )
    return controller.to(old.projection.weight.device)


def bag_of_words(data: Labelled) -> torch.Tensor:
    """The baseline: multinomial logistic regression on counts of the training words, (Q,G) probabilities."""
    train_B, validation_B = data.places(TRAIN), data.places(VALIDATION)
    watched_B = validation_B if len(validation_B) else train_B
    words = CountVectorizer(max_features=MOST_WORDS, token_pattern=r"(?u)\w+")
    words.fit([data.rows[place]["question"] for place in train_B.tolist()])
    counts_QV = words.transform(data.questions)
    # Labels are probabilities: every row stands there once per level, weighted by the level's probability.
    levels = data.target_BG.shape[1]
    rows_V = vstack([counts_QV[data.question_B[train_B].numpy()]] * levels)
    label = np.repeat(np.arange(levels), len(train_B))
    weight = data.target_BG[train_B].T.flatten().numpy()
    losses = {}
    for inverse_l2 in INVERSE_L2:
        regression = LogisticRegression(C=inverse_l2, max_iter=1000).fit(rows_V, label, sample_weight=weight)
        logs_QG = torch.from_numpy(regression.predict_log_proba(counts_QV)).float()
        loss = nn.functional.cross_entropy(logs_QG[data.question_B[watched_B]], data.target_BG[watched_B])
        losses[loss.item()] = logs_QG.exp()
    return losses[min(losses)]


def _split_report(data: Labelled, split: str, predictions: dict[str, torch.Tensor], seed: int) -> dict:
    """Scores of each prediction on one split, beside those of a blind guess and of the commonest training level."""
    places_B = data.places(split)
    level_B = data.level_B[places_B].numpy()
    groups = [bootstrap_group(data.rows[place], split) for place in places_B.tolist()]
    commonest = data.level_B[data.places(TRAIN)].bincount().argmax().item()
    return {
        "rows": len(places_B),
        "chance": 1 / data.target_BG.shape[1],
        "commonest": float((level_B == commonest).mean()),
        **{
            name: scores(probs_QG[data.question_B[places_B]].numpy(), level_B, groups, seed)
            for name, probs_QG in predictions.items()
        },
        **_answer_loss(data, places_B, predictions["controller"]),
    }


def _answer_loss(data: Labelled, places_B: torch.Tensor, probs_QG: torch.Tensor) -> dict:
    """Where a split's labels were measured, what the answers lose at the chosen levels."""
    rows = [data.rows[place] for place in places_B.tolist()]
    if not all("answer_nll" in row for row in rows):
        return {}
    levels = list(rows[0]["answer_nll"])
    chosen = [levels[index] for index in probs_QG[data.question_B[places_B]].argmax(-1).tolist()]
    images = [row["image_sha"] for row in rows]
    return {"answer_loss": compare_levels(rows, chosen, images)}


def bootstrap_group(row: dict, split: str) -> str:
    """What the bootstrap draws as one: a kind where kinds are held out, else a template, else a question."""
    return str(row.get(GROUP_OF_SPLIT.get(split, "phrasing")) or row["question"])


def _split_sizes(data: Labelled) -> Counter:
    return Counter(row["split"] for row in data.rows)


def tables(report: dict) -> str:
    """The report's scores as Markdown, each with its 95% interval; where labels were measured, the answers' loss."""
    lines = ["| split | rows (groups) | model | accuracy | macro-F1 | ECE |", "|---|--:|---|--:|--:|--:|"]
    for split, part in report["splits"].items():
        for name in ("controller", "bag_of_words"):
            cells = " | ".join(_interval(part[name][measure]) for measure in ("accuracy", "macro_f1", "ece"))
            lines.append(f"| {split} | {part['rows']} ({part[name]['groups']}) | {name.replace('_', ' ')} | {cells} |")
        for name in ("chance", "commonest"):
            lines.append(f"| {split} | {part['rows']} | {name} | {part[name]:.3f} | | |")
    measured = {split: part["answer_loss"] for split, part in report["splits"].items() if "answer_loss" in part}
    if measured:
        lines += ["", "| split | levels | nats per answer | image tokens |", "|---|---|--:|--:|"]
    for split, loss in measured.items():
        fixed = {f"{name}, fixed": (value, loss["image_tokens"][name]) for name, value in loss["fixed"].items()}
        chosen = {"chosen by the controller": (loss["chosen"], loss["image_tokens"]["chosen"])}
        for name, (value, tokens) in (fixed | chosen).items():
            lines.append(f"| {split} | {name} | {_interval(value)} | {tokens:.1f} |")
        difference = _interval(loss["chosen_minus_best_fixed"])
        lines.append(f"| {split} | best of each row (oracle) | {_interval(loss['oracle'])} | |")
        lines.append(f"| {split} | chosen less best fixed ({loss['best_fixed']}) | {difference} | |")
    return "\n".join(lines)


def _interval(value: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def save_with_controller(source: Path, controller: GranularityController, report: dict, output: Path):
    """
    The checkpoint again, with another controller; every other weight is copied bit for bit.

    The files are copied, since loading and saving would bring parts that are stored in several dtypes into one. The
    folder appears when it is complete.

    Raises:
        ValueError: the checkpoint has no safetensors file with the controller's weights.
    """
    new = {PREFIX + name: weight.detach().cpu() for name, weight in controller.state_dict().items()}
    with complete_or_absent(output) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*TRAINING_STATE_FILES))
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                names, metadata = set(stored.keys()) & set(new), stored.metadata()
            if names:
                weights = load_file(file)
                weights |= {name: new.pop(name).to(weights[name].dtype).contiguous() for name in names}
                save_file(weights, file, metadata)
        if new:
            raise ValueError(
                f"{source} has no {', '.join(sorted(new)[:2])} in a safetensors file; save the model with "
                "save_pretrained first"
            )
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        _add_training_record(folder, report)
        if report["splits"]:
            confusions = {split: part["controller"]["confusion"] for split, part in report["splits"].items()}
            draw_confusions(confusions, report["levels"], folder / PICTURE)


def _add_training_record(folder: Path, report: dict):
    """Write into the manifest, which later stages keep, what the controller was trained on and who labelled it."""
    corpus = report.get("corpus")
    tell_training(
        folder,
        stage="controller",
        recipe=corpus and public_name(corpus),
        settings={"data": [corpus] if corpus not in (None, SEED_CORPUS) else []},
        rows=sum(report["rows"].values()),
        steps=f"{report['best_epoch']} epochs",
        seed=report.get("seed"),
        processes=1,
        annotators=report["annotators"],
    )


def run(arguments: ControllerArguments) -> dict:
    """Train, save and report as the command line says; raises ValueError for what cannot be used."""
    output = Path(arguments.output)
    if output.exists():
        raise ValueError(f"{output} exists already; name a folder that does not")
    rows = load_corpus(arguments.corpus)
    source = Path(arguments.model)
    if not source.is_dir():
        source = Path(snapshot_download(arguments.model))
    model = load_model(str(source))
    if torch.cuda.is_available():
        model = model.to("cuda")
    processor = load_processor(str(source), model.config)
    report = {"model": arguments.model, "corpus": arguments.corpus, "seed": arguments.seed} | train_controller(
        model,
        processor,
        rows,
        epochs=arguments.epochs,
        lr=arguments.learning_rate,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        soft=not arguments.hard,
    )
    save_with_controller(source, model.model.granularity_controller, report, output)
    return report


def main():
    (arguments,) = HfArgumentParser(ControllerArguments, description=__doc__).parse_args_into_dataclasses()
    try:
        report = run(arguments)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"granulon-train-controller: {error}")
    print(f"rows {report['rows']}; best epoch {report['best_epoch']} of {len(report['history'])}\n")
    print(tables(report))
    print(f"\nwrote {arguments.output} (scores in {REPORT}, confusion matrices in {PICTURE})")


if __name__ == "__main__":
    main()
