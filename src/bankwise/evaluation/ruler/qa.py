"""Question answering: the paragraph that holds the answer among others of its article and of the whole data set."""

from collections.abc import Callable

from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.family import Draft, Family, Streams, Window
from bankwise.evaluation.ruler.prompts import DOCUMENT
from bankwise.evaluation.ruler.texts import QuestionSet


class DocumentQuestions(Family):
    """The tasks `qa_*`. Row i asks question i; the length search asks question 0."""

    unit = "documents"

    def __init__(self, window: Window, template: str, count: Callable[[str], int], *, questions: QuestionSet) -> None:
        super().__init__(window, template, count, increment=10)
        self._questions = questions.questions
        self._pool = questions.pool

    def smallest(self, row: int) -> int:
        return len(self._questions[row].gold)

    def build(self, units: int, streams: Streams, row: int) -> Draft:
        if row >= len(self._questions):
            raise ConfigError(
                f"{self.window.task} has {len(self._questions)} questions, and sample {row + 1} is asked for; "
                f"take at most {len(self._questions)} samples"
            )
        question = self._questions[row]
        documents = self._documents(units, streams, row)
        streams.fresh().shuffle(documents)
        context = "\n\n".join(DOCUMENT.format(i=i, document=document) for i, document in enumerate(documents, start=1))
        return Draft(text=self.template.format(context=context, query=question.text), outputs=question.answers)

    def _documents(self, units: int, streams: Streams, row: int) -> list[str]:
        """The gold documents, then related ones, then any; from the pool's size on, the pool from its start."""
        if units >= len(self._pool):
            repeats = -(-units // len(self._pool))
            return (self._pool * repeats)[:units]
        question = self._questions[row]
        room = units - len(question.gold)
        if room > len(question.related):
            shown = question.gold + question.related
            known = set(shown)
            others = [place for place in range(len(self._pool)) if place not in known]
            shown += streams.main.sample(others, max(0, room - len(question.related)))
        else:
            shown = question.gold + streams.main.sample(question.related, room)
        return [self._pool[place] for place in shown]
