"""Held-out loss on fixed token windows, the same ones for every model, and its distance from the dense model's.

Shapes: W windows, S tokens of a window, T = S - 1 predicted tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bankwise.errors import ConfigError
from bankwise.ffn import SparseSwiGLU, record_routing, sparse_layers
from bankwise.precision import bf16_autocast

_LOGIT_ROWS = 256  # tokens whose logits exist at one time


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


class TokenLosses(NamedTuple):
    """What one window's predicted tokens cost, float64 on the CPU."""

    nll_T: Tensor
    """Negative log likelihood, nats."""

    kl_T: Tensor | None
    """KL(reference || model), nats; None without a reference."""

    agrees_T: Tensor | None
    """bool: model and reference have the same most likely token."""


class Reference(NamedTuple):
    """A model's predictions on the windows, as its last hidden states and its head: small, where logits are not."""

    hidden: dict[str, list[Tensor]]
    """By source, one [S, D] per window, on the CPU."""

    head_VD: Tensor


@torch.no_grad()
def token_losses(
    hidden_SD: Tensor, head_VD: Tensor, tokens_S: Tensor, reference: tuple[Tensor, Tensor] | None = None
) -> TokenLosses:
    """Losses of tokens 2..S of a window from the hidden states of a forward pass, a chunk of logits at a time.

    `reference`: hidden states [S, D'] and head [V, D'] of the model to compare with. Products run in the autocast
    dtype where autocast is on, like the model's own head.
    """
    device = hidden_SD.device
    nll, kl, agrees = [], [], []
    for start in range(0, tokens_S.numel() - 1, _LOGIT_ROWS):
        part = slice(start, min(start + _LOGIT_ROWS, tokens_S.numel() - 1))
        log_p_CV = torch.log_softmax(torch.nn.functional.linear(hidden_SD[part], head_VD).float(), dim=-1)
        target_C1 = tokens_S[part.start + 1 : part.stop + 1, None].to(device)
        nll.append(-log_p_CV.gather(-1, target_C1).squeeze(-1))
        if reference is not None:
            other_SD, other_head_VD = reference
            states_CD = other_SD[part].to(device, other_head_VD.dtype)
            log_q_CV = torch.log_softmax(torch.nn.functional.linear(states_CD, other_head_VD).float(), dim=-1)
            agrees.append(log_p_CV.argmax(dim=-1) == log_q_CV.argmax(dim=-1))
            kl.append(torch.linalg.vecdot(log_q_CV.exp(), log_q_CV.sub_(log_p_CV)))
    return TokenLosses(
        torch.cat(nll).double().cpu(),
        torch.cat(kl).double().cpu() if kl else None,
        torch.cat(agrees).cpu() if agrees else None,
    )


@torch.no_grad()
def window_states(
    model: PreTrainedModel, windows_WS: Tensor, *, batch_size: int = 4, bf16: bool = False, progress: str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [S] and last hidden states [S, D] of each window, in evaluation mode."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and windows_WS.shape[1] > context:
        raise ConfigError(f"windows of {windows_WS.shape[1]} tokens are longer than the model's context of {context}")
    was_training = model.training
    model.eval()
    try:
        for batch_WS in tqdm(
            windows_WS.split(batch_size), desc=progress, unit="batch", disable=progress is None, leave=False
        ):
            batch_WS = batch_WS.to(model.device)
            with bf16_autocast(model.device, enabled=bf16):
                hidden_WSD = model.model(batch_WS, use_cache=False).last_hidden_state
            yield from zip(batch_WS, hidden_WSD, strict=True)
    finally:
        model.train(was_training)


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, windows_WS: Tensor, *, batch_size: int = 4, bf16: bool = False, progress: str | None = None
) -> Tensor:
    """losses_W (float64): mean negative log likelihood of tokens 2..S of each window, in nats."""
    losses = []
    for tokens_S, hidden_SD in window_states(model, windows_WS, batch_size=batch_size, bf16=bf16, progress=progress):
        with bf16_autocast(model.device, enabled=bf16):
            losses.append(token_losses(hidden_SD, model.lm_head.weight, tokens_S).nll_T.mean())
    return torch.stack(losses)


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


def perplexity_and_recall(
    model: PreTrainedModel, windows: Mapping[str, Tensor], *, batch_size: int = 4, bf16: bool = False
) -> tuple[LossResult, float | None]:
    """`perplexity`, and the share of the bank oracle's channels that the model reads: mean over the tokens and sparse
    layers of the same pass; None for a model without sparse layers."""
    with record_routing(model, with_loss=False) as record:
        result = perplexity(model, windows, batch_size=batch_size, bf16=bf16)
    if not record.recalls:
        return result, None
    batches = [batch_WS.numel() for windows_WS in windows.values() for batch_WS in windows_WS.split(batch_size)]
    weight_N = torch.tensor(batches, dtype=torch.float64) / sum(batches)
    recall_N = torch.stack(record.recalls).double().cpu().view(len(batches), -1).mean(dim=1)
    return result, (recall_N * weight_N).sum().item()


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
