"""Runs of 13 words are counted exactly, whatever the case and punctuation, and a contained text is found."""

import random
import time

import pytest

from bankwise.data import Document
from bankwise.data.contamination import EvaluationSet, Overlap, RunCounter, overlaps


def words(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(count)]


def compare(training: list[str], evaluation: list[str], *, is_held_out: bool = False) -> Overlap:
    documents = [Document(str(number), text) for number, text in enumerate(training)]
    (overlap,) = overlaps({"source": documents}, [EvaluationSet("set", evaluation, is_held_out)])
    return overlap


def test_runs_are_counted_in_documents_and_texts() -> None:
    first, second, third = words(100, 1), words(100, 2), words(100, 3)
    training = [" ".join(first), " ".join([*first[10:40], *third]), " ".join(third)]
    overlap = compare(training, [" ".join([*second, *first[20:35]]), " ".join(second), " ".join(first[20:33])])
    assert (overlap.runs, overlap.training_documents, overlap.evaluation_texts) == (3, 2, 2)
    assert (overlap.contained, overlap.of_evaluation_texts) == (1, 3)


@pytest.mark.parametrize(("shared", "runs"), [(12, 0), (13, 1), (14, 2)])
def test_twelve_words_are_no_run(shared: int, runs: int) -> None:
    text = words(shared, 1)
    assert compare([" ".join([*text, *words(50, 2)])], [" ".join([*words(50, 3), *text])]).runs == runs


def test_order_counts_and_case_and_punctuation_do_not() -> None:
    text = words(20, 1)
    assert compare([" ".join(text)], [", ".join(text).upper() + "!"]).contained == 1
    assert compare([" ".join(text)], [" ".join(reversed(text))]).runs == 0


def test_repeated_runs_count_once() -> None:
    text = " ".join(words(13, 1))
    overlap = compare([f"{text} {text}"] * 2, [text, text])
    assert (overlap.runs, overlap.training_documents, overlap.evaluation_texts) == (1, 2, 2)


@pytest.mark.parametrize(("kept", "contained"), [(70, 0), (95, 1)])
def test_text_is_contained_from_four_fifths_of_its_runs(kept: int, contained: int) -> None:
    text = words(100, 1)
    overlap = compare([" ".join([*text[:kept], *words(200, 2)])], [" ".join(text)], is_held_out=True)
    assert overlap.contained == contained
    assert overlap.is_leak == bool(contained)
    assert not compare([" ".join(text)], [" ".join(text)]).is_leak


def test_short_texts_and_empty_sets_have_no_runs() -> None:
    overlap = compare(["only a few words"], ["only a few words"], is_held_out=True)
    assert (overlap.of_evaluation_texts, overlap.contained, overlap.is_leak) == (0, 0, False)
    assert compare([" ".join(words(50, 1))], []).of_evaluation_texts == 0


def test_a_megabyte_takes_little_time() -> None:
    text = " ".join(words(170_000, 1))
    started = time.process_time()
    runs, _ = RunCounter().runs([text])
    assert len(runs) == 170_000 - 12
    assert time.process_time() - started < 3  # 20 MB stay below a minute
