"""Suite `perplexity`: loss, perplexity, bits per byte by source and by position, and the distance to the dense model.

Shapes: W windows, S tokens of a window, T = S - 1 predicted tokens, D hidden, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config.evaluation import EvaluationPlan
from bankwise.data import document_windows, held_out_windows
from bankwise.data.positions import buckets_below
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.measures import Measure
from bankwise.evaluation.perplexity import Reference, token_losses, window_states
from bankwise.evaluation.suites import SuiteResult
from bankwise.precision import bf16_autocast

SECTION = "perplexity"
ALL = "all sources"


@dataclass
class DenseReference:
    """The dense model's predictions on the windows, kept as hidden states once somebody needs them."""

    fingerprint: str
    load: Callable[[], PreTrainedModel]
    """Loads the dense model; called only where its states were not kept while it was measured itself."""
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    head_VD: Tensor | None = None

    def on(self, windows: dict[str, Tensor], engine: Engine) -> Reference:
        """The reference on these windows."""
        missing = [source for source in windows if source not in self.states]
        if missing:
            model = self.load()
            for source in missing:
                self.keep(model, source, [hidden_SD for _, hidden_SD in _states(model, windows[source], engine)])
        assert self.head_VD is not None
        return Reference(self.states, self.head_VD)

    def keep(self, model: PreTrainedModel, source: str, hidden: list[Tensor]) -> None:
        self.states[source] = [hidden_SD.cpu() for hidden_SD in hidden]
        self.head_VD = model.lm_head.weight.detach()


def held_out(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The suite's windows [n, seq_len] by source; the routing suite reads the same ones."""
    settings = plan.perplexity
    windows_of = document_windows if settings.within_documents else held_out_windows
    return windows_of(
        settings.data,
        tokenizer,
        seq_len=settings.seq_len,
        num_windows=settings.windows,
        held_out_fraction=settings.held_out_fraction,
        seed=plan.seed,
    )


def check(plan: EvaluationPlan, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[str]:
    """What is wrong with the plan's windows; missing sources are found when they are read, before any model is."""
    length = plan.perplexity.seq_len
    if context is not None and length > context:
        return [f"perplexity.seq_len={length} is longer than the model's context of {context}; use {context} or less"]
    return []


def run(engine: Engine, plan: EvaluationPlan, reference: DenseReference | None = None) -> SuiteResult:
    """Measures of every source and of all together. `reference` adds the divergence from the dense model."""
    windows = held_out(plan, engine.tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {}
    for source, windows_WS in windows.items():
        rows[source] = _window_rows(engine, source, windows, reference if plan.perplexity.kl_to_dense else None)
        for row, tokens_S in zip(rows[source], windows_WS, strict=True):
            text = engine.tokenizer.decode(tokens_S[1:], skip_special_tokens=True)
            row["bytes"] = len(str(text).encode("utf-8", "replace"))
    measures = []
    for source in rows:
        measures += _measures(source, {source: rows[source]})
    if len(rows) > 1:
        measures += _measures(ALL, rows)
    return SuiteResult(measures=measures)


def _window_rows(
    engine: Engine, source: str, windows: dict[str, Tensor], reference: DenseReference | None
) -> list[dict[str, Any]]:
    """Of each window: tokens and summed loss by position bucket, summed KL and agreement. Read once per model."""
    windows_WS = windows[source]
    keys = [
        {
            "window": hashlib.sha256(tokens_S.numpy().tobytes()).hexdigest(),
            "reference": None if reference is None else reference.fingerprint,
        }
        | engine.settings
        for tokens_S in windows_WS
    ]
    cache = engine.cache
    if cache is not None:
        stored = [cache.get(cache.key(key)) for key in keys]
        if all(row is not None for row in stored):
            return [dict(row) for row in stored if row is not None]
    is_dense = cache is not None and reference is not None and cache.fingerprint == reference.fingerprint
    other = None if reference is None or is_dense else reference.on(windows, engine)
    rows, states = [], []
    for index, (tokens_S, hidden_SD) in enumerate(_states(engine.model, windows_WS, engine, label=source)):
        compared = (hidden_SD, engine.model.lm_head.weight) if is_dense else None
        if other is not None:
            compared = (other.hidden[source][index], other.head_VD)
        with bf16_autocast(engine.device, enabled=engine.bf16):
            losses = token_losses(hidden_SD, engine.model.lm_head.weight, tokens_S, compared)
        buckets = {
            name: [end - max(first, 1), losses.nll_T[max(first, 1) - 1 : end - 1].sum().item()]
            for name, (first, end) in buckets_below(tokens_S.numel()).items()
        }
        rows.append(
            {
                "buckets": buckets,
                "kl": None if losses.kl_T is None else losses.kl_T.sum().item(),
                "agrees": None if losses.agrees_T is None else int(losses.agrees_T.sum()),
            }
        )
        if is_dense:
            states.append(hidden_SD)
    if is_dense and reference is not None:
        reference.keep(engine.model, source, states)
    if cache is not None:
        cache.put({cache.key(key): row for key, row in zip(keys, rows, strict=True)})
    return [dict(row) for row in rows]


def _states(model: PreTrainedModel, windows_WS: Tensor, engine: Engine, label: str | None = None) -> Any:
    batch_size = max(1, engine.batch_tokens // windows_WS.shape[1])
    progress = label if engine.progress else None
    return window_states(model, windows_WS, batch_size=batch_size, bf16=engine.bf16, progress=progress)


def _measures(task: str, rows: dict[str, list[dict[str, Any]]]) -> list[Measure]:
    flat = [(f"{source}/{index}", row) for source, part in rows.items() for index, row in enumerate(part)]
    items = tuple(item for item, _ in flat)
    tokens = tuple(float(sum(count for count, _ in row["buckets"].values())) for _, row in flat)
    nll = tuple(sum(total for _, total in row["buckets"].values()) for _, row in flat)
    common: dict[str, Any] = {"section": SECTION, "task": task, "items": items}
    measures = [
        Measure(**common, metric="perplexity", amounts=nll, weights=tokens, form="exp", better="lower",
                recovery="inverse", is_headline=True),
        Measure(**common, metric="loss", amounts=nll, weights=tokens, unit="nats", better="lower"),
        Measure(**common, metric="bits_per_byte", amounts=tuple(value / math.log(2) for value in nll),
                weights=tuple(float(max(1, row["bytes"])) for _, row in flat), unit="bits/byte", better="lower",
                recovery="inverse"),
    ]  # fmt: skip
    if all(row["kl"] is not None for _, row in flat):
        measures += [
            Measure(**common, metric="kl_to_dense", amounts=tuple(row["kl"] for _, row in flat), weights=tokens,
                    unit="nats", better="lower"),
            Measure(**common, metric="top_token_agreement", amounts=tuple(float(row["agrees"]) for _, row in flat),
                    weights=tokens, scale=100, unit="%"),
        ]  # fmt: skip
    buckets = list(flat[0][1]["buckets"])
    for name in buckets if len(buckets) > 1 else []:
        parts = [row["buckets"][name] for _, row in flat]
        counts, sums = tuple(float(count) for count, _ in parts), tuple(total for _, total in parts)
        measures.append(
            Measure(**common, metric="perplexity", amounts=sums, weights=counts, form="exp", better="lower",
                    recovery="inverse", variant=name)
        )  # fmt: skip
    return measures
