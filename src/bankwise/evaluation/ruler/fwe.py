"""Frequent words: coded words counted by a Zipf law; the most frequent one is dots, the next three are asked."""

import math
import string
from collections.abc import Callable

from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.catalogue import RulerTask
from bankwise.evaluation.ruler.family import Draft, Family, LengthSearch, Sample, Streams, Window

_WORD_LETTERS = 6
_TOKENS_PER_WORD = 50  # the vocabulary holds one coded word for as many tokens
_STEPS = 32
_ZETA_2 = math.pi**2 / 6  # the sum of the law's shares at alpha 2


class FrequentWords(Family):
    """The task `fwe`. Its texts fill the window less the answer; sizes move by a 32nd of that."""

    unit = "words"

    def __init__(self, task: RulerTask, window: Window, template: str, count: Callable[[str], int]) -> None:
        self._room = window.budget - window.new_tokens
        super().__init__(window, template, count, increment=self._room // _STEPS)
        self.vocabulary_size = self._room // _TOKENS_PER_WORD
        self._alpha = float(task.arguments["alpha"])
        if self.vocabulary_size < 2:
            raise ConfigError(
                f"fwe does not fit a window of {window.max_seq_length} tokens: it has room for "
                f"{max(0, self.vocabulary_size)} coded words, and the answer needs at least one besides the dots; "
                "use a longer window"
            )

    def search(self, streams: Streams) -> LengthSearch:
        """From a start that is too short upwards; the vocabulary is thrown away."""
        vocabulary = self._vocabulary(streams)
        units = self._room // _WORD_LETTERS
        trace = [(units, self.count(self._text(vocabulary, units, streams)))]
        while trace[-1][1] < self._room:
            units += self.increment
            trace.append((units, self.count(self._text(vocabulary, units, streams))))
        return LengthSearch(units=units - self.increment, trace=trace)

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        vocabulary = self._vocabulary(streams)
        return Draft(text=self._text(vocabulary, units, streams), outputs=vocabulary[1:4])

    def sample(self, units: int, streams: Streams, row: int) -> Sample:
        """Smaller and smaller texts over the same vocabulary, until one fits."""
        vocabulary = self._vocabulary(streams)
        while True:
            text = self._text(vocabulary, units, streams)
            tokens = self.count(text)
            if tokens <= self._room:
                return Sample(draft=Draft(text=text, outputs=vocabulary[1:4]), tokens=tokens, units=units)
            if units <= self.increment:
                raise self.too_small(units, tokens)
            units -= self.increment

    def _vocabulary(self, streams: Streams) -> list[str]:
        """Coded words by rank."""
        words = [self._word(streams) for _ in range(self.vocabulary_size)]
        while len(set(words)) < self.vocabulary_size:
            words.append(self._word(streams))
        ranked = sorted(set(words))
        streams.fresh().shuffle(ranked)
        ranked[0] = "..."
        return ranked

    def _word(self, streams: Streams) -> str:
        return "".join(streams.main.choices(string.ascii_lowercase, k=_WORD_LETTERS))

    def _text(self, vocabulary: list[str], units: int, streams: Streams) -> str:
        words = [
            word
            for rank, word in enumerate(vocabulary, start=1)
            for _ in range(int(units * rank**-self._alpha / _ZETA_2))
        ]
        streams.fresh().shuffle(words)
        return self.template.format(context=" ".join(words))
