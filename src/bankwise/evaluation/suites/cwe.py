"""Suite `cwe`: what the answer to the common-words task costs a model, by window size, and the CWE-lite presets.

The official rows are those of the RULER suite, under its template and data folder. Where the RULER suite reads a row
too, the prompt is the same, so the reading comes from the cache and brings the generated answer along: then there are
error classes. Otherwise nothing is generated for the official rows; CWE-lite always generates.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from bankwise.config.evaluation import EvaluationPlan, Permutation
from bankwise.errors import BankwiseError
from bankwise.evaluation.cwe import ANSWER_CLASSES, ITEM_CLASSES, LITE_PRESETS, RowRecord, lite, measure_rows
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.measures import NOT_COMPATIBLE, Measure
from bankwise.evaluation.ruler import check_task, find_task, generate, resolve_template
from bankwise.evaluation.ruler.score import exact, string_match_all
from bankwise.evaluation.suites import SuiteResult

SECTION = "cwe"
TASK = "cwe"


@dataclass(frozen=True)
class _Cell:
    """The rows of one task, length and permutation, with what the model made of them."""

    task: str
    length: int | None
    permutation: Permutation
    seed: int
    rows: Sequence[dict[str, Any]]
    records: Sequence[RowRecord]
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.task if self.length is None else self.length}/{self.permutation}"

    def measure(
        self, metric: str, amounts: Iterable[float], weights: Iterable[float] | None = None, **about: Any
    ) -> Measure:
        """One amount, and one weight, per row."""
        place = [self.task, *([] if self.length is None else [str(self.length)]), self.permutation, str(self.seed)]
        cut = sum(record.truncated for record in self.records)
        notes = [self.note, f"{cut} of {len(self.records)} lists cut to fit the context" if cut else ""]
        return Measure(
            section=SECTION,
            task=self.task,
            metric=metric,
            items=tuple("/".join([*place, str(row)]) for row in range(len(self.records))),
            amounts=tuple(amounts),
            weights=None if weights is None else tuple(weights),
            length=self.length,
            variant=self.permutation,
            note="; ".join(filter(None, notes)),
            **about,
        )


def check(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[str]:
    """What is wrong with the plan's windows, presets, template and tokenizer, one line each.

    Cheap: of each window the smallest prompt is made, and of each preset, which is short, the rows themselves.
    """
    settings, problems = plan.cwe, []
    if not settings.lengths and not settings.lite:
        problems.append(f"cwe has neither lengths nor lite presets; name a length, or one of {', '.join(LITE_PRESETS)}")
    if settings.lengths and not settings.permutation:
        problems.append(f"cwe.permutation is empty; use {' or '.join(get_args(Permutation))}")
    if not tokenizer.is_fast:
        problems.append(
            f"cwe needs a fast tokenizer (one with a tokenizer.json), to tell words from numbering; "
            f"{type(tokenizer).__name__} is none"
        )
    try:
        template = resolve_template(plan.ruler.template, tokenizer)
    except BankwiseError as error:
        return [*problems, str(error)]
    for length in dict.fromkeys(settings.lengths):
        if context is not None and length > context:
            problems.append(
                f"cwe.lengths holds {length}, longer than the model's context of {context}; use {context} or less"
            )
            continue
        try:
            check_task(TASK, tokenizer, max_seq_length=length, data_dir=plan.ruler.data_dir, model_template=template)
        except BankwiseError as error:
            problems.append(str(error))
    for preset in dict.fromkeys(settings.lite):
        try:
            longest = max(row["length"] for row in lite.generate(preset, tokenizer, **_draw(plan, template)))
        except BankwiseError as error:
            problems.append(str(error))
            continue
        if context is not None and longest > context:
            problems.append(
                f"{preset} needs {longest} tokens, more than the model's context of {context}; use a smaller preset"
            )
    return list(dict.fromkeys(problems))


def run(engine: Engine, plan: EvaluationPlan) -> SuiteResult:
    """Measures of every length, permutation and lite preset."""
    measures: list[Measure] = []
    answers: dict[str, Any] = {}
    for cell in _cells(engine, plan):
        measures += _lite_measures(cell) if cell.length is None else _official_measures(cell)
        if all(record.answer is not None for record in cell.records):
            answers[cell.name] = _answer_shares(cell)
    return SuiteResult(measures=measures, details={"answers": answers})


def _cells(engine: Engine, plan: EvaluationPlan) -> Iterator[_Cell]:
    settings, tokenizer = plan.cwe, engine.tokenizer
    drawn = _draw(plan, resolve_template(plan.ruler.template, tokenizer))
    for length in dict.fromkeys(settings.lengths):
        for permutation in dict.fromkeys(settings.permutation):
            rows = generate(
                TASK,
                tokenizer,
                max_seq_length=length,
                permutation=permutation,
                data_dir=plan.ruler.data_dir,
                **drawn,
            )
            new_tokens = find_task(TASK).tokens_to_generate if _is_in_ruler(plan, length, permutation) else 0
            records = measure_rows(engine, rows, new_tokens, label=f"cwe {length}")
            yield _Cell(TASK, length, permutation, settings.seed, rows, records)
    for preset in dict.fromkeys(settings.lite):
        rows = lite.generate(preset, tokenizer, **drawn)
        records = measure_rows(engine, rows, LITE_PRESETS[preset].tokens_to_generate, label=preset)
        yield _Cell(preset, None, "per_sample", settings.seed, rows, records, NOT_COMPATIBLE)


def _draw(plan: EvaluationPlan, template: str) -> dict[str, Any]:
    """What the official rows and those of the presets are drawn with."""
    return {"num_samples": plan.cwe.samples, "seed": plan.cwe.seed, "model_template": template}


def _is_in_ruler(plan: EvaluationPlan, length: int, permutation: Permutation) -> bool:
    """Whether the RULER suite reads these very rows."""
    return (
        "ruler" in plan.suites
        and TASK in plan.ruler.tasks
        and length in plan.ruler.lengths
        and permutation in plan.ruler.permutation
        and plan.ruler.seed == plan.cwe.seed
        and plan.ruler.samples >= plan.cwe.samples
    )


def _official_measures(cell: _Cell) -> list[Measure]:
    nlls = [record.nll for record in cell.records]
    firsts = [record.first for record in cell.records]
    return [
        *_likelihood_measures(cell, nll_is_headline=True),
        cell.measure(
            "nll_first_item",
            (nll.first_total for nll in nlls),
            (nll.first_tokens for nll in nlls),
            unit="nats",
            better="lower",
        ),
        cell.measure("top10_hits", (first.top_hits for first in firsts)),
        cell.measure("mass_common", (first.mass_common for first in firsts)),
        cell.measure("mass_uncommon", (first.mass_uncommon for first in firsts), better="lower"),
    ]


def _lite_measures(cell: _Cell) -> list[Measure]:
    """Generation first: these presets are for models whose official score is at the floor."""
    sizes = LITE_PRESETS[cell.task]
    answers = [(record.prediction, row["outputs"]) for record, row in zip(cell.records, cell.rows, strict=True)]
    shown: dict[str, Any] = {
        "scale": 100.0,
        "unit": "%",
        "recovery": "ratio",
        "chance": 100 * sizes.common / sizes.words,
    }
    return [
        cell.measure("score", (string_match_all(*answer) for answer in answers), is_headline=True, **shown),
        cell.measure("exact", (exact(*answer) for answer in answers), **shown),
        *_likelihood_measures(cell, nll_is_headline=False),
    ]


def _likelihood_measures(cell: _Cell, *, nll_is_headline: bool) -> list[Measure]:
    """NLL in nats per word token, and AUC."""
    return [
        cell.measure(
            "nll",
            (record.nll.total for record in cell.records),
            (record.nll.tokens for record in cell.records),
            unit="nats",
            better="lower",
            is_headline=nll_is_headline,
        ),
        cell.measure("auc", (record.first.auc for record in cell.records), chance=0.5),
    ]


def _answer_shares(cell: _Cell) -> dict[str, Any]:
    """Shares of the classes of items and answers, and of the references that only the substring rule credits."""
    answers = [record.answer for record in cell.records if record.answer is not None]
    items = Counter(kind for answer in answers for kind in answer.item_classes)
    kinds = Counter(answer.answer_class for answer in answers)
    num_references = sum(len(row["outputs"]) for row in cell.rows)
    return {
        "item_classes": {name: items[name] / max(1, items.total()) for name in ITEM_CLASSES},
        "answer_classes": {name: kinds[name] / len(answers) for name in ANSWER_CLASSES},
        "substring_only": sum(answer.substring_only for answer in answers) / num_references,
        "n": len(answers),
    }
