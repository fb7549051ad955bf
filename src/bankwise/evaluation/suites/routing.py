"""The routing suite: how the sparse layers choose their channels, on the windows of the perplexity suite."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from bankwise.config.evaluation import EvaluationPlan
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.measures import Measure
from bankwise.evaluation.routing import routing_statistics
from bankwise.evaluation.suites import SuiteResult, perplexity
from bankwise.ffn import sparse_layers


@dataclass(frozen=True)
class _Figure:
    """A figure of each layer whose mean over layers is a measure."""

    metric: str
    better: Literal["higher", "lower", ""]
    unit: str = "%"
    is_headline: bool = False


_FIGURES = (
    _Figure("recall", "higher", is_headline=True),
    _Figure("retained_energy", "higher", is_headline=True),
    _Figure("usage_entropy", "", unit=""),
    _Figure("dead", "lower"),
    _Figure("always_on", ""),
    # What adjacent tokens share need not be read twice when they are read together.
    _Figure("overlap", "higher"),
    _Figure("union_8", "lower"),
    _Figure("union_32", "lower"),
)


def check(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[str]:
    """What is wrong with the plan's windows, in the words of the perplexity suite, whose windows these are."""
    return perplexity.check(plan, tokenizer, context)


def run(engine: Engine, plan: EvaluationPlan) -> SuiteResult:
    """Means over the layers, and the figures of every layer; nothing for a model without sparse layers."""
    if not sparse_layers(engine.model):
        return SuiteResult()
    windows = perplexity.held_out(plan, engine.tokenizer)
    statistics = routing_statistics(
        engine.model,
        {source: windows_WS[: plan.routing.windows] for source, windows_WS in windows.items()},
        batch_size=max(1, plan.batch_tokens // plan.perplexity.seq_len),
        bf16=plan.bf16,
    )
    return SuiteResult(measures=_measures(statistics["layers"]), details=statistics)


def _measures(layers: list[dict[str, Any]]) -> list[Measure]:
    measures = []
    for figure in _FIGURES:
        name, _, width = figure.metric.partition("union_")
        values = [layer["union"][width] if width else layer[name] for layer in layers]
        if None in values:  # a union of more tokens than a window has
            continue
        measures.append(
            Measure(
                section="routing",
                task="all layers",
                metric=figure.metric,
                items=tuple(f"layer {layer['layer']}" for layer in layers),
                amounts=tuple(values),
                scale=100.0 if figure.unit == "%" else 1.0,
                unit=figure.unit,
                better=figure.better,
                is_headline=figure.is_headline,
                note="mean over the sparse layers",
            )
        )
    return measures
