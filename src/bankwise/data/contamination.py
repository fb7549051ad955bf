"""How much of an evaluation stands in the training text, by runs of 13 words.

A run is 13 successive words, without case and punctuation, known by a 64-bit hash. Texts of fewer words have no run and
are only counted. Shapes: W words, N runs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bankwise.data.documents import Document

RUN = 13  # words, as in the published overlap counts
CONTAINED = 0.8  # share of a text's runs from which it counts as contained

Hashes = NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0


@dataclass(frozen=True)
class EvaluationSet:
    """Texts that a model is measured on."""

    name: str
    texts: Sequence[str]
    is_held_out: bool = False
    """Documents that no training text may contain; of other sets the overlap is only counted."""


@dataclass(frozen=True)
class Overlap:
    """What one training source and one evaluation set have in common."""

    source: str
    evaluation: str
    runs: int
    """Distinct runs of 13 words that are in both."""
    training_documents: int
    """Training documents with such a run."""
    evaluation_texts: int
    """Evaluation texts with such a run."""
    contained: int
    """Evaluation texts of which at least 80% of the runs are in the training text."""
    of_evaluation_texts: int
    """Texts of the evaluation that are long enough to have a run."""
    is_held_out: bool

    @property
    def is_leak(self) -> bool:
        """Whether a text that is never trained on is in the training text."""
        return self.is_held_out and self.contained > 0


class RunCounter:
    """Turns texts into the hashes of their runs; every text that is compared must go through the same one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._values_W = np.empty(0, np.uint64)
        self._random = np.random.default_rng(0)

    def runs(self, texts: Iterable[str]) -> tuple[Hashes, NDArray[np.int64]]:
        """Hashes [N] of all runs, and the number [N] of the text that each is in."""
        hashes, owners = [], []
        for number, text in enumerate(texts):
            own_N = self._runs(text)
            hashes.append(own_N)
            owners.append(np.full(len(own_N), number))
        if not hashes:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        return np.concatenate(hashes), np.concatenate(owners)

    def _runs(self, text: str) -> Hashes:
        numbers = self._numbers
        ids_W = [numbers.setdefault(word, len(numbers)) for word in _WORD.findall(text.lower())]
        if len(ids_W) < RUN:
            return np.empty(0, np.uint64)
        if len(numbers) > len(self._values_W):
            more = self._random.integers(0, 1 << 64, len(numbers) * 2 - len(self._values_W), np.uint64)
            self._values_W = np.concatenate([self._values_W, more])
        values_W = self._values_W[np.array(ids_W)]
        hashes_N = np.zeros(len(values_W) - RUN + 1, np.uint64)
        for place in range(RUN):
            hashes_N = hashes_N * _BASE + values_W[place : place + len(hashes_N)]  # modulo 2^64
        return hashes_N


def overlaps(training: Mapping[str, Sequence[Document]], evaluations: Sequence[EvaluationSet]) -> list[Overlap]:
    """Every pair of a training source (by name) and an evaluation set, in their order."""
    counter = RunCounter()
    sets = [(evaluation, *counter.runs(evaluation.texts)) for evaluation in evaluations]
    found = []
    for name, documents in training.items():
        runs_N, owners_N = counter.runs(document.text for document in documents)
        distinct = np.unique(runs_N)
        for evaluation, wanted_N, texts_N in sets:
            is_hit_N = _is_in(wanted_N, distinct)
            shared = np.unique(wanted_N[is_hit_N])
            num_runs = np.bincount(texts_N, minlength=len(evaluation.texts))
            num_hits = np.bincount(texts_N[is_hit_N], minlength=len(evaluation.texts))
            found.append(
                Overlap(
                    source=name,
                    evaluation=evaluation.name,
                    runs=len(shared),
                    training_documents=len(np.unique(owners_N[_is_in(runs_N, shared)])) if len(shared) else 0,
                    evaluation_texts=int((num_hits > 0).sum()),
                    contained=int(((num_runs > 0) & (num_hits >= CONTAINED * num_runs)).sum()),
                    of_evaluation_texts=int((num_runs > 0).sum()),
                    is_held_out=evaluation.is_held_out,
                )
            )
    return found


def _is_in(values_N: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Which values are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(values_N), np.bool_)
    places_N = np.minimum(np.searchsorted(ordered, values_N), len(ordered) - 1)
    return ordered[places_N] == values_N
