"""Where the pieces of documents go: nothing lost, nothing twice, little room wasted."""

import time

import numpy as np
import pytest

from bankwise.data.packing import best_fit, concat_split, join, one_piece_per_row, pack

LENGTHS = np.array([5, 23, 8, 1, 16, 3, 40, 7])
SEQ_LEN = 16


def rows_of(packed):
    """Each row as a list of (document, start, length)."""
    pieces = list(zip(packed.documents.tolist(), packed.starts.tolist(), packed.lengths.tolist(), strict=True))
    return [pieces[first:end] for first, end in zip(packed.borders, packed.borders[1:], strict=False)]


def random_lengths(count, seed=0):
    return np.random.default_rng(seed).lognormal(5.5, 1.2, count).astype(np.int64) + 1


@pytest.mark.parametrize("mode", ["best_fit", "concat_split", "none"])
@pytest.mark.parametrize("lengths", [LENGTHS, np.array([1]), np.array([16]), np.array([160]), random_lengths(500)])
def test_every_token_is_in_exactly_one_row(mode, lengths):
    packed = pack(lengths, SEQ_LEN, mode)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for row in rows_of(packed):
        assert 0 < sum(length for _, _, length in row) <= SEQ_LEN
        for document, start, length in row:
            seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    assert packed.tokens == lengths.sum()
    assert packed.padding == pytest.approx(1 - lengths.sum() / (len(packed) * SEQ_LEN))


def test_best_fit_cuts_only_what_is_longer_than_a_row():
    rows = rows_of(best_fit(LENGTHS, SEQ_LEN))
    pieces = sorted(piece for row in rows for piece in row)
    assert [(d, s, n) for d, s, n in pieces if d in (1, 6)] == [
        (1, 0, 16), (1, 16, 7), (6, 0, 16), (6, 16, 16), (6, 32, 8)
    ]  # fmt: skip
    assert all((document, 0, int(LENGTHS[document])) in pieces for document in (0, 2, 3, 4, 5, 7))


def test_best_fit_takes_the_row_with_the_least_room_that_is_enough():
    # 9 and 10 open rows with room 7 and 6; 6 goes to the room of 6, 5 to that of 7, 2 to the remaining 2.
    assert rows_of(best_fit(np.array([9, 10, 6, 5, 2]), SEQ_LEN)) == [
        [(1, 0, 10), (2, 0, 6)], [(0, 0, 9), (3, 0, 5), (4, 0, 2)]
    ]  # fmt: skip


def test_best_fit_wastes_little_and_packs_100_000_documents_in_seconds():
    lengths = random_lengths(100_000)
    started = time.process_time()
    packed = best_fit(lengths, 32768)
    assert time.process_time() - started < 10
    assert packed.padding < 0.005
    assert best_fit(random_lengths(5000), 512).padding < 0.02


def test_joined_documents_leave_padding_in_the_last_row_only():
    packed = concat_split(LENGTHS, SEQ_LEN)
    sizes = [sum(length for *_, length in row) for row in rows_of(packed)]
    assert sizes == [16] * (LENGTHS.sum() // 16) + [LENGTHS.sum() % 16]
    order = [(document, start) for row in rows_of(packed) for document, start, _ in row]
    assert order == sorted(order)


def test_unpacked_rows_hold_one_document_each():
    packed = one_piece_per_row(LENGTHS, SEQ_LEN)
    assert all(len(row) == 1 for row in rows_of(packed))
    assert len(packed) == 6 + 2 + 3


def test_rows_can_be_taken_joined_and_renumbered():
    one, other = best_fit(LENGTHS, SEQ_LEN), concat_split(LENGTHS, SEQ_LEN)
    taken = one.take(np.array([3, 0, 3]))
    assert rows_of(taken) == [rows_of(one)[index] for index in (3, 0, 3)]
    assert rows_of(join([taken, other])) == rows_of(taken) + rows_of(other)
    names = np.arange(8)[::-1]
    expected = [[(7 - document, *piece) for document, *piece in row] for row in rows_of(one)]
    assert rows_of(one.of_documents(names)) == expected
