"""`scan`: which layer of a sparse model breaks a metric, and at which lengths.

Every sample is read once; then each layer is changed in turn and the sample is read again from that layer on. Values go
to a file as they come, so an interrupted scan goes on where it stopped.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.config.evaluation import Permutation
from bankwise.data.tokenized import tokenizer_fingerprint
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.reading_cache import model_fingerprint
from bankwise.ffn import SparseSwiGLU
from bankwise.repair.changes import CHANGES, all_dense, check_sparse, find_layer, keep, masked
from bankwise.repair.metrics import Metric, Sample, SampleSource, find_metric
from bankwise.repair.prefix import PrefixReader
from bankwise.repair.scan_result import DAMAGE, Scan

_LEAST_SAMPLES = 4  # two that screen and two that confirm: fewer have no standard error


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metric: str = "cwe_nll",
    lengths: Sequence[int] = (1024, 4096),
    *,
    samples: int = 8,
    layers: Sequence[int] | None = None,
    companion: PreTrainedModel | None = None,
    permutation: Permutation = "per_sample",
    data: Sequence[DataSource] = (),
    data_dir: str = "",
    held_out_fraction: float = 0.05,
    seed: int = 42,
    bf16: bool = False,
    batch_tokens: int = 4096,
    resume: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Scan:
    """What each layer's sparsity does to a metric, by length.

    `metric`: `cwe_nll`, `cwe_auc`, `ruler:TASK` or `perplexity:BUCKET` (which reads the held-out split of `data`).
    `companion`: the dense model that the sparse one is compared with; without one, the sparse model with all channels.
    `resume`: a file to which values are appended and from which those of an interrupted scan are taken.
    The model is left as it was.
    """
    found = find_metric(metric)
    sparse = _chosen_layers(model, layers)
    source = SampleSource(
        tokenizer=tokenizer, permutation=permutation, data_dir=data_dir, data=data, held_out_fraction=held_out_fraction
    )
    lengths = sorted(set(lengths))
    check_lengths(model, found, source, lengths)
    if samples < _LEAST_SAMPLES:
        raise ConfigError(
            f"samples={samples} is too few: half of them choose the layer and half confirm it; use {_LEAST_SAMPLES} or "
            "more"
        )
    _check_companion(model, companion)
    drawn = {length: found.samples(source, length, samples, seed) for length in lengths}
    fingerprint = model_fingerprint(model)
    context = {
        "model": fingerprint,
        "companion": None if companion is None else model_fingerprint(companion),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "metric": metric,
        "bf16": bf16,
    }
    store = _Values(resume, context)
    work = _Work(model, companion, tokenizer, found, sparse, bf16, batch_tokens, store)
    work.run([batch for length in lengths for batch in _batches(drawn[length], batch_tokens)], say or _say_nothing)

    def column(step: str) -> dict[str, list[float]]:
        return {str(length): [store.get(sample, step) for sample in drawn[length]] for length in lengths}

    dense = column("reference")
    numbers = [layer.layer for layer in sparse]
    return Scan(
        fingerprint=fingerprint,
        metric=metric,
        better=found.better,
        unit=found.unit,
        smallest_gap={length: found.smallest_gap(sum(values) / len(values)) for length, values in dense.items()},
        lengths=list(lengths),
        layers=numbers,
        active_per_bank={str(layer.layer): layer.active_per_bank for layer in sparse},
        num_sparse=len(check_sparse(model)),
        bank_size=sparse[0].bank_size,
        samples=samples,
        seed=seed,
        permutation=permutation,
        reference="all layers dense" if companion is None else "companion",
        clusters={str(length): [sample.cluster for sample in drawn[length]] for length in lengths},
        sparse=column("sparse"),
        dense=dense,
        changed={
            change: {str(layer): column(_step(layer, change)) for layer in numbers} for change in (*CHANGES, DAMAGE)
        },
    )


def check_lengths(model: PreTrainedModel, metric: Metric, source: SampleSource, lengths: Sequence[int]) -> None:
    """Raise where a length is no length, does not fit the model or is too small for the metric."""
    context = getattr(model.config, "max_position_embeddings", None)
    if not lengths:
        raise ConfigError("lengths is empty; name at least one, for example 1024")
    for length in lengths:
        if length < 1:
            raise ConfigError(f"lengths holds {length}; lengths are positive token counts")
        if context is not None and length > context:
            raise ConfigError(
                f"lengths holds {length}, longer than the model's context of {context}; use {context} or less"
            )
        metric.check(source, length)


def _chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[SparseSwiGLU]:
    every = check_sparse(model)
    if layers is None:
        return every
    if not layers:
        raise ConfigError("layers is empty; name at least one, or leave it out to scan them all")
    return [find_layer(model, layer) for layer in sorted(set(layers))]


def _check_companion(model: PreTrainedModel, companion: PreTrainedModel | None) -> None:
    if companion is None:
        return
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    shapes = [tuple(getattr(config, name) for name in names) for config in (model.config, companion.config)]
    if shapes[0] != shapes[1] or companion.config.model_type.startswith("bankwise_"):
        raise ConfigError(
            f"the companion ({companion.config.model_type}, {dict(zip(names, shapes[1], strict=True))}) is not the "
            f"dense model of this one ({dict(zip(names, shapes[0], strict=True))}); name its dense companion, or none"
        )


def _batches(samples: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Samples that are read together; all of one length."""
    count = max(1, batch_tokens // samples[0].length)
    return [list(samples[start : start + count]) for start in range(0, len(samples), count)]


def _step(layer: int, change: str) -> str:
    return f"{layer}/{change}"


class _Values:
    """Values by sample and step, in memory and, one line each, in a file."""

    def __init__(self, path: str | Path | None, context: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._run = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()[:16]
        self._values: dict[tuple[str, str], float] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            lines = self._path.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be used to resume ({error.strerror}); choose another file") from error
        for number, line in enumerate(lines[:-1], start=1):
            try:
                run, sample, step, value = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number} is damaged; delete the file to scan again") from error
            if run == self._run:
                self._values[sample, step] = value
        if lines and lines[-1]:
            # A process that was killed while it wrote leaves half a line; what stands before it is whole.
            with self._path.open("rb+") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def has(self, samples: Sequence[Sample], step: str) -> bool:
        return all((sample.name, step) in self._values for sample in samples)

    def get(self, sample: Sample, step: str) -> float:
        return self._values[sample.name, step]

    def put(self, samples: Sequence[Sample], step: str, values: Sequence[float]) -> None:
        rows = [(sample.name, step, value) for sample, value in zip(samples, values, strict=True)]
        self._values |= {(name, step): value for name, step, value in rows}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([self._run, *row]) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


@dataclass
class _Work:
    """Reads batches of samples under every change."""

    model: PreTrainedModel
    companion: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    metric: Metric
    layers: Sequence[SparseSwiGLU]
    bf16: bool
    batch_tokens: int
    values: _Values

    def run(self, batches: Sequence[list[Sample]], say: Callable[[str], None]) -> None:
        todo = [batch for batch in batches if not all(self.values.has(batch, step) for step in self._steps())]
        total = sum(self._cost(batch) for batch in todo)
        say(
            f"scan of {len(self.layers)} layers: {sum(map(len, todo))} of {sum(map(len, batches))} samples to read, "
            f"{len(CHANGES) + 1} changes of each layer"
        )
        # The first reading is slower than all others (caches, code that is compiled on first use), so time counts from
        # its end, and the estimate comes after the first change of the first layer.
        started, cold, done, said = time.monotonic(), 0.0, 0.0, -1
        for number, batch in enumerate(todo, start=1):
            for passes in self._read(batch):
                done += passes * self._pass_cost(batch)
                if not cold:
                    started, cold = time.monotonic(), done
                    continue
                left = (time.monotonic() - started) * (total - done) / (done - cold)
                if said < 0:
                    say(f"estimate: {left / 60:.1f} minutes ({left:.0f} s)")
                percent = int(100 * done / total + 1e-9)
                if percent > said:
                    said = percent
                    say(
                        f"length {batch[0].length}, samples {number} of {len(todo)} batches, {percent:3}%, "
                        f"{left / 60:.1f} minutes left"
                    )

    def _steps(self) -> list[str]:
        changed = [_step(layer.layer, change) for layer in self.layers for change in (*CHANGES, DAMAGE)]
        return ["sparse", "reference", *changed]

    def _pass_cost(self, batch: list[Sample]) -> float:
        """Of one plain reading, in layers and tokens; attention makes long rows dearer than their tokens."""
        length = batch[0].length
        return self.model.config.num_hidden_layers * len(batch) * length * (1 + length / 8192)

    def _cost(self, batch: list[Sample]) -> float:
        """Of all readings of the batch that are not there yet."""
        layers = [layer for layer in self.layers for change in (*CHANGES, DAMAGE) if self._misses(batch, layer, change)]
        return self._pass_cost(batch) * (2 + sum(map(self._passes, layers)))

    def _misses(self, batch: list[Sample], layer: SparseSwiGLU, change: str) -> bool:
        return not self.values.has(batch, _step(layer.layer, change))

    def _passes(self, layer: SparseSwiGLU) -> float:
        """Share of a plain reading that a change of `layer` takes: its feed-forward, half a layer, and all above."""
        depth: int = self.model.config.num_hidden_layers
        return (depth - layer.layer - 0.5) / depth

    def _read(self, batch: list[Sample]) -> Iterator[float]:
        """Yields the work of each reading, in plain ones, as soon as it is done."""
        reader = PrefixReader(self.model, self.tokenizer, bf16=self.bf16, batch_tokens=self.batch_tokens)
        with reader.recording():
            self.values.put(batch, "sparse", self.metric.values(reader, batch))
        yield 1.0
        for layer in self.layers:
            for change, applied in CHANGES.items():
                if self._misses(batch, layer, change):
                    with applied(layer), reader.resuming(layer.layer):
                        self.values.put(batch, _step(layer.layer, change), self.metric.values(reader, batch))
                    yield self._passes(layer)
        del reader
        yield from self._read_reference(batch)

    def _read_reference(self, batch: list[Sample]) -> Iterator[float]:
        model = self.model if self.companion is None else self.companion
        whole: AbstractContextManager[None] = all_dense(model) if self.companion is None else nullcontext()
        reader = PrefixReader(model, self.tokenizer, bf16=self.bf16, batch_tokens=self.batch_tokens)
        own = {layer.layer: layer.active_per_bank for layer in self.layers}
        with whole:
            with reader.recording():
                self.values.put(batch, "reference", self.metric.values(reader, batch))
            yield 1.0
            for layer in self.layers:
                if self._misses(batch, layer, DAMAGE):
                    number = layer.layer
                    damage = keep(layer, own[number]) if self.companion is None else masked(self.companion, layer)
                    with damage, reader.resuming(number):
                        self.values.put(batch, _step(number, DAMAGE), self.metric.values(reader, batch))
                    yield self._passes(layer)


def _say_nothing(text: str) -> None:
    pass
