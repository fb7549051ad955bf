"""Synthetic documents have right answers at their end, the asked length, and none of RULER's words or wording."""

import re
from collections import Counter

import pytest

from bankwise.config import DataSource, load_recipe
from bankwise.config.data import SYNTHETIC_TASKS
from bankwise.data import Document, load_documents, source_name
from bankwise.data.aggregation import aggregation_words
from bankwise.data.synthetic import estimate_tokens, wording
from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.prompts import PROMPTS
from bankwise.evaluation.ruler.words import common_words


def load(task: str, *, tokens: int | list[int | str] = 600, count: int = 12, seed: int = 0) -> list[Document]:
    return load_documents(DataSource(path=f"synthetic:{task}", document_tokens=tokens, max_documents=count, seed=seed))


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_documents_depend_on_seed_and_number_alone(task: str) -> None:
    documents = load(task)
    assert documents == load(task)
    assert documents[:5] == load(task, count=5)
    assert not {document.text for document in documents} & {document.text for document in load(task, seed=1)}
    assert source_name(DataSource(path=f"synthetic:{task}", max_documents=1)) == f"synthetic:{task}"


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_documents_have_the_asked_length(task: str) -> None:
    documents = load(task, tokens=[500, "2k", 32768], count=6)
    for document, tokens in zip(documents, [500, 2000, 32768] * 2, strict=True):
        assert 0.8 * tokens <= estimate_tokens(document.text) <= 1.02 * tokens


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_words_are_ours_and_the_wording_is_not_rulers(task: str) -> None:
    text = " ".join(document.text for document in load(task, tokens=2000))
    used = set(re.findall("[a-z]+", text.lower()))
    assert used - wording() <= set(aggregation_words())
    assert not (used - wording()) & {part for word in common_words() for part in re.findall("[a-z]+", word.lower())}

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[start : start + 4]) for start in range(len(words) - 3)}

    assert not runs(text) & runs(" ".join(prompt.template + prompt.prefix for prompt in PROMPTS.values()))


def found(part: str, *patterns: str) -> list[tuple[str, ...]]:
    """Groups of all matches of the patterns."""
    return [match.groups() for pattern in patterns for match in re.finditer(pattern, part, re.M)]


def test_values_are_those_of_the_keys() -> None:
    layouts = set()
    for document in load("key_value", count=20):
        for part in document.text.split("\n\n"):
            entries = found(part, r"(\w+-\w+) owes (\d+)", r'"(\w+-\w+)": (\d+)', r"\| (\w+-\w+) \| (\d+) \|")
            questions = r"owed by (\w+-\w+)\? (\d+)\.", r'lookup\("(\w+-\w+)"\) returned (\d+)$'
            answers = found(part, *questions, r"^(\w+-\w+) stands beside (\d+)\.$")
            assert answers
            assert set(answers) <= set(entries)
            assert part.rstrip(".").endswith(answers[-1][1])
            layouts.add(re.sub(r"[\w-]+", "", part)[:3])
    assert len(layouts) == 3


def test_traces_are_those_of_the_moves() -> None:
    layouts = set()
    for document in load("tracing", count=20):
        for part in document.text.split("\n\n"):
            starts = found(part, r"The (\w+) belongs at first to (\w+)\.", r"^(\w+) @ (\w+)$")
            starts += [(thing, holder) for holder, thing in found(part, r"^(\w+) called it (\w+)\.$")]
            chains = {thing: [holder] for thing, holder in starts}
            moves = found(part, r"^(\w+): (\w+) -> (\w+)$")
            told = r"(\w+) gave the (\w+) onward, (\w+) has it\.", r"^What (\w+) called (\w+) was .* by (\w+) as well"
            moves += [(thing, holder, after) for holder, thing, after in found(part, *told)]
            for thing, holder, after in moves:
                assert chains[thing][-1] == holder
                chains[thing].append(after)
            questions = r"^Who holds the (\w+) now\? (\w+)\.$", r"^whereabouts\((\w+)\) = (\w+)$"
            answers = found(part, *questions, r"^The newest who called it (\w+) was (\w+)\.$")
            assert answers
            assert all(chains[thing][-1] == holder for thing, holder in answers)
            assert len(moves) > len(chains)
            assert part.rstrip(".").endswith(" " + ", ".join(chains[answers[0][0]]))
            layouts.add(part.splitlines()[-1].split(answers[0][0])[0])
    assert len(layouts) == 3


def test_long_lists_still_have_one_right_answer() -> None:
    for document in load("counting", tokens=20_000, count=6)[::2]:
        listed, question, answer = re.fullmatch(
            r"[^:]*: (.*)\. ([^.:]*): (.*)\.", document.text.split("\n\n")[0]
        ).groups()  # type: ignore[union-attr]
        counts = Counter(re.findall("[a-z]+", listed))
        answered = re.findall("[a-z]+", answer)
        assert answered == [word for word, _ in counts.most_common(len(answered))]
        if "more than" in question:
            limit = int(re.findall(r"\d+", question)[0])
            assert set(answered) == {word for word, times in counts.items() if times > limit}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "synthetic:sorting", "max_documents": 1}, r"'synthetic:sorting' is not a known task; use .*counting"),
        ({"path": "synthetic:counting"}, r"needs max_documents, since it could go on"),
        ({"path": "synthetic:tracing", "max_documents": 1, "document_tokens": [4000, 64]}, r"must be at least 128"),
        ({"path": "synthetic:tracing", "max_documents": 1, "document_tokens": []}, r"must be at least 128"),
    ],
)
def test_impossible_sources_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataSource(**settings)


def test_recipe_takes_lengths_as_people_write_them() -> None:
    source = {"path": "synthetic:counting", "max_documents": 3, "document_tokens": ["4k", 32768]}
    (read,) = load_recipe({"model": "m", "data": [source]}).data
    assert read.document_tokens == [4000, 32768]
