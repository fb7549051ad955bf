"""Synthetic long-context documents (`synthetic:TASK`): facts spread over a long text, then questions with answers.

- `counting`: what is frequent in a long list (`bankwise.data.aggregation`).
- `key_value`: which value stands beside a key, among many that look like it.
- `tracing`: where something is after it has changed hands many times, among other things that did.

None of it is RULER's: the words are `aggregation_words()`, of which none is an entry of wonderwords, and wording and
layouts are others. A question and its answer stand at the end of each task, so that training predicts the answer. Every
second document is one task as long as the document; the others are several short ones. A document depends on the
task, the seed and its number alone.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bankwise.config import DataSource
from bankwise.config.data import SHORTEST_SYNTHETIC
from bankwise.data.aggregation import LAYOUTS, aggregation_task, aggregation_words
from bankwise.data.documents import Document

_MANY = 6  # tasks of a document that holds several
_QUESTION = 18  # tokens of a question with its answer, at most
_TOKEN = re.compile(r" [^\W\d_]+|[^\W\d_]{1,5}|\d|[^\w\s]+|\n|_")


@dataclass(frozen=True)
class _KeyValueLayout:
    entry: str
    separator: str
    question: str
    """One question with its answer."""
    separator_of_questions: str


_KEY_VALUE_LAYOUTS = (
    _KeyValueLayout("{key} owes {value}", "; ", "What is owed by {key}? {value}.", " "),
    _KeyValueLayout('"{key}": {value}', ",\n", 'lookup("{key}") returned {value}', "\n"),
    _KeyValueLayout("| {key} | {value} |", "\n", "{key} stands beside {value}.", "\n"),
)


@dataclass(frozen=True)
class _TracingLayout:
    start: str
    move: str
    separator: str
    question: str
    """The last holder."""
    chain: str
    """All of them in their order."""


_TRACING_LAYOUTS = (
    _TracingLayout(
        "The {thing} belongs at first to {holder}.",
        "{holder} gave the {thing} onward, {next} has it.",
        " ",
        "Who holds the {thing} now? {holder}.",
        "The {thing} has been with {chain}.",
    ),
    _TracingLayout(
        "{thing} @ {holder}",
        "{thing}: {holder} -> {next}",
        "\n",
        "whereabouts({thing}) = {holder}",
        "itinerary({thing}) = {chain}",
    ),
    _TracingLayout(
        "{holder} called it {thing}.",
        "What {holder} called {thing} was then called so by {next} as well.",
        "\n",
        "The newest who called it {thing} was {holder}.",
        "{thing} was the term of {chain}.",
    ),
)


def synthetic_documents(source: DataSource) -> Iterator[Document]:
    """`max_documents` documents of the source's task, each of about `document_tokens` tokens."""
    lengths = source.document_tokens
    assert isinstance(lengths, list)
    name = source.path.removeprefix("synthetic:")
    for number in range(source.max_documents):
        tokens = int(lengths[number % len(lengths)])
        generator = random.Random(f"{name}/{tokens}/{source.seed}/{number}")
        parts: list[str] = []
        left = tokens
        size = tokens if number % 2 == 0 else max(SHORTEST_SYNTHETIC, tokens // _MANY)
        while left >= SHORTEST_SYNTHETIC:
            # A rest that is too short for another task goes to this one.
            parts.append(_TASKS[name](generator, size if left - size >= SHORTEST_SYNTHETIC else left))
            left -= estimate_tokens(parts[-1] + "\n\n")
        yield Document(f"{tokens}/{source.seed}/{number}", "\n\n".join(parts))


def estimate_tokens(text: str) -> int:
    """Tokens of a text as SmolLM2's tokenizer counts them, with which each digit is a token; no more than 10% off.

    Tokenizers that pack digits need fewer tokens.
    """
    return round(1.07 * len(_TOKEN.findall(text)))


def wording() -> frozenset[str]:
    """The fixed words of all layouts, in lower case: what a document holds beside the words of its facts."""
    texts = [layout.text for layout in LAYOUTS]
    for key_value in _KEY_VALUE_LAYOUTS:
        texts += [key_value.entry, key_value.question]
    for tracing in _TRACING_LAYOUTS:
        texts += [tracing.start, tracing.move, tracing.question, tracing.chain]
    fixed = re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()
    return frozenset(re.findall(r"[a-z]+", fixed)) | {"repeated", "more", "than"}


def _counting(generator: random.Random, tokens: int) -> str:
    layout = generator.choice(LAYOUTS)
    of_entry = estimate_tokens(f" word{layout.separator}" * 100) / 100
    return aggregation_task(generator, int((tokens - 80) / of_entry), layout)  # 80: wording and answer, at most


def _key_value(generator: random.Random, tokens: int) -> str:
    layout = generator.choice(_KEY_VALUE_LAYOUTS)
    num_questions = max(1, min(16, tokens // 300))
    values: dict[str, int] = {}
    left = float(tokens)
    questions: dict[str, str] = {}
    entries: list[str] = []
    while True:
        # Of two words, so that many keys share one of them and only the whole key tells.
        while (key := "-".join(generator.choices(aggregation_words(), k=2))) in values:
            pass
        values[key] = generator.randint(10_000, 99_999)
        entry = layout.entry.format(key=key, value=values[key])
        left -= estimate_tokens(entry + layout.separator)
        if left < _QUESTION * num_questions and entries:
            break
        entries.append(entry)
        questions[key] = layout.question.format(key=key, value=values[key])
    asked = generator.sample(sorted(questions), min(num_questions, len(questions)))
    return "\n".join(
        (layout.separator.join(entries), layout.separator_of_questions.join(questions[key] for key in asked))
    )


def _tracing(generator: random.Random, tokens: int) -> str:
    layout = generator.choice(_TRACING_LAYOUTS)
    things = generator.sample(aggregation_words(), max(2, min(24, tokens // 240)))
    holders = {thing: [generator.choice(aggregation_words())] for thing in things}
    asked = generator.sample(things, max(1, len(things) // 2))
    lines = [layout.start.format(thing=thing, holder=holders[thing][0]) for thing in things]
    left = tokens - sum(estimate_tokens(line + layout.separator) for line in lines) - _QUESTION * (len(asked) + 1)
    while left > 0:
        thing = generator.choice(things)
        chain = holders[thing]
        holder = next(word for word in generator.sample(aggregation_words(), 2) if word != chain[-1])
        lines.append(layout.move.format(thing=thing, holder=chain[-1], next=holder))
        left -= estimate_tokens(lines[-1] + layout.separator) + (2 if thing == asked[0] else 0)
        chain.append(holder)
    # The last holder of every thing that is asked about, and all holders of one.
    answers = [layout.question.format(thing=thing, holder=holders[thing][-1]) for thing in asked]
    answers.append(layout.chain.format(thing=asked[0], chain=", ".join(holders[asked[0]])))
    return "\n".join((layout.separator.join(lines), *answers))


_TASKS: dict[str, Callable[[random.Random, int], str]] = {
    "counting": _counting,
    "key_value": _key_value,
    "tracing": _tracing,
}
