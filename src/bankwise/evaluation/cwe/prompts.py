"""What is asked of a model about one CWE row, so that one reading of the list answers everything."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from bankwise.evaluation.cwe.likelihood import ITEM_START, answer_text, first_tokens
from bankwise.evaluation.engine import Probe, Prompt


def cwe_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 0) -> Prompt:
    """The row's text with the right answer to score, the first tokens of its words, and generation if asked for.

    Equal arguments give equal prompts, so suites that ask the same of a row share one reading.
    """
    words = [*row["details"]["common"], *row["details"]["rest"]]
    return Prompt(
        text=row["input"] + row["answer_prefix"],
        continuations=(answer_text(row["outputs"]),),
        probes=(Probe(suffix=ITEM_START, token_ids=tuple(dict.fromkeys(first_tokens(words, tokenizer)))),),
        max_new_tokens=max_new_tokens,
    )
