"""Tasks of lmms-eval: found by name, answered by a model, scored.

Figures are computed here from what lmms-eval logs with each sample (scoring.py). A metric of lmms-eval that is not
known here keeps its own aggregation, and has a value but no interval.
"""

import difflib
import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import datasets
import transformers
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger
from tenacity import RetryError

from granulon.hub.answer import is_hub_id
from granulon.hub.text import first_line

from .metrics import BERTSCORE, METRICS, bertscore_statistics
from .protocols import OURS, PROTOCOLS
from .scoring import LMMS_EVAL_FIGURES, UNSCORED, figures, statistics_of

TASKS = Path(__file__).parent / "tasks"
HUB_TIMEOUT = 10.0  # seconds
MODEL_NAME = "granulon"  # the key for this model in a task's `lmms_eval_specific_kwargs`
NLTK_DATA = "NLTK's data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
# Tasks of lmms-eval whose scoring needs data that pip does not install.
NEEDED_DATA = {
    "coco_cap_chair": NLTK_DATA,
    "amber_g": f"{NLTK_DATA}; a spaCy model: python -m spacy download en_core_web_md; and AMBER's metadata "
    "(relation.json, safe_words.txt, annotations.json, metrics.txt of its repository's data folder) in "
    "data/amber/metadata",
}


def reduce_logging():
    """Show warnings of lmms-eval, and no progress bars or messages of the libraries below it."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level} lmms-eval: {message}")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def task_config(name: str, protocol: str = OURS) -> dict:
    """
    The configuration of a task of ours or of lmms-eval, as a protocol has it.

    Raises:
        ValueError: the task does not exist, is a group of tasks, needs a package that is not installed, or is not part
            of the protocol.
    """
    rules = PROTOCOLS[protocol]
    if not rules.has(name):
        raise ValueError(f"the protocol {protocol} has no task {name}; it has {', '.join(rules.tasks)}")
    config = _read_task((rules.tasks or {}).get(name, name))
    if rules.options:
        config["generation_kwargs"] = dict(rules.options)
    if rules.limit is not None:
        config["metadata"] = {**config["metadata"], "limit": rules.limit}
    if rules.question_first:
        config["doc_to_messages"] = _question_before_image(config["doc_to_text"], config["doc_to_visual"])
    config["metric_list"] = [entry for entry in config.get("metric_list") or [] if rules.has(name, entry["metric"])]
    return config


def own_limit(config: dict) -> int | None:
    """The number of samples that a task evaluates unless another is asked for; None for all."""
    metadata = config.get("metadata")
    return metadata.get("limit") if isinstance(metadata, dict) else None


@lru_cache
def data_commit(path: str, revision: str | None) -> str | None:
    """The commit of a data set on the Hub, or the one in its cache; None if neither is found."""
    if Path(path).exists() or not is_hub_id(path):
        return None
    try:
        return HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT).sha
    except Exception:  # the client's own errors have no common class
        cached = Path(HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset"), "refs", revision or "main")
        return cached.read_text().strip() if cached.is_file() else None


def with_commit(config: dict, commit: str | None) -> dict:
    """The configuration of a task with its data at a commit."""
    options = config.get("dataset_kwargs") or {}
    return config if commit is None else config | {"dataset_kwargs": {**options, "revision": commit}}


def _read_task(name: str) -> dict:
    """The content of a task's file."""
    index = _task_manager().task_index
    if name not in index:
        index = _task_manager(include_defaults=True).task_index
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        raise ValueError(f"there is no task {name}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    entry = index[name]
    if entry["type"] != "task":
        raise ValueError(f"{name} is a {entry['type']} of tasks; name the tasks themselves: {_members(entry)}")
    try:
        return load_yaml_config(entry["yaml_path"], mode="full")
    except ImportError as error:
        raise ValueError(f"the task {name} needs a package that is not installed: {error}") from error


def task_identity(name: str, config: dict) -> dict:
    """What decides the figures of a task: data, prompt, options and version; functions by their names."""
    return {"name": name, "config": _json_form({key: value for key, value in config.items() if key != "task"})}


def make_task(config: dict, replacements: dict | None = None) -> ConfigurableMessagesTask:
    """
    A task with its data.

    Args:
        config: of `task_config`.
        replacements: entries that replace the configuration's, such as another data set; None removes an entry.

    Raises:
        ValueError: the data were not found, or have no rows or no such column.
    """
    config = {key: value for key, value in {**config, **(replacements or {})}.items() if value is not None}
    config["metric_list"] = [
        {**entry, "aggregation": _no_aggregation} if entry["metric"] in (*METRICS, *LMMS_EVAL_FIGURES) else entry
        for entry in config.get("metric_list") or []
    ]
    data = f"the data of {config['task']} ({config.get('dataset_path')})"
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL_NAME)
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise ValueError(f"{data} were not found: {first_line(cause)}") from cause
    except IndexError as error:
        raise ValueError(f"{data} have no rows in the split that is evaluated") from error
    except KeyError as error:
        raise ValueError(f"{data} have no column or split {error}; see its task folder") from error


def check_scoring(task: ConfigurableMessagesTask):
    """Score a made-up answer before the model runs for hours; raises `ValueError` if that needs missing data."""
    name = task.config.task
    if name in NEEDED_DATA:
        try:
            task.config.process_results(task.eval_docs[0], ["A dog on a boat."])  # without the task's five retries
        except (LookupError, OSError) as error:
            raise ValueError(f"{name} cannot be scored without {NEEDED_DATA[name]}") from error


def answer(model, task: ConfigurableMessagesTask, limit: int | None) -> tuple[list[dict], dict] | None:
    """
    Answer all samples, on all processes, and score them.

    Args:
        model: a model of lmms-eval.
        limit: number of samples; None for all.

    Returns:
        on the main process: the samples in their order, each with id, question, references, answer, doc, what was
        seen of the image, and its statistics by figure; and the values of metrics that only lmms-eval can aggregate.
        None on other processes.
    """
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    results = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=_task_manager(),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=Namespace(process_with_media=False, output_path="."),
        process_docs_parallel=1,
        **seeds,
    )
    if results is None:
        return None
    name, metrics = task.config.task, [entry["metric"] for entry in task.config.metric_list]
    logged = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    unknown = [metric for metric in metrics if metric not in METRICS and metric not in LMMS_EVAL_FIGURES]
    aggregated = {metric: results["results"][name].get(f"{metric},none") for metric in unknown}
    return [_sample(entry, metrics) for entry in logged], aggregated


def score(samples: list[dict], aggregated: dict, bertscore_model: str, device=None) -> tuple[dict, dict, dict]:
    """
    The figures of samples; their BERTScore, which needs batches, is computed here and added to their statistics.

    Args:
        samples: of `answer`.
        aggregated: values of further figures, by name.

    Returns:
        figures by name; reasons of figures that could not be computed, by name; numbers of samples without a score,
        by reason.
    """
    not_computed = {}
    with_bertscore = [sample for sample in samples if BERTSCORE in sample["statistics"]]
    if with_bertscore:
        answers, references = ([sample[key] for sample in with_bertscore] for key in ("answer", "references"))
        try:
            found = bertscore_statistics(answers, references, bertscore_model, device)
        except (ImportError, RuntimeError, ValueError) as error:
            not_computed[BERTSCORE] = first_line(error)
            found = [None] * len(with_bertscore)
        for sample, statistics in zip(with_bertscore, found, strict=True):
            sample["statistics"][BERTSCORE] = statistics
    found = figures(samples)
    for name, value in aggregated.items():
        if name not in found and isinstance(value, (int, float)):
            found[name] = {"value": value, "low": None, "high": None, "n": len(samples), "higher_is_better": True}
    return found, not_computed, dict(Counter(sample[UNSCORED] for sample in samples if UNSCORED in sample))


@lru_cache
def _task_manager(include_defaults: bool = False) -> TaskManager:
    """Our tasks; with `include_defaults` also lmms-eval's, whose 2000 files take seconds to read."""
    return TaskManager("ERROR", include_path=str(TASKS), include_defaults=include_defaults, model_name=MODEL_NAME)


def _members(entry: dict) -> str:
    """The tasks of a group."""
    members = entry["task"]
    if members == -1:
        members = load_yaml_config(entry["yaml_path"], mode="simple").get("task", [])
    return ", ".join(member if isinstance(member, str) else str(member.get("task")) for member in members)


def _sample(logged: dict, metrics: list[str]) -> dict:
    statistics, groups = statistics_of(logged, metrics)
    doc = _json_form(logged["doc"])
    return {
        "id": logged["doc_id"],
        "question": next((text for text in logged["arguments"] if isinstance(text, str)), ""),
        "references": logged["target"] if isinstance(logged["target"], list) else [str(logged["target"])],
        "answer": logged["filtered_resps"][0],
        **next((counts for counts in logged["token_counts"] if counts), {}),
        "statistics": statistics,
        **({"groups": groups} if groups else {}),
        **({UNSCORED: logged[UNSCORED]} if UNSCORED in logged else {}),
        "doc": doc,
        # lmms-eval's own hash is that of the task's name alone.
        "doc_sha256": hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest(),
    }


def _question_before_image(doc_to_text: Callable, doc_to_visual: Callable) -> Callable:
    """A task's `doc_to_messages` for prompts whose image stands on a line after the question."""

    def question_before_image(doc, lmms_eval_specific_kwargs=None):
        options = [] if lmms_eval_specific_kwargs is None else [lmms_eval_specific_kwargs]
        images = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
        return [{"role": "user", "content": [{"type": "text", "text": f"{doc_to_text(doc, *options)}\n"}, *images]}]

    return question_before_image


def _no_aggregation(items: list) -> float:
    """Replaces lmms-eval's aggregation: figures are computed from the samples instead."""
    return 0.0


def _json_form(value):
    """A value as JSON can hold it: functions as their names, other objects as text."""
    if isinstance(value, dict):
        return {str(key): _json_form(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_form(entry) for entry in value]
    if callable(value):
        function, arguments = getattr(value, "func", value), getattr(value, "args", ())
        return ".".join(map(str, (getattr(function, "__name__", type(function).__name__), *arguments)))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
