"""From documents to measures: what is asked of the model, and what its log-probabilities make of each document.

A tie between answers counts against the gold one: some sets always list the gold answer last or first, so that an
order among equals would give or take credit that the model has not earned.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from bankwise.evaluation.benchmarks.catalogue import Task
from bankwise.evaluation.benchmarks.documents import Document, DocumentSet
from bankwise.evaluation.engine import ContinuationScore, Engine, Prompt, Reading
from bankwise.evaluation.measures import Measure

_Item = TypeVar("_Item")

# No tokenizer in use spends more than a token on a byte, nor more than these on what it adds by itself.
_ADDED_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How likely a model finds the answers of one document."""

    document: Document
    scores: tuple[ContinuationScore, ...]
    """Of each continuation."""
    unconditional: tuple[ContinuationScore, ...] = ()
    """The same without the question; empty where it was not asked."""
    truncated: bool = False
    """Whether a context was cut on the left."""


def draw(items: Sequence[_Item], limit: int, seed: int) -> list[_Item]:
    """`limit` of the items (0: all), in their order; the same ones for the same seed."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def read_answers(engine: Engine, documents: Sequence[Document], *, with_pmi: bool, label: str) -> list[Answer]:
    """The model's answers to the documents, in their order."""
    asked = [_questions(document, engine) for document in documents]
    bare = [_unconditional(document) if with_pmi else [] for document in documents]
    prompts = [prompt for pair in zip(asked, bare, strict=True) for part in pair for prompt in part]
    readings = iter(engine.read(prompts, label=label))
    answers: list[Answer] = []
    for document, questions, plain in zip(documents, asked, bare, strict=True):
        given = [next(readings) for _ in questions]
        without = [next(readings) for _ in plain]
        answers.append(
            Answer(
                document=document,
                scores=_scores(document, questions, given),
                unconditional=_scores(document, plain, without) if plain else (),
                truncated=any(reading.truncated for reading in given),
            )
        )
    return answers


def _questions(document: Document, engine: Engine) -> list[Prompt]:
    if len(document.contexts) > 1:
        pairs = zip(document.contexts, document.continuations, strict=True)
        return [Prompt(text=context, continuations=(text,)) for context, text in pairs]
    (context,) = document.contexts
    # Equal answers are scored once, so that they tie to the last bit.
    answers = tuple(dict.fromkeys(document.continuations))
    if _overflows(context, answers, engine):
        # Each answer is then given the context that fits beside it, as lm-eval does.
        return [Prompt(text=context, continuations=(text,)) for text in answers]
    return [Prompt(text=context, continuations=answers)]


def _overflows(context: str, answers: Sequence[str], engine: Engine) -> bool:
    if engine.context is None:
        return False
    room = engine.context - _ADDED_TOKENS
    return any(len((context + text).encode()) > room and len(engine.encode(context + text)) > room for text in answers)


def _unconditional(document: Document) -> list[Prompt]:
    if not document.unconditional:
        return []
    return [Prompt(text=document.unconditional, continuations=tuple(dict.fromkeys(document.continuations)))]


def _scores(
    document: Document, prompts: Sequence[Prompt], readings: Sequence[Reading]
) -> tuple[ContinuationScore, ...]:
    if len(document.contexts) > 1:
        return tuple(reading.continuations[0] for reading in readings)
    by_text = {
        text: score
        for prompt, reading in zip(prompts, readings, strict=True)
        for text, score in zip(prompt.continuations, reading.continuations, strict=True)
    }
    return tuple(by_text[text] for text in document.continuations)


# Metrics of one document. A continuation is counted with the space before it, except by `acc_norm`, which is lm-eval's.


def accuracy(answer: Answer) -> float:
    return _is_best([score.logprob for score in answer.scores], answer.document.gold)


def accuracy_per_char(answer: Answer) -> float:
    return _is_best(_divided(answer, [len(text) for text in answer.document.continuations]), answer.document.gold)


def accuracy_norm(answer: Answer) -> float:
    lengths = [len(text.removeprefix(" ")) for text in answer.document.continuations]
    return _is_best(_divided(answer, lengths), answer.document.gold)


def accuracy_per_token(answer: Answer) -> float:
    return _is_best(_divided(answer, [len(score.token_ids) for score in answer.scores]), answer.document.gold)


def accuracy_pmi(answer: Answer) -> float:
    gains = [score.logprob - plain.logprob for score, plain in zip(answer.scores, answer.unconditional, strict=True)]
    return _is_best(gains, answer.document.gold)


def is_greedy(answer: Answer) -> float:
    """Whether greedy decoding gives the gold answer (LAMBADA)."""
    return float(answer.scores[answer.document.gold].is_greedy)


def bits_per_byte(answer: Answer) -> float:
    gold = answer.document.gold
    return -answer.scores[gold].logprob / (len(answer.document.continuations[gold].encode()) * math.log(2))


def loss(answer: Answer) -> float:
    """Nats of the whole gold answer."""
    return -answer.scores[answer.document.gold].logprob


def _divided(answer: Answer, lengths: Sequence[int]) -> list[float]:
    return [score.logprob / max(length, 1) for score, length in zip(answer.scores, lengths, strict=True)]


def _is_best(values: Sequence[float], gold: int) -> float:
    return float(all(value < values[gold] for index, value in enumerate(values) if index != gold))


_AMOUNTS: dict[str, Callable[[Answer], float]] = {
    "acc": accuracy,
    "acc_per_char": accuracy_per_char,
    "acc_norm": accuracy_norm,
    "acc_per_token": accuracy_per_token,
    "acc_pmi": accuracy_pmi,
    "bits_per_byte": bits_per_byte,
    "perplexity": loss,
}


def measure_task(task: Task, source: DocumentSet, answers: Sequence[Answer], context: int | None) -> list[Measure]:
    """Every measure of a task; `context` is the window that long prompts were cut to."""
    headline = task.headline_metric(source)
    documents = [answer.document for answer in answers]
    common: dict[str, Any] = {
        "section": "benchmarks",
        "task": task.name,
        "items": tuple(f"{task.name}/{document.id}" for document in documents),
        "group": task.group,
        "note": _note(task, source, answers, context),
    }
    accuracies: dict[str, Any] = {"scale": 100.0, "unit": "%", "recovery": "ratio"}
    if task.kind == "choice":
        accuracies["chance"] = 100 * sum(1 / len(document.continuations) for document in documents) / len(documents)
    measures = []
    for metric in _metrics(task, headline, answers):
        amount = is_greedy if metric == "acc" and task.kind == "word" else _AMOUNTS[metric]
        form: dict[str, Any] = accuracies
        if metric == "bits_per_byte":
            form = {"unit": "bits/byte", "better": "lower", "recovery": "inverse"}
        elif metric == "perplexity":
            form = {"form": "exp", "better": "lower", "recovery": "inverse"}
        amounts = tuple(amount(answer) for answer in answers)
        measures.append(Measure(**common, **form, metric=metric, amounts=amounts, is_headline=metric == headline))
    if len({document.part for document in documents}) > 1:
        measures.insert(1, _mean_of_parts(measures[0], documents))
    return measures


def _metrics(task: Task, headline: str, answers: Sequence[Answer]) -> list[str]:
    """Names of what is measured. Accuracies that cannot differ from `acc`, all answers being of a length, are left out
    unless they are the headline."""
    if task.kind == "word":
        return ["acc", "perplexity", "bits_per_byte"]
    if task.kind == "answer":
        return ["bits_per_byte"]
    one_length = all(len(set(map(len, answer.document.continuations))) == 1 for answer in answers)
    metrics = ["acc"] if one_length else ["acc", "acc_per_char", "acc_norm"]
    if all(answer.unconditional for answer in answers):
        metrics.append("acc_pmi")
    if headline not in metrics:
        metrics.append(headline)
    return [*metrics, "bits_per_byte"]


def _mean_of_parts(accuracy: Measure, documents: Sequence[Document]) -> Measure:
    """The mean of the parts' accuracies, each part counting alike."""
    sizes = Counter(document.part for document in documents)
    weights = tuple(1 / sizes[document.part] for document in documents)
    return replace(
        accuracy,
        metric="acc_mean_of_subjects",
        amounts=tuple(amount * weight for amount, weight in zip(accuracy.amounts, weights, strict=True)),
        weights=weights,
        is_headline=False,
    )


def part_accuracies(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Accuracy in % and size of every part."""
    parts: dict[str, list[float]] = {}
    for answer in answers:
        parts.setdefault(answer.document.part, []).append(accuracy(answer))
    return {part: {"acc": 100 * sum(hits) / len(hits), "n": len(hits)} for part, hits in sorted(parts.items())}


def majority(answers: Sequence[Answer]) -> float | None:
    """What always giving the most frequent right answer scores, in %; None unless all documents have the same answers.

    BoolQ: 62 % are "yes", far above the 50 % of a coin.
    """
    if len(answers) < 2 or len({answer.document.continuations for answer in answers}) > 1:
        return None
    golds = Counter(answer.document.gold for answer in answers)
    return 100 * golds.most_common(1)[0][1] / len(answers)


def _note(task: Task, source: DocumentSet, answers: Sequence[Answer], context: int | None) -> str:
    parts = [f"{source.shots}-shot"]
    most_frequent = majority(answers) if task.kind == "choice" else None
    if most_frequent is not None:
        parts.append(f"always giving the most frequent answer scores {most_frequent:.1f} %")
    truncated = sum(answer.truncated for answer in answers)
    if truncated:
        parts.append(f"{truncated} of {len(answers)} contexts cut on the left to fit {context} tokens")
    return "; ".join(parts)
