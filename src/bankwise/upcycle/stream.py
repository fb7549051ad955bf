"""Hidden states of the calibration text, one decoder layer at a time, for any of the supported families."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.ffn import SparseSwiGLU
from bankwise.precision import bf16_autocast, multiplies_bf16

_CHECK_SHARE = 8
_CHECK_TOKENS = 4096


def check_windows(windows: Tensor) -> Tensor:
    """The last eighth of the calibration windows: they measure the fit instead of being fitted."""
    return windows[-max(1, len(windows) // _CHECK_SHARE) :]


class HiddenStream:
    """Hidden states of all calibration windows, advanced one decoder layer at a time."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, stream: str, batch: int = 4) -> None:
        self.batch = batch
        self.stream = stream
        # Three times faster than float32 on a CPU with bfloat16 products, and the fit does not see the difference
        # (docs/research-log.md).
        self.dtype = torch.bfloat16 if multiplies_bf16(model.device.type) else model.dtype
        windows = windows.to(model.device)
        self.num_check = len(check_windows(windows)) if len(windows) > 1 else 0
        self.block_arguments: dict[nn.Module, dict[str, Any]] = {}
        self._catch_arguments(model, windows[:1])
        self.states = [model.model.embed_tokens(part) for part in windows.split(batch)]
        self.ffn_input: list[Tensor] = []

    def _catch_arguments(self, model: PreTrainedModel, window: Tensor) -> None:
        """What the model passes to each decoder layer (masks, positions); windows are unpadded and of one length."""

        def catch(block: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
            kept = {name: value for name, value in arguments.items() if name != "hidden_states"}
            self.block_arguments[block] = kept | {"past_key_values": None, "use_cache": False}

        hooks = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in model.model.layers]
        try:
            model.model(window, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def ffn_inputs(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        """Run the block's attention; return FFN inputs [T, D] to fit on and to check on."""
        layer, tap = block.mlp, _Tap()
        block.mlp = tap
        try:
            with bf16_autocast(self.states[0].device):
                self.states = [block(state, **self.block_arguments[block]) for state in self.states]
        finally:
            block.mlp = layer
        self.ffn_input = [value.to(self.dtype) for value in tap.seen]
        windows = torch.cat(self.ffn_input)
        check = windows[len(windows) - self.num_check :] if self.num_check else windows
        return windows[: len(windows) - self.num_check].flatten(0, 1), check.flatten(0, 1)[:_CHECK_TOKENS]

    def advance(self, block: nn.Module, layer: nn.Module) -> None:
        """Add the FFN's output to the states: the sparse one, or the dense one where `stream` is dense."""
        if not self.ffn_input:
            self.ffn_inputs(block)
        with bf16_autocast(self.states[0].device):
            for position, x in enumerate(self.ffn_input):
                if self.stream == "sparse" or not isinstance(layer, SparseSwiGLU):
                    output = layer(x)
                else:
                    output = layer.down_proj(layer.dense_activation(x))
                self.states[position] = self.states[position] + output
        self.ffn_input = []


class _Tap(nn.Module):
    """Stands in for an FFN: keeps its input and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return torch.zeros_like(x)
