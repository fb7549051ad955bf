"""What one model made of CWE rows: the record of each row, from one reading of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bankwise.evaluation.cwe.answers import Answer, read_answer
from bankwise.evaluation.cwe.likelihood import AnswerNll, FirstWord, answer_nll, first_tokens, first_word, word_of_token
from bankwise.evaluation.cwe.prompts import cwe_prompt
from bankwise.evaluation.engine import Engine, Reading


@dataclass(frozen=True, kw_only=True)
class RowRecord:
    """The CWE metrics of one row."""

    nll: AnswerNll
    first: FirstWord
    prediction: str
    """What the model generated; empty without generation."""
    answer: Answer | None
    """What it amounts to; None without generation."""
    truncated: bool
    """Whether the list was cut on the left to fit the model's context, so that the figures mean little."""


def measure_rows(
    engine: Engine, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 0, *, label: str = ""
) -> list[RowRecord]:
    """One record per row of `ruler.generate("cwe", ...)` or `lite.generate`; one prefill a row.

    Without `max_new_tokens` nothing is generated: the cheap reading, for scans over many models.
    """
    readings = engine.read([cwe_prompt(row, engine.tokenizer, max_new_tokens) for row in rows], label=label)
    return [
        _record(row, reading, engine, has_answer=max_new_tokens > 0)
        for row, reading in zip(rows, readings, strict=True)
    ]


def _record(row: Mapping[str, Any], reading: Reading, engine: Engine, *, has_answer: bool) -> RowRecord:
    words, (score,), (logprobs,) = row["details"], reading.continuations, reading.probes
    prompt_text = row["input"] + row["answer_prefix"]
    tokens = first_tokens([*words["common"], *words["rest"]], engine.tokenizer)
    num_common = len(words["common"])
    return RowRecord(
        nll=answer_nll(score, word_of_token(score.token_ids, row["outputs"], engine.tokenizer, prompt_text)),
        first=first_word(
            dict(zip(dict.fromkeys(tokens), logprobs, strict=True)), tokens[:num_common], tokens[num_common:]
        ),
        prediction=reading.generated,
        answer=read_answer(reading.generated, words) if has_answer else None,
        truncated=reading.truncated,
    )
