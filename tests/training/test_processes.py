"""Training on two processes equals training on one: DDP, FSDP2 through Accelerate, resume with another number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_two
from safetensors.torch import load_file
from training import two_processes
from transformers import PreTrainedModel

SCRIPT = Path(two_processes.__file__)
SPARSITY: dict[str, dict[str, Any]] = {
    "distilled": {},
    "detached": {"predictor_grad": "aux", "predictor_form": "linear"},
    "tied": {},
}


@pytest.fixture(scope="module")
def models(
    tiny_dense: Callable[..., PreTrainedModel],
    sparse: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_dense(seed=1).save_pretrained(folder / "companion")
    for name, sparsity in SPARSITY.items():
        sparse(sparsity=sparsity, tie_word_embeddings=name == "tied").save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in two_processes.CASES:
        two_processes.run_case(name, folder / name, models)
    return folder


@pytest.fixture(scope="module")
def together(alone: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    two_processes.copy_first_half(alone / "distilled", folder / "resumed" / "distilled")
    run_two(SCRIPT, folder, models)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(folder: Path, expected: Path) -> None:
    rows, expected_rows = lines(folder), lines(expected)
    assert [(row["step"], row["tokens"]) for row in rows] == [(row["step"], row["tokens"]) for row in expected_rows]
    for row, other in zip(rows, expected_rows, strict=True):
        for key in ("loss", "ce", "kd", "state", "aux", "grad_norm", "lr"):
            same = row[key] is None if other[key] is None else row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9)
            assert same, (row["step"], key, row[key], other[key])
    assert_same_weights(folder, expected)


def assert_same_weights(folder: Path, expected: Path) -> None:
    own, other = load_file(folder / "weights.safetensors"), load_file(expected / "weights.safetensors")
    assert own.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(
            own[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    sums = [
        json.loads((folder / f"sums-{rank}.json").read_text())
        for rank in range(2)
        if (folder / f"sums-{rank}.json").is_file()
    ]
    assert all(one == sums[0] for one in sums)


@pytest.mark.parametrize("case", two_processes.CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(kind: str, case: str, alone: Path, together: Path) -> None:
    assert_same_training(together / kind / case, alone / case)


def test_a_training_goes_on_with_another_number_of_processes(
    alone: Path, together: Path, models: Path, tmp_path: Path
) -> None:
    assert_same_training(together / "resumed" / "distilled", alone / "distilled")
    two_processes.copy_first_half(together / "ddp" / "distilled", tmp_path / "distilled")
    two_processes.run_case("distilled", tmp_path / "distilled", models, resume=True)
    assert_same_training(tmp_path / "distilled", alone / "distilled")


def test_a_fully_sharded_training_resumes_from_its_checkpoint(alone: Path, together: Path) -> None:
    assert_same_training(together / "fsdp-resumed", alone / "distilled")


def test_a_fully_sharded_training_in_bfloat16_keeps_its_losses_in_float32(alone: Path, together: Path) -> None:
    for row, expected in zip(lines(together / "fsdp-bf16"), lines(alone / "distilled"), strict=True):
        for key in ("loss", "ce", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=0.03)
            assert torch.tensor(row[key]).bfloat16().item() != row[key]
