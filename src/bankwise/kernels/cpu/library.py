"""The compiled operators as Python sees them: loaded once, traceable by `torch.compile`.

Shapes: T leading dimensions (at most 8 tokens in the operators of inference), D hidden, F channels, N banks,
        R predictor rank, O output columns, P a row of D padded to whole 64-byte lines.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from bankwise.errors import KernelError
from bankwise.kernels.cpu.build import library_path

MAX_TOKENS = 8
MAX_BANK = 1024


@cache
def load() -> None:
    """Compile if needed, and register the operators of namespace `bankwise`. Raises `KernelError`."""
    sanitize = os.environ.get("BANKWISE_SANITIZE") == "1"
    try:
        torch.ops.load_library(str(library_path(sanitize=sanitize)))
    except OSError as error:
        raise KernelError(f"the compiled CPU kernels cannot be loaded: {error}") from error
    torch.library.register_fake("bankwise::ffn_decode")(_fake_ffn_decode)
    torch.library.register_fake("bankwise::attention_input")(_fake_attention_input)
    torch.library.register_fake("bankwise::attention_output")(_fake_attention_output)
    torch.library.register_fake("bankwise::linear")(_fake_linear)
    torch.library.register_fake("bankwise::route")(_fake_route)
    torch.library.register_fake("bankwise::energy_logits")(_fake_energy_logits)
    torch.library.register_fake("bankwise::energy_logits_backward")(_fake_energy_logits_backward)
    torch.library.register_fake("bankwise::unit_gate_cpu")(_fake_unit_gate)
    torch.library.register_fake("bankwise::unit_gate_cpu_backward")(_fake_unit_gate_backward)
    torch.library.register_fake("bankwise::logit_loss")(_fake_logit_loss)
    if wanted := os.environ.get("BANKWISE_ISA"):
        choose_isa(wanted)


def available_isas() -> list[str]:
    """Instruction sets that this machine can run, best first."""
    load()
    return str(torch.ops.bankwise.choose_isa("")).split()


def current_isa() -> str:
    """The instruction set in use: the best one, unless `BANKWISE_ISA` or `forced_isa` names another."""
    load()
    return str(torch.ops.bankwise.current_isa())


def choose_isa(name: str) -> None:
    """Use this instruction set from now on, in all threads."""
    known = str(torch.ops.bankwise.choose_isa("")).split()
    if name not in known:
        raise KernelError(f"instruction set {name!r} cannot run here; choose one of {', '.join(known)}")
    torch.ops.bankwise.choose_isa(name)


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Use this instruction set inside the context."""
    before = current_isa()
    choose_isa(name)
    try:
        yield
    finally:
        choose_isa(before)


def huge_page_tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in 2 MB pages where the system grants them.

    Zeroing the pages in one go also makes them resident now, instead of at the first token.
    """
    load()
    tensor = torch.empty(shape, dtype=dtype)
    torch.ops.bankwise.advise_huge_pages(tensor)
    return tensor


def _fake_ffn_decode(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_attention_input(
    x: Tensor, norm: Tensor, epsilon: float, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    cos = rest[5]  # after three biases and two norms
    assert cos is not None
    head = cos.shape[-1]
    return tuple(x.new_empty(1, weight.shape[0] // head, 1, head) for weight in (q, k, v))


def _fake_attention_output(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, weight: Tensor, bias: Tensor | None, residual: Tensor,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(residual)


def _fake_linear(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_route(logits: Tensor, bank_size: int, active: int) -> tuple[Tensor, Tensor]:
    banks = logits.shape[-1] // bank_size
    threshold_shape = (*logits.shape[:-1], banks, int(active < bank_size))
    return torch.empty_like(logits, dtype=torch.bool), logits.new_empty(threshold_shape)


def _fake_energy_logits(gate: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _fake_energy_logits_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, gate_offset: Tensor, up_offset: Tensor, gate_log_noise: Tensor,
    up_log_noise: Tensor, rounded: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.bfloat16 if rounded else torch.float32
    return (
        torch.empty_like(gate, dtype=dtype),
        torch.empty_like(up, dtype=dtype),
        *(torch.empty_like(gate_offset) for _ in range(5)),
    )


def _fake_unit_gate(h: Tensor, logits: Tensor, bank_size: int, active: int, tau: float) -> tuple[Tensor, ...]:
    rows = h.numel() // bank_size
    bits = h.new_empty((rows, (bank_size + 7) // 8), dtype=torch.uint8)
    return torch.empty_like(h), bits, logits.new_empty(rows), logits.new_empty(rows)


def _fake_unit_gate_backward(
    dy: Tensor, h: Tensor, logits: Tensor, bits: Tensor, threshold: Tensor, scale: Tensor, bank_size: int,
    alpha: float, with_dh: bool, with_dz: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(h) if with_dh else h.new_empty(0),
        torch.empty_like(logits) if with_dz else logits.new_empty(0),
    )


def _fake_logit_loss(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((logits.shape[0], 2), dtype=torch.float32)
