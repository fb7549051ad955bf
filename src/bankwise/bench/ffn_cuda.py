"""One sparse feed-forward layer in decoding on a GPU, against dense layers of the same dtype, all in CUDA graphs.

Baselines by name: `torch-eager` (three products), `torch-fused` (gate and up in one product), `op-all-channels` (the
kernels with every channel kept). A graph goes through enough copies of the layer, each with weights of its own, that
none is still in the GPU's cache when its turn comes again.

Shapes: T tokens, D hidden, F channels, R predictor rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from bankwise.bench.ffn import _bytes, all_channels, relative_error
from bankwise.bench.results import BenchResult, stamped, timed_row
from bankwise.bench.shapes import Shape
from bankwise.bench.timing import Step, Timing, interleave
from bankwise.config import SparsityConfig
from bankwise.config.sparsity import PredictorForm
from bankwise.errors import KernelError
from bankwise.ffn.bank import bank_topk_mask
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch
from bankwise.kernels.triton import support

MIN_CALLS = 32
"""Layers in a graph, at least: its launch then costs each of them little."""

Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def bench_ffn_cuda(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
    pairs: int = 20,
    form: PredictorForm = "gated_product",
    idle_only: bool = False,
) -> list[BenchResult]:
    """Measure one layer of `shape` on the GPU (in Triton's interpreter: on the CPU, to test this function).

    A result that differs from the reference is a row with status `wrong`.
    """
    if (reason := support.unavailable()) is not None:
        raise KernelError(f"`bench ffn --device cuda` needs the Triton kernels: {reason}")
    device = torch.device(support.decode_limits(forced=True).device)
    torch.manual_seed(0)
    sparsity = shape.sparsity(form)
    x_TD = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    fields: dict[str, Any] = {
        "bench": "ffn", "tokens": tokens, "D": shape.hidden, "F": shape.ffn, "R": shape.rank, "dtype": str(dtype)[6:],
        "device": support.device_name(),
    }  # fmt: skip

    layers = [_layer(shape, sparsity, dtype, device)]
    eager, fused = [_eager(layers[0])], [_fused(layers[0])]
    sparse = [_sparse(layers[0])]
    if (fault := _fault(layers[0], x_TD, sparse[0](x_TD))) is not None:
        return [stamped(BenchResult(impl="op", status="wrong", reason=fault, **fields))]
    moved = _bytes(layers[0], layers[0].packed, 1 - 0.75**tokens)
    for _ in range(_copies(moved, device) - 1):
        layers.append(_layer(shape, sparsity, dtype, device))
        eager.append(_eager(layers[-1]))
        fused.append(_fused(layers[-1]))
        sparse.append(_sparse(layers[-1]))
    every = [_packed_forward(all_channels(layer), layer.packed) for layer in layers]

    calls = max(MIN_CALLS, len(layers)) if device.type == "cuda" else 1
    baselines = {
        "torch-eager": _recorded(eager, x_TD, calls),
        "torch-fused": _recorded(fused, x_TD, calls),
        "op-all-channels": _recorded(every, x_TD, calls),
    }
    timings = interleave(_recorded(sparse, x_TD, calls), baselines, pairs=pairs, idle_only=idle_only)
    return [timed_row("op", name, _per_call(timing, calls), moved, fields) for name, timing in timings.items()]


def _fault(layer: SparseSwiGLU, x_TD: Tensor, y_TD: Tensor) -> str | None:
    """What is wrong with the kernels' logits, their choice for these logits, or y for this choice; None if nothing."""
    # Looked at one by one: rounding in the logits may move a channel across the cut, which is no error of y.
    from bankwise.kernels.triton import decode

    size, active = layer.bank_size, layer.active_per_bank
    active_TA, _, logits_TF = decode.select_channels(
        x_TD, decode.Predictor.of(layer.predictor), size, active, keep_logits=True
    )
    assert logits_TF is not None
    mask_TF = torch.zeros_like(logits_TF, dtype=torch.bool).scatter_(1, active_TA.long(), True)
    if not torch.equal(mask_TF, bank_topk_mask(logits_TF, bank_size=size, active_per_bank=active)):
        return "the kernels choose other channels than the rule does"
    gate_FD, up_FD, down_DF = (weight.float() for weight in _copied(layer))
    h_TF = functional.silu(functional.linear(x_TD.float(), gate_FD)) * functional.linear(x_TD.float(), up_FD)
    exact_TD = functional.linear(h_TF * mask_TF, down_DF)
    plain_TD = layer.down_proj(layer.dense_activation(x_TD) * mask_TF)
    logits_error = relative_error(logits_TF, layer.logits(x_TD))
    error, bound = relative_error(y_TD, exact_TD), 2 * max(relative_error(plain_TD, exact_TD), 1e-6)
    if not (logits_error <= 1e-5 and error <= bound):
        return (
            f"differs from the reference: relative error {error:.2e} (allowed {bound:.2e}), of the logits "
            f"{logits_error:.2e} (allowed 1e-5)"
        )
    return None


def _layer(shape: Shape, sparsity: SparsityConfig, dtype: torch.dtype, device: torch.device) -> SparseSwiGLU:
    with device:
        return SparseSwiGLU(shape.hidden, shape.ffn, sparsity, 0).to(dtype).eval()


def _eager(layer: SparseSwiGLU) -> Forward:
    gate_FD, up_FD, down_DF = _copied(layer)
    return lambda x: functional.linear(
        functional.silu(functional.linear(x, gate_FD)) * functional.linear(x, up_FD), down_DF
    )


def _fused(layer: SparseSwiGLU) -> Forward:
    gate_FD, up_FD, down_DF = _copied(layer)
    both_2FD = torch.cat([gate_FD, up_FD])

    def forward(x: Tensor) -> Tensor:
        gate, up = functional.linear(x, both_2FD).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, down_DF)

    return forward


def _sparse(layer: SparseSwiGLU) -> Forward:
    return _packed_forward(layer, dispatch.pack_for(layer, dispatch.Choice("triton", "")))


def _packed_forward(layer: SparseSwiGLU, packed: Any) -> Forward:
    return lambda x: dispatch.run_packed(layer, packed, x)


def _copied(layer: SparseSwiGLU) -> list[Tensor]:
    # Copies: packing turns the layer's own weights into views, which torch reads more slowly.
    return [linear.weight.detach().clone() for linear in (layer.gate_proj, layer.up_proj, layer.down_proj)]


def _copies(moved: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-4 * cache // moved))


def _recorded(forwards: list[Forward], x_TD: Tensor, calls: int) -> Step:
    """A step that runs `calls` forwards in turn and waits for them; on a GPU recorded in one CUDA graph."""

    def run() -> None:
        for call in range(calls):
            forwards[call % len(forwards)](x_TD)

    if x_TD.device.type != "cuda":
        return run
    # Compiles and chooses algorithms, on a stream of its own as capturing asks.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def _per_call(timing: Timing, calls: int) -> Timing:
    return Timing(*([seconds / calls for seconds in samples] for samples in timing))
