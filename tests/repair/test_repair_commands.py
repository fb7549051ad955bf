"""`bankwise scan` and `bankwise repair` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bankwise.cli import main
from bankwise.models.checkpoint import load_checkpoint, save_checkpoint
from bankwise.repair import Patch, Scan
from bankwise.repair.changes import find_layer
from bankwise.repair.patch import set_active


@pytest.fixture
def damaged(chain: Any, words: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    """A damaged checkpoint, and the arguments that name it and its text."""
    save_checkpoint(chain.sparse, words, tmp_path / "sparse")
    model, _ = load_checkpoint(tmp_path / "sparse")
    set_active(model, find_layer(model, 0), 1)
    save_checkpoint(model, words, tmp_path / "damaged")
    (tmp_path / "guards.yaml").write_text(
        f"suites: [perplexity]\nperplexity:\n  data: [{{path: {chain.data[0].path}}}]\n  windows: 8\n  seq_len: 64\n"
        "  held_out_fraction: 0.2\n",
        encoding="utf-8",
    )
    return [str(tmp_path / "damaged"), "--data", chain.data[0].path, "--held-out-fraction", "0.2"]


def scan_arguments(damaged: list[str], *more: str) -> list[str]:
    return ["scan", *damaged, "--metric", "perplexity:0-1K", "--lengths", "64,128", "--samples", "12", *more]


def test_scan_then_repair(damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "evaluation"
    evaluation = ["eval", damaged[0], "--preset", str(tmp_path / "guards.yaml"), "--output", str(folder), "--quiet"]
    assert main(evaluation) == 0
    assert main(scan_arguments(damaged, "--report", str(folder))) == 0
    shown = capsys.readouterr()
    assert "verdict: layer 0" in shown.out
    assert "estimate: " in shown.err
    assert Scan.load(tmp_path / "damaged" / "scan.json").finding.layer == 0
    assert len(json.loads((folder / "report.json").read_text(encoding="utf-8"))["scan"]["values"]) == 3
    assert "perplexity:0-1K" in (folder / "report.html").read_text(encoding="utf-8")

    output = tmp_path / "repaired"
    arguments = [
        "repair",
        *damaged,
        "--output",
        str(output),
        "--samples",
        "12",
        "--guards",
        str(tmp_path / "guards.yaml"),
    ]
    assert main(arguments) == 0
    assert "layer 0: more channels" in capsys.readouterr().out
    patch, (model, _) = Patch.load(output / "patch"), load_checkpoint(output)
    assert find_layer(model, 0).active_per_bank == patch.active_per_bank > 1

    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_mistakes_are_one_line(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], chain: Any
) -> None:
    chain.companion.save_pretrained(tmp_path / "dense")
    folders = set(tmp_path.iterdir())
    for arguments, message in (
        (scan_arguments(damaged, "--layers", "9"), "layer 9 is no sparse layer"),
        (["scan", *damaged, "--lengths", "8192"], "longer than the model's context of 256"),
        (["scan", str(tmp_path / "dense")], "holds no sparse checkpoint"),
        (["scan", *damaged, "--report", str(tmp_path)], "report.json cannot be read"),
        (["repair", *damaged, "--output", str(tmp_path / "new")], "scan.json cannot be read"),
        (["repair", str(tmp_path / "dense"), "--output", str(tmp_path / "new")], "holds no sparse checkpoint"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("bankwise: ")
        assert message in error
    assert set(tmp_path.iterdir()) == folders


def test_scan_of_another_model_is_refused(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(scan_arguments(damaged, "--quiet", "--output", str(tmp_path / "scan.json"))) == 0
    other = [str(tmp_path / "sparse"), *damaged[1:]]
    assert main(["repair", *other, "--scan", str(tmp_path / "scan.json"), "--output", str(tmp_path / "new")]) == 2
    assert "the scan is of another model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
