"""The feed-forward of a baseline: a dense SwiGLU, with its own weights, that reads only some of its channels.

Shapes: T leading dimensions (tokens), D hidden, F FFN channels.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from bankwise.errors import ConfigError
from bankwise.evaluation.baselines.rules import keep_large, token_keys

MaskRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gate [T, F] before the SiLU, h [T, F], weight of `down` [D, F]) -> bool mask that broadcasts to [T, F]."""


class MaskedSwiGLU(nn.Module):
    """y = Wd (mask * h): channels that the rule drops add nothing. Shares the projections of `dense`."""

    def __init__(self, dense: Any, rule: MaskRule) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self.rule = rule

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF = self.gate_proj(x_TD)
        h_TF = functional.silu(gate_TF) * self.up_proj(x_TD)
        return self.down_proj(h_TF * self.rule(gate_TF, h_TF, self.down_proj.weight))


class ThresholdedSwiGLU(nn.Module):
    """TEAL style: small inputs of each matrix are set to 0. Shares the projections of `dense`."""

    def __init__(self, dense: Any, input_threshold: float, hidden_threshold: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self.input_threshold = input_threshold
        self.hidden_threshold = hidden_threshold

    def activation(self, x_TD: Tensor) -> Tensor:
        """h [T, F] of the inputs that are large enough."""
        kept_TD = x_TD * keep_large(x_TD, threshold=self.input_threshold)
        return functional.silu(self.gate_proj(kept_TD)) * self.up_proj(kept_TD)

    def forward(self, x_TD: Tensor) -> Tensor:
        h_TF = self.activation(x_TD)
        return self.down_proj(h_TF * keep_large(h_TF, threshold=self.hidden_threshold))


class TokenKeys:
    """A key for each token of the running forward pass, from its id and its position.

    A hash of the layer's input would not do: its last bits change with the shape of the batch, and with them every
    mask. Id and position are the same in any batch, with a cache or without, and say nothing about the channels.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._position: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: PreTrainedModel) -> None:
        """Follow the forward passes of `model` until `remove` is called."""
        self._hooks = [
            model.model.register_forward_pre_hook(self._see_ids, with_kwargs=True),
            model.model.rotary_emb.register_forward_pre_hook(self._see_positions, with_kwargs=True),
        ]

    def _see_ids(self, _model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._ids = named.get("input_ids", arguments[0] if arguments else None)

    def _see_positions(self, _rotary: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._position = named["position_ids"] if "position_ids" in named else arguments[1]

    def current(self) -> Tensor:
        """int64 keys [rows, columns]."""
        if self._ids is None or self._position is None:
            raise ConfigError("random_per_token draws by token id; call the model with input_ids, not inputs_embeds")
        return token_keys(self._ids, self._position)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
