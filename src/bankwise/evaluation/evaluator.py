"""Measuring one model (`evaluate`) or several beside each other (`evaluate_models`).

Everything that can be wrong with a plan is found before a weight is read. Models are read one after the other, so that
only one is in memory; what was read is cached by the model's hash, so an interrupted evaluation goes on.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.cache import cache_folder
from bankwise.config import EvaluationPlan, SparsityConfig, dump_plan, load_plan
from bankwise.data import mixed_windows
from bankwise.data.tokenized import tokenizer_fingerprint
from bankwise.errors import ConfigError
from bankwise.evaluation.baselines import BASELINES, apply_baseline
from bankwise.evaluation.comparison import COLUMNS, ColumnScores, compare
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.perplexity import active_fraction
from bankwise.evaluation.reading_cache import ReadingCache, model_fingerprint
from bankwise.evaluation.suites import SuiteResult, benchmarks, cwe, perplexity, routing, ruler
from bankwise.models.cost import token_cost
from bankwise.processes import own_device, use_device
from bankwise.provenance import environment
from bankwise.upcycle import describe_model, load_model

_SUITES: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "benchmarks": benchmarks,
    "ruler": ruler,
    "cwe": cwe,
    "routing": routing,
}
_CALIBRATION_WINDOWS = 8
_SAMPLE = "Active channels are counted on this sentence; all gate modes but one keep the same number for every token."


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str] | None = None,
    *,
    plan: EvaluationPlan | str | Path | dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of one model by suite.

    `plan` is an `EvaluationPlan`, a preset (`ci`, `smoke`, `full`), a YAML file or a dict; `overrides` change its
    fields (`ruler.lengths=[1024]`), `suites` its suites. Each suite gives `{task: {metric: {value, standard_error,
    n}}}` and its details; `perplexity` also loss, perplexity, standard error and n over all sources, and by source.
    With `cache`, readings are kept in that folder and an interrupted call goes on; otherwise in memory for this call.
    """
    plan = _resolved(plan, overrides, suites)
    check_plan(plan, tokenizer, getattr(model.config, "max_position_embeddings", None))
    store = ReadingCache(cache, model_fingerprint(model) if cache else "this model")
    engine = Engine(model, tokenizer, bf16=plan.bf16, batch_tokens=plan.batch_tokens, cache=store, progress=progress)
    scores: dict[str, Any] = {}
    for name in plan.suites:
        result: SuiteResult = _SUITES[name].run(engine, plan)
        scores[name] = _by_task(result, plan.seed)
        if name == "perplexity":
            windows = perplexity.held_out(plan, tokenizer)
            scores[name] |= _loss_summary(scores[name])
            scores[name]["active_fraction"] = active_fraction(model, next(iter(windows.values()))[:1])
    return scores


def evaluate_models(
    models: Mapping[str, str | Path],
    plan: EvaluationPlan,
    *,
    baselines: Sequence[str] = (),
    cache: Path | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """The report dict of several models; keys of `models` are those of `COLUMNS`, values as `load_model` takes them.

    `baselines` are training-free rules applied to the dense model at the sparse model's active fraction. `about` adds
    figures to a column's description, such as its trained tokens.
    """
    tokenizer = check_models(models, plan, baselines)
    use_device(plan.device)
    job = _Job(plan, tokenizer, cache or cache_folder("readings"), say, progress)
    order = [name for name in COLUMNS if name in models]
    columns: list[ColumnScores] = []
    for name in order:
        say(f"{COLUMNS[name]} ({len(columns) + 1} of {len(order) + len(baselines)}): {models[name]}")
        model = _on_device(models[name])
        fingerprint = model_fingerprint(model)
        if name == "dense":
            job.reference = perplexity.DenseReference(fingerprint, lambda: _on_device(models["dense"]))
        own = {"model": str(models[name]), **(about or {}).get(name, {})}
        if name == "dense_narrow" and "dense" in models:
            share = model.config.intermediate_size / describe_model(models["dense"])[0].intermediate_size
            own |= {"active_fraction": share, "ffn_bytes_fraction": share}
        columns.append(job.column(name, model, fingerprint, own))
        del model
    if baselines:
        columns += _baseline_columns(job, models, baselines, columns)
    return compare(columns, _provenance(job, models, baselines, columns), plan.seed)


def _on_device(source: str | Path) -> PreTrainedModel:
    model: Any = load_model(source)[0]
    moved: PreTrainedModel = model.to(own_device())
    return moved


@dataclass
class _Job:
    """What the columns of one evaluation share."""

    plan: EvaluationPlan
    tokenizer: PreTrainedTokenizerBase
    cache: Path
    say: Callable[[str], None]
    progress: bool
    reference: perplexity.DenseReference | None = None
    started: float = field(default_factory=time.time)

    def column(self, name: str, model: PreTrainedModel, fingerprint: str, about: Mapping[str, Any]) -> ColumnScores:
        """Run every suite on one model."""
        started = time.time()
        store = ReadingCache(self.cache, fingerprint)
        engine = Engine(
            model, self.tokenizer, bf16=self.plan.bf16, batch_tokens=self.plan.batch_tokens, cache=store,
            progress=self.progress,
        )  # fmt: skip
        scores = ColumnScores(name=name, about={})
        for suite in self.plan.suites:
            suite_started = time.time()
            result = (
                perplexity.run(engine, self.plan, self.reference)
                if suite == "perplexity"
                else _SUITES[suite].run(engine, self.plan)
            )
            scores.measures += result.measures
            scores.details[suite] = result.details
            self.say(f"  {suite:10} {len(result.measures):4} numbers {time.time() - suite_started:8.1f} s")
        scores.about = {
            "sha256": fingerprint,
            "active_fraction": active_fraction(model, torch.tensor([self.tokenizer(_SAMPLE)["input_ids"]])),
            "ffn_bytes_fraction": token_cost(model.config, dtype_bytes=model.dtype.itemsize).ffn_bytes_fraction,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": round(time.time() - started, 1),
            **about,
        }
        return scores


def _baseline_columns(
    job: _Job, models: Mapping[str, str | Path], baselines: Sequence[str], measured: Sequence[ColumnScores]
) -> list[ColumnScores]:
    """The dense model under each rule, at the active fraction of the sparse column (a quarter where there is none)."""
    dense = _on_device(models["dense"])
    fingerprint = model_fingerprint(dense)
    sparse = next((models[name] for name in ("sparse", "repaired", "untrained") if name in models), None)
    sparsity = SparsityConfig() if sparse is None else SparsityConfig.from_dict(describe_model(sparse)[0].sparsity)
    by_name = {column.name: column.about["active_fraction"] for column in measured}
    fraction = next((by_name[name] for name in ("sparse", "repaired", "untrained") if name in by_name), 0.25)
    plan = job.plan
    calibration = mixed_windows(
        plan.perplexity.data, job.tokenizer, seq_len=plan.perplexity.seq_len, num_windows=_CALIBRATION_WINDOWS,
        split="train", held_out_fraction=plan.perplexity.held_out_fraction, seed=plan.seed,
    )  # fmt: skip
    columns: list[ColumnScores] = []
    for name in baselines:
        job.say(f"{name} ({len(measured) + len(columns) + 1} of {len(measured) + len(baselines)}): {models['dense']}")
        rule = json.dumps([fingerprint, name, fraction, sparsity.bank_size, plan.seed, calibration.tolist()])
        with apply_baseline(
            dense, name, fraction=fraction, bank_size=sparsity.bank_size, calibration=calibration, seed=plan.seed
        ) as applied:
            about = {
                "model": str(models["dense"]),
                "active_fraction": applied.active_fraction,
                "ffn_bytes_fraction": applied.ffn_bytes_fraction,
                "description": applied.description,
            }
            columns.append(job.column(name, dense, hashlib.sha256(rule.encode()).hexdigest(), about))
    return columns


def check_models(
    models: Mapping[str, str | Path], plan: EvaluationPlan, baselines: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The models' common tokenizer, once nothing is wrong with models, plan and baselines; reads no weights."""
    unknown = sorted(set(models) - set(COLUMNS))
    if unknown or not models:
        raise ConfigError(f"columns {unknown or 'are missing'}; name models as {', '.join(COLUMNS)}")
    wrong = [name for name in baselines if name not in BASELINES]
    if wrong:
        raise ConfigError(f"baselines {wrong} are not known; use {', '.join(BASELINES)}")
    if baselines and "dense" not in models:
        raise ConfigError(f"baselines {list(baselines)} are rules on the dense model; name it as the column dense")
    described = {name: describe_model(source) for name, source in models.items()}
    first, tokenizer = next((name, tokenizer) for name, (_, tokenizer) in described.items())
    contexts = []
    for name, (config, other) in described.items():
        if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
            raise ConfigError(
                f"the tokenizer of {name} ({models[name]}) is not that of {first} ({models[first]}); their scores "
                "could not be compared, evaluate them apart"
            )
        if getattr(config, "max_position_embeddings", None) is not None:
            contexts.append(int(config.max_position_embeddings))
    check_plan(plan, tokenizer, min(contexts, default=None))
    return tokenizer


def check_plan(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
    """Raise `ConfigError` with everything that is wrong with the plan, before any work."""
    found = (problem for name in plan.suites for problem in _SUITES[name].check(plan, tokenizer, context))
    problems = list(dict.fromkeys(found))  # two suites may read the same windows
    if problems:
        raise ConfigError("; ".join(problems))
    if {"perplexity", "routing"} & set(plan.suites):
        perplexity.held_out(plan, tokenizer)  # raises where a source is missing or too short


def _resolved(
    plan: EvaluationPlan | str | Path | dict[str, Any] | None, overrides: Sequence[str], suites: Sequence[str] | None
) -> EvaluationPlan:
    extra = [] if suites is None else [f"suites={json.dumps(list(suites))}"]
    if isinstance(plan, EvaluationPlan):
        plan = dataclasses.asdict(plan)
    return load_plan(plan, [*overrides, *extra])


def _by_task(result: SuiteResult, seed: int) -> dict[str, Any]:
    """`{task: {metric: {value, standard_error, n}}}`; length and variant are part of the task's name."""
    tasks: dict[str, Any] = {}
    for measure in result.measures:
        parts = [measure.task, *([] if measure.length is None else [str(measure.length)])]
        name = "/".join([*parts, *([measure.variant] if measure.variant else [])])
        tasks.setdefault(name, {})[measure.metric] = {
            "value": measure.value, "standard_error": measure.standard_error(seed), "n": measure.n
        }  # fmt: skip
    return tasks | ({"details": result.details} if result.details else {})


def _loss_summary(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Loss, perplexity, standard error (of the loss) and n over all sources, and by source."""
    rows = {
        task: {
            "loss": metrics["loss"]["value"],
            "perplexity": metrics["perplexity"]["value"],
            "standard_error": metrics["loss"]["standard_error"],
            "n": metrics["loss"]["n"],
        }
        for task, metrics in tasks.items()
        if "loss" in metrics
    }
    total = rows.pop(perplexity.ALL, None)
    return (total or next(iter(rows.values()))) | {"by_source": rows}


def _provenance(
    job: _Job, models: Mapping[str, str | Path], baselines: Sequence[str], columns: Sequence[ColumnScores]
) -> dict[str, Any]:
    """What another person needs to get the same numbers, beside the models' own hashes."""
    plan, details = job.plan, columns[0].details
    values: dict[str, Any] = {
        "models": {name: str(source) for name, source in models.items()},
        "baselines": list(baselines),
        "tokenizer_sha256": tokenizer_fingerprint(job.tokenizer),
    }
    if {"perplexity", "routing"} & set(plan.suites):
        windows = perplexity.held_out(plan, job.tokenizer)
        values["held_out_windows_sha256"] = {
            source: hashlib.sha256(rows.numpy().tobytes()).hexdigest() for source, rows in windows.items()
        }
    if "ruler" in plan.suites:
        values["ruler"] = details["ruler"]["generator"]
    if tasks := details.get("benchmarks", {}).get("tasks"):
        values["benchmark_files"] = {
            name: {key: task[key] for key in ("file", "sha256", "split", "shots")} for name, task in tasks.items()
        }
    return values | {"plan": dump_plan(plan), **environment(time.time() - job.started)}
