"""RULER's official scores, the strict word match beside them, and what a model's lengths add up to.

A row's score lies in [0, 1]; `official` turns rows into the number that NVIDIA's evaluation prints.
"""

import re
from collections.abc import Mapping, Sequence

EFFECTIVE_SCORE = 85.6
"""Llama-2-7B-chat at 4096 tokens: a length counts as effective from this score on (RULER)."""

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBERING = re.compile(r"\d+\.")
_SEPARATOR = re.compile(r"[,\n]")


def postprocess(prediction: str) -> str:
    """The answer as it is judged: control characters are newlines, and the ends are stripped."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def occurs(reference: str, text: str) -> bool:
    """RULER's test: the reference is a part of the text, in any case. "art" occurs in "party"."""
    return reference.lower() in text.lower()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in a prediction."""
    text = postprocess(prediction)
    return sum(occurs(reference, text) for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 where any reference occurs in a prediction, else 0."""
    text = postprocess(prediction)
    return float(any(occurs(reference, text) for reference in references))


def official(row_scores: Sequence[float]) -> float:
    """The printed score of a task: percent, two digits."""
    return round(sum(row_scores) / len(row_scores) * 100, 2)


def parse_items(prediction: str) -> list[str]:
    """The items of an answer in lower case: between list numbers, or between commas and newlines if there are none."""
    text = postprocess(prediction)
    parts = _NUMBERING.split(text) if _NUMBERING.search(text) else _SEPARATOR.split(text)
    return [item for item in (part.strip().lower() for part in parts) if item]


def exact(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that equal one item of the answer: no credit for a word inside another."""
    items = set(parse_items(prediction))
    return sum(reference.lower() in items for reference in references) / len(references)


def is_null(prediction: str) -> bool:
    """Whether nothing is left of a prediction."""
    return not postprocess(prediction)


def length_score(task_scores: Mapping[str, float]) -> tuple[float, str]:
    """Mean over tasks at one length, and its name: "mean of k tasks"."""
    count = len(task_scores)
    return sum(task_scores.values()) / count, f"mean of {count} task{'' if count == 1 else 's'}"


def effective_length(scores: Mapping[int, float], threshold: float = EFFECTIVE_SCORE) -> int | None:
    """The largest length whose score reaches the threshold; None if none does."""
    return max((length for length, score in scores.items() if score >= threshold), default=None)


def weighted_average(scores: Mapping[int, float], *, increasing: bool) -> float:
    """RULER's wAvg: weights 1, 2, ... over the lengths, from the shortest (increasing) or from the longest."""
    ordered = [scores[length] for length in sorted(scores, reverse=not increasing)]
    weights = range(1, len(ordered) + 1)
    return sum(weight * score for weight, score in zip(weights, ordered, strict=True)) / sum(weights)
