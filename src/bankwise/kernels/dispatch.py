"""Which implementation runs: the PyTorch reference or the CPU operators, and why.

`choose` decides for a layer and an input; `BANKWISE_KERNEL=reference|cpu` overrides. Without the variable an
unsupported case runs the reference, with one warning where that is a surprise (no compiler); with `cpu` it raises.
A case that the operators take gives the reference's channels for the same logits, and its output up to rounding.

Shapes: T leading dimensions (tokens), D hidden, F channels.
"""

import os
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bankwise.errors import KernelError, RoutingError
from bankwise.ffn.bank import BankCut, bank_topk_mask
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels.cpu import library
from bankwise.kernels.cpu.packing import PackedWeights, dense_forward_int8, is_current, pack

KERNELS = ("reference", "cpu")
UNIT_GATES = ("ste_unit", "hard", "detached", "default_ema")
"""Gate modes whose forward multiplies a kept channel by 1."""

MAX_DECODE_TOKENS = library.MAX_TOKENS
"""Above this many tokens the masked dense path runs: eight tokens already read nine tenths of the channels."""


class Choice(NamedTuple):
    """What runs, and the reason in words."""

    kernel: str
    reason: str


def requested_kernel() -> str | None:
    """`BANKWISE_KERNEL`, or None where it is unset or `auto`."""
    name = os.environ.get("BANKWISE_KERNEL", "auto")
    if name == "auto" or name == "":
        return None
    if name not in KERNELS:
        raise KernelError(f"BANKWISE_KERNEL={name} is not known; use one of auto, {', '.join(KERNELS)}")
    return name


@cache
def cpu_operators() -> Choice:
    """Whether the CPU operators can run in this process. The first call compiles them if they are not in the cache."""
    try:
        library.load()
    except KernelError as error:
        return Choice("reference", str(error))
    return Choice("cpu", f"instruction set {library.current_isa()}")


def choose(layer: SparseSwiGLU, x_TD: Tensor) -> Choice:
    """What runs a forward of `layer` on `x_TD` in evaluation mode without gradients."""
    requested = requested_kernel()
    if requested == "reference":
        return Choice("reference", "BANKWISE_KERNEL=reference")
    if requested is None and layer.active_per_bank == layer.bank_size:
        return Choice("reference", "all channels are kept, and the reference then equals the dense model bit for bit")
    reason = _unsupported(layer, x_TD)
    if reason is None:
        operators = cpu_operators()
        if operators.kernel == "cpu":
            return operators
        if requested is None:
            _warn_once(operators.reason)
        reason = operators.reason
    if requested == "cpu" and _tokens(x_TD) <= MAX_DECODE_TOKENS and layer.routing_record is None:
        raise KernelError(f"BANKWISE_KERNEL=cpu, but the CPU operators cannot run layer {layer.layer}: {reason}")
    return Choice("reference", reason)


def fast_forward(layer: SparseSwiGLU, x_TD: Tensor) -> Tensor | None:
    """y of the layer by the CPU operator, or None where the reference has to run."""
    packed = layer.packed
    if packed is None:
        if _tokens(x_TD) > MAX_DECODE_TOKENS or torch.compiler.is_compiling():
            return None
        if choose(layer, x_TD).kernel == "reference":
            return None
        packed = pack(layer)
    elif not torch.compiler.is_compiling():
        if os.environ.get("BANKWISE_KERNEL") == "reference" and packed.scales_F3 is None:
            return None
        if not is_current(layer, packed):
            layer.packed = None
            return fast_forward(layer, x_TD)
    if _tokens(x_TD) > MAX_DECODE_TOKENS or layer.routing_record is not None:
        if packed.scales_F3 is None:
            return None
        mask_TF = bank_topk_mask(layer.logits(x_TD), bank_size=layer.bank_size, active_per_bank=layer.active_per_bank)
        return dense_forward_int8(layer, x_TD, mask_TF)
    return decode(layer, packed, x_TD)


def fast_cut(logits_TF: Tensor, bank_size: int, active_per_bank: int) -> BankCut | None:
    """`ffn.bank.cut_banks` by the operator, which selects without a sort and on all threads; the same bits."""
    if (
        logits_TF.device.type != "cpu"
        or logits_TF.dtype != torch.float32
        or active_per_bank == bank_size
        or bank_size > library.MAX_BANK
        or requested_kernel() == "reference"
        or cpu_operators().kernel != "cpu"
    ):
        return None
    try:
        mask_TF, threshold_TN1 = torch.ops.bankwise.route(logits_TF, bank_size, active_per_bank)
    except RuntimeError as error:
        if "router logits are not finite" in str(error):
            return None  # the reference raises the error that users know
        raise
    return BankCut(mask_TF, threshold_TN1)


def runs_packed(layer: SparseSwiGLU) -> bool:
    """Whether a few tokens of a packed layer go to the operator now."""
    return (
        layer.packed is not None
        and layer.routing_record is None
        and not (os.environ.get("BANKWISE_KERNEL") == "reference" and layer.packed.scales_F3 is None)
    )


def decode(
    layer: SparseSwiGLU, packed: PackedWeights, x_TD: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """`run_packed`, with the error that users know for logits that are not finite."""
    if torch.compiler.is_compiling():
        return run_packed(layer, packed, x_TD, norm=norm, epsilon=epsilon)
    try:
        return run_packed(layer, packed, x_TD, norm=norm, epsilon=epsilon)
    except RuntimeError as error:
        raise _translated(error) from None


def run_packed(
    layer: SparseSwiGLU, packed: PackedWeights, x_TD: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """The operator on the layer's packed weights and its predictor. With `norm`, x + layer(RMS norm of x) instead."""
    # Dictionaries instead of attributes: nn.Module resolves each attribute in Python, 13 of them cost 8 us a layer.
    modules = layer._modules
    predictor: Any = modules["predictor"]
    own: dict[str, Any] = predictor._parameters
    expand = predictor._modules["expand"]._parameters
    return torch.ops.bankwise.ffn_decode(
        x_TD,
        packed.weights_F3P,
        packed.scales_F3,
        predictor._modules["reduce"]._parameters["weight"],
        expand["weight"],
        expand["bias"],
        own.get("gate_offset"),
        own.get("up_offset"),
        own.get("gate_log_noise"),
        own.get("up_log_noise"),
        modules["gate_proj"]._parameters["bias"],  # type: ignore[union-attr]
        modules["up_proj"]._parameters["bias"],  # type: ignore[union-attr]
        modules["down_proj"]._parameters["bias"],  # type: ignore[union-attr]
        layer.bank_size,
        layer.active_per_bank,
        norm,
        epsilon,
    )


def _tokens(x_TD: Tensor) -> int:
    return x_TD.numel() // x_TD.shape[-1]


def _unsupported(layer: SparseSwiGLU, x_TD: Tensor) -> str | None:
    """Why the operators cannot run this case, or None."""
    settings = layer.sparsity
    if x_TD.device.type != "cpu":
        return f"the input is on {x_TD.device.type}"
    if _tokens(x_TD) > MAX_DECODE_TOKENS:
        return f"{_tokens(x_TD)} tokens at once; the masked dense path is faster above {MAX_DECODE_TOKENS}"
    if layer.routing_record is not None:
        return "routing statistics are being recorded"
    if settings.gate_mode not in UNIT_GATES:
        return f"gate_mode={settings.gate_mode!r} scales the kept channels (supported: {', '.join(UNIT_GATES)})"
    if settings.center != "off":
        return f"center={settings.center!r} lets dropped channels contribute"
    if layer.bank_size > library.MAX_BANK:
        return f"bank_size={layer.bank_size} is above {library.MAX_BANK}"
    linears = [layer.gate_proj, layer.up_proj, layer.down_proj]
    dtypes = {linear.weight.dtype for linear in linears if isinstance(linear, nn.Linear)} | {x_TD.dtype}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"input and weights are {', '.join(sorted(map(str, dtypes)))} (supported: all float32 or all bfloat16)"
    if any(type(linear) is not nn.Linear or _is_hooked(linear) for linear in (*linears, layer.predictor.reduce)):
        return "a projection of the layer is wrapped, quantised or hooked"
    if {value.dtype for value in layer.predictor.parameters()} not in ({torch.float32}, {torch.bfloat16}):
        return "the predictor's parameters are not all float32 or all bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _translated(error: RuntimeError) -> Exception:
    text = str(error)
    if "router logits are not finite" not in text:
        return error
    start = text.index("bankwise: ") + len("bankwise: ")
    return RoutingError(
        f"{text[start:].splitlines()[0]}, so no channels can be chosen; the FFN input or the predictor weights hold "
        "NaN or infinity"
    )


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"bankwise decodes with the slower PyTorch reference: {reason}", stacklevel=4)
