"""Documents into rows of equal length: which piece of which document goes where.

Works on lengths alone and gives index arrays, so it costs no memory for tokens. Deterministic; pieces of one row stand
in the order of their documents. Every token of every document is in exactly one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Ints = np.ndarray


@dataclass(frozen=True)
class PackedRows:
    """Rows of `seq_len` positions, as pieces of documents; what a row's pieces leave free is padding."""

    seq_len: int
    documents: Ints
    """Document of each piece; the pieces of a row follow one another."""
    starts: Ints
    """First token of each piece within its document."""
    lengths: Ints
    """Tokens of each piece."""
    borders: Ints
    """First piece of each row, and the number of pieces at the end."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def tokens(self) -> int:
        """Positions that hold a token; the others are padding."""
        return int(self.lengths.sum())

    @property
    def padding(self) -> float:
        """Share of the positions that is padding."""
        return 1 - self.tokens / (len(self) * self.seq_len) if len(self) else 0.0

    def take(self, rows: Ints) -> "PackedRows":
        """The named rows, in that order."""
        counts = np.diff(self.borders)[rows]
        borders = np.concatenate([[0], np.cumsum(counts)])
        pieces = np.repeat(self.borders[rows] - borders[:-1], counts) + np.arange(borders[-1])
        return PackedRows(self.seq_len, self.documents[pieces], self.starts[pieces], self.lengths[pieces], borders)

    def of_documents(self, documents: Ints) -> "PackedRows":
        """The same rows, where document i of the packing was document `documents[i]`."""
        return PackedRows(self.seq_len, documents[self.documents], self.starts, self.lengths, self.borders)


def pack(lengths: Ints, seq_len: int, mode: Literal["best_fit", "concat_split", "none"]) -> PackedRows:
    """Rows of all documents, given their lengths (each at least 1) in the order in which they are to be packed."""
    modes: dict[str, Callable[[Ints, int], PackedRows]] = {
        "best_fit": best_fit, "concat_split": concat_split, "none": one_piece_per_row
    }  # fmt: skip
    return modes[mode](np.asarray(lengths, dtype=np.int64), seq_len)


def best_fit(lengths: Ints, seq_len: int) -> PackedRows:
    """Documents are cut only where they are longer than a row; best-fit-decreasing places what is shorter.

    From the longest piece down, each goes into the row with the least room that still takes it, else into a new row.
    """
    documents, starts, sizes = _cut(lengths, seq_len)
    rows_by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set while some row has room for r tokens: the best fit is the lowest set bit from `size` up
    row_of_piece = np.empty(len(sizes), dtype=np.int64)
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, num_rows
            num_rows += 1
        rest = room - size
        if rest:
            rows_by_room[rest].append(row)
            rooms |= 1 << rest
        row_of_piece[piece] = row
    return _by_row(seq_len, documents, starts, sizes, row_of_piece)


def concat_split(lengths: Ints, seq_len: int) -> PackedRows:
    """Documents are joined and cut every `seq_len` tokens; only the last row can have padding."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(seq_len, total, seq_len))
    begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64)
    documents = np.searchsorted(ends, begins, side="right")
    return _by_row(seq_len, documents, begins - (ends - lengths)[documents], cuts - begins, begins // seq_len)


def one_piece_per_row(lengths: Ints, seq_len: int) -> PackedRows:
    """Every document has rows of its own: one that is longer than a row is cut, and the last row is padded."""
    documents, starts, sizes = _cut(lengths, seq_len)
    return PackedRows(seq_len, documents, starts, sizes, np.arange(len(sizes) + 1))


def join(parts: Sequence[PackedRows]) -> PackedRows:
    """The rows of all parts, one part after the other."""
    offsets = np.cumsum([0, *(len(part.documents) for part in parts)])
    borders = [part.borders[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    return PackedRows(
        parts[0].seq_len,
        np.concatenate([part.documents for part in parts]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([*borders, offsets[-1:]]),
    )


def _cut(lengths: Ints, seq_len: int) -> tuple[Ints, Ints, Ints]:
    """Document, start and size of pieces of at most `seq_len` tokens; only the last piece of a document is shorter."""
    counts = -(-lengths // seq_len)
    documents = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    starts = (np.arange(len(documents)) - first_piece[documents]) * seq_len
    return documents, starts, np.minimum(lengths[documents] - starts, seq_len)


def _by_row(seq_len: int, documents: Ints, starts: Ints, sizes: Ints, row_of_piece: Ints) -> PackedRows:
    order = np.argsort(row_of_piece, kind="stable")
    borders = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])
    return PackedRows(seq_len, documents[order], starts[order], sizes[order], borders)
