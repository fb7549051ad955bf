"""Making a model ready to decode: weights packed for the kernels, and on a CPU every linear layer through them.

`prepare` changes where the weights lie, never their values (but for int8), and neither parameter names nor what
`save_pretrained` writes. A prepared model still trains: the layers that it swaps fall back to torch's own code for
gradients, for more than eight tokens, and for any dtype or device that the operators do not take.

Shapes: T leading dimensions (tokens), I input and O output columns of a linear layer.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bankwise.errors import ConfigError, KernelError
from bankwise.ffn.layer import SparseSwiGLU, sparse_layers
from bankwise.inference.decode_layer import DECODE_LAYERS
from bankwise.kernels import dispatch
from bankwise.kernels.cpu.library import MAX_TOKENS, huge_page_tensor
from bankwise.kernels.cpu.packing import pack_int8, quantise_rows

Weights = Literal["as_is", "int8"]


class DecodeLinear(nn.Linear):
    """nn.Linear whose products of a few tokens run in the CPU operator, which reads weights at memory speed.

    torch's bfloat16 product of one token reaches a third of it (docs/kernels.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if (
            input.numel() <= MAX_TOKENS * input.shape[-1]
            and not torch.is_grad_enabled()
            and input.dtype == weight.dtype
            and weight.dtype in (torch.float32, torch.bfloat16)
            and weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.bankwise.linear(input, weight, None, self._parameters["bias"])
        return functional.linear(input, weight, self._parameters["bias"])

    @property
    def operands(self) -> tuple[Tensor, None]:
        """Matrix and scales of its rows, as the operators take them."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight, None


class Int8Linear(nn.Linear):
    """nn.Linear with int8 weights and a float32 scale per row; the float weights are released."""

    codes: Tensor
    scales: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() <= MAX_TOKENS * input.shape[-1]:
            return torch.ops.bankwise.linear(input, self.codes, self.scales, self._parameters["bias"])
        weight_OI = (self.codes * self.scales[:, None]).to(input.dtype)
        return functional.linear(input, weight_OI, self._parameters["bias"])

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Matrix and scales of its rows, as the operators take them."""
        return self.codes, self.scales


@torch.no_grad()
def prepare(model: nn.Module, *, weights: Weights = "as_is") -> list[str]:
    """Pack `model` in place for decoding on its device; returns what was done, one line per kind of layer.

    `weights="int8"` quantises the feed-forward and all other linear layers to 8 bits with one scale per row, for
    inference only: such a model can be neither trained nor saved. Where the operators cannot run, the model is left
    as it is (int8 raises). Preparing again is harmless.
    """
    if weights not in ("as_is", "int8"):
        raise ConfigError(f"weights={weights!r} is not known; use 'as_is' or 'int8'")
    operators = dispatch.operators_for(next(model.parameters()).device)
    if model.training and operators.kernel != "reference":
        operators = dispatch.Choice("reference", "the model is in training mode; call model.eval() first")
    if weights == "int8" and operators.kernel != "cpu":
        raise KernelError(f"weights='int8' needs the CPU operators: {operators.reason}")
    if operators.kernel == "reference":
        return [f"reference: {operators.reason}"]
    done: dict[str, int] = {}
    for layer in sparse_layers(model):
        kind = _prepare_ffn(layer, weights)
        done[kind] = done.get(kind, 0) + 1
    inner = {id(module) for layer in sparse_layers(model) for module in layer.modules()}
    for module in model.modules():
        if operators.kernel == "cpu" and id(module) not in inner and type(module) is nn.Linear and _is_plain(module):
            kind = _prepare_linear(module, weights)
            done[kind] = done.get(kind, 0) + 1
    for module in model.modules():
        if type(module) in DECODE_LAYERS and all(
            type(linear) in (DecodeLinear, Int8Linear)
            for linear in module.get_submodule("self_attn").children()
            if isinstance(linear, nn.Linear)
        ):
            module.__class__ = DECODE_LAYERS[type(module)]
            done["decoder layer"] = done.get("decoder layer", 0) + 1
    return [f"{count} x {kind}" for kind, count in done.items()]


def _prepare_ffn(layer: SparseSwiGLU, weights: Weights) -> str:
    if layer.packed is not None:
        if weights == "int8" and layer.packed.scales_F3 is None:
            layer.unpack()
        else:
            return "feed-forward packed already"
    probe_TD = torch.empty(1, layer.gate_proj.in_features, dtype=layer.gate_proj.weight.dtype)
    choice = dispatch.choose(layer, probe_TD.to(layer.gate_proj.weight.device))
    if choice.kernel == "reference":
        if weights == "int8":
            raise KernelError(f"layer {layer.layer} cannot use int8 weights: {choice.reason}")
        return f"feed-forward on the reference ({choice.reason})"
    if weights == "int8":
        pack_int8(layer)
        return "sparse feed-forward, int8"
    dispatch.pack_for(layer, choice)
    return "sparse feed-forward, packed"


def _is_plain(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


def _prepare_linear(linear: Any, weights: Weights) -> str:
    if weights == "int8":
        linear.codes, linear.scales = quantise_rows(linear.weight)
        linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
        linear.__class__ = Int8Linear
        return "linear layer, int8"
    paged_OI = huge_page_tensor(*linear.weight.shape, dtype=linear.weight.dtype)
    linear.weight.data = paged_OI.copy_(linear.weight.data)
    linear.__class__ = DecodeLinear
    return "linear layer"
