"""What the Triton kernels can run, and whether they can run here. Imports no kernel.

Shapes: T tokens, F channels.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

from bankwise.errors import KernelError


class Limits(NamedTuple):
    """What an implementation of decoding takes."""

    device: str
    max_tokens: int
    max_bank: int
    dtypes: tuple[torch.dtype, ...]


MAX_TOKENS = 8
"""The most tokens that the decode kernels take."""

DECODE_TOKENS = 4
"""The most tokens that they get by themselves: each token reads its own quarter of the weights through the cache, as
many bytes as the dense layer at four tokens. From that count, not from a measurement."""

MAX_BANK = 64
"""Channels of a bank: its mask is one 64-bit word."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; `pip install triton` (Linux only)"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA device is available"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


@cache
def device_name() -> str:
    """The device that the kernels run on."""
    import triton

    return "Triton's interpreter, for tests" if triton.knobs.runtime.interpret else torch.cuda.get_device_name()


def launch_on(device: torch.device) -> AbstractContextManager:
    """Kernels launched inside run on this device, whichever is the current one (a model may be spread over several)."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def decode_limits(*, forced: bool) -> Limits:
    """What the decode kernels take; `forced` where the user asks for them, whatever is faster."""
    interpreted = unavailable() is None and not torch.cuda.is_available()
    return Limits("cpu" if interpreted else "cuda", MAX_TOKENS if forced else DECODE_TOKENS, MAX_BANK, DTYPES)


def check_banks(num_channels: int, bank_size: int, active: int) -> None:
    """Raise unless the kernels can select in banks of this size: they read memory without further checks."""
    if not 1 <= active <= bank_size <= MAX_BANK or num_channels % bank_size:
        raise KernelError(
            f"cannot keep {active} of every {bank_size} in {num_channels} channels: the GPU kernels take a bank_size "
            f"up to {MAX_BANK} that divides the channels, and active_per_bank in 1..bank_size"
        )


@torch.compiler.assume_constant_result
def runs_gate(
    requested: str | None, device: str, h_dtype: torch.dtype, logits_dtype: torch.dtype, bank_size: int
) -> bool:
    """Whether the fused gate runs for h_TF and logits_TF of these dtypes; raises where it was asked for and cannot."""
    if requested in ("reference", "cpu") or (requested is None and device != "cuda"):
        return False
    reason = unavailable()
    if reason is not None and requested is None:
        _warn_once(reason)
    if reason is None and device != decode_limits(forced=True).device:
        reason = f"the input is on {device}"
    if reason is None and h_dtype not in DTYPES:
        reason = f"the activation is {h_dtype} (supported: {', '.join(map(str, DTYPES))})"
    if reason is None and logits_dtype != torch.float32:
        reason = f"the router logits are {logits_dtype} (supported: torch.float32)"
    if reason is None and bank_size > MAX_BANK:
        reason = f"bank_size={bank_size} is above {MAX_BANK}"
    if reason is not None and requested == "triton":
        raise KernelError(f"BANKWISE_KERNEL=triton, but the fused gate cannot run: {reason}")
    return reason is None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"bankwise trains with the slower PyTorch gate: {reason}", stacklevel=5)
