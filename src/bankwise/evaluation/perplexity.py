"""Held-out loss and perplexity on fixed token windows, the same ones for every model.

Shapes: W windows, S tokens of a window.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bankwise.errors import ConfigError
from bankwise.ffn import SparseSwiGLU, sparse_layers
from bankwise.models.lm_loss import chunked_lm_loss


@dataclass
class LossResult:
    """Mean loss in nats per predicted token, over windows."""

    loss: float
    perplexity: float
    standard_error: float
    """Of the loss, over windows (windows of one document are not independent)."""
    n: int
    """Windows."""
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, windows_WS: Tensor, *, batch_size: int = 4, bf16: bool = False, progress: str | None = None
) -> Tensor:
    """losses_W (float64): mean negative log likelihood of tokens 2..S of each window, in nats."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and windows_WS.shape[1] > context:
        raise ConfigError(f"windows of {windows_WS.shape[1]} tokens are longer than the model's context of {context}")
    was_training = model.training
    model.eval()
    losses = []
    try:
        for batch_WS in tqdm(
            windows_WS.split(batch_size), desc=progress, unit="batch", disable=progress is None, leave=False
        ):
            batch_WS = batch_WS.to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                hidden_WSD = model.model(batch_WS, use_cache=False).last_hidden_state
                losses += [
                    chunked_lm_loss(hidden_SD[:-1], model.lm_head.weight, tokens_S[1:], chunk_size=256).cross_entropy
                    for hidden_SD, tokens_S in zip(hidden_WSD, batch_WS, strict=True)
                ]
    finally:
        model.train(was_training)
    return torch.stack(losses).double().cpu() / (windows_WS.shape[1] - 1)


def perplexity(
    model: PreTrainedModel,
    windows: Mapping[str, Tensor],
    *,
    batch_size: int = 4,
    bf16: bool = False,
    progress: str | None = None,
) -> LossResult:
    """Loss over the windows of all sources together, and for each source alone."""
    losses = {
        source: window_losses(model, windows_WS, batch_size=batch_size, bf16=bf16, progress=progress)
        for source, windows_WS in windows.items()
    }
    total = _summary(torch.cat(list(losses.values())))
    return LossResult(**total, by_source={source: _summary(losses_W) for source, losses_W in losses.items()})


def _summary(losses_W: Tensor) -> dict[str, Any]:
    count = losses_W.numel()
    error = (losses_W.std() / math.sqrt(count)).item() if count > 1 else float("nan")
    loss = losses_W.mean().item()
    return {"loss": loss, "perplexity": math.exp(loss), "standard_error": error, "n": count}


@torch.no_grad()
def active_fraction(model: PreTrainedModel, windows_WS: Tensor) -> float:
    """Share of all FFN channels that a token reads, counted from the masks of a forward pass; 1.0 for a dense model."""
    counted = [0, 0]

    def count(layer: SparseSwiGLU, arguments: tuple[Tensor, ...]) -> None:
        mask = layer.active_mask(arguments[0])
        counted[0] += int(mask.sum())
        counted[1] += mask.numel()

    hooks = [layer.register_forward_pre_hook(count) for layer in sparse_layers(model)]
    was_training = model.training
    model.eval()  # training mode would move the running means
    try:
        model.model(windows_WS.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    dense_layers = model.config.num_hidden_layers - len(hooks)
    if not hooks:
        return 1.0
    sparse_share = counted[0] / counted[1]
    return (sparse_share * len(hooks) + dense_layers) / model.config.num_hidden_layers
