"""lmms-eval as the engine: a task by name, its samples answered by a model and scored.

Figures are computed here from what lmms-eval logs with each sample (scoring.py). A metric of lmms-eval's that is not
known here keeps its own aggregation, and has a value but no interval.
"""

import difflib
import hashlib
import json
import sys
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import datasets
import transformers
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger
from tenacity import RetryError

from .metrics import METRICS, bertscore_statistics
from .scoring import READINGS, UNSCORED, figures, statistics_of

TASKS = Path(__file__).parent / "tasks"
MODEL_NAME = "granulon"  # what a task's `lmms_eval_specific_kwargs` may name
BATCHED = "bertscore"
# Tasks of lmms-eval's that score with data of other packages, which pip does not bring.
NEEDS = {
    "coco_cap_chair": "NLTK's data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet",
    "amber_g": "NLTK's data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet; a spaCy "
    "model: python -m spacy download en_core_web_md; and AMBER's metadata (relation.json, safe_words.txt, "
    "annotations.json, metrics.txt of its repository's data folder) in data/amber/metadata",
}


def quiet():
    """lmms-eval and the libraries under it tell of every step; what matters are their warnings, and one bar."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level} lmms-eval: {message}")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def task_config(name: str) -> dict:
    """
    A task's configuration: ours, or lmms-eval's.

    Raises:
        ValueError: no such task, a group of tasks, or one whose packages are missing.
    """
    index = _own_tasks().task_index
    if name not in index:
        index = _all_tasks().task_index
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


def identity(name: str, config: dict) -> dict:
    """What of a task decides its figures: data, prompt, options and version; functions by their names."""
    return {"name": name, "config": _plain({key: value for key, value in config.items() if key != "task"})}


def make_task(config: dict, replaced: dict | None = None) -> ConfigurableMessagesTask:
    """
    The task with its data loaded.

    Args:
        replaced: entries in place of the configuration's own.

    Raises:
        ValueError: the data cannot be had, lack columns, or are empty.
    """
    config = {key: value for key, value in {**config, **(replaced or {})}.items() if value is not None}
    config["metric_list"] = [
        {**entry, "aggregation": _later} if entry["metric"] in (*METRICS, *READINGS) else entry
        for entry in config.get("metric_list") or []
    ]
    name, data = config["task"], config.get("dataset_path")
    try:
        return ConfigurableMessagesTask(config=config, model_name=MODEL_NAME)
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise ValueError(f"the data of {name} ({data}) cannot be had: {_line(cause)}") from cause
    except IndexError as error:
        raise ValueError(f"the data of {name} ({data}) have no rows in the split that is evaluated") from error
    except KeyError as error:
        raise ValueError(
            f"the data of {name} ({data}) have no column or split {error}; see its task folder"
        ) from error


def check_scoring(task: ConfigurableMessagesTask):
    """Raises `ValueError` where a task's answers could not be scored, before hours are spent on them."""
    name = task.config.task
    if name in NEEDS:
        try:
            task.config.process_results(task.eval_docs[0], ["A dog on a boat."])  # the task's own would try five times
        except (LookupError, OSError) as error:
            raise ValueError(f"{name} cannot be scored without {NEEDS[name]}") from error


def answer(adapter, task: ConfigurableMessagesTask, limit: int | None, seed: int) -> tuple[list[dict], dict] | None:
    """
    Every sample answered and scored, on all processes; on the main one the samples, and lmms-eval's own figures.

    Returns:
        samples in their order, each with id, question, references, answer, doc, what was seen of the image, and its
        statistics by figure; and the value of every metric that only lmms-eval can aggregate.
    """
    results = simple_evaluate(
        model=adapter,
        tasks=[task],
        task_manager=_own_tasks(),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=Namespace(process_with_media=False, output_path="."),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        process_docs_parallel=1,
    )
    if results is None:
        return None
    names = [entry["metric"] for entry in task.config.metric_list]
    name = task.config.task
    logged = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    theirs = {
        metric: results["results"][name].get(f"{metric},none")
        for metric in names
        if metric not in METRICS and metric not in READINGS
    }
    return [_sample(entry, names) for entry in logged], theirs


def score(
    samples: list[dict], theirs: dict, seed: int, bertscore_model: str, bertscore_layer: int | None, device=None
) -> tuple[dict, dict, dict]:
    """
    The figures of samples; those that are scored in batches are filled in here.

    Returns:
        figures by name; what could not be computed, by name: why; samples without a score, by reason: how many.
    """
    failed = {}
    texts = [sample["statistics"].get(BATCHED) for sample in samples]
    waiting = [(sample, pair) for sample, pair in zip(samples, texts) if isinstance(pair, dict)]
    if waiting:
        answers, references = [pair["answer"] for _, pair in waiting], [pair["references"] for _, pair in waiting]
        try:
            found = bertscore_statistics(answers, references, bertscore_model, bertscore_layer, device=device)
            for (sample, _), statistics in zip(waiting, found, strict=True):
                sample["statistics"][BATCHED] = statistics
        except (ImportError, RuntimeError, ValueError) as error:
            failed[BATCHED] = _line(error)
            for sample, _ in waiting:
                del sample["statistics"][BATCHED]
    ours = figures(samples, seed)
    for name, value in theirs.items():
        if name not in ours and isinstance(value, (int, float)):
            ours[name] = {"value": value, "low": None, "high": None, "n": len(samples), "higher_is_better": True}
    unscored = {}
    for sample in samples:
        if reason := sample.get(UNSCORED):
            unscored[reason] = unscored.get(reason, 0) + 1
    return ours, failed, unscored


def waiting_for_bertscore(samples: list[dict]) -> list[dict]:
    """The samples of a finished cell as they were before BERTScore was computed."""
    for sample in samples:
        if UNSCORED not in sample:
            sample["statistics"][BATCHED] = {"answer": sample["answer"], "references": sample["references"]}
    return samples


@lru_cache
def _own_tasks() -> TaskManager:
    return TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name=MODEL_NAME)


@lru_cache
def _all_tasks() -> TaskManager:
    return TaskManager("ERROR", include_path=str(TASKS), model_name=MODEL_NAME)  # reads 2000 files


def _members(entry: dict) -> str:
    members = entry["task"]
    if members == -1:
        members = load_yaml_config(entry["yaml_path"], mode="simple").get("task", [])
    return ", ".join(member if isinstance(member, str) else str(member.get("task")) for member in members)


def _sample(logged: dict, names: list[str]) -> dict:
    statistics, groups = statistics_of(logged, names)
    counts = next((entry for entry in logged["token_counts"] if entry), {})
    return {
        "id": logged["doc_id"],
        "question": next((text for text in logged["arguments"] if isinstance(text, str)), ""),
        "references": logged["target"] if isinstance(logged["target"], list) else [str(logged["target"])],
        "answer": logged["filtered_resps"][0],
        **counts,
        "statistics": statistics,
        **({"groups": groups} if groups else {}),
        **({UNSCORED: logged[UNSCORED]} if UNSCORED in logged else {}),
        "doc": (doc := _plain(logged["doc"])),
        # lmms-eval's own hash is that of the task's name alone.
        "doc_sha256": hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest(),
    }


def _later(items: list) -> float:
    """In place of an aggregation: figures are computed from the samples."""
    return 0.0


def _plain(value):
    """JSON's types; functions by name, anything else by its text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if callable(value):
        function = getattr(value, "func", value)
        arguments = getattr(value, "args", ())
        return ".".join(map(str, (getattr(function, "__name__", type(function).__name__), *arguments)))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
