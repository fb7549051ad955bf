"""Planted faults: does the scan find the layer, and does the repair mend it?

    python benchmarks/repair.py [--models FOLDER] [--trials 20] [--healthy 20] [--controls] [--csv out.csv]

A small model that can do the common-words task (trained here in minutes, or taken from FOLDER) is damaged in one layer
and handed to `scan` and `repair`, which are told nothing: five kinds of damage on every layer, a new seed each time.
Healthy: conversions of the same dense model under other seeds, scanned on other rows. Controls: damage that one layer's
choice of channels cannot mend. `regained` is measured on rows that neither scan nor repair has read.
"""

import argparse
import copy
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

import bankwise
from bankwise.bench.results import write_rows
from bankwise.cache import cache_folder
from bankwise.config import DataSource
from bankwise.config.evaluation import CwePlan, EvaluationPlan, PerplexityPlan
from bankwise.data.aggregation import aggregation_documents
from bankwise.evaluation.cwe import measure_rows
from bankwise.evaluation.ruler import generate
from bankwise.repair import Patch, RepairSettings, Scan, faults
from bankwise.repair.counting_model import CountingRows, counting_models, make_sparse
from bankwise.repair.prefix import PrefixReader

LENGTHS = [512, 640]
LATE = 440  # damage that acts from this position on spares the shorter length
SAMPLES = 16
JUDGES = 24
SHORT = 480
TEXT = [DataSource(path="package:pydoc")]
FIELDS = (
    "kind", "layer", "seed", "verdict", "found", "affected", "fault", "remedy", "k", "healthy_nll", "damaged_nll",
    "repaired_nll", "regained", "guards", "others_identical", "seconds",
)  # fmt: skip


class Bench:
    """The models, and what every trial shares."""

    def __init__(self, folder: Path, texts: Path) -> None:
        self.sparse, self.companion, self.tokenizer = counting_models(folder)
        for number, document in enumerate(aggregation_documents(self.tokenizer, seq_len=512, count=40, seed=777)):
            (texts / f"{number}.txt").write_text(document.text, encoding="utf-8")
        self.guards = EvaluationPlan(
            suites=["perplexity", "cwe"],
            perplexity=PerplexityPlan(
                data=[DataSource(path=str(texts))], windows=16, seq_len=256, held_out_fraction=0.5, kl_to_dense=False
            ),
            cwe=CwePlan(lengths=[SHORT], samples=16, permutation=["per_sample"], seed=91),
        )
        self.lists = CountingRows(self.tokenizer, 55).windows(16, 512)

    def nll(self, model: PreTrainedModel, length: int, seed: int = 4242) -> float:
        rows = generate(
            "cwe", self.tokenizer, max_seq_length=length, num_samples=24, seed=seed, permutation="per_sample"
        )
        records = measure_rows(PrefixReader(model, self.tokenizer), rows)
        return sum(record.nll.total / record.nll.tokens for record in records) / len(records)

    def scan(self, model: PreTrainedModel, seed: int) -> Scan:
        return bankwise.scan(
            model, self.tokenizer, lengths=LENGTHS, samples=SAMPLES, companion=self.companion, seed=seed
        )

    def repair(self, model: PreTrainedModel, scan: Scan) -> Patch:
        return bankwise.repair(
            model, self.tokenizer, scan=scan, companion=self.companion, data=TEXT, samples=JUDGES, guards=self.guards,
            settings=RepairSettings(windows=24),
        )  # fmt: skip

    def trial(self, kind: str, layers: tuple[int, ...], seed: int) -> dict[str, object]:
        started = time.perf_counter()
        model = copy.deepcopy(self.sparse)
        for layer in layers:
            self.plant(kind)(model, layer, seed)
        before = hashes(model)
        scan = self.scan(model, 42 + seed)
        patch = self.repair(model, scan)
        row: dict[str, object] = {
            "kind": kind, "layer": "+".join(map(str, layers)), "seed": seed, "verdict": scan.finding.verdict,
            "found": scan.finding.layer, "affected": "+".join(map(str, scan.affected)), "remedy": patch.remedy,
            "fault": patch.figures.get("diagnosis", {}).get("fault", ""), "k": patch.active_per_bank or "",
        }  # fmt: skip
        length = max(scan.affected, default=LENGTHS[-1])
        healthy, damaged = self.nll(self.sparse, length), self.nll(model, length)
        patch.apply(model)
        repaired = self.nll(model, length)
        own = f"model.layers.{patch.layer}.mlp."
        after = hashes(model)
        acceptance = patch.figures["tried"][-1]["acceptance"] if patch.is_repair else {}
        return row | {
            "healthy_nll": f"{healthy:.4f}", "damaged_nll": f"{damaged:.4f}", "repaired_nll": f"{repaired:.4f}",
            "regained": f"{(damaged - repaired) / (damaged - healthy):.3f}" if damaged - healthy > 1e-3 else "",
            "guards": acceptance.get("accepted", ""),
            "others_identical": all(after[name] == value for name, value in before.items() if not name.startswith(own)),
            "seconds": f"{time.perf_counter() - started:.0f}",
        }  # fmt: skip

    def plant(self, kind: str) -> faults.Fault:
        return {
            "scrambled predictor": faults.scramble_predictor,
            "noise in the predictor": faults.add_predictor_noise,
            "4 of 64 channels": faults.keep_few,
            "sorted banks": faults.sort_banks(self.lists),
            "scrambled late": faults.scramble_late(LATE),
            "noise in down_proj": faults.add_down_noise,
        }[kind]


KINDS = ("scrambled predictor", "noise in the predictor", "4 of 64 channels", "scrambled late", "sorted banks")


def planted(first: int, count: int, layers: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for trial in range(first, first + count):
        yield KINDS[trial % len(KINDS)], (trial // len(KINDS) % layers,), trial


def controls(layers: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for layer in range(layers):
        yield "noise in down_proj", (layer,), layer
    yield "4 of 64 channels", (0, layers - 1), 0
    yield "scrambled predictor", (0, layers - 1), 0


def hashes(model: PreTrainedModel) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


def healthy(bench: Bench, first: int, count: int) -> Iterator[dict[str, object]]:
    for seed in range(first, first + count):
        started = time.perf_counter()
        model = make_sparse(bench.companion, bench.tokenizer, rank=32, steps=10, seed=100 + seed, say=lambda text: None)
        finding = bench.scan(model, 1000 + seed).finding
        yield {
            "kind": "healthy", "seed": seed, "verdict": finding.verdict, "found": finding.layer,
            "affected": "+".join(map(str, finding.lengths)), "seconds": f"{time.perf_counter() - started:.0f}",
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=cache_folder("counting-model"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--healthy", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to share the work")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as texts:
        bench = Bench(options.models, Path(texts))
        depth = bench.sparse.config.num_hidden_layers
        trials = list(planted(options.first, options.trials, depth)) + (
            list(controls(depth)) if options.controls else []
        )
        for row in chain((bench.trial(*trial) for trial in trials), healthy(bench, options.first, options.healthy)):
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items() if value not in ("", None)), flush=True)
    print(summary(rows, options.trials))
    if options.csv:
        write_rows(rows, options.csv, FIELDS)
    return 0


def summary(rows: list[dict[str, object]], trials: int) -> str:
    main_rows, alarms = rows[:trials], [row for row in rows if row["kind"] == "healthy"]
    right = sum(str(row["found"]) == row["layer"] for row in main_rows)
    mended = sum(float(str(row["regained"] or 0)) >= 0.8 and row["remedy"] != "none" for row in main_rows)
    identical = sum(bool(row.get("others_identical", True)) for row in rows)
    return (
        f"\nright layer {right} of {len(main_rows)}; at least 80 % regained in {mended}; other parameters identical in "
        f"{identical} of {len(rows)}; false alarms {sum(row['found'] is not None for row in alarms)} of {len(alarms)}"
    )


if __name__ == "__main__":
    sys.exit(main())
