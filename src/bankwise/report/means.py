"""Means over tasks, read as independent: recoveries of a group of benchmarks, and scores of RULER's tasks.

Benchmarks at chance say nothing about recovery and are left out. Recovery R = v / r (accuracies) or r / v (perplexity,
bits per byte) with v the model's value and r the reference's; its variance is that of a ratio of two correlated values
to first order, their covariance read from the paired interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bankwise.report.evaluation_data import Delta, Evaluation, Row

_INTERVAL_IN_ERRORS = 2 * 1.959964
"""Width of a 95 % interval in standard errors."""


@dataclass(frozen=True, kw_only=True)
class GroupMean:
    """Mean recovery of one column, in %, over `k` tasks."""

    value: float
    standard_error: float | None
    """None where a task has no standard error or no interval."""
    k: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tasks whose recoveries are averaged, and those that are at chance."""

    name: str
    rows: Sequence[Row]
    at_chance: Sequence[Row]


def groups(evaluation: Evaluation) -> list[Group]:
    """The groups of the benchmarks' headline metrics, in the order of the report.

    A task that was also run through lm-eval (a variant) counts once.
    """
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    seen: set[str] = set()
    for row in sorted(evaluation.section("benchmarks"), key=lambda row: bool(row.variant)):
        if row.is_headline and row.recovery and row.task not in seen:
            seen.add(row.task)
            found.setdefault(row.group or "other", ([], []))[evaluation.is_at_chance(row)].append(row)
    return [Group(name=name, rows=kept, at_chance=left_out) for name, (kept, left_out) in found.items()]


def group_mean(evaluation: Evaluation, group: Group, column: str) -> GroupMean | None:
    """The column's mean over the group's tasks that it has; None where it has none."""
    rows = [row for row in group.rows if column in row.scores and row.scores[column].recovery is not None]
    if not rows:
        return None
    errors = [_recovery_error(row, column, evaluation.reference) for row in rows]
    known = [error for error in errors if error is not None]
    return GroupMean(
        value=sum(row.scores[column].recovery or 0.0 for row in rows) / len(rows),
        standard_error=math.hypot(*known) / len(rows) if len(known) == len(rows) else None,
        k=len(rows),
    )


@dataclass(frozen=True, kw_only=True)
class ScoreMean:
    """What stands beside the mean score of several tasks: each number None where a task lacks it."""

    n: int
    """Items of all tasks."""
    standard_error: float | None
    delta: Delta | None


def score_mean(rows: Sequence[Row], column: str) -> ScoreMean:
    """Error and paired difference of the mean over the rows' values, for a column that has them all."""
    scores = [row.scores[column] for row in rows]
    errors = [score.standard_error for score in scores if score.standard_error is not None]
    deltas = [score.delta for score in scores if score.delta is not None]
    k, n = len(rows), sum(score.n for score in scores)
    delta = None
    if len(deltas) == k:
        value = sum(one.value for one in deltas) / k
        below = math.hypot(*(one.value - one.low for one in deltas)) / k
        above = math.hypot(*(one.high - one.value for one in deltas)) / k
        delta = Delta(value=value, low=value - below, high=value + above, n=sum(one.n for one in deltas))
    return ScoreMean(n=n, standard_error=math.hypot(*errors) / k if len(errors) == k else None, delta=delta)


def _recovery_error(row: Row, column: str, reference: str) -> float | None:
    """Standard error of a recovery in %; None where its parts are unknown."""
    score, other = row.scores[column], row.scores.get(reference)
    if other is None or score.delta is None or not score.value or not other.value:
        return None
    if score.standard_error is None or other.standard_error is None:
        return None
    variance, other_variance = score.standard_error**2, other.standard_error**2
    delta_variance = ((score.delta.high - score.delta.low) / _INTERVAL_IN_ERRORS) ** 2
    covariance = (variance + other_variance - delta_variance) / 2
    relative = (
        variance / score.value**2 + other_variance / other.value**2 - 2 * covariance / (score.value * other.value)
    )
    return (score.recovery or 0.0) * math.sqrt(max(0.0, relative))
