"""What a scan measures: one number per sample, for the common-words task, a RULER task, or text by position.

A metric's samples are made from a seed; what it measures goes through an engine, so any model can be read, changed or
not. Names: `cwe_nll`, `cwe_auc`, `ruler:TASK`, `perplexity:BUCKET` (buckets of `bankwise.data.positions`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.config.evaluation import Permutation
from bankwise.data import held_out_windows
from bankwise.data.positions import POSITION_BUCKETS
from bankwise.errors import ConfigError
from bankwise.evaluation.cwe import cwe_prompt, measure_rows
from bankwise.evaluation.engine import Prompt
from bankwise.evaluation.perplexity import token_losses
from bankwise.evaluation.ruler import check_task, find_task, generate
from bankwise.evaluation.ruler.score import string_match_all, string_match_part
from bankwise.repair.prefix import PrefixReader

NAMES = "cwe_nll, cwe_auc, ruler:TASK (ruler:vt), perplexity:BUCKET (perplexity:1-4K)"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt or window at one length."""

    name: str
    """Unique within a metric and a seed."""
    length: int
    cluster: str
    """Samples that share a list's layout share this; they are no independent evidence."""
    content: Any
    """A row of a RULER generator, or a window of tokens."""


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Where a metric's samples come from."""

    tokenizer: PreTrainedTokenizerBase
    permutation: Permutation = "per_sample"
    data_dir: str = ""
    data: Sequence[DataSource] = ()
    """Text of the perplexity metric; its held-out split is read."""
    held_out_fraction: float = 0.05


class Metric(ABC):
    """One number per sample."""

    name: str
    better: Literal["lower", "higher"]
    unit: str

    @abstractmethod
    def check(self, source: SampleSource, length: int) -> None:
        """Raise `ConfigError` or `DataError` where no sample of this length can be made; cheap."""

    @abstractmethod
    def samples(self, source: SampleSource, length: int, count: int, seed: int) -> list[Sample]:
        """`count` samples of a length."""

    @abstractmethod
    def values(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        """The number of each sample, for the reader's model as it is now."""

    @abstractmethod
    def smallest_gap(self, reference: float) -> float:
        """How much a model must lose against the reference's mean before a loss is worth a repair."""

    @property
    def sign(self) -> float:
        """1 where more is worse: what a value is multiplied by to become a loss."""
        return 1.0 if self.better == "lower" else -1.0


class _Rows(Metric):
    """Over the rows of a RULER generator."""

    task: str

    def check(self, source: SampleSource, length: int) -> None:
        check_task(self.task, source.tokenizer, max_seq_length=length, data_dir=source.data_dir or None)

    def samples(self, source: SampleSource, length: int, count: int, seed: int) -> list[Sample]:
        rows = generate(
            self.task,
            source.tokenizer,
            max_seq_length=length,
            num_samples=count,
            seed=seed,
            permutation=source.permutation,
            data_dir=source.data_dir or None,
        )
        return [
            Sample(
                name=f"{self.task}/{length}/{source.permutation}/{seed}/{number}",
                length=length,
                cluster=(
                    f"{length}/{row['details']['units']}" if source.permutation == "upstream" else f"{length}/{number}"
                ),
                content=row,
            )
            for number, row in enumerate(rows)
        ]


class CweNll(_Rows):
    """Nats per word token of the right answer."""

    name, task, better, unit = "cwe_nll", "cwe", "lower", "nats"

    def values(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        records = measure_rows(reader, [sample.content for sample in samples])
        return [record.nll.total / record.nll.tokens for record in records]

    def smallest_gap(self, reference: float) -> float:
        return 0.05 * reference


class CweAuc(_Rows):
    """How well the first word of the answer tells common words from the rest."""

    name, task, better, unit = "cwe_auc", "cwe", "higher", ""

    def values(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        return [record.first.auc for record in measure_rows(reader, [sample.content for sample in samples])]

    def smallest_gap(self, reference: float) -> float:
        return 0.05


class RulerScore(_Rows):
    """Official score of a RULER task, in percent; the answer is generated."""

    better, unit = "higher", "%"

    def __init__(self, task: str) -> None:
        self._task = find_task(task)
        self.task, self.name = task, f"ruler:{task}"

    def values(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        rows = [sample.content for sample in samples]
        tokens = self._task.tokens_to_generate
        prompts = [
            cwe_prompt(row, reader.tokenizer, tokens)
            if self._task.family == "common_words_extraction"
            else Prompt(text=row["input"] + row["answer_prefix"], max_new_tokens=tokens)
            for row in rows
        ]
        score = string_match_all if self._task.metric == "all" else string_match_part
        return [
            100 * score(reading.generated, row["outputs"])
            for reading, row in zip(reader.read(prompts), rows, strict=True)
        ]

    def smallest_gap(self, reference: float) -> float:
        return 5.0


class BucketLoss(Metric):
    """Nats per token of held-out text, over the tokens of one position bucket."""

    better, unit = "lower", "nats"

    def __init__(self, bucket: str) -> None:
        if bucket not in POSITION_BUCKETS:
            raise ConfigError(f"perplexity:{bucket} is no position bucket; use one of {', '.join(POSITION_BUCKETS)}")
        self.name = f"perplexity:{bucket}"
        self._first, self._end = POSITION_BUCKETS[bucket]

    def check(self, source: SampleSource, length: int) -> None:
        if length <= self._first + 1:
            raise ConfigError(
                f"{self.name} begins at position {self._first}, which windows of {length} tokens do not reach; "
                f"use lengths above {self._first + 1}"
            )
        if not source.data:
            raise ConfigError(f"{self.name} reads held-out text, but no data source is named; name one, package:pydoc")

    def samples(self, source: SampleSource, length: int, count: int, seed: int) -> list[Sample]:
        windows = held_out_windows(
            source.data,
            source.tokenizer,
            seq_len=length,
            num_windows=max(count, len(source.data)),
            held_out_fraction=source.held_out_fraction,
            seed=seed,
        )
        named = [(f"{name}/{number}", tokens) for name, part in windows.items() for number, tokens in enumerate(part)]
        return [
            Sample(name=f"{name}/{length}/{seed}", length=length, cluster=name, content=tokens)
            for name, tokens in named
        ]

    def values(self, reader: PrefixReader, samples: Sequence[Sample]) -> list[float]:
        windows_WS = torch.stack([sample.content for sample in samples])
        hidden_WSD = reader.window_states(windows_WS)
        first = max(self._first, 1) - 1  # the token at a position is predicted from the one before it
        end = min(self._end, windows_WS.shape[1])
        return [
            token_losses(hidden_SD[first:end], reader.model.lm_head.weight, tokens_S[first:end]).nll_T.mean().item()
            for hidden_SD, tokens_S in zip(hidden_WSD, windows_WS, strict=True)
        ]

    def smallest_gap(self, reference: float) -> float:
        return 0.05  # 5 % of perplexity


def find_metric(name: str) -> Metric:
    """The metric of that name."""
    kind, _, rest = name.partition(":")
    if name == "cwe_nll":
        return CweNll()
    if name == "cwe_auc":
        return CweAuc()
    if kind == "ruler" and rest:
        return RulerScore(rest)
    if kind == "perplexity" and rest:
        return BucketLoss(rest)
    raise ConfigError(f"metric={name!r} is not known; use one of {NAMES}")
