"""The common-words task in depth: what the answer costs a model, and what a wrong answer did wrong."""

from bankwise.evaluation.cwe.answers import ANSWER_CLASSES, ITEM_CLASSES, Answer, read_answer
from bankwise.evaluation.cwe.likelihood import AnswerNll, FirstWord, cwe_auc
from bankwise.evaluation.cwe.lite import LITE_PRESETS
from bankwise.evaluation.cwe.prompts import cwe_prompt
from bankwise.evaluation.cwe.records import RowRecord, measure_rows

__all__ = [
    "ANSWER_CLASSES",
    "ITEM_CLASSES",
    "LITE_PRESETS",
    "Answer",
    "AnswerNll",
    "FirstWord",
    "RowRecord",
    "cwe_auc",
    "cwe_prompt",
    "measure_rows",
    "read_answer",
]
