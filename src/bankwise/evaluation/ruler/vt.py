"""Variable tracking: a chain of assignments in repeated noise, after a solved smaller example."""

import string
from collections.abc import Callable
from itertools import pairwise

from bankwise.evaluation.ruler.catalogue import RulerTask
from bankwise.evaluation.ruler.family import Draft, Family, LengthSearch, Streams, Window
from bankwise.evaluation.ruler.prompts import NOISE, PROMPTS

_DEMO_BUDGET = 500
_DEMO_VALUE = "12345"
_DEMO_LETTERS = 3


class _Chain(Family):
    """Prompts with one chain; also the demonstration on its own."""

    unit = "sentences"

    def __init__(
        self,
        task: RulerTask,
        window: Window,
        template: str,
        count: Callable[[str], int],
        *,
        increment: int,
        letters: int,
        value: Callable[[Streams], str],
    ) -> None:
        super().__init__(window, template, count, increment)
        self._num_names = int(task.arguments["num_hops"]) + 1
        self._letters = letters
        self._value = value

    def smallest(self, row: int) -> int:
        return self._num_names

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        return self._plain(units, streams)

    def _plain(self, units: int, streams: Streams) -> Draft:
        names = self._names(streams)
        value = self._value(streams)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        sentences = [NOISE] * units
        places = sorted(streams.main.sample(range(units), len(chain)))
        for inserted, (place, statement) in enumerate(zip(places, chain, strict=True)):
            sentences.insert(place + inserted, statement)
        context = "\n".join(sentences).replace(". \n", ".\n")
        text = self.template.format(context=context, query=value, num_v=self._num_names)
        return Draft(text=text, outputs=names)

    def _names(self, streams: Streams) -> list[str]:
        # Upstream adds a name where two are equal and then fails on six of them (once in 1,800 demonstrations).
        while True:
            names = [_letters(streams, self._letters) for _ in range(self._num_names)]
            if len(set(names)) == len(names):
                return names


class VariableTracking(_Chain):
    """The task `vt`."""

    def __init__(self, task: RulerTask, window: Window, template: str, count: Callable[[str], int]) -> None:
        super().__init__(
            task,
            window,
            template,
            count,
            increment=5 if window.is_short else 10,
            letters=5,
            value=lambda streams: str(streams.five_digits()),
        )
        prompt = PROMPTS[task.family]
        self._start = prompt.template[:20]
        self._demo_family = _Chain(
            task,
            Window(
                task=f"the demonstration of {task.name}",
                max_seq_length=_DEMO_BUDGET,
                template_tokens=window.template_tokens,
                new_tokens=0,
                remedy=f"RULER fixes this window, so {task.name} cannot be made with this tokenizer",
            ),
            prompt.template + prompt.prefix,
            count,
            increment=5,
            letters=_DEMO_LETTERS,
            value=lambda streams: _DEMO_VALUE,
        )
        self.demo_search: LengthSearch
        self.demo_tokens: int
        self._demo: str

    def prepare(self, streams: Streams) -> None:
        """Makes the demonstration, which all rows share but for its names and value."""
        self.demo_search = self._demo_family.search(streams)
        draft = self._demo_family.sample(self.demo_search.units, streams, 0).draft
        self._demo = f"{draft.text} {' '.join(draft.outputs)}\n"
        self.demo_tokens = self.count(self._demo)

    def probe(self, units: int, streams: Streams) -> int:
        return self.count(self._plain(units, streams).text)

    @property
    def reserved(self) -> int:
        return self.demo_tokens + self.window.new_tokens

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        draft = self._plain(units, streams)
        place = draft.text.index(self._start)
        text = f"{draft.text[:place]}{self._renamed_demo(streams)}\n{draft.text[place:]}"
        return Draft(text=text, outputs=draft.outputs)

    def _renamed_demo(self, streams: Streams) -> str:
        """The demonstration with other names and another value. One replacement may hit what an earlier one put."""
        demo = self._demo
        for name in demo.split()[-self._num_names :]:
            demo = demo.replace(name, _letters(streams, len(name)))
        return demo.replace(_DEMO_VALUE, str(streams.five_digits()))


def _letters(streams: Streams, length: int) -> str:
    return "".join(streams.main.choices(string.ascii_uppercase, k=length))
