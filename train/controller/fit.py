"""`granulon-train-controller`: train the controller on a granularity corpus; everything else is frozen.

The controller reads the mean of a question's states in the language model (Eq. 2). The language model is frozen, so
the mean is computed once per distinct question and kept on the CPU as an fp32 vector. On each test split of the
corpus, scores are reported beside chance, the most frequent level, and logistic regression on a bag of words.

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

from granulon.hub.files import atomic_folder, write_atomically
from granulon.hub.inference import load_model, load_processor
from granulon.hub.licences import public_name
from granulon.hub.manifest import append_training_record
from granulon.hub.text import markdown_table, with_interval
from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.granularity_controller import GranularityController
from modeling_granulon.granularity_controller import question_states as read_questions

from .corpus import TEST, TRAIN, VALIDATION, check_rows
from .level_scores import draw_confusions, scores
from .measure import compare_levels
from .replay import SEED_CORPUS, annotators_of, load_corpus

REPORT, PICTURE = "controller_report.json", "controller_confusion.png"
PREFIX = "model.granularity_controller."
LIBRARIES = ("granulon", "transformers", "torch", "scikit-learn")  # whose versions the manifest records
# Files of a training checkpoint that belong to the run and are not copied.
TRAINING_STATE_FILES = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "complete.json")
# The column by which a test split is held out; the bootstrap draws whole groups of it.
GROUP_OF_SPLIT = {"test_kinds": "kind"}
MAX_WORDS = 5000
INVERSE_L2 = (0.1, 1.0, 10.0)  # C of the regression on the bag of words, chosen on the validation split


@dataclass
class ControllerArguments:
    model: str = field(metadata={"help": "checkpoint: a folder or a Hub repository"})
    output: str = field(metadata={"help": "new folder for the checkpoint"})
    corpus: str = field(
        default=SEED_CORPUS,
        metadata={"help": "JSON Lines file or folder, or 'seed' for the corpus from templates"},
    )
    hard: bool = field(
        default=False, metadata={"help": "train on the level instead of the probabilities of all levels"}
    )
    epochs: int = field(default=100, metadata={"help": "maximum; training stops when validation no longer improves"})
    learning_rate: float = field(default=3e-4, metadata={"help": "learning rate of AdamW"})
    batch_size: int = field(default=64, metadata={"help": "questions per step"})
    seed: int = field(default=0, metadata={"help": "seed of the initial weights and of the order of rows"})


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
        """Indices of the rows of a split, (B,) long."""
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
    Train the model's controller on a corpus; no other weight changes.

    The controller is initialised from the seed. The weights with the lowest cross-entropy on the validation split are
    kept, and training stops after `patience` epochs without improvement. Without validation rows all epochs run. The
    global random state does not change.

    Args:
        rows: of the corpus, see corpus.py.
        soft: train on `level_probs` instead of the level.

    Returns:
        dict: settings and history of the training and, for each test split, scores of controller and baselines.

    Raises:
        ValueError: the model has no learned controller, or invalid rows.
        FloatingPointError: a loss that is not finite; the model is unchanged.
    """
    levels = model.config.granularity_names
    if model.model.granularity_controller is None:
        raise ValueError(
            f"the model has no learned controller (controller is {model.config.controller!r}, levels {levels}); use a "
            "checkpoint with controller='learned' and at least two levels"
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
    # The licences of the annotators restrict the name and licence of the published model.
    annotators = annotators_of(rows)
    sizes = dict(_split_sizes(data))
    return {"levels": levels, "rows": sizes, "annotators": annotators, **training, "splits": splits}


@torch.no_grad()
def question_states(model, processor, questions: list[str], batch_size: int = 64) -> torch.Tensor:
    """The controller's input for each question: the standardised mean of its states (Eq. 2), (Q,E) fp32 on the CPU."""
    base = model.model
    pooled = []
    for start in tqdm(range(0, len(questions), batch_size), desc="questions", leave=False, disable=None):
        texts = [as_rendered(processor, question) for question in questions[start : start + batch_size]]
        inputs = processor.tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        ).to(base.device)
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        states_BTE = read_questions(base.language_model, ids_BT, mask_BT, model.config.controller_layers)
        pooled.append(base.granularity_controller.pool(states_BTE, mask_BT).cpu())
    return torch.cat(pooled)


def as_rendered(processor: GranulonProcessor, question: str) -> str:
    """The question as the controller reads it after the chat template."""
    message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return processor.question(processor.apply_chat_template(message, add_generation_prompt=True))


def controller_logits(controller: GranularityController, states_BE: torch.Tensor) -> torch.Tensor:
    """Logits (B,G) fp32 of pooled questions."""
    return controller.classify(states_BE.to(controller.projection.weight.device)).float().cpu()


def fit(controller, states_QE, data: Labelled, epochs=100, lr=3e-4, batch_size=64, seed=0, patience=10) -> dict:
    """Train a controller in fp32 (bf16 is too coarse for the optimizer's steps); returns settings and history."""
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
            watched = loss_of(validation_B).item() if len(validation_B) else -epoch  # without validation: the last
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
    selection_B = validation_B if len(validation_B) else train_B
    words = CountVectorizer(max_features=MAX_WORDS, token_pattern=r"(?u)\w+")
    words.fit([data.rows[place]["question"] for place in train_B.tolist()])
    counts_QV = words.transform(data.questions)
    # Soft labels: every row occurs once per level, weighted by the probability of the level.
    levels = data.target_BG.shape[1]
    rows_V = vstack([counts_QV[data.question_B[train_B].numpy()]] * levels)
    label = np.repeat(np.arange(levels), len(train_B))
    weight = data.target_BG[train_B].T.flatten().numpy()
    losses = {}
    for inverse_l2 in INVERSE_L2:
        regression = LogisticRegression(C=inverse_l2, max_iter=1000).fit(rows_V, label, sample_weight=weight)
        logs_QG = torch.from_numpy(regression.predict_log_proba(counts_QV)).float()
        loss = nn.functional.cross_entropy(logs_QG[data.question_B[selection_B]], data.target_BG[selection_B])
        losses[loss.item()] = logs_QG.exp()
    return losses[min(losses)]


def _split_report(data: Labelled, split: str, predictions: dict[str, torch.Tensor], seed: int) -> dict:
    """Scores of each prediction on one split, beside chance and the most frequent training level."""
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
    """For measured labels, the answers' loss at the chosen levels."""
    rows = [data.rows[place] for place in places_B.tolist()]
    if not all("answer_nll" in row for row in rows):
        return {}
    levels = list(rows[0]["answer_nll"])
    chosen = [levels[index] for index in probs_QG[data.question_B[places_B]].argmax(-1).tolist()]
    images = [row["image_sha"] for row in rows]
    return {"answer_loss": compare_levels(rows, chosen, images)}


def bootstrap_group(row: dict, split: str) -> str:
    """The bootstrap's group of a row: its kind where kinds are held out, else its template, else its question."""
    return str(row.get(GROUP_OF_SPLIT.get(split, "phrasing")) or row["question"])


def _split_sizes(data: Labelled) -> Counter:
    return Counter(row["split"] for row in data.rows)


def tables(report: dict) -> str:
    """The report's scores in Markdown with 95% intervals; for measured labels also the answers' loss."""
    rows, losses = [], []
    for split, part in report["splits"].items():
        for name in ("controller", "bag_of_words"):
            measures = [with_interval(*part[name][measure], digits=3) for measure in ("accuracy", "macro_f1", "ece")]
            rows.append([split, f"{part['rows']} ({part[name]['groups']})", name.replace("_", " "), *measures])
        rows += [[split, part["rows"], name, f"{part[name]:.3f}", "", ""] for name in ("chance", "commonest")]
        if "answer_loss" in part:
            losses += _loss_rows(split, part["answer_loss"])
    text = markdown_table(["split", "rows (groups)", "model", "accuracy", "macro-F1", "ECE"], rows)
    if losses:
        text += "\n\n" + markdown_table(["split", "levels", "nats per answer", "image tokens"], losses, text_columns=2)
    return text


def _loss_rows(split: str, loss: dict) -> list[list]:
    tokens = loss["image_tokens"]
    named = {f"{name}, fixed": (value, tokens[name]) for name, value in loss["fixed"].items()}
    named["chosen by the controller"] = loss["chosen"], tokens["chosen"]
    difference = f"chosen minus best fixed ({loss['best_fixed']})", loss["chosen_minus_best_fixed"]
    return [
        *([split, name, with_interval(*value, digits=3), f"{count:.1f}"] for name, (value, count) in named.items()),
        [split, "best of each row (oracle)", with_interval(*loss["oracle"], digits=3), ""],
        [split, difference[0], with_interval(*difference[1], digits=3), ""],
    ]


def save_with_controller(source: Path, controller: GranularityController, report: dict, output: Path):
    """
    Copy a checkpoint with another controller; every other weight stays the same, bit for bit.

    Files are copied because loading and saving would convert parts with different dtypes to one. The folder appears
    when it is complete.

    Raises:
        ValueError: the checkpoint has no safetensors file with the controller's weights.
    """
    new = {PREFIX + name: weight.detach().cpu() for name, weight in controller.state_dict().items()}
    with atomic_folder(output) as folder:
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
        write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
        _add_training_record(folder, report)
        if report["splits"]:
            confusions = {split: part["controller"]["confusion"] for split, part in report["splits"].items()}
            draw_confusions(confusions, report["levels"], folder / PICTURE)


def _add_training_record(folder: Path, report: dict):
    """Record corpus and annotators in the manifest, which later stages keep."""
    corpus = report.get("corpus")
    append_training_record(
        folder,
        LIBRARIES,
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
    """Train and save; returns the report. Raises `ValueError` for invalid arguments or data."""
    output = Path(arguments.output)
    if output.exists():
        raise ValueError(f"{output} exists already; choose a new folder")
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
