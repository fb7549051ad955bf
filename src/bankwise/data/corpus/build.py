"""Writes the corpus: one .jsonl per source and a manifest, whole or not at all.

A row is `{id, text, bankwise_source, bankwise_held_out}`. Equal packages and settings give equal files. Rows remember
the source that they came from, so a document is on the same side of the split wherever it is read from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bankwise.data.corpus.catalogue import CORPUS, CorpusSource, default_sources, is_permissive
from bankwise.data.corpus.filters import CUT, Filters
from bankwise.data.documents import Document
from bankwise.data.files import HELD_OUT_FIELD, MANIFEST, ORIGIN_FIELD
from bankwise.errors import ConfigError, DataError
from bankwise.files import file_sha256, write_json


def build_corpus(
    output: Path,
    *,
    sources: Sequence[str] = (),
    permissive_only: bool = False,
    code: bool = False,
    keep_all: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The manifest of the corpus, which is then in the folder `output`; that must not exist.

    `sources` are names of the catalogue, by default `default_sources`. With `keep_all` only repeated documents are
    dropped, no paragraphs. `say` is told of every source.
    """
    names = _chosen(sources, permissive_only=permissive_only, code=code)
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another folder or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed build that had the same process number
    partial.mkdir()
    try:
        filters = Filters(keep_all=keep_all)
        entries = {}
        for name in names:
            say(f"{name}: reading")
            entries[name] = _build_source(name, CORPUS[name], partial, filters, permissive_only=permissive_only)
            say(f"{name}: {describe(entries[name])}")
        manifest = {
            "bankwise_corpus": 1,
            "filters": {"paragraphs": not keep_all, "compression_cut_at_either_end": 0 if keep_all else CUT},
            "permissive_only": permissive_only,
            "documents": sum(entry["documents"] for entry in entries.values()),
            "bytes": sum(entry["bytes"] for entry in entries.values()),
            "sources": entries,
        }
        write_json(partial / MANIFEST, manifest)
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def describe(entry: dict[str, Any]) -> str:
    """One line on a source of a manifest."""
    held_out = f", {len(entry['held_out'])} always held out" if entry["held_out"] else ""
    return (
        f"{entry['documents']} documents{held_out}, {entry['bytes'] / 1e6:.1f} MB "
        f"({entry['dropped']['bytes'] / 1e6:.1f} MB dropped), {entry['package']} {entry['version']}, "
        f"{entry['licence']}"
    )


def _chosen(sources: Sequence[str], *, permissive_only: bool, code: bool) -> list[str]:
    unknown = [name for name in sources if name not in CORPUS]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} is not a known source; choose from {', '.join(CORPUS)}")
    if sources and code:
        raise ConfigError("--code adds to the default sources; with --sources name stdlib and installed there")
    bound = [name for name in sources if not CORPUS[name].is_permissive]
    if permissive_only and bound:
        raise ConfigError(f"{', '.join(bound)} has no permissive licence; drop it or --permissive-only")
    chosen = sources or default_sources(permissive_only=permissive_only, code=code)
    return [name for name in CORPUS if name in chosen]


def _build_source(
    name: str, source: CorpusSource, folder: Path, filters: Filters, *, permissive_only: bool
) -> dict[str, Any]:
    """Write one source; returns its entry in the manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        package = source.fetch(Path(scratch) / "package")
        read = [replace(document, source=source.origin) for document in source.read(package.root)]
    licences = {document.id: source.licence_of(document.id) for document in read} if source.licence_of else {}
    if permissive_only and licences:
        read = [document for document in read if is_permissive(licences[document.id])]
    documents, dropped = filters.apply(read, is_code=source.is_code)
    if not documents:
        raise DataError(f"{name}: {package.name} {package.version} holds no text; leave it out of --sources")
    path = folder / f"{name}.jsonl"
    _write(documents, path)
    entry = {
        "file": path.name,
        "sha256": file_sha256(path),
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "held_out": [document.id for document in documents if document.held_out],
        "licence": source.licence,
        "permissive": source.is_permissive,
        "package": package.name,
        "version": package.version,
        "package_sha256": package.sha256,
        "origin": source.origin,
        "dropped": asdict(dropped),
    }
    if licences:
        entry["licences"] = {document.id: licences[document.id] for document in documents}
    return entry


def _write(documents: Sequence[Document], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {
                "id": document.id,
                "text": document.text,
                ORIGIN_FIELD: document.source,
                HELD_OUT_FIELD: document.held_out,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
