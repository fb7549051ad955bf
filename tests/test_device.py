"""On what a run works: the choice, and that every step of the pipeline works there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.tiny_run import tiny_recipe, write_model, write_texts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bankwise
from bankwise import pipeline, processes
from bankwise.errors import ConfigError


def test_cuda_is_refused_where_there_is_none_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = tiny_recipe(tmp_path / "no-model", tmp_path / "no-texts", tmp_path / "run", device="cuda")
    with pytest.raises(ConfigError, match="device='cuda', but torch sees no CUDA device"):
        bankwise.run(recipe, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_is_on_the_device_for_the_work_and_then_back_home(monkeypatch: pytest.MonkeyPatch) -> None:
    class Travelling(nn.Linear):
        def to(self, device: torch.device) -> "Travelling":  # type: ignore[override]  # records, moves nothing
            places.append(str(device))
            return self

    places: list[str] = []
    monkeypatch.setattr(processes, "own_device", lambda: torch.device("cuda", 3))
    with processes.on_own_device(Travelling(2, 2)):
        assert places == ["cuda:3"]
    assert places == ["cuda:3", "cpu"]


def test_conversion_measuring_and_generation_happen_on_the_own_device(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: list[nn.Module] = []
    worked: list[str] = []

    @contextmanager
    def moved(model: nn.Module) -> Iterator[None]:
        there.append(model)
        yield
        there.pop()

    def checked(name: str) -> Callable[..., Any]:
        work = getattr(pipeline, name)

        def check(model: nn.Module, *arguments: Any, **settings: Any) -> Any:
            assert there[-1] is model, f"{name} works on a model that was not moved"
            worked.append(name)
            return work(model, *arguments, **settings)

        return check

    monkeypatch.setattr(pipeline, "on_own_device", moved)
    steps = ("convert", "perplexity_and_recall", "active_fraction", "generate_text")
    for name in steps:
        monkeypatch.setattr(pipeline, name, checked(name))
    model = write_model(tmp_path / "dense", tiny_dense(), tokenizer)
    bankwise.run(tiny_recipe(model, write_texts(tmp_path / "texts"), tmp_path / "run", stages=[]), quiet=True)
    assert set(worked) == set(steps)
