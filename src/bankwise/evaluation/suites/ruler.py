"""Suite `ruler`: official and strict scores of the generated tasks by length and layout, and their summaries.

Rows are made anew for each model, which takes seconds; what a model makes of them is kept by the engine's cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bankwise.config.evaluation import EvaluationPlan, RulerPlan
from bankwise.errors import BankwiseError
from bankwise.evaluation.cwe.prompts import cwe_prompt
from bankwise.evaluation.engine import Engine, Prompt
from bankwise.evaluation.measures import NOT_COMPATIBLE, Measure
from bankwise.evaluation.ruler import TASKS, RulerTask, check_task, find_task, generate, resolve_template
from bankwise.evaluation.ruler.prompts import REVISION
from bankwise.evaluation.ruler.score import (
    effective_length,
    exact,
    is_null,
    length_score,
    string_match_all,
    string_match_part,
    weighted_average,
)
from bankwise.evaluation.ruler.words import WONDERWORDS_VERSION
from bankwise.evaluation.suites import SuiteResult


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """The answers of one task at one length in one layout."""

    task: RulerTask
    length: int
    permutation: str
    items: tuple[str, ...]
    scores: tuple[float, ...]
    exact: tuple[float, ...]
    nulls: tuple[float, ...]
    truncated: int
    """Prompts that a special token of the tokenizer made too long for the model's context."""

    @property
    def score(self) -> float:
        """The task's score in percent."""
        return 100 * sum(self.scores) / len(self.scores)


def check(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[str]:
    """What is wrong with the plan, one line each: names, data, windows too small for a task or too large for the model.

    Cheap: of each task the smallest prompt is made.
    """
    ruler = plan.ruler
    problems = [
        f"ruler.{name} is empty; name at least one, or leave the suite out"
        for name in ("tasks", "lengths", "permutation")
        if not getattr(ruler, name)
    ]
    if context is not None:
        problems += [
            f"ruler.lengths holds {length}, which is longer than the model's context of {context}; "
            f"use {context} or less"
            for length in ruler.lengths
            if length > context
        ]
    try:
        template = resolve_template(ruler.template, tokenizer)
    except BankwiseError as error:
        return [*problems, str(error)]
    for name in dict.fromkeys(ruler.tasks):
        for length in _checked_lengths(name, ruler):
            try:
                check_task(
                    name,
                    tokenizer,
                    max_seq_length=length,
                    num_samples=ruler.samples,
                    data_dir=ruler.data_dir,
                    model_template=template,
                )
            except BankwiseError as error:
                problems.append(str(error))
    return list(dict.fromkeys(problems))


def _checked_lengths(name: str, ruler: RulerPlan) -> Iterable[int]:
    """The shortest for a task over a text, which is slow to read: its smallest prompt does not depend on the length."""
    lengths = sorted(set(ruler.lengths))
    return lengths[:1] if name not in TASKS or TASKS[name].source else lengths


def run(engine: Engine, plan: EvaluationPlan) -> SuiteResult:
    """Measures of every task, length and layout, and their summaries."""
    ruler = plan.ruler
    template = resolve_template(ruler.template, engine.tokenizer)
    cells = [
        _read_cell(engine, ruler, find_task(name), length, permutation, template)
        for permutation in dict.fromkeys(ruler.permutation)
        for length in sorted(set(ruler.lengths))
        for name in dict.fromkeys(ruler.tasks)
    ]
    details = _summaries(cells) | {
        "generator": {
            "revision": REVISION,
            "wonderwords": WONDERWORDS_VERSION,
            "seed": ruler.seed,
            "samples": ruler.samples,
            "template": template,
            "lead_tokens": engine.tokenizer.convert_ids_to_tokens(engine.lead_ids),
        },
        "truncated": sum(cell.truncated for cell in cells),
    }
    return SuiteResult(measures=[measure for cell in cells for measure in _measures(cell)], details=details)


def _read_cell(
    engine: Engine, ruler: RulerPlan, task: RulerTask, length: int, permutation: Any, template: str
) -> _Cell:
    rows = generate(
        task.name,
        engine.tokenizer,
        max_seq_length=length,
        num_samples=ruler.samples,
        seed=ruler.seed,
        permutation=permutation,
        data_dir=ruler.data_dir,
        model_template=template,
    )
    prompts = [_prompt(task, row, engine.tokenizer) for row in rows]
    readings = engine.read(prompts, label=f"{task.name} {length}")
    score = string_match_all if task.metric == "all" else string_match_part
    answers = [(reading.generated, row["outputs"]) for reading, row in zip(readings, rows, strict=True)]
    return _Cell(
        task=task,
        length=length,
        permutation=permutation,
        items=tuple(f"{task.name}/{length}/{permutation}/{ruler.seed}/{row['details']['row']}" for row in rows),
        scores=tuple(score(*answer) for answer in answers),
        exact=tuple(exact(*answer) for answer in answers),
        nulls=tuple(float(is_null(text)) for text, _ in answers),
        truncated=sum(reading.truncated for reading in readings),
    )


def _prompt(task: RulerTask, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if task.family == "common_words_extraction":
        # The prompt of the cwe suite, so that both read the row once.
        return cwe_prompt(row, tokenizer, task.tokens_to_generate)
    return Prompt(text=row["input"] + row["answer_prefix"], max_new_tokens=task.tokens_to_generate)


def _measures(cell: _Cell) -> list[Measure]:
    shared: dict[str, Any] = {
        "section": "ruler",
        "task": cell.task.name,
        "items": cell.items,
        "scale": 100.0,
        "unit": "%",
        "length": cell.length,
        "variant": cell.permutation,
        "note": "" if cell.task.ruler_compatible else NOT_COMPATIBLE,
    }
    return [
        Measure(metric="score", amounts=cell.scores, is_headline=True, recovery="ratio", **shared),
        Measure(metric="exact", amounts=cell.exact, recovery="ratio", **shared),
        Measure(metric="nulls", amounts=cell.nulls, better="lower", **shared),
    ]


def _summaries(cells: list[_Cell]) -> dict[str, Any]:
    """Means over tasks by length and layout, substitutes apart; over lengths, of RULER's own tasks alone."""
    groups: dict[tuple[str, bool, int], list[_Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.permutation, cell.task.ruler_compatible, cell.length), []).append(cell)
    summary: list[dict[str, Any]] = []
    by_length: dict[str, dict[int, float]] = {}
    for (permutation, is_compatible, length), members in groups.items():
        mean, label = length_score({cell.task.name: cell.score for cell in members})
        nulls = [null for cell in members for null in cell.nulls]
        summary.append(
            {
                "length": length,
                "permutation": permutation,
                "mean": mean,
                "label": label,
                "tasks": [cell.task.name for cell in members],
                "nulls": f"{int(sum(nulls))}/{len(nulls)}",
                "compatible": is_compatible,
            }
        )
        if is_compatible:
            by_length.setdefault(permutation, {})[length] = mean
    return {
        "summary": summary,
        "effective_length": {permutation: effective_length(means) for permutation, means in by_length.items()},
        "weighted": {
            permutation: {
                "increasing": weighted_average(means, increasing=True),
                "decreasing": weighted_average(means, increasing=False),
            }
            for permutation, means in by_length.items()
        },
    }
