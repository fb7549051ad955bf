"""Which implementation runs: the PyTorch reference, the CPU operators or the Triton kernels, and why.

`choose` decides for a layer and an input; `BANKWISE_KERNEL=reference|cpu|triton` overrides. Without the variable an
unsupported case runs the reference, with one warning where that is a surprise (no compiler); with a kernel's name it
raises. A case that a kernel takes gives the reference's channels for the same logits, and its output up to rounding.

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
from bankwise.ffn.gates import SteUnitGate
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.ffn.predictor import Predictor
from bankwise.kernels.cpu import library
from bankwise.kernels.cpu.crossover import crossover
from bankwise.kernels.cpu.packing import PackedWeights, dense_forward_int8, is_current, pack
from bankwise.kernels.cpu.training import CpuSteUnitGate, ProductLogits
from bankwise.kernels.triton import support
from bankwise.models.lm_loss import LogitLoss

KERNELS = ("reference", "cpu", "triton")
UNIT_GATES = ("ste_unit", "hard", "detached", "default_ema")
"""Gate modes whose forward multiplies a kept channel by 1."""

MAX_DECODE_TOKENS = library.MAX_TOKENS
"""The most tokens that a kernel takes: eight already read nine tenths of the channels. From `cpu.crossover` on, or what
`triton.support` says, the masked dense path runs below that too."""

CPU_LIMITS = support.Limits("cpu", MAX_DECODE_TOKENS, library.MAX_BANK, (torch.float32, torch.bfloat16))


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


def operators_for(device: torch.device) -> Choice:
    """Whether the kernels for tensors on this device, or those that `BANKWISE_KERNEL` names, can run here."""
    requested = requested_kernel()
    if requested == "reference":
        return Choice("reference", "BANKWISE_KERNEL=reference")
    if (requested or device.type) not in ("triton", "cuda"):
        return cpu_operators()
    reason = support.unavailable()
    return Choice("triton", support.device_name()) if reason is None else Choice("reference", reason)


def choose(layer: SparseSwiGLU, x_TD: Tensor) -> Choice:
    """What runs a forward of `layer` on `x_TD` in evaluation mode without gradients."""
    requested = requested_kernel()
    if requested == "reference":
        return Choice("reference", "BANKWISE_KERNEL=reference")
    if requested is None and layer.active_per_bank == layer.bank_size:
        return Choice("reference", "all channels are kept, and the reference then equals the dense model bit for bit")
    operators = operators_for(x_TD.device)
    is_gpu = (requested or x_TD.device.type) in ("triton", "cuda")
    reason = _unsupported(layer, x_TD, _limits(layer, is_gpu=is_gpu))
    if reason is None:
        if operators.kernel != "reference":
            return operators
        if requested is None:
            _warn_once(operators.reason)
        reason = operators.reason
    if requested is not None and _tokens(x_TD) <= MAX_DECODE_TOKENS and layer.routing_record is None:
        name = "Triton kernels" if requested == "triton" else "CPU operators"
        raise KernelError(f"BANKWISE_KERNEL={requested}, but the {name} cannot run layer {layer.layer}: {reason}")
    return Choice("reference", reason)


def fast_forward(layer: SparseSwiGLU, x_TD: Tensor) -> Tensor | None:
    """y of the layer by the kernels, or None where the reference has to run."""
    packed = layer.packed
    if packed is None:
        if _tokens(x_TD) > MAX_DECODE_TOKENS or torch.compiler.is_compiling():
            return None
        choice = choose(layer, x_TD)
        if choice.kernel == "reference":
            return None
        packed = pack_for(layer, choice)
    elif not torch.compiler.is_compiling():
        if os.environ.get("BANKWISE_KERNEL") == "reference" and packed.scales_F3 is None:
            return None
        if not is_current(layer, packed):
            layer.packed = None
            return fast_forward(layer, x_TD)
    if _tokens(x_TD) > packed.max_tokens or not _has_own_predictor(layer):
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
    """Whether a few tokens of a packed layer go to the CPU operator now."""
    return (
        layer.packed is not None
        and layer.packed.kernel == "cpu"
        and layer.routing_record is None
        and _has_own_predictor(layer)
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


def pack_for(layer: SparseSwiGLU, choice: Choice) -> PackedWeights:
    """Pack the layer's weights for the kernel chosen, whose operator becomes known to torch."""
    is_gpu = choice.kernel == "triton"
    if is_gpu:
        import bankwise.kernels.triton.decode  # noqa: F401
    return pack(layer, kernel=choice.kernel, max_tokens=_limits(layer, is_gpu=is_gpu).max_tokens)


def unit_gate(h_TF: Tensor, logits_TF: Tensor, *settings: float) -> Tensor:
    """`SteUnitGate.apply`, fused into one pass each way where a kernel can."""
    gate: Any = SteUnitGate
    bank_size, active_per_bank = int(settings[0]), int(settings[1])
    if support.runs_gate(requested_kernel(), h_TF.device.type, h_TF.dtype, logits_TF.dtype, bank_size):
        from bankwise.kernels.triton.gate import FusedSteUnitGate

        gate = FusedSteUnitGate
    elif (
        h_TF.dtype in CPU_LIMITS.dtypes
        and active_per_bank < bank_size <= library.MAX_BANK
        and _trains_on_cpu(logits_TF, h_TF)
    ):
        try:
            return CpuSteUnitGate.apply(h_TF, logits_TF, *settings)
        except RuntimeError as error:
            raise _translated(error) from None
    return gate.apply(h_TF, logits_TF, *settings)


def product_logits(code_TR: Tensor, expand_FR: Tensor, *vectors_F: Tensor) -> Tensor | None:
    """Logits of the predictor's product form by the fused operator, or None where the reference has to run."""
    if not _trains_on_cpu(code_TR, expand_FR, *vectors_F):
        return None
    return ProductLogits.apply(code_TR, expand_FR, *vectors_F)


def logit_loss(
    logits_CV: Tensor,
    labels_C: Tensor,
    teacher_CV: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    with_gradient: bool,
) -> LogitLoss | None:
    """`models.lm_loss.logit_loss` by the operator, which keeps a row in the cache, or None where it cannot run.

    The gradient takes the place of the logits.
    """
    tensors = [value for value in (logits_CV, labels_C, teacher_CV) if value is not None]
    if (
        logits_CV.dtype not in CPU_LIMITS.dtypes
        or (teacher_CV is not None and teacher_CV.dtype != logits_CV.dtype)
        or any(type(value) is not Tensor or value.device.type != "cpu" for value in tensors)
        or requested_kernel() == "reference"
        or cpu_operators().kernel != "cpu"
    ):
        return None
    logits_CV, labels_C = logits_CV.contiguous(), labels_C.contiguous()
    teacher_CV = None if teacher_CV is None else teacher_CV.contiguous()
    losses_C2 = torch.ops.bankwise.logit_loss(logits_CV, teacher_CV, labels_C, ce_weight, kd_weight, with_gradient)
    cross_entropy, distillation = losses_C2.sum(0)
    return LogitLoss(cross_entropy, distillation, logits_CV if with_gradient else None)


def _trains_on_cpu(logits_TF: Tensor, *others: Tensor) -> bool:
    """Whether the CPU operators of training take float32 logits (or what they are made of) like these."""
    return (
        not torch.compiler.is_compiling()
        and logits_TF.dtype == torch.float32
        # A subclass (a DTensor) has its own rules for operators, which ours do not know.
        and all(type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" for value in (logits_TF, *others))
        and requested_kernel() != "reference"
        and cpu_operators().kernel == "cpu"
    )


def run_packed(
    layer: SparseSwiGLU, packed: PackedWeights, x_TD: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """The operator on the layer's packed weights and its predictor. With `norm`, x + layer(RMS norm of x) instead."""
    # Dictionaries instead of attributes: nn.Module resolves each attribute in Python, 13 of them cost 8 us a layer.
    modules = layer._modules
    predictor: Any = modules["predictor"]
    own: dict[str, Any] = predictor._parameters
    expand = predictor._modules["expand"]._parameters
    arguments = (
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
        # No module is None here, as the type of _modules allows.
        modules["gate_proj"]._parameters["bias"],  # type: ignore[union-attr]
        modules["up_proj"]._parameters["bias"],  # type: ignore[union-attr]
        modules["down_proj"]._parameters["bias"],  # type: ignore[union-attr]
        layer.bank_size,
        layer.active_per_bank,
    )
    if packed.kernel == "triton":
        assert norm is None
        return torch.ops.bankwise.ffn_decode_gpu(*arguments)
    return torch.ops.bankwise.ffn_decode(*arguments, norm, epsilon)


def _has_own_predictor(layer: SparseSwiGLU) -> bool:
    """Whether the logits come from the layer's own matrices: the layer scan puts oracles in the predictor's place."""
    return type(layer._modules["predictor"]) is Predictor


def _limits(layer: SparseSwiGLU, *, is_gpu: bool) -> support.Limits:
    """What the kernels take of this layer; where the user names a kernel, also what another path would do faster."""
    forced = requested_kernel() is not None
    if is_gpu:
        return support.decode_limits(forced=forced)
    if forced or cpu_operators().kernel != "cpu" or type(layer.gate_proj) is not nn.Linear:
        return CPU_LIMITS
    return CPU_LIMITS._replace(max_tokens=crossover(layer).tokens)


def _tokens(x_TD: Tensor) -> int:
    return x_TD.numel() // x_TD.shape[-1]


def _unsupported(layer: SparseSwiGLU, x_TD: Tensor, limits: support.Limits) -> str | None:
    """Why the operators cannot run this case, or None."""
    settings = layer.sparsity
    if x_TD.device.type != limits.device:
        return f"the input is on {x_TD.device.type}"
    if _tokens(x_TD) > limits.max_tokens:
        return f"{_tokens(x_TD)} tokens at once; the masked dense path is faster above {limits.max_tokens}"
    if layer.routing_record is not None:
        return "routing statistics are being recorded"
    if getattr(layer, "_is_fsdp_managed_module", False):
        return "FSDP shards its weights"
    if not _has_own_predictor(layer):
        return f"its predictor is replaced by {type(layer.predictor).__name__}"
    if settings.selection != "predictor":
        return f"selection={settings.selection!r} chooses channels without the predictor"
    if settings.gate_mode not in UNIT_GATES:
        return f"gate_mode={settings.gate_mode!r} scales the kept channels (supported: {', '.join(UNIT_GATES)})"
    if settings.center != "off":
        return f"center={settings.center!r} lets dropped channels contribute"
    if layer.bank_size > limits.max_bank:
        return f"bank_size={layer.bank_size} is above {limits.max_bank}"
    linears = [layer.gate_proj, layer.up_proj, layer.down_proj]
    dtypes = {linear.weight.dtype for linear in linears if isinstance(linear, nn.Linear)} | {x_TD.dtype}
    supported = " or ".join(f"all {str(dtype)[6:]}" for dtype in limits.dtypes)
    if len(dtypes) > 1 or not dtypes <= set(limits.dtypes):
        return f"input and weights are {', '.join(sorted(map(str, dtypes)))} (supported: {supported})"
    if any(type(linear) is not nn.Linear or _is_hooked(linear) for linear in (*linears, layer.predictor.reduce)):
        return "a projection of the layer is wrapped, quantised or hooked"
    predictor_dtypes = {value.dtype for value in layer.predictor.parameters()}
    if len(predictor_dtypes) > 1 or not predictor_dtypes <= set(limits.dtypes):
        return f"the predictor's parameters are not {supported}"
    if torch.is_autocast_enabled(limits.device):
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
