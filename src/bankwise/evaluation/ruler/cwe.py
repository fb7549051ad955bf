"""Common words: a numbered list in which ten words stand more often than the rest, after a solved shorter list."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bankwise.errors import DataError
from bankwise.evaluation.ruler.catalogue import RulerTask
from bankwise.evaluation.ruler.family import Draft, Family, Streams, Window
from bankwise.evaluation.ruler.texts import SECOND_WORD_LIST
from bankwise.evaluation.ruler.words import common_words

_ESTIMATE_WORDS = 4096


@dataclass(frozen=True)
class WordList:
    """A list of words and what is common in it."""

    context: str
    common: list[str]
    rest: list[str]


class CommonWords(Family):
    """The task `cwe`."""

    unit = "words"

    def __init__(
        self,
        task: RulerTask,
        window: Window,
        template: str,
        count: Callable[[str], int],
        *,
        second_words: Sequence[str] | None,
    ) -> None:
        super().__init__(window, template, count, increment=10)
        self._second_words = second_words
        self._words = list(common_words())
        self._num_common = int(task.arguments["num_cw"])
        if window.is_short:
            self._demo_size, self._demo_repeats, self._repeats = 20, (3, 1), (6, 1)
        else:
            self._demo_size, self._demo_repeats = 40, (10, 3)
            self._repeats = (int(task.arguments["freq_cw"]), int(task.arguments["freq_ucw"]))

    def prepare(self, streams: Streams) -> None:
        streams.fresh().shuffle(self._words)

    @property
    def estimate_units(self) -> int:
        return _ESTIMATE_WORDS

    def bound(self, estimate: float) -> int:
        return int(self.window.budget // estimate) * 2

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        demo = self._word_list(self._demo_size, self._demo_repeats, streams)
        main = self._word_list(units, self._repeats, streams)
        solved = self.template.format(context=demo.context) + " " + _numbered(demo.common)
        return Draft(
            text=f"{solved}\n{self.template.format(context=main.context)}",
            outputs=main.common,
            details={
                "common": main.common,
                "rest": main.rest,
                "demo_words": demo.common + demo.rest,
                "demo_answer": demo.common,
            },
        )

    def _word_list(self, size: int, repeats: tuple[int, int], streams: Streams) -> WordList:
        words = streams.main.sample(self._pool(size), size)
        common, rest = words[: self._num_common], words[self._num_common :]
        entries = common * repeats[0] + rest * repeats[1]
        streams.fresh().shuffle(entries)
        return WordList(_numbered(entries), common, rest)

    def _pool(self, size: int) -> Sequence[str]:
        if size <= len(self._words):
            return self._words
        if self._second_words is None:
            raise DataError(
                f"cwe at {self.window.max_seq_length} tokens needs {size} distinct words, and wonderwords has "
                f"{len(self._words)}; put RULER's {SECOND_WORD_LIST} into the data folder, or use a shorter window"
            )
        if size > len(self._second_words):
            raise DataError(
                f"cwe at {self.window.max_seq_length} tokens needs {size} distinct words, and {SECOND_WORD_LIST} has "
                f"{len(self._second_words)}; use a shorter window"
            )
        return self._second_words


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
