"""Decoding with a whole model, one token after the other: the sparse model against dense ones of the same shape.

Baselines by name: `hf-dense` (the dense family's own class), `op-dense` (the same with every linear layer through the
CPU operator, as good a dense engine as ours), `llama.cpp` (the same weights in llama.cpp, where llama-cpp-python is
installed). A last row gives the share of a step that is spent outside the operators.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from bankwise.bench import llama_cpp_baseline
from bankwise.bench.llama_cpp_baseline import LlamaCppModel
from bankwise.bench.results import BenchResult, stamped, timed_row
from bankwise.bench.shapes import Shape, random_model
from bankwise.bench.timing import Step, interleave, quantiles
from bankwise.config import SparsityConfig
from bankwise.config.sparsity import PredictorForm
from bankwise.inference.decoding import Weights, prepare

CONTEXT = 64
"""Tokens in the cache before the timed ones: the weights rule, not the cache."""

STEPS = 8
"""Tokens of one sample."""

_LLAMA_ERROR = 0.1
"""Relative difference of two bfloat16 implementations' logits that is still rounding, over all layers of a shape; a
wrong order of rows or a missing bias gives about 1."""


@torch.no_grad()
def bench_decode(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pairs: int = 8,
    form: PredictorForm = "gated_product",
    weights: Weights = "as_is",
    idle_only: bool = False,
) -> list[BenchResult]:
    """Milliseconds per token of the sparse model, prepared as `bankwise generate` prepares it."""
    sparsity = shape.sparsity(form)
    sparse = random_model(shape, dtype, sparsity)
    fields: dict[str, Any] = {
        "bench": "decode", "tokens": 1, "D": shape.hidden, "F": shape.ffn, "R": shape.rank, "dtype": str(dtype)[6:],
    }  # fmt: skip
    ids = torch.randint(1, shape.vocab, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    impl = "sparse" if weights == "as_is" else "sparse-int8"
    error, allowed = _errors(shape, dtype, sparsity, weights, ids)
    if not error <= allowed:
        reason = f"logits differ from those in float32: relative error {error:.2e}, allowed {allowed:.2e}"
        return [stamped(BenchResult(impl=impl, status="wrong", reason=reason, **fields))]
    moved = _bytes_per_token(sparse, shape, weights)
    prepare(sparse, weights=weights)
    dense = random_model(shape, dtype, None)
    engine = random_model(shape, dtype, None)
    prepare(engine)
    baselines = {"hf-dense": decoder(dense, ids), "op-dense": decoder(engine, ids)}
    with _in_llama_cpp(dense) as (llama, why_not):
        status = "skipped"
        if llama is not None:
            status, why_not = "wrong", _differs(llama, dense, ids)
            if why_not is None:
                baselines["llama.cpp"] = llama.decoder(ids[0].tolist(), STEPS)
        timings = interleave(decoder(sparse, ids), baselines, pairs=pairs, min_seconds=0.0, idle_only=idle_only)
    rows = [timed_row(impl, name, timing, moved * STEPS, fields) for name, timing in timings.items()]
    for row in rows:
        row.p10_ms, row.p50_ms, row.p90_ms = row.p10_ms / STEPS, row.p50_ms / STEPS, row.p90_ms / STEPS
        row.base_p50_ms, row.bytes = row.base_p50_ms / STEPS, moved
    if why_not is not None:
        rows.append(stamped(BenchResult(impl=impl, baseline="llama.cpp", status=status, reason=why_not, **fields)))
    return [*rows, _overhead(impl, sparse, ids, pairs, fields)]


@contextmanager
def _in_llama_cpp(dense: PreTrainedModel) -> Iterator[tuple[LlamaCppModel | None, str | None]]:
    """The dense model in llama.cpp, or None and the reason why it cannot be measured there."""
    reason = llama_cpp_baseline.unavailable(dense.config.model_type)
    if reason is not None:
        yield None, reason
        return
    with llama_cpp_baseline.loaded(dense, CONTEXT + STEPS) as llama:
        yield llama, None


def _differs(llama: LlamaCppModel, dense: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """How llama.cpp's logits after `ids` differ from the dense model's, or None where they are the same function's."""
    expected = dense(ids).logits[0, -1].float()
    llama.crop(0)
    actual = torch.from_numpy(llama.append(ids[0].tolist()).copy())
    error = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    # How far below the model's best logit the one that llama.cpp puts first lies, in the same measure.
    behind = float((expected.max() - expected[actual.argmax()]) / expected.square().mean().sqrt())
    if error <= _LLAMA_ERROR and behind <= _LLAMA_ERROR:
        return None
    return (
        f"logits differ from those of hf-dense: relative error {error:.2e}, its first choice {behind:.2e} behind; "
        f"allowed {_LLAMA_ERROR:.0e}"
    )


def _errors(
    shape: Shape, dtype: torch.dtype, sparsity: SparsityConfig, weights: Weights, ids: torch.Tensor
) -> tuple[float, float]:
    """Relative error of a decoded token's logits against the reference in float32, and what is allowed.

    Two layers of the shape: with random weights every channel is near the cut, and in bfloat16 the channels that change
    sides add up over 28 layers, in the reference as in the operators.
    """
    shape = dataclasses.replace(shape, layers=min(2, shape.layers))
    model: Any = random_model(shape, dtype, sparsity)
    exact = model.to(torch.float32)(ids[:, :9]).logits[:, -1]
    model.to(dtype)
    plain = model(ids[:, :9]).logits[:, -1].float()
    prepare(model, weights=weights)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    decoded = model(ids[:, 8:9], past_key_values=cache).logits[:, -1].float()

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    # int8 was 0.05 to 0.17 off on these random weights, with a plain bfloat16 model 0.02 to 0.12 off.
    return error(decoded), 0.3 if weights == "int8" else max(1.5 * error(plain), 1e-5)


def decoder(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    """A step that decodes `STEPS` tokens greedily after `ids`."""
    cache = DynamicCache(config=model.config)
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step() -> None:
        following = token
        for _ in range(STEPS):
            following = model(following, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.crop(-STEPS)

    return step


def _bytes_per_token(model: PreTrainedModel, shape: Shape, weights: Weights) -> int:
    """Weights that one token reads: a quarter of the feed-forward, all else but an embedding that is only looked up."""
    total = 0
    for name, value in model.named_parameters():
        if "embed_tokens" in name and not shape.tied:
            continue
        is_quantised = weights == "int8" and value.dim() == 2 and "predictor" not in name
        size = value.numel() if is_quantised else value.nbytes
        is_gathered = any(part in name for part in ("gate_proj", "up_proj", "down_proj"))
        total += size // 4 if is_gathered else size
    return total


def _overhead(impl: str, model: PreTrainedModel, ids: torch.Tensor, pairs: int, fields: dict[str, Any]) -> BenchResult:
    """Share of a step that is spent outside the operators: `ratio` is overhead / step here."""
    inside = 0.0
    operators = torch.ops.bankwise
    names = ("ffn_decode", "linear", "attention_input", "attention_output")
    originals = {name: getattr(operators, name) for name in names}

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            result = function(*arguments)
            inside += time.perf_counter() - start
            return result

        return call

    step = decoder(model, ids)
    shares, totals = [], []
    try:
        for name, function in originals.items():
            setattr(operators, name, timed(function))
        for _ in range(max(2, pairs)):
            inside, start = 0.0, time.perf_counter()
            step()
            total = time.perf_counter() - start
            totals.append(total)
            shares.append((total - inside) / total)
    finally:
        for name, function in originals.items():
            setattr(operators, name, function)
    p10, p50, p90 = (1e3 * value / STEPS for value in quantiles(totals))
    ratio_p10, ratio_p50, ratio_p90 = quantiles(shares)
    return stamped(
        BenchResult(
            impl=impl, baseline="share outside operators", pairs=len(shares), p10_ms=p10, p50_ms=p50, p90_ms=p90,
            ratio_p10=ratio_p10, ratio_p50=ratio_p50, ratio_p90=ratio_p90, **fields,
        )
    )  # fmt: skip
