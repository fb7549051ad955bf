"""Any task of lm-eval with a model object of ours: its data, prompts and scores, as measures with their items.

A measure's value is lm-eval's own. Where lm-eval aggregates by a rule that is no mean over items, the measure has a
single item, and so neither a standard error nor a paired difference.
"""

import difflib
import importlib.metadata
import importlib.util
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.benchmarks.catalogue import TASKS
from bankwise.evaluation.measures import Measure
from bankwise.precision import multiplies_bf16

_INSTALL = "lm-eval tasks need the package lm_eval: pip install 'lm-eval>=0.4.13'"
_HEADLINES = ("acc_norm", "acc", "exact_match")  # the first that a task has


def find_problems(
    tasks: Sequence[str], include_path: str = "", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """What keeps these tasks from being run, one line each; their data is not looked at."""
    if importlib.util.find_spec("lm_eval") is None:
        return [_INSTALL]
    if include_path and not Path(include_path).is_dir():
        return [f"benchmarks.lm_eval_include={include_path} is no folder; name one that holds task files (YAML)"]
    known = _manager(include_path, _origin(tokenizer)).all_tasks
    problems = []
    for name in tasks:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, known, n=3))
            hint = f"close to it: {close}" if close else "`lm_eval ls tasks` lists them"
            problems.append(f"benchmarks.lm_eval: lm-eval has no task {name!r}; {hint}")
    return problems


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    include_path: str = "",
    bf16: bool = False,
    execute_code: bool = False,
) -> tuple[list[Measure], dict[str, Any]]:
    """Measures, and lm-eval's own tables as JSON values.

    `limit` takes the first documents of each task, as lm-eval does. `num_fewshot` leaves alone the tasks that are
    defined without examples. A group that aggregates its tasks (mmlu) gives one measure, other groups one per task.
    """
    problems = find_problems(tasks, include_path, tokenizer)
    if problems:
        raise ConfigError(problems[0])
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _manager(include_path, _origin(tokenizer))
    was_training = model.training
    with _quiet():
        loaded = [item for name in dict.fromkeys(tasks) for item in _load(manager, name, execute_code)]
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            mixed_precision_dtype="bfloat16" if bf16 and multiplies_bf16(model.device.type) else None,
        )
        results: Any = lm_eval.simple_evaluate(
            lm,
            tasks=loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=execute_code,
        )
    model.train(was_training)
    version = importlib.metadata.version("lm_eval")
    return _measures(results, version), _tables(results, version)


def _origin(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Folder or name that the tokenizer was loaded from; tasks that generate their texts to a length load it again."""
    return "" if tokenizer is None else tokenizer.name_or_path


@lru_cache(maxsize=2)
def _manager(include_path: str, tokenizer: str = "") -> Any:
    """lm-eval's index of tasks; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] | None = {"tokenizer": tokenizer} if tokenizer else None
    return TaskManager(include_path=include_path or None, metadata=metadata)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what is meant here: a model object, and tasks that were found by name."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(manager: Any, name: str, execute_code: bool) -> list[Any]:
    """The task, the group, or the tasks of the tag of that name, with their data."""
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"lm-eval task {name} cannot be loaded: {reason}; its data comes from the Hugging Face hub unless its file "
            "names local files, so download it once with a network, or leave the task out"
        ) from error
    unsafe = [task for task, loaded_task in loaded["tasks"].items() if getattr(loaded_task, "UNSAFE_CODE", False)]
    if unsafe and not execute_code:
        raise ConfigError(
            f"lm-eval task {unsafe[0]} runs programs that the model wrote; allow it with benchmarks.execute_code=true"
        )
    groups = loaded["groups"].values()
    inner_groups = {group.name for outer in groups for group in outer.get_all_groups()}
    inner_tasks = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [group for group in groups if group.name not in inner_groups] + [
        task for task_name, task in loaded["tasks"].items() if task_name not in inner_tasks
    ]


def _measures(results: Mapping[str, Any], version: str) -> list[Measure]:
    by_task = {task: _task_measures(task, results, version) for task in results["samples"]}
    children = results["group_subtasks"]
    aggregated = results.get("groups", {})
    roots = [name for name in aggregated if not any(name in children[other] for other in aggregated)]
    measures = []
    covered = set()
    for name in roots:
        leaves = _leaves(name, children)
        covered.update(leaves)
        measures += _group_measures(name, results, [by_task[leaf] for leaf in leaves], version)
    return measures + [measure for task, own in by_task.items() if task not in covered for measure in own.values()]


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


def _values(table: Mapping[str, Any]) -> dict[str, float]:
    """`metric,filter` -> value, without standard errors and descriptions."""
    return {
        key: float(value)
        for key, value in table.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _task_measures(task: str, results: Mapping[str, Any], version: str) -> dict[str, Measure]:
    """Measures by their `metric,filter`."""
    values = _values(results["results"][task])
    measures = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        samples = [row for row in results["samples"][task] if row["filter"] == chosen and metric in row]
        common = _common(task, key, values, results, version)
        if results["configs"][task].get("output_type") == "multiple_choice" and metric.startswith("acc"):
            common["chance"] = 100 * statistics.fmean(1 / len(row["filtered_resps"]) for row in samples)
        items = [f"{task}/{row['doc_id']}" for row in samples]
        measures[key] = _as_items(common, items, [row[metric] for row in samples], value)
    return measures


def _group_measures(
    group: str, results: Mapping[str, Any], tasks: Sequence[Mapping[str, Measure]], version: str
) -> list[Measure]:
    values = _values(results["groups"][group])
    measures = []
    for key, value in values.items():
        parts = [own[key] for own in tasks if key in own]
        common = _common(group, key, values, results, version)
        chances = [(part.chance, part.n) for part in parts if part.chance is not None]
        if len(chances) == len(parts):
            common["chance"] = sum(chance * n for chance, n in chances) / sum(n for _, n in chances)
        items = [item for part in parts for item in part.items]
        amounts = [amount for part in parts for amount in part.amounts]
        weights = [1 / part.n for part in parts for _ in part.items]
        by_task = [amount * weight for amount, weight in zip(amounts, weights, strict=True)]
        if _is_close(sum(by_task) / sum(weights), value) and not _is_close(statistics.fmean(amounts), value):
            measure = Measure(**common, items=tuple(items), amounts=tuple(by_task), weights=tuple(weights))
        else:
            measure = _as_items(common, items, amounts, value)
        measures.append(measure)
    return measures


def _common(
    task: str, key: str, values: Mapping[str, float], results: Mapping[str, Any], version: str
) -> dict[str, Any]:
    """What a measure says of itself, whatever its items."""
    metric, _, chosen = key.partition(",")
    is_lower_better = results["higher_is_better"].get(task, {}).get(metric) is False
    is_share = not is_lower_better and 0 <= values[key] <= 1
    first = next((name for name in _HEADLINES if any(other.partition(",")[0] == name for other in values)), None)
    return {
        "section": "benchmarks",
        "task": task,
        "metric": metric if chosen == "none" else key,
        "variant": "lm-eval",
        "group": TASKS[task].group if task in TASKS else "",
        "better": "lower" if is_lower_better else "higher",
        "recovery": "inverse" if is_lower_better else "ratio" if is_share else "",
        "is_headline": metric == first if first else key == next(iter(values)),
        "note": f"lm-eval {version}, {results['n-shot'].get(task, 0)}-shot",
    } | ({"scale": 100.0, "unit": "%"} if is_share else {})


def _as_items(common: dict[str, Any], items: Sequence[str], raw: Sequence[Any], value: float) -> Measure:
    """The measure over its items under the rule that gives lm-eval's value; as one item where none does."""
    named = {"items": tuple(items)}
    if all(isinstance(amount, int | float) for amount in raw) and raw:
        amounts = tuple(map(float, raw))
        mean = statistics.fmean(amounts)
        if _is_close(mean, value):
            return Measure(**common | named, amounts=amounts)
        if _is_close(math.exp(min(-mean, 700.0)), value):
            return Measure(**common | named, amounts=tuple(-amount for amount in amounts), form="exp")
    elif raw and all(isinstance(amount, tuple | list) and len(amount) == 2 for amount in raw):
        # Log-likelihood and words or bytes of each document.
        losses = tuple(-float(amount[0]) for amount in raw)
        weights = tuple(float(amount[1]) for amount in raw)
        mean = sum(losses) / sum(weights)
        if _is_close(math.exp(min(mean, 700.0)), value):
            return Measure(**common | named, amounts=losses, weights=weights, form="exp")
        if _is_close(mean / math.log(2), value):
            return Measure(**common | named, amounts=losses, weights=weights, scale=1 / math.log(2))
    note = f"{common['note']}; aggregated by lm-eval, no value per item"
    return Measure(**common | {"items": (common["task"],), "amounts": (value,), "note": note})


def _is_close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)


def _tables(results: Mapping[str, Any], version: str) -> dict[str, Any]:
    return {
        "version": version,
        "results": {
            task: {key: float(value) if isinstance(value, int | float) else str(value) for key, value in table.items()}
            for task, table in results["results"].items()
        },
        "shots": {task: int(shots) for task, shots in results["n-shot"].items()},
        "versions": {task: str(number) for task, number in results["versions"].items()},
        "documents": {task: dict(count) for task, count in results["n-samples"].items()},
    }
