"""One sparse feed-forward layer in decoding, against dense layers of the same dtype and threads.

Baselines by name: `torch-eager` (three products), `torch-fused` (gate and up in one product), `torch-compiled`,
`op-all-channels` (the operator with every channel kept), `stream` (a plain read of as many bytes as the operator must
move), and for int8 also `op-bfloat16`.

Shapes: T tokens, D hidden, F channels, R predictor rank.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from bankwise.bench.results import BenchResult, timed_row, wrong_row
from bankwise.bench.shapes import Shape
from bankwise.bench.timing import Step, interleave
from bankwise.config.sparsity import PredictorForm
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch
from bankwise.kernels.cpu import library
from bankwise.kernels.cpu.packing import PackedWeights, pack, pack_int8


@torch.no_grad()
def bench_ffn(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
    pairs: int = 20,
    form: PredictorForm = "gated_product",
    idle_only: bool = False,
    int8: bool = False,
    compiled: bool = True,
) -> list[BenchResult]:
    """Measure one layer of `shape`; a result that differs from the reference is a row with status `wrong`."""
    torch.manual_seed(0)
    sparsity = shape.sparsity(form)
    layer = SparseSwiGLU(shape.hidden, shape.ffn, sparsity, 0).to(dtype).eval()
    x_TD = torch.randn(tokens, shape.hidden).to(dtype)
    dense = _dense_steps(layer, x_TD, compiled=compiled)
    exact_TD, plain_error = exact_output(layer, x_TD)
    fields: dict[str, Any] = {
        "bench": "ffn", "tokens": tokens, "D": shape.hidden, "F": shape.ffn, "R": shape.rank, "dtype": str(dtype)[6:],
    }  # fmt: skip
    twin = None
    if int8:
        twin = SparseSwiGLU(shape.hidden, shape.ffn, sparsity, 0).to(dtype).eval()
        twin.load_state_dict(layer.state_dict())
    packed = pack(layer)
    measured, measured_packed, impl, bound = layer, packed, "op", 2 * plain_error
    if twin is not None:
        measured, measured_packed, impl, bound = twin, pack_int8(twin), "op-int8", 0.03
    error = relative_error(dispatch.run_packed(measured, measured_packed, x_TD), exact_TD)
    if not error <= bound:
        return [wrong_row(impl, error, bound, fields)]
    union = 1 - 0.75**tokens
    moved = _bytes(measured, measured_packed, union)
    buffer = library.huge_page_tensor(moved // 256 * 256, dtype=torch.uint8).zero_()

    every = all_channels(measured)
    baselines: dict[str, Step] = dense | {
        "op-all-channels": lambda: dispatch.run_packed(every, measured_packed, x_TD),
        "stream": lambda: torch.ops.bankwise.stream_read(buffer),
    }
    if twin is not None:
        baselines["op-bfloat16" if dtype == torch.bfloat16 else "op-float32"] = lambda: dispatch.run_packed(
            layer, packed, x_TD
        )
    timings = interleave(
        lambda: dispatch.run_packed(measured, measured_packed, x_TD), baselines, pairs=pairs, idle_only=idle_only
    )
    return [timed_row(impl, name, timing, moved, fields) for name, timing in timings.items()]


def _dense_steps(layer: SparseSwiGLU, x_TD: Tensor, *, compiled: bool) -> dict[str, Step]:
    # Copies: packing turns the layer's own weights into views, which torch reads more slowly.
    gate_FD, up_FD, down_DF = (
        linear.weight.detach().clone() for linear in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    both_2FD = torch.cat([gate_FD, up_FD])

    def eager(x: Tensor) -> Tensor:
        return functional.linear(functional.silu(functional.linear(x, gate_FD)) * functional.linear(x, up_FD), down_DF)

    def fused(x: Tensor) -> Tensor:
        gate, up = functional.linear(x, both_2FD).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, down_DF)

    steps: dict[str, Step] = {"torch-eager": lambda: eager(x_TD), "torch-fused": lambda: fused(x_TD)}
    if compiled:
        program = torch.compile(fused, dynamic=False)
        program(x_TD)
        steps["torch-compiled"] = lambda: program(x_TD)
    return steps


def exact_output(layer: SparseSwiGLU, x_TD: Tensor) -> tuple[Tensor, float]:
    """The layer in float32 products of its own weights, and the relative error of plain PyTorch in its dtype."""
    mask_TF = layer.active_mask(x_TD)
    gate_TF = functional.linear(x_TD.float(), layer.gate_proj.weight.float())
    h_TF = functional.silu(gate_TF) * functional.linear(x_TD.float(), layer.up_proj.weight.float())
    exact_TD = functional.linear(h_TF * mask_TF, layer.down_proj.weight.float())
    plain_TD = layer.down_proj(layer.dense_activation(x_TD) * mask_TF)
    return exact_TD, max(relative_error(plain_TD, exact_TD), 1e-6)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`."""
    return float((actual.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def shared_twin(layer: SparseSwiGLU) -> SparseSwiGLU:
    """Another layer object with the same parameters, to run them with other settings."""
    twin = SparseSwiGLU.__new__(SparseSwiGLU)
    twin.__dict__.update(layer.__dict__)
    return twin


def all_channels(layer: SparseSwiGLU) -> SparseSwiGLU:
    """A twin that keeps every channel."""
    every = shared_twin(layer)
    every.active_per_bank = layer.bank_size
    return every


def _bytes(layer: SparseSwiGLU, packed: PackedWeights, share: float) -> int:
    predictor = sum(value.nbytes for value in layer.predictor.parameters())
    scales = 0 if packed.scales_F3 is None else packed.scales_F3.nbytes
    return int(predictor + share * (packed.weights_F3P.nbytes + scales))
