"""Causal attention within each document of a packed row, as an attention function of transformers.

`cu_seq_lens_q` holds the borders of the documents (`data.collate`). Each document goes through
`scaled_dot_product_attention` on its own, so the cost is that of the documents and no [T, T] mask is ever made, not for
a sliding window either. Without borders this is causal attention over the whole row, with or without a cache.

Shapes: H query heads, T tokens of the flattened batch, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from bankwise.errors import ConfigError

NAME = "documents"
_REPLACED = ("sdpa", "eager")
_LARGEST_BLOCK = 1024  # queries that share one mask under a sliding window


def check_document_attention(model: PreTrainedModel) -> None:
    """Refuse an attention implementation that cannot keep the documents of a row apart."""
    name = model.config._attn_implementation
    if name not in _REPLACED and not is_flash_attention_requested(requested_attention_implementation=name):
        raise ConfigError(
            f"attn_implementation={name!r} cannot keep the documents of a row apart; load the model with sdpa or "
            "flash_attention_2, or set packing.doc_mask: false"
        )


@contextmanager
def document_attention(*models: PreTrainedModel) -> Iterator[None]:
    """While it is active, `models` attend within documents where their inputs have `cu_seq_lens_q`.

    It has to be active in the backward pass too, which runs layers again under gradient checkpointing. Models with
    FlashAttention keep it: it reads the same inputs.
    """
    for model in models:
        check_document_attention(model)
    replaced = [(model.config, model.config._attn_implementation) for model in models]
    try:
        for config, name in replaced:
            if name in _REPLACED:
                config._attn_implementation = NAME
        yield
    finally:
        for config, name in replaced:
            config._attn_implementation = name


def attend_within_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention output [1, T, H, D] of query [1, H, T, D] and key and value (perhaps of fewer heads)."""
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if cu_seq_lens_q is None:
        return _causal(module, query, key, value, sliding_window, settings), None
    return _by_document(module, query, key, value, sliding_window, cu_seq_lens_q, settings), None


@torch.compiler.disable
def _by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    borders: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    lengths = _document_lengths(borders)
    # One split, not many slices: the backward pass of a slice writes zeros for all other documents.
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_causal(module, q, k, v, window, settings) for q, k, v in documents], dim=1)


@lru_cache(maxsize=2)
def _document_lengths(borders: Tensor) -> list[int]:
    # All layers get the same tensor, so an accelerator is waited for once in a pass and not once in a layer.
    return borders.diff().tolist()


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, settings: dict[str, Any]
) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return sdpa_attention_forward(module, query, key, value, None, **settings)[0]
    block = min(max(window, 64), _LARGEST_BLOCK)
    outputs = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first = max(0, begin - window + 1)
        back = torch.arange(begin, end, device=query.device)[:, None] - torch.arange(first, end, device=query.device)
        mask = (back >= 0) & (back < window)
        outputs.append(
            sdpa_attention_forward(
                module, query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end], mask[None, None],
                **settings,
            )[0]
        )  # fmt: skip
    return torch.cat(outputs, dim=1)


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **settings: Any) -> Tensor | None:
    """No mask for whole rows, which the attention function masks itself; sdpa's for padded or cached ones."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **settings)


AttentionInterface.register(NAME, attend_within_documents)
AttentionMaskInterface.register(NAME, _mask)
