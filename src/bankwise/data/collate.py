"""Training rows into the inputs of one forward pass.

With a document mask the batch follows transformers' padding-free convention: all rows flattened into one, with the
borders of the documents (`cu_seq_lens_q`, ...), which FlashAttention and `models.document_attention` read. The size
of a batch never varies: padding at the end of a row is a document of its own, without labels. `text_places` says where
there is text; what is averaged over tokens must leave the padding out.

Shapes: R rows of T tokens, N documents (padding included).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bankwise.config import Packing
from bankwise.models.lm_loss import IGNORED_LABEL


class RowCollator:
    """Collates rows as `TrainingRows` gives them; a row without `document_lengths` is one document."""

    def __init__(self, packing: Packing) -> None:
        self.doc_mask = packing.doc_mask
        self.reset_positions = packing.reset_positions

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Inputs and labels of a causal LM, which predicts token t from those before it.

        With doc_mask [1, R * T]: no label on the first token of a document, since nothing before it belongs to it.
        Without [R, T]. `text_places`, no input of the model: int64, the places of all but the padding among the R * T;
        not there where no row has padding.
        """
        ids_RT = torch.stack([row["input_ids"] for row in rows])
        length = ids_RT.shape[1]
        documents = [row.get("document_lengths", torch.tensor([length])).long() for row in rows]
        labels_RT = ids_RT.clone()
        for labels_T, lengths in zip(labels_RT, documents, strict=True):
            labels_T[int(lengths.sum()) :] = IGNORED_LABEL
        is_text = torch.arange(length) < torch.stack([lengths.sum() for lengths in documents])[:, None]
        text = {} if is_text.all() else {"text_places": is_text.flatten().nonzero().flatten()}
        if not self.doc_mask:
            return {"input_ids": ids_RT, "labels": labels_RT, **text}

        padded = [_with_padding(lengths, length) for lengths in documents]
        lengths_N = torch.cat(padded)
        ends_N = lengths_N.cumsum(0)
        starts_N = ends_N - lengths_N
        labels_T = labels_RT.flatten()
        labels_T[starts_N] = IGNORED_LABEL
        if self.reset_positions:
            positions_T = torch.arange(labels_T.numel()) - starts_N.repeat_interleave(lengths_N)
        else:
            positions_T = torch.arange(length).repeat(len(rows))
        borders = torch.cat([torch.zeros(1, dtype=torch.long), ends_N]).int()
        longest = int(lengths_N.max())
        return {
            "input_ids": ids_RT.view(1, -1),
            "labels": labels_T[None],
            "position_ids": positions_T[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
            **text,
        }


def _with_padding(lengths: Tensor, row_length: int) -> Tensor:
    """The lengths that cover a whole row: of its documents, and of the padding behind them."""
    padding = row_length - lengths.sum()
    return torch.cat([lengths, padding[None]]) if padding else lengths
