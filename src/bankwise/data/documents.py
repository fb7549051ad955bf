"""A document, and the split of documents into training and held-out text.

A document is a speech, a topic, a file or a row. Its side of the split depends on a hash of its id alone, so it stays
on that side when documents are added, removed or reordered - unless a source has so few that one side would be empty.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bankwise.errors import ConfigError, DataError

_BORDERS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"\s+"))


@dataclass(frozen=True)
class Document:
    """One text that belongs together."""

    id: str
    """Stable within its source: file name, topic, or a hash of the text where rows have no name."""

    text: str
    """The text, never blank."""

    source: str = ""
    """Name of the source that a corpus took it from, so that it is on the same side of the split when it is read from
    there; empty: the source that it is read from."""

    held_out: bool = False
    """Never trained on, whatever the share that is held out."""


def row_id(text: str) -> str:
    """Id of a row without a name: a hash of its text, since row numbers change when rows are added."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_documents(
    documents: Sequence[Document], held_out_fraction: float, source_name: str
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents in their order; of each source neither is empty.

    A document is held out when it says so, or when the sha256 of `source_name/id`, as a number in [0, 1), is below
    `held_out_fraction`. Where that leaves one side empty, the document nearest to the border changes sides. A single
    document is cut at a paragraph border instead: its last part is held out. A source whose documents all say that
    they are held out has no training documents.
    """
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={held_out_fraction} is outside (0, 1)")
    if not documents:
        raise DataError(f"{source_name} has no documents to split")
    sources: dict[str, list[Document]] = {}
    for document in documents:
        sources.setdefault(document.source or source_name, []).append(document)
    train: list[Document] = []
    held_out: list[Document] = []
    for name, own in sources.items():
        first, last = _split_source(own, held_out_fraction, name)
        train += first
        held_out += last
    return train, held_out


def _split_source(documents: list[Document], fraction: float, name: str) -> tuple[list[Document], list[Document]]:
    fixed = {index for index, document in enumerate(documents) if document.held_out}
    free = [index for index in range(len(documents)) if index not in fixed]
    if len(documents) == 1 and free:
        first, last = _cut(documents[0], fraction, name)
        return [first], [last]
    places = {index: _place(f"{name}/{documents[index].id}") for index in free}
    held_out = fixed | {index for index, place in places.items() if place < fraction}
    if not held_out:
        held_out = {min(free, key=places.__getitem__)}
    elif len(held_out) == len(documents) and free:
        held_out.remove(max(free, key=places.__getitem__))
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [document for index, document in enumerate(documents) if index in held_out],
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _cut(document: Document, held_out_fraction: float, source_name: str) -> tuple[Document, Document]:
    """The first part and the last `held_out_fraction` of a text, cut between paragraphs, else lines, else words."""
    text = document.text
    target, tolerance = len(text) * (1 - held_out_fraction), len(text) * held_out_fraction / 2
    inside = (len(text) - len(text.lstrip()), len(text.rstrip()))
    for border in _BORDERS:
        cuts = [match.end() for match in border.finditer(text, *inside)]
        cut = min((cut for cut in cuts if inside[0] < cut < inside[1]), key=lambda c: abs(c - target), default=None)
        if cut is not None and (border is _BORDERS[-1] or abs(cut - target) <= tolerance):
            return (
                Document(f"{document.id}#train", text[:cut], document.source),
                Document(f"{document.id}#held_out", text[cut:], document.source),
            )
    raise DataError(f"{source_name} is one document of a single word, so nothing can be held out; add more text")
