"""How far training brings the sparse model to its dense companion: the gap in held-out nats against tokens.

    python benchmarks/recovery.py [--folder runs/smollm2-135m-recovery] [--csv out.csv] [key=value ...]

Runs recipes/smollm2-135m-recovery.yaml (or goes on with it, where FOLDER holds a part of it), then measures every
checkpoint that companion and sparse model left at the same number of tokens, on the same windows: held-out messages,
the domain they were trained on, and the Python reference, which neither has seen. The gap's standard error is that of
the paired difference over windows (windows of one document are not independent).
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bankwise
from bankwise.bench.results import write_rows
from bankwise.config import DataSource, Recipe, load_recipe
from bankwise.data import held_out_windows
from bankwise.evaluation.perplexity import window_losses
from bankwise.ffn.allocator import keep_freed_memory
from bankwise.upcycle import load_dense

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m-recovery.yaml"
OTHER_DOMAIN = DataSource(path="package:pydoc")
OTHER_WINDOWS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    folder = Path("runs/smollm2-135m-recovery")
    parser.add_argument("--folder", type=Path, default=folder, help="folder of the run (%(default)s)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, [f"output={options.folder}", *options.overrides])
    keep_freed_memory()
    if not (options.folder / "summary.json").is_file():
        bankwise.run(recipe, resume=True)
    elif load_recipe(options.folder / "recipe.yaml") != recipe:
        parser.error(f"{options.folder} holds a run with other settings; choose another --folder")
    windows = _windows(recipe)
    rows = []
    print(f"{'tokens':>10} {'domain':22} {'companion':>10} {'sparse':>8} {'gap':>7} {'se':>7} {'n':>4}")
    for tokens, companion, sparse in _pairs(recipe, options.folder):
        for domain, windows_WS in windows.items():
            one_W, other_W = (window_losses(model, windows_WS, bf16=True) for model in (companion, sparse))
            gap_W = other_W - one_W
            row = {
                "tokens": tokens,
                "domain": domain,
                "companion": one_W.mean().item(),
                "sparse": other_W.mean().item(),
                "gap": gap_W.mean().item(),
                "standard_error": gap_W.std().item() / math.sqrt(gap_W.numel()),
                "n": gap_W.numel(),
            }
            rows.append(row)
            print(
                f"{tokens:10,} {domain:22} {row['companion']:10.4f} {row['sparse']:8.4f} {row['gap']:7.4f} "
                f"{row['standard_error']:7.4f} {row['n']:4}",
                flush=True,
            )
    if options.csv and rows:
        write_rows(rows, options.csv)
    return 0


def _windows(recipe: Recipe) -> dict[str, Tensor]:
    tokenizer = load_dense(recipe.model).tokenizer
    assert tokenizer is not None
    parts = [(recipe.data, recipe.eval.windows), ([OTHER_DOMAIN], OTHER_WINDOWS)]
    return {
        name: windows
        for sources, count in parts
        for name, windows in held_out_windows(
            sources,
            tokenizer,
            seq_len=recipe.eval.seq_len,
            num_windows=count,
            held_out_fraction=recipe.held_out_fraction,
            seed=recipe.seed,
        ).items()
    }


def _pairs(recipe: Recipe, folder: Path) -> Iterator[tuple[int, PreTrainedModel, PreTrainedModel]]:
    """Tokens, companion and sparse model: before training, at every common checkpoint, and at the end."""
    stage = recipe.stages[0]
    yield 0, load_dense(recipe.model, tokenizer=False).model, _load(folder / "untrained")
    checkpoints = {
        name: {int(re.sub(r"\D", "", path.name)): path for path in (folder / "training" / name).glob("**/checkpoint-*")}
        for name in ("companion", "sparse")
    }
    for step in sorted(checkpoints["companion"].keys() & checkpoints["sparse"].keys()):
        companion, sparse = (_load(checkpoints[name][step]) for name in ("companion", "sparse"))
        yield step * int(stage.batch_tokens), companion, sparse
    if (folder / "checkpoint").is_dir() and stage.steps not in checkpoints["sparse"]:
        yield stage.steps * int(stage.batch_tokens), _load(folder / "companion"), _load(folder / "checkpoint")


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


if __name__ == "__main__":
    sys.exit(main())
