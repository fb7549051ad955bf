"""Measurement of dense and sparse models."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource, EvalConfig
from bankwise.data import held_out_windows
from bankwise.errors import ConfigError
from bankwise.evaluation.perplexity import LossResult, active_fraction, perplexity, window_losses

SUITES = ("perplexity",)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str] = SUITES,
    *,
    data: Sequence[DataSource] = (DataSource(path="package:pydoc"),),
    windows: int = 24,
    seq_len: int = 512,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    batch_size: int = 4,
    bf16: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores by suite. `perplexity`: loss, perplexity, standard error and n, for all sources and for each.

    Windows come from the held-out split of each source: the same `held_out_fraction` as in training keeps them unseen.
    """
    EvalConfig(windows=windows, seq_len=seq_len, batch_size=batch_size)  # refuses impossible sizes
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        raise ConfigError(f"unknown suites {unknown}; this version measures {', '.join(SUITES)}")
    tokens = held_out_windows(
        list(data),
        tokenizer,
        seq_len=seq_len,
        num_windows=windows,
        held_out_fraction=held_out_fraction,
        seed=seed,
    )
    result = perplexity(
        model, tokens, batch_size=batch_size, bf16=bf16, progress="perplexity" if progress else None
    ).to_dict()
    result["active_fraction"] = active_fraction(model, next(iter(tokens.values()))[:1])
    return {"perplexity": result}


__all__ = ["SUITES", "LossResult", "active_fraction", "evaluate", "perplexity", "window_losses"]
