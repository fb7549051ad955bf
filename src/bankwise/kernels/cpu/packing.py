"""Weights of a sparse layer in the layout that the decode kernels read: everything of one channel in one piece.

`pack` moves the weights of a layer into one tensor [F, 3, P]: gate row, up row and down column of each channel. The
layer's own parameters become views of it, so memory does not double, `state_dict` and the dense path see the same
values, and writing into a parameter writes into the packed weights. int8 weights are a copy that cannot be undone; the
dense parameters are then released.

Shapes: D hidden, F channels, P = D padded to whole 64-byte lines.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels.cpu.library import MAX_TOKENS, huge_page_tensor


@dataclass
class PackedWeights:
    """The packed weights of one layer."""

    weights_F3P: Tensor
    scales_F3: Tensor | None = None
    """float32, int8 weights only: one scale per packed row."""
    kernel: str = "cpu"
    """What reads them: `cpu` or `triton`."""
    max_tokens: int = MAX_TOKENS
    """Above this many tokens the masked dense path runs."""


def pack(layer: SparseSwiGLU, *, kernel: str = "cpu", max_tokens: int = MAX_TOKENS) -> PackedWeights:
    """Move the layer's weights into the packed layout; its parameters stay, as views."""
    rows = _rows(layer)
    packed_F3P = _padded(rows[0], rows[0].dtype)
    for place, (linear, row_FD) in enumerate(zip(_linears(layer), rows, strict=True)):
        view_FD = packed_F3P[:, place, : row_FD.shape[1]]
        view_FD.copy_(row_FD)
        linear.weight.data = view_FD.T if place == 2 else view_FD
    layer.packed = PackedWeights(packed_F3P, kernel=kernel, max_tokens=max_tokens)
    return layer.packed


def is_current(layer: SparseSwiGLU, packed: PackedWeights) -> bool:
    """Whether the layer's parameters still are views of these packed weights (`.to`, for one, makes new tensors)."""
    if packed.scales_F3 is not None:
        return True
    start = packed.weights_F3P.data_ptr()
    line = packed.weights_F3P.stride(1) * packed.weights_F3P.element_size()
    modules = layer._modules
    for place, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        # The type of _modules allows None, which these three never are.
        weight = modules[name]._parameters["weight"]  # type: ignore[union-attr]
        if weight is None or weight.data_ptr() != start + place * line:
            return False
    return True


def pack_int8(layer: SparseSwiGLU) -> PackedWeights:
    """Quantise the layer's weights to int8 with one scale per gate row, up row and down column; release the rest."""
    rows = _rows(layer)
    packed_F3P = _padded(rows[0], torch.int8)
    scales_F3 = torch.empty(rows[0].shape[0], 3)
    for place, row_FD in enumerate(rows):
        codes_FD, scales_F3[:, place] = quantise_rows(row_FD)
        packed_F3P[:, place, : row_FD.shape[1]] = codes_FD
    for linear in _linears(layer):
        linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    layer.packed = PackedWeights(packed_F3P, scales_F3)
    return layer.packed


def quantise_rows(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and one float32 scale per row: the largest magnitude of a row is 127."""
    scales_O = weight_OD.float().abs().amax(dim=1) / 127
    safe_O = torch.where(scales_O > 0, scales_O, 1.0)
    return (weight_OD.float() / safe_O[:, None]).round_().to(torch.int8), scales_O


def dense_forward_int8(layer: SparseSwiGLU, x_TD: Tensor, mask_TF: Tensor) -> Tensor:
    """Masked dense forward from the int8 weights, for more tokens than the operator takes: unpacked for one call."""
    packed = layer.packed
    gate_FD, up_FD, down_FD = (
        (packed.weights_F3P[:, place, : x_TD.shape[-1]] * packed.scales_F3[:, place, None]).to(x_TD.dtype)
        for place in range(3)
    )
    gate_TF = functional.linear(x_TD, gate_FD, layer.gate_proj.bias)
    h_TF = functional.silu(gate_TF) * functional.linear(x_TD, up_FD, layer.up_proj.bias)
    return functional.linear(h_TF * mask_TF, down_FD.T, layer.down_proj.bias)


def _linears(layer: SparseSwiGLU) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return layer.gate_proj, layer.up_proj, layer.down_proj


def _rows(layer: SparseSwiGLU) -> tuple[Tensor, Tensor, Tensor]:
    return layer.gate_proj.weight.data, layer.up_proj.weight.data, layer.down_proj.weight.data.T


def _padded(row_FD: Tensor, dtype: torch.dtype) -> Tensor:
    line = 64 // dtype.itemsize
    width = (row_FD.shape[1] + line - 1) // line * line
    if row_FD.device.type == "cpu":
        packed_F3P = huge_page_tensor(row_FD.shape[0], 3, width, dtype=dtype)
    else:
        packed_F3P = row_FD.new_empty(row_FD.shape[0], 3, width, dtype=dtype)
    if width > row_FD.shape[1]:
        packed_F3P[:, :, row_FD.shape[1] :] = 0
    return packed_F3P
