"""Language-model loss without full logits: cross entropy and distillation, a chunk of tokens at a time.

32K tokens times a 152K vocabulary are 20 GB of float32 logits. `chunked_lm_loss` never holds more than one chunk of
them: it computes the gradients of the hidden states and of the head in the forward pass, chunk by chunk.
`lm_loss_reference` is the definition.

Shapes: T tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100


class LogitLoss(NamedTuple):
    """Of one chunk: float32 sums over its tokens, and the gradient [C, V] of ce_weight * CE + kd_weight * KL."""

    cross_entropy: Tensor
    distillation: Tensor
    gradient: Tensor | None


fast_logit_loss: Callable[[Tensor, Tensor, Tensor | None, float, float, bool], LogitLoss | None] | None = None
"""Set by `bankwise.kernels`: `logit_loss` in one operator, or None where it has to run as it is."""


class LMLoss(NamedTuple):
    """Sums over the tokens whose label is not -100; `total` carries the gradient, the parts are for the log."""

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor


def lm_loss_reference(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
) -> LMLoss:
    """ce_weight * CE + kd_weight * KL(teacher || student), both in nats, from full logits."""
    kept_T = labels_T != IGNORED_LABEL
    log_p_TV = torch.log_softmax((hidden_TD @ head_VD.T).float(), dim=-1)[kept_T]
    cross_entropy = functional.nll_loss(log_p_TV, labels_T[kept_T], reduction="sum")
    distillation = torch.zeros_like(cross_entropy)
    if kd_weight:
        assert teacher_TD is not None
        assert teacher_head_VD is not None
        log_q_TV = torch.log_softmax((teacher_TD @ teacher_head_VD.T).float(), dim=-1)[kept_T]
        distillation = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum()
    return LMLoss(ce_weight * cross_entropy + kd_weight * distillation, cross_entropy.detach(), distillation.detach())


def chunked_lm_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    chunk_size: int = 1024,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    teacher_TD: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
) -> LMLoss:
    """`lm_loss_reference` with peak extra memory chunk_size * V instead of T * V.

    Matrix products run in the autocast dtype where autocast is on, sums and softmax in float32. The first derivative
    only: double backward is not supported.
    """
    if not torch.is_grad_enabled():
        # The Function sees only requires_grad, and would compute gradients that nobody asks for.
        hidden_TD, head_VD = hidden_TD.detach(), head_VD.detach()
    kept = (labels_T != IGNORED_LABEL).nonzero().squeeze(-1)
    if kept.numel() < labels_T.numel():
        hidden_TD, labels_T = hidden_TD[kept], labels_T[kept]
        teacher_TD = None if teacher_TD is None else teacher_TD[kept]
    return LMLoss(
        *_ChunkedLMLoss.apply(
            hidden_TD, head_VD, labels_T, chunk_size, ce_weight, kd_weight, teacher_TD, teacher_head_VD
        )
    )


def logit_loss(
    logits_CV: Tensor,
    labels_C: Tensor,
    teacher_CV: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    with_gradient: bool,
) -> LogitLoss:
    """Losses of logits, softmax and sums in float32; the gradient in the logits' dtype, and perhaps in their memory."""
    if fast_logit_loss is not None and not torch.compiler.is_compiling():
        losses = fast_logit_loss(logits_CV, labels_C, teacher_CV, ce_weight, kd_weight, with_gradient)
        if losses is not None:
            return losses
    labels_C1 = labels_C[:, None]
    log_p_CV = torch.log_softmax(logits_CV.float(), dim=-1)
    cross_entropy = -log_p_CV.gather(-1, labels_C1).sum()
    distillation = torch.zeros_like(cross_entropy)
    if teacher_CV is not None:
        log_q_CV = torch.log_softmax(teacher_CV.float(), dim=-1)
        teacher_CV = log_q_CV.exp()
        distillation = torch.linalg.vecdot(teacher_CV, log_q_CV.sub_(log_p_CV)).sum()
    if not with_gradient:
        return LogitLoss(cross_entropy, distillation, None)
    grad_CV = log_p_CV.exp_().mul_(ce_weight + kd_weight)
    if teacher_CV is not None:
        grad_CV.sub_(teacher_CV, alpha=kd_weight)
    grad_CV.scatter_add_(-1, labels_C1, torch.full_like(labels_C1, -ce_weight, dtype=torch.float32))
    return LogitLoss(cross_entropy, distillation, grad_CV.to(logits_CV.dtype))


class _ChunkedLMLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        labels_T: Tensor,
        chunk_size: int,
        ce_weight: float,
        kd_weight: float,
        teacher_TD: Tensor | None,
        teacher_head_VD: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_TD.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        head = head_VD.to(compute)
        teacher_head = None if teacher_head_VD is None else teacher_head_VD.to(compute)
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=torch.float32) if needs_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        cross_entropy = torch.zeros((), device=hidden_TD.device)
        distillation = torch.zeros((), device=hidden_TD.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, labels_T.numel(), chunk_size):
                part = slice(start, start + chunk_size)
                hidden_CD = hidden_TD[part].to(compute)
                teacher_CV = None
                if kd_weight:
                    assert teacher_TD is not None
                    assert teacher_head is not None
                    teacher_CV = teacher_TD[part].to(compute) @ teacher_head.T
                losses = logit_loss(
                    hidden_CD @ head.T, labels_T[part], teacher_CV, ce_weight, kd_weight, needs_hidden or needs_head
                )
                cross_entropy += losses.cross_entropy
                distillation += losses.distillation
                if losses.gradient is None:
                    continue
                if grad_hidden_TD is not None:
                    grad_hidden_TD[part] = losses.gradient @ head
                if grad_head_VD is not None:
                    grad_head_VD += losses.gradient.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.dtypes = hidden_TD.dtype, head_VD.dtype
        total = ce_weight * cross_entropy + kd_weight * distillation
        ctx.mark_non_differentiable(cross_entropy, distillation)
        return total, cross_entropy, distillation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_head_VD = ctx.saved_tensors
        hidden_dtype, head_dtype = ctx.dtypes
        grad_hidden = None if grad_hidden_TD is None else (grad_hidden_TD * grad_total).to(hidden_dtype)
        grad_head = None if grad_head_VD is None else (grad_head_VD * grad_total).to(head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None, None
