"""A prompt in one forward pass: the sparse model, which masks a dense feed-forward there, against the dense model.

The ratio is dense / sparse time: below 1, since the predictor and the routing come on top of the dense products.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from bankwise.bench.results import BenchResult, timed_row
from bankwise.bench.shapes import Shape, random_model
from bankwise.bench.timing import Step, interleave
from bankwise.config.sparsity import PredictorForm
from bankwise.inference.decoding import prepare


@torch.no_grad()
def bench_prefill(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 256,
    pairs: int = 6,
    form: PredictorForm = "gated_product",
    idle_only: bool = False,
) -> list[BenchResult]:
    """Milliseconds of one prompt of `tokens` tokens. Baselines: `hf-dense`, and `sparse-unpacked`, the same sparse
    model before `prepare`, whose weights are in their ordinary layout."""
    sparsity = shape.sparsity(form)
    ids = torch.randint(1, shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    sparse = random_model(shape, dtype, sparsity)
    prepare(sparse)
    baselines = {
        "hf-dense": _step(random_model(shape, dtype, None), ids),
        "sparse-unpacked": _step(random_model(shape, dtype, sparsity), ids),
    }
    fields: dict[str, Any] = {
        "bench": "prefill", "phase": "prefill", "tokens": tokens, "D": shape.hidden, "F": shape.ffn, "R": shape.rank,
        "dtype": str(dtype)[6:],
    }  # fmt: skip
    timings = interleave(_step(sparse, ids), baselines, pairs=pairs, min_seconds=0.0, idle_only=idle_only)
    moved = sum(value.nbytes for value in sparse.parameters())
    return [timed_row("sparse", name, timing, moved, fields) for name, timing in timings.items()]


def _step(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    return step
