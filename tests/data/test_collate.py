"""One batch from rows: borders, positions and labels of their documents."""

import pytest
import torch

from bankwise.config import Packing
from bankwise.data import RowCollator
from bankwise.errors import ConfigError

ROWS = [
    {"input_ids": torch.arange(10, 18), "document_lengths": torch.tensor([3, 5])},
    {"input_ids": torch.arange(20, 28), "document_lengths": torch.tensor([4, 1])},  # ends in padding
]


def test_a_masked_batch_is_flat_with_the_borders_of_its_documents():
    batch = RowCollator(Packing())(ROWS)
    x = -100
    assert batch["input_ids"].tolist() == [[*range(10, 18), *range(20, 28)]]
    assert batch["labels"].tolist() == [[x, 11, 12, x, 14, 15, 16, 17, x, 21, 22, 23, x, x, x, x]]
    assert batch["position_ids"].tolist() == [[*range(8), *range(8)]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 8, 12, 13, 16]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 5


def test_positions_can_count_within_documents():
    batch = RowCollator(Packing(reset_positions=True))(ROWS)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1, 2]]
    with pytest.raises(ConfigError, match="doc_mask: true"):
        Packing(reset_positions=True, doc_mask=False)


def test_an_unmasked_batch_keeps_its_rows_and_has_no_label_on_padding():
    batch = RowCollator(Packing(doc_mask=False))(ROWS)
    assert set(batch) == {"input_ids", "labels", "text_places"}
    assert batch["input_ids"].tolist() == [[*range(10, 18)], [*range(20, 28)]]
    assert batch["labels"].tolist() == [[*range(10, 18)], [*range(20, 25), -100, -100, -100]]
    assert ROWS[1]["input_ids"].tolist() == [*range(20, 28)], "the row itself is left alone"


@pytest.mark.parametrize("doc_mask", [True, False])
def test_a_batch_says_which_of_its_tokens_are_text_where_there_is_padding(doc_mask):
    collate = RowCollator(Packing(doc_mask=doc_mask))
    assert collate(ROWS)["text_places"].tolist() == [*range(8), *range(8, 13)]
    assert collate(ROWS[::-1])["text_places"].tolist() == [*range(5), *range(8, 16)]
    assert "text_places" not in collate(ROWS[:1])


def test_a_row_without_lengths_is_one_document():
    batch = RowCollator(Packing())([{"input_ids": torch.arange(4)}, {"input_ids": torch.arange(4)}])
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8]
    assert batch["labels"].tolist() == [[-100, 1, 2, 3, -100, 1, 2, 3]]
