"""Time of one training step: the sparse model against the dense one, in the same loop with the same loss code.

A step is forward, backward, clipping and AdamW in bfloat16 autocast with the chunked loss, and with the auxiliary
routing loss as a recipe's stage sets it. The ratio is dense / sparse: 1 would be a free router.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from bankwise.bench.results import BenchResult, timed_row
from bankwise.bench.shapes import Shape, random_model
from bankwise.bench.timing import Step, interleave
from bankwise.config import Stage
from bankwise.config.sparsity import PredictorForm
from bankwise.ffn import record_routing
from bankwise.ffn.allocator import keep_freed_memory
from bankwise.ffn.precision import bf16_router_products
from bankwise.models.modeling import use_chunked_loss
from bankwise.precision import bf16_autocast, multiplies_bf16
from bankwise.training import parameter_groups


def bench_train_step(
    shape: Shape,
    *,
    tokens: int = 1024,
    pairs: int = 8,
    form: PredictorForm = "gated_product",
    idle_only: bool = False,
) -> list[BenchResult]:
    """Milliseconds of one optimiser step on two rows of `tokens` / 2 tokens."""
    keep_freed_memory()
    dense = random_model(shape, torch.float32, None)
    sparsity = shape.sparsity(form)
    sparse = random_model(shape, torch.float32, sparsity)
    use_chunked_loss(dense)
    ids = torch.randint(1, shape.vocab, (2, tokens // 2), generator=torch.Generator().manual_seed(1))
    fields: dict[str, Any] = {
        "bench": "train-step", "phase": "train", "batch": 2, "tokens": tokens, "D": shape.hidden, "F": shape.ffn,
        "R": shape.rank, "dtype": "bfloat16 autocast" if multiplies_bf16("cpu") else "float32",
    }  # fmt: skip
    with bf16_router_products():
        timings = interleave(
            _step(sparse, ids), {"hf-dense": _step(dense, ids)}, pairs=pairs, min_seconds=0.0, idle_only=idle_only
        )
    return [timed_row("sparse", name, timing, 0, fields) for name, timing in timings.items()]


def _step(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    stage = Stage()
    model.train()
    optimiser = torch.optim.AdamW(list(parameter_groups(model, stage)), betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with record_routing(
            model, with_statistics=False, token_fraction=stage.aux_token_fraction, loss_kind=stage.aux_loss
        ) as record:
            with bf16_autocast("cpu"):
                loss = model(ids, labels=ids, loss_chunk=stage.loss_chunk, use_cache=False).loss
            if record.losses:
                loss = loss + stage.aux_weight * torch.stack(record.losses).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()

    return step
