"""Up to how many tokens at once the CPU operator is faster than the masked dense path that runs above them.

Baseline by name: `masked-dense`, the same layer with the same packed weights through PyTorch, as dispatch runs it.

Shapes: T tokens, D hidden.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bankwise.bench.ffn import exact_output, relative_error, shared_twin
from bankwise.bench.results import BenchResult, timed_row, wrong_row
from bankwise.bench.shapes import Shape
from bankwise.bench.timing import Step, interleave
from bankwise.config.sparsity import PredictorForm
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels.cpu import crossover
from bankwise.kernels.cpu.library import MAX_TOKENS
from bankwise.kernels.cpu.packing import pack


@torch.no_grad()
def bench_crossover(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pairs: int = 20,
    form: PredictorForm = "gated_product",
    idle_only: bool = False,
    save: bool = False,
) -> list[BenchResult]:
    """One row for each number of tokens from 1 to 8; `save` keeps the crossover for layers of this shape."""
    torch.manual_seed(0)
    layer = SparseSwiGLU(shape.hidden, shape.ffn, shape.sparsity(form), 0).to(dtype).eval()
    packed = pack(layer)
    dense = shared_twin(layer)
    dense.packed = dataclasses.replace(packed, max_tokens=0)
    rows = []
    for tokens in range(1, MAX_TOKENS + 1):
        x_TD = torch.randn(tokens, shape.hidden).to(dtype)
        fields: dict[str, Any] = {
            "bench": "crossover", "tokens": tokens, "D": shape.hidden, "F": shape.ffn, "R": shape.rank,
            "dtype": str(dtype)[6:],
        }  # fmt: skip
        exact_TD, plain_error = exact_output(layer, x_TD)
        error = relative_error(layer(x_TD), exact_TD)
        if not error <= 2 * plain_error:
            return [wrong_row("op", error, 2 * plain_error, fields)]
        baselines: dict[str, Step] = {"masked-dense": partial(dense, x_TD)}
        timings = interleave(partial(layer, x_TD), baselines, pairs=pairs, idle_only=idle_only)
        rows.append(timed_row("op", "masked-dense", timings["masked-dense"], 0, fields))
    if save:
        crossover.save(layer, crossover_of(rows))
    return rows


def crossover_of(rows: Sequence[BenchResult]) -> int:
    """The most tokens up to which the operator is never slower by the median of the pairs; at least 1."""
    tokens = 0
    for row in sorted(rows, key=lambda row: row.tokens):
        if row.ratio_p50 < 1:
            break
        tokens = row.tokens
    return max(tokens, 1)
