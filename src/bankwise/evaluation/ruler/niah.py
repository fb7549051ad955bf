"""Needles in a haystack: keys with magic values, hidden in repeated noise, in an essay, or among other needles."""

import uuid
from collections.abc import Callable, Sequence

import numpy as np

from bankwise.evaluation.ruler.catalogue import RulerTask
from bankwise.evaluation.ruler.family import Draft, Family, Streams, Window
from bankwise.evaluation.ruler.prompts import NEEDLE, NOISE
from bankwise.evaluation.ruler.texts import sentence_splitter
from bankwise.evaluation.ruler.words import adjective_nouns

_DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


class Needles(Family):
    """The tasks `niah_*`."""

    def __init__(
        self,
        task: RulerTask,
        window: Window,
        template: str,
        count: Callable[[str], int],
        *,
        haystack_words: Sequence[str],
    ) -> None:
        self._haystack = str(task.arguments["type_haystack"])
        is_essay = self._haystack == "essay"
        self.unit = "words" if is_essay else "sentences"
        super().__init__(window, template, count, increment=500 if is_essay else 5 if window.is_short else 25)
        self._key_type = str(task.arguments["type_needle_k"])
        self._value_type = str(task.arguments["type_needle_v"])
        self._num_queries = int(task.arguments["num_needle_q"])
        self._num_keys = max(int(task.arguments["num_needle_k"]), self._num_queries)
        self._num_values = int(task.arguments["num_needle_v"])
        self._asked_type = self._value_type
        if self._num_queries * self._num_values == 1:
            # Over the whole text: words of a model template are rewritten too, as upstream does.
            for plural, singular in _SINGULAR:
                self.template = self.template.replace(plural, singular)
            self._asked_type = self._value_type[:-1]
        self._haystack_words = haystack_words
        self._split_sentences = sentence_splitter() if is_essay else None
        self._sentences: dict[int, list[str]] = {}

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        keys, values, needles = [], [], []
        for _ in range(self._num_keys):
            key = self._draw(self._key_type, streams)
            own = [self._draw(self._value_type, streams) for _ in range(self._num_values)]
            keys.append(key)
            values.append(own)
            needles += [self._needle(key, value) for value in own]
        streams.fresh().shuffle(needles)
        context = self._context(units, needles, streams)
        asked = streams.main.sample(range(self._num_keys), self._num_queries)
        names = [keys[place] for place in asked]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        text = self.template.format(type_needle_v=self._asked_type, context=context, query=query)
        return Draft(text=text, outputs=[value for place in asked for value in values[place]])

    def _context(self, units: int, needles: list[str], streams: Streams) -> str:
        if self._haystack == "essay":
            return self._essay_context(units, needles, streams)
        if self._haystack == "noise":
            sentences = [NOISE] * units
        else:
            sentences = [
                self._needle(self._draw(self._key_type, streams), self._draw(self._value_type, streams))
                for _ in range(units)
            ]
        places = sorted(streams.main.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            sentences.insert(place, needle)
        return "\n".join(sentences)

    def _essay_context(self, units: int, needles: list[str], streams: Streams) -> str:
        sentences = self._essay_sentences(units)
        depths = streams.main.sample(_DEPTHS, len(needles))
        # depth / 100 first, as upstream: the other order rounds some places to the next sentence.
        places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        parts = []
        for start, end, needle in zip([0, *places], places, needles, strict=False):
            parts += [" ".join(sentences[start:end]), needle]
        return " ".join([*parts, " ".join(sentences[places[-1] :])])

    def _essay_sentences(self, units: int) -> list[str]:
        """Sentences of the first `units` words. The text repeats where it is shorter."""
        if units not in self._sentences:
            assert self._split_sentences is not None
            repeats = -(-units // len(self._haystack_words))
            words = (list(self._haystack_words) * repeats)[:units]
            self._sentences[units] = self._split_sentences(" ".join(words).strip())
        return self._sentences[units]

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self._value_type, key=key, value=value)

    def _draw(self, kind: str, streams: Streams) -> str:
        if kind == "numbers":
            return str(streams.main.randint(10**6, 10**7 - 1))
        if kind == "words":
            return streams.main.choice(adjective_nouns())
        return str(uuid.UUID(int=streams.main.getrandbits(128), version=4))
