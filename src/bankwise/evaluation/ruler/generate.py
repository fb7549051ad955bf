"""RULER's prompts, equal to the byte to those of NVIDIA's generator for the same arguments and word lists.

Written from a description of the rules at `prompts.REVISION`. Two layouts:

upstream    NVIDIA's. All rows with the same number of entries share one permutation, and a row depends on those before.
per_sample  The same length search; then each row is drawn from a stream of its own, so that layouts differ from row to
            row and a row does not depend on any other. The demonstration of vt is the search's, with the row's names;
            the order of the word list that cwe samples from is the seed's.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from bankwise.config.evaluation import Permutation
from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.catalogue import RulerTask, find_task
from bankwise.evaluation.ruler.cwe import CommonWords
from bankwise.evaluation.ruler.family import Family, Sample, Window, row_streams, shared_streams
from bankwise.evaluation.ruler.fwe import FrequentWords
from bankwise.evaluation.ruler.niah import Needles
from bankwise.evaluation.ruler.prompts import PROMPTS
from bankwise.evaluation.ruler.qa import DocumentQuestions
from bankwise.evaluation.ruler.templates import BASE_TEMPLATE, full_template
from bankwise.evaluation.ruler.texts import check_source, haystack_words, question_set, second_words
from bankwise.evaluation.ruler.vt import VariableTracking
from bankwise.evaluation.ruler.words import check_words

_MARK_CHARS = 10  # of the unformatted answer prefix, by which upstream finds the prefix in the text


class Generator:
    """One run: the length search when it is made, then the rows."""

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int,
        seed: int = 42,
        permutation: Permutation = "upstream",
        data_dir: str | Path | None = None,
        model_template: str = BASE_TEMPLATE,
        model_template_token: int = 0,
    ) -> None:
        if permutation not in get_args(Permutation):
            raise ConfigError(f"permutation={permutation!r} is not known; use {' or '.join(get_args(Permutation))}")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} is outside [0, 2**32), where numpy's generator lies")
        self.task = find_task(task)
        self.seed = seed
        self.permutation = permutation
        self._count = token_counter(tokenizer)
        self.family = _family(
            self.task,
            Window(
                task=task,
                max_seq_length=max_seq_length,
                template_tokens=model_template_token,
                new_tokens=self.task.tokens_to_generate,
            ),
            full_template(self.task, model_template),
            self._count,
            data_dir,
        )
        self._streams = shared_streams(seed)
        self.family.prepare(self._streams)
        self.search = self.family.search(self._streams)

    def rows(self, num_samples: int) -> Iterator[dict[str, Any]]:
        """Rows 0 to `num_samples` - 1. With `permutation="upstream"` a second call goes on in the random stream."""
        window = self.family.window
        for row in range(num_samples):
            streams = self._streams
            if self.permutation == "per_sample":
                streams = row_streams(self.task.name, window.max_seq_length, self.seed, row)
            yield self._row(row, self.family.sample(self.search.units, streams, row))

    def _row(self, row: int, sample: Sample) -> dict[str, Any]:
        window, text = self.family.window, sample.draft.text
        cut = text.rfind(PROMPTS[self.task.family].prefix[:_MARK_CHARS])
        length = sample.tokens + window.new_tokens
        values: dict[str, Any] = {
            "index": row,
            "input": text[:cut],
            "outputs": list(sample.draft.outputs),
            "length": length,
            "length_w_model_temp": length + window.template_tokens,
            "answer_prefix": text[cut:],
        }
        if self.task.family == "niah":
            # Upstream uses one variable for both, so the row number is lost.
            values["index"] = text[:cut].find(sample.draft.outputs[0])
            values["token_position_answer"] = self._count(text[: values["index"]])
        values["details"] = {
            "task": self.task.name,
            "row": row,
            "units": sample.units,
            "ruler_compatible": self.task.ruler_compatible,
            "permutation": self.permutation,
            **sample.draft.details,
        }
        return values


def generate(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    num_samples: int = 500,
    seed: int = 42,
    permutation: Permutation = "upstream",
    data_dir: str | Path | None = None,
    model_template: str = BASE_TEMPLATE,
    model_template_token: int = 0,
) -> list[dict[str, Any]]:
    """Rows of one task: NVIDIA's keys, and `details` with what only we record.

    A model reads `input + answer_prefix` and generates at most the task's `tokens_to_generate`; both together fit
    `max_seq_length` tokens without special tokens. `data_dir` holds the essay and question files of the tasks that need
    them. `model_template` wraps the task at `{task_template}`; its braces count twice, so write `{{{{` for one.
    """
    generator = Generator(
        task,
        tokenizer,
        max_seq_length=max_seq_length,
        seed=seed,
        permutation=permutation,
        data_dir=data_dir,
        model_template=model_template,
        model_template_token=model_template_token,
    )
    return list(generator.rows(num_samples))


def check_task(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    num_samples: int = 1,
    data_dir: str | Path | None = None,
    model_template: str = BASE_TEMPLATE,
) -> None:
    """Raises what would stop `generate`: an unknown task, missing data or words, a window that is too small.

    Makes the last row at its smallest size, not the length search.
    """
    known = find_task(task)
    check_source(known, data_dir)
    if known.family in ("niah", "common_words_extraction"):
        check_words()
    window = Window(task=task, max_seq_length=max_seq_length, template_tokens=0, new_tokens=known.tokens_to_generate)
    family = _family(known, window, full_template(known, model_template), token_counter(tokenizer), data_dir)
    streams = shared_streams(0)
    family.prepare(streams)
    family.sample(family.increment, streams, num_samples - 1)


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Writes rows as NVIDIA's generator does: its keys alone, one JSON object a line."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({key: value for key, value in row.items() if key != "details"}) + "\n")


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Counts the tokens of a text, without special tokens and without a warning where it is long."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _family(
    task: RulerTask, window: Window, template: str, count: Callable[[str], int], data_dir: str | Path | None
) -> Family:
    match task.family:
        case "common_words_extraction":
            return CommonWords(task, window, template, count, second_words=second_words(data_dir))
        case "freq_words_extraction":
            return FrequentWords(task, window, template, count)
        case "variable_tracking":
            return VariableTracking(task, window, template, count)
        case "qa":
            return DocumentQuestions(window, template, count, questions=question_set(task, data_dir))
    words = haystack_words(task, data_dir) if task.source else []
    return Needles(task, window, template, count, haystack_words=words)
