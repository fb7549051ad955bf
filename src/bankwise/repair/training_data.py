"""What a repair learns from: long natural text and synthetic aggregation tasks. The common-words task is held out.

Shapes: W windows, S tokens of a window, D hidden, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.data import mixed_windows, token_windows
from bankwise.data.aggregation import aggregation_documents
from bankwise.data.positions import buckets_below
from bankwise.repair.changes import find_layer


def training_windows(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_windows: int,
    data: Sequence[DataSource],
    held_out_fraction: float,
    seed: int,
) -> Tensor:
    """Windows [W, S], half of them natural text (of the training split), half aggregation; without `data` all."""
    natural = num_windows // 2 if data else 0
    synthetic = num_windows - natural
    documents = aggregation_documents(tokenizer, seq_len=seq_len, count=synthetic, seed=seed)
    parts: list[Tensor] = [token_windows(documents, tokenizer, seq_len=seq_len, max_windows=synthetic, seed=seed)]
    if natural:
        parts.append(
            mixed_windows(
                data,
                tokenizer,
                seq_len=seq_len,
                num_windows=natural,
                split="train",
                held_out_fraction=held_out_fraction,
                seed=seed,
            )
        )
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def ffn_inputs(model: PreTrainedModel, layer: int, windows_WS: Tensor, *, batch_tokens: int) -> Tensor:
    """x [W, S, D]: what the feed-forward of a layer reads in each window."""
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = find_layer(model, layer).register_forward_pre_hook(keep)
    try:
        for batch_WS in windows_WS.split(max(1, batch_tokens // windows_WS.shape[1])):
            model.model(batch_WS.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return torch.cat(seen)


def stratified(inputs_WSD: Tensor, per_bucket: int, seed: int) -> Tensor:
    """x [T, D], equally many tokens of each position bucket that the windows reach, in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for first, end in buckets_below(inputs_WSD.shape[1]).values():
        bucket_TD = inputs_WSD[:, first:end].flatten(0, 1)
        parts.append(bucket_TD[torch.randperm(len(bucket_TD), generator=generator)[:per_bucket]])
    chosen_TD = torch.cat(parts)
    return chosen_TD[torch.randperm(len(chosen_TD), generator=generator)]
