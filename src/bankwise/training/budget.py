"""What training costs, from configs alone: parameters and FLOPs of a stage. Pure functions; no weights are loaded.

FLOPs are two for each multiply-add of a matrix product, forward and backward, of the products that the training code
runs (tests/training/test_budget.py counts them on a real model). Attention counts the tokens that a token may attend
to, half of the row on average; a kernel that computes the whole square and masks it does twice that. Element-wise work,
clipping, the optimiser, the routing telemetry and the measurements before and after training are not counted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bankwise.config import SparsityConfig, Stage
from bankwise.models.cost import MatrixSizes, head_size, matrix_sizes, sparsity_of
from bankwise.training.optimizer import select_trained


@dataclass(frozen=True, kw_only=True)
class TrainedParameters:
    """Parameters that a stage trains, by their group in the optimiser."""

    model: int
    predictor: int

    @property
    def total(self) -> int:
        return self.model + self.predictor


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of one training token."""

    forward: int
    backward: int
    recompute: int
    """Second forward of the layers under gradient checkpointing."""
    attention: int
    """Of the above, the part that grows with the length of the rows."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


def meta_model(config: Any) -> nn.Module:
    """The causal LM of a config on the meta device: names and shapes of all parameters, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_parameters(model: nn.Module, stage: Stage) -> TrainedParameters:
    """Parameters of `model` that the stage trains; sets which ones require gradients."""
    select_trained(model, stage)
    trained = [(name, value.numel()) for name, value in model.named_parameters() if value.requires_grad]
    predictor = sum(count for name, count in trained if ".mlp.predictor." in name)
    return TrainedParameters(model=sum(count for _, count in trained) - predictor, predictor=predictor)


def token_flops(config: Any, stage: Stage) -> TokenFlops:
    """FLOPs of one token in the stage, of a sparse model or of a dense companion."""
    sparsity, sizes = sparsity_of(config), matrix_sizes(config)
    counts = _Counts(2 * _visible_tokens(config, stage.seq_len) * config.num_attention_heads * head_size(config) * 2)
    trains_all, checkpointing = stage.trains == "all", stage.gradient_checkpointing
    # Of the hidden states at the point of the forward pass that is reached: the embedding comes first, and under
    # checkpointing transformers asks for the gradient of its output whatever is trained.
    has_gradient = trains_all or checkpointing
    for layer in range(config.num_hidden_layers):
        before = counts.forward
        routed = sparsity if sparsity is not None and layer not in sparsity.dense_layers else None
        in_scope = stage.trained_layer in (None, layer)
        trains_ffn = in_scope and stage.trains != "predictor"
        reaches = routed is not None and _lm_reaches_predictor(routed)
        from_lm = reaches and in_scope
        counts.attend(sizes, trained=trains_all, has_gradient=has_gradient)
        counts.feed_forward(sizes, trained=trains_ffn, has_gradient=has_gradient, router_gradient=from_lm)
        if routed is not None:
            counts.route(sizes, trained=from_lm, has_gradient=has_gradient and reaches)
            if stage.aux_weight and routed.predictor_grad != "lm":
                counts.auxiliary(sizes, trained=in_scope, every=max(1, round(1 / stage.aux_token_fraction)))
        has_gradient = has_gradient or trains_ffn or from_lm
        if checkpointing:
            # It stops at the last product whose input is needed, which is that of `down`.
            counts.recompute += counts.forward - before - 2 * sizes.down
            counts.attention += counts.square
    counts.multiply(sizes.head, trained=trains_all, has_gradient=has_gradient)
    return TokenFlops(
        forward=round(counts.forward),
        backward=round(counts.backward),
        recompute=round(counts.recompute),
        attention=round(counts.attention),
    )


def teacher_flops(config: Any, stage: Stage) -> int:
    """FLOPs of a teacher on one token: a forward pass of the dense model."""
    return 0 if not stage.has_teacher else token_flops(config, stage).forward


class _Counts:
    """FLOPs of one token, added up along the forward pass."""

    def __init__(self, square: float) -> None:
        self.square = square
        self.forward = self.backward = self.recompute = self.attention = 0.0

    def multiply(self, weights: float, *, trained: bool, has_gradient: bool) -> None:
        self.forward += 2 * weights
        self.backward += 2 * weights * (trained + has_gradient)

    def attend(self, sizes: MatrixSizes, *, trained: bool, has_gradient: bool) -> None:
        self.multiply(sizes.attention, trained=trained, has_gradient=has_gradient)
        self.forward += self.square
        self.backward += 2 * self.square * has_gradient
        self.attention += self.square * (1 + 2 * has_gradient)

    def feed_forward(self, sizes: MatrixSizes, *, trained: bool, has_gradient: bool, router_gradient: bool) -> None:
        self.multiply(sizes.gate_up, trained=trained, has_gradient=has_gradient)
        self.multiply(sizes.down, trained=trained, has_gradient=has_gradient or trained or router_gradient)

    def route(self, sizes: MatrixSizes, *, trained: bool, has_gradient: bool) -> None:
        self.multiply(sizes.reduce, trained=trained, has_gradient=has_gradient)
        self.multiply(sizes.expand, trained=trained, has_gradient=has_gradient or trained)

    def auxiliary(self, sizes: MatrixSizes, *, trained: bool, every: int) -> None:
        """The routing loss runs the predictor once more, on every n-th token, its input detached."""
        self.multiply(sizes.reduce / every, trained=trained, has_gradient=False)
        self.multiply(sizes.expand / every, trained=trained, has_gradient=trained)


def _visible_tokens(config: Any, seq_len: int) -> float:
    """Tokens that a token attends to, mean over the row."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reach = min(seq_len, window or seq_len)
    return reach - reach * (reach - 1) / (2 * seq_len)


def _lm_reaches_predictor(sparsity: SparsityConfig) -> bool:
    return sparsity.predictor_grad != "aux" and sparsity.gate_mode not in ("detached", "hard")
