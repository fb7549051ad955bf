"""Held-out loss of the untrained conversion of SmolLM2-135M, by predictor form, initialisation and calibration.

    python benchmarks/conversion.py [--csv out.csv] [VARIANT ...]

Every variant: 16 of 64, rank 192, the demo recipe's text and calibration tokens, one common set of 24 held-out windows
of 512 tokens (bfloat16 autocast). Columns: nats above dense, seconds of the fit, and means over layers on calibration
windows that were not fitted: recall of the oracle's channels and retained energy.
"""

import argparse
import sys
from pathlib import Path

from bankwise.bench.results import write_rows
from bankwise.config import load_recipe
from bankwise.evaluation import perplexity
from bankwise.ffn.allocator import keep_freed_memory
from bankwise.pipeline import load_data
from bankwise.upcycle import convert, load_dense

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m-cpu.yaml"
VARIANTS = {
    "default": [],
    "closed-form": ["calibration.refine_epochs=0"],
    "dense-stream": ["calibration.stream=dense"],
    "snake": ["sparsity.bank_layout=snake"],
    "center-mean": ["sparsity.center=mean"],
    "product-svd_gate": ["calibration.init=svd_gate"],
    "product-zero": ["calibration.init=zero"],
    "linear-ridge": ["sparsity.predictor_form=linear"],
    "linear-svd_act": ["sparsity.predictor_form=linear", "calibration.init=svd_act"],
    "linear-svd_gate": ["sparsity.predictor_form=linear", "calibration.init=svd_gate"],
    "linear-zero": ["sparsity.predictor_form=linear", "calibration.init=zero"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: all of {', '.join(VARIANTS)}")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    unknown = sorted(set(options.variants) - set(VARIANTS))
    if unknown:
        parser.error(f"unknown variants {unknown}; known are {', '.join(VARIANTS)}")
    keep_freed_memory()
    recipe = load_recipe(RECIPE)
    loaded = load_dense(recipe.model)
    assert loaded.tokenizer is not None
    data = load_data(recipe, loaded.tokenizer)
    dense = perplexity(loaded.model, data.held_out, bf16=True)
    print(f"dense loss {dense.loss:.4f}, n = {dense.n}", flush=True)
    rows = []
    for name in options.variants or VARIANTS:
        variant = load_recipe(RECIPE, VARIANTS[name])
        conversion = convert(loaded.model, variant.sparsity, data.calibration, variant.calibration, progress=False)
        result = perplexity(conversion.model, data.held_out, bf16=True)
        after = conversion.report["after"]
        recall, retained = after["recall of the oracle's channels"], after["retained energy of the predictor"]
        rows.append({
            "variant": name, "loss": f"{result.loss:.4f}", "above_dense": f"{result.loss - dense.loss:.4f}",
            **{f"above_dense_{source}": f"{row['loss'] - dense.by_source[source]['loss']:.4f}"
               for source, row in result.by_source.items()},
            "recall": f"{recall:.4f}", "retained": f"{retained:.4f}",
            "seconds": f"{conversion.report['seconds']:.0f}",
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.csv:
        write_rows(rows, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
