"""Planted faults: does the scan find the layer, and does the repair mend it?

    python benchmarks/repair.py [--task text] [--models FOLDER] [--trials 20] [--healthy 20] [--controls] [--csv FILE]
    python benchmarks/repair.py [--task text] [--models FOLDER] --costs

A small model (trained here, or taken from FOLDER) is damaged in one layer and handed to `scan` and `repair`, which are
told nothing: five kinds of damage on every layer, a new seed each time. `--task counting`: a model that can do the
common-words task, whose answer is what is measured. `--task text`: a language model of English text, measured by its
loss on held-out text; its feed-forwards start loud, so that each of them matters. `--costs` says in which layers a
damage shows. Healthy: conversions of the same dense model under other seeds, scanned on other rows. Controls: damage
that one layer's choice of channels cannot mend, and banks of like channels, which may cost too little to be seen.
`regained` is measured on rows that neither scan nor repair has read: of another seed (counting), or of messages that
no training and no other measurement has seen (text).

The text models train in three minutes on one AVX-512 core; a trial takes 5 to 60 seconds there.
"""

import argparse
import copy
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from text_model import SOURCE, Shape, text_recipe, train_text_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bankwise
from bankwise.bench.results import write_rows
from bankwise.cache import cache_folder
from bankwise.config import DataSource
from bankwise.config.evaluation import CwePlan, EvaluationPlan, PerplexityPlan
from bankwise.data import load_split
from bankwise.data.aggregation import aggregation_documents
from bankwise.data.windows import mixed_windows
from bankwise.models.checkpoint import load_checkpoint
from bankwise.repair import Patch, RepairSettings, Scan, faults
from bankwise.repair.counting_model import CountingRows, counting_models, make_sparse
from bankwise.repair.metrics import SampleSource, find_metric
from bankwise.repair.prefix import PrefixReader
from bankwise.upcycle import load_dense

SAMPLES = 16
JUDGES = 24
SOTU, PYDOC = DataSource(path=SOURCE), DataSource(path="package:pydoc")
TEXT_SHAPE = Shape(layers=4, hidden=96, ffn=256, heads=2, vocabulary=512, lr=3e-3, loud=(1.0, 3.0, 9.0, 27.0))
# Of full rank, the product form rebuilds gate and up projection, so the healthy sparse model loses only what lies in
# the 48 dropped channels of a bank: little next to any damage.
TEXT_RANK = 2 * TEXT_SHAPE.hidden
_FINAL_SHARE = 0.05  # of the messages; only `regained` reads them
FIELDS = (
    "kind", "layer", "seed", "verdict", "found", "affected", "fault", "remedy", "k", "healthy", "damaged",
    "repaired", "regained", "guards", "others_identical", "seconds",
)  # fmt: skip


@dataclass(kw_only=True)
class Testbed:
    """A healthy model, how it is measured and mended, and a trial on it."""

    sparse: PreTrainedModel
    companion: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metric: str
    lengths: list[int]
    late: int
    """Damage that acts from this position on spares the shorter length."""
    read: list[DataSource]
    """Text that the metric of scan and repair reads."""
    final: list[DataSource]
    """Text by which `regained` is measured."""
    learn: list[DataSource]
    """Text that remedies learn from."""
    guards: EvaluationPlan
    settings: RepairSettings
    windows: Tensor
    """By which channels are sorted into banks."""
    convert: Callable[[int], PreTrainedModel]
    """Another healthy sparse model of the same companion, by seed."""

    def loss(self, model: PreTrainedModel, length: int) -> float:
        """Mean of the metric over rows that are used for nothing else."""
        metric = find_metric(self.metric)
        source = SampleSource(tokenizer=self.tokenizer, data=self.final, held_out_fraction=_FINAL_SHARE)
        samples = metric.samples(source, length, 24, 4242)
        values = metric.values(PrefixReader(model, self.tokenizer), samples)
        return sum(values) / len(values)

    def scan(self, model: PreTrainedModel, seed: int) -> Scan:
        return bankwise.scan(
            model, self.tokenizer, self.metric, self.lengths, samples=SAMPLES,
            companion=self.companion, data=self.read, seed=seed,
        )  # fmt: skip

    def repair(self, model: PreTrainedModel, scan: Scan) -> Patch:
        return bankwise.repair(
            model, self.tokenizer, scan=scan, companion=self.companion, data=self.learn, samples=JUDGES,
            guards=self.guards, settings=self.settings,
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
        length = max(scan.affected, default=self.lengths[-1])
        healthy, damaged = self.loss(self.sparse, length), self.loss(model, length)
        patch.apply(model)
        repaired = self.loss(model, length)
        own = f"model.layers.{patch.layer}.mlp."
        after = hashes(model)
        acceptance = patch.figures["tried"][-1]["acceptance"] if patch.is_repair else {}
        return row | {
            "healthy": f"{healthy:.4f}", "damaged": f"{damaged:.4f}", "repaired": f"{repaired:.4f}",
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
            "permuted banks": faults.permute_banks,
            "sorted banks": faults.sort_banks(self.windows),
            "scrambled late": faults.scramble_late(self.late),
            "noise in down_proj": faults.add_down_noise,
        }[kind]


def counting_testbed(folder: Path, texts: Path) -> Testbed:
    sparse, companion, tokenizer = counting_models(folder)
    for number, document in enumerate(aggregation_documents(tokenizer, seq_len=512, count=40, seed=777)):
        (texts / f"{number}.txt").write_text(document.text, encoding="utf-8")
    guards = EvaluationPlan(
        suites=["perplexity", "cwe"],
        perplexity=PerplexityPlan(
            data=[DataSource(path=str(texts))], windows=16, seq_len=256, held_out_fraction=0.5, kl_to_dense=False
        ),
        cwe=CwePlan(lengths=[480], samples=16, permutation=["per_sample"], seed=91),
    )
    return Testbed(
        sparse=sparse, companion=companion, tokenizer=tokenizer, metric="cwe_nll", lengths=[512, 640], late=440,
        read=[], final=[], learn=[PYDOC], guards=guards,
        settings=RepairSettings(windows=24), windows=CountingRows(tokenizer, 55).windows(16, 512),
        convert=lambda seed: make_sparse(
            companion, tokenizer, rank=32, steps=10, seed=100 + seed, say=lambda text: None
        ),
    )  # fmt: skip


def text_testbed(folder: Path) -> Testbed:
    texts = DataSource(path=str(_known_messages(folder / "messages")))
    data = [replace(texts, weight=3.0), PYDOC]
    dense, sparse = folder / "dense", folder / "sparse"
    companion = sparse / "companion"
    if not (dense / "config.json").is_file():
        train_text_model(dense, "600k", shape=TEXT_SHAPE, data=data)
    if not (sparse / "summary.json").is_file():
        train_taught(dense, sparse, data, tokens="300k", seed=0, teacher="companion")
    model, tokenizer = load_checkpoint(sparse / "checkpoint")
    guards = EvaluationPlan(
        suites=["perplexity"],
        perplexity=PerplexityPlan(data=[texts, PYDOC], windows=48, seq_len=128, kl_to_dense=False),
    )

    def convert(seed: int) -> PreTrainedModel:
        output = folder / f"healthy-{seed}"
        if not (output / "summary.json").is_file():
            train_taught(companion, output, data, tokens="20k", seed=100 + seed, teacher="dense")
        return load_checkpoint(output / "checkpoint")[0]

    return Testbed(
        sparse=model, companion=load_dense(companion, tokenizer=False).model, tokenizer=tokenizer,
        metric="perplexity:0-1K", lengths=[128, 256], late=140, read=[texts], final=[SOTU], learn=[texts],
        guards=guards, convert=convert, settings=RepairSettings(windows=96, layer_steps=192, layer_lr=3e-4),
        windows=mixed_windows([texts], tokenizer, seq_len=256, num_windows=16, split="train", held_out_fraction=0.05),
    )  # fmt: skip


def _known_messages(folder: Path) -> Path:
    """All messages but those of the final measurement, as files: for training, scan and repair."""
    folder.mkdir(parents=True, exist_ok=True)
    for document in load_split(SOTU, _FINAL_SHARE)[0]:
        (folder / f"{document.id.replace('/', '-')}.txt").write_text(document.text, encoding="utf-8")
    return folder


def train_taught(dense: Path, output: Path, data: list[DataSource], *, tokens: str, seed: int, teacher: str) -> None:
    """A sparse model of `dense` that learns mainly from its teacher: `dense` itself, or a companion."""
    recipe = text_recipe(dense, output, tokens=tokens, seed=seed)
    recipe["sparsity"]["predictor_rank"] = TEXT_RANK
    recipe["data"] = [{"path": source.path, "weight": source.weight} for source in data]
    recipe["eval"] |= {"windows": 16}
    recipe["stages"][0] |= {
        "lr": 2e-4, "ce_weight": 0.1, "kd_weight": 1.0, "state_weight": 10.0, "teacher": teacher,
    }  # fmt: skip
    bankwise.run(recipe | {"companion": teacher == "companion"}, overwrite=True, quiet=True)


def print_costs(bed: Testbed, depth: int) -> None:
    """Loss that a damage adds at the longest length, by layer: what is invisible cannot be found."""
    length = bed.lengths[-1]
    healthy = bed.loss(bed.sparse, length)
    print(f"healthy {healthy:.4f}, companion {bed.loss(bed.companion, length):.4f}")
    for kind in (*KINDS, "sorted banks", "noise in down_proj"):
        costs = []
        for layer in range(depth):
            model = copy.deepcopy(bed.sparse)
            bed.plant(kind)(model, layer, 1)
            costs.append(bed.loss(model, length) - healthy)
        print(f"{kind:22}", "  ".join(f"{cost:7.4f}" for cost in costs), flush=True)


KINDS = ("scrambled predictor", "noise in the predictor", "4 of 64 channels", "scrambled late", "permuted banks")


def planted(first: int, count: int, layers: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for trial in range(first, first + count):
        yield KINDS[trial % len(KINDS)], (trial // len(KINDS) % layers,), trial


def controls(layers: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for layer in range(layers):
        yield "noise in down_proj", (layer,), layer
        yield "sorted banks", (layer,), layer
    yield "4 of 64 channels", (0, layers - 1), 0
    yield "scrambled predictor", (0, layers - 1), 0


def hashes(model: PreTrainedModel) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


def healthy(bed: Testbed, first: int, count: int) -> Iterator[dict[str, object]]:
    for seed in range(first, first + count):
        started = time.perf_counter()
        finding = bed.scan(bed.convert(seed), 1000 + seed).finding
        yield {
            "kind": "healthy", "seed": seed, "verdict": finding.verdict, "found": finding.layer,
            "affected": "+".join(map(str, finding.lengths)), "seconds": f"{time.perf_counter() - started:.0f}",
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["counting", "text"], default="counting")
    parser.add_argument("--models", type=Path, help="folder of the models; default: in the cache")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--healthy", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to share the work")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--costs", action="store_true", help="only say what each damage costs in each layer")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as texts:
        folder = options.models or cache_folder(f"{options.task}-model")
        bed = text_testbed(folder) if options.task == "text" else counting_testbed(folder, Path(texts))
        depth = bed.sparse.config.num_hidden_layers
        if options.costs:
            print_costs(bed, depth)
            return 0
        trials = list(planted(options.first, options.trials, depth)) + (
            list(controls(depth)) if options.controls else []
        )
        for row in chain((bed.trial(*trial) for trial in trials), healthy(bed, options.first, options.healthy)):
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
    compared = [bool(row["others_identical"]) for row in rows if "others_identical" in row]
    false = sum(row["found"] is not None for row in alarms)
    return (
        f"\nright layer {right} of {len(main_rows)}; at least 80 % regained in {mended}; other parameters identical in "
        f"{sum(compared)} of {len(compared)}; false alarms {false} of {len(alarms)}"
    )


if __name__ == "__main__":
    sys.exit(main())
