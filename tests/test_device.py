"""On what a run works: the choice, and that every step of the pipeline works there."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from training.tiny_run import tiny_recipe, write_model, write_texts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bankwise
from bankwise import cli, pipeline, processes
from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.errors import ConfigError
from bankwise.training import controls
from bankwise.upcycle import Conversion, convert
from bankwise.upcycle.narrow import narrow_dense


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


def test_a_conversion_has_one_model_at_a_time_on_its_device(
    tiny_dense: Callable[..., PreTrainedModel], tokens: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[str, str]] = []
    to = PreTrainedModel.to

    def recorded(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
        moves.append((model.config.model_type, str(device)))
        return to(model, device)  # type: ignore[arg-type]  # its wrapper lost the type of the argument

    monkeypatch.setattr(PreTrainedModel, "to", recorded)
    dense = tiny_dense()
    convert(
        dense, SparsityConfig(predictor_rank=32), tokens(8, 32), CalibrationConfig(), device=torch.device("cpu", 0),
        progress=False,
    )  # fmt: skip
    there = [(name, place) for name, place in moves if place == "cpu:0" or name == "llama"]
    assert there == [("llama", "cpu:0"), ("llama", "cpu"), ("bankwise_llama", "cpu:0")]


@pytest.mark.parametrize("command", ["run", "upcycle"])
def test_conversions_are_given_the_own_device(
    command: str,
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = write_model(tmp_path / "dense", tiny_dense(), tokenizer)
    recipe = tiny_recipe(model, write_texts(tmp_path / "texts"), tmp_path / "run", stages=[])
    places = []

    def recorded(*arguments: Any, device: torch.device, **settings: Any) -> Conversion:
        places.append(device)
        return convert(*arguments, **settings)

    monkeypatch.setattr(processes, "own_device", lambda: torch.device("cpu", 7))
    if command == "run":
        monkeypatch.setattr(pipeline, "own_device", processes.own_device)
        monkeypatch.setattr(pipeline, "convert", recorded)
        monkeypatch.setattr(pipeline, "on_own_device", nullcontext)
        bankwise.run(recipe, quiet=True)
    else:
        monkeypatch.setattr(sys.modules["bankwise.upcycle"], "convert", recorded)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert cli.main(["upcycle", str(model), str(tmp_path / "sparse"), "--recipe", str(path), "--quiet"]) == 0
    assert places == [torch.device("cpu", 7)]


def test_measuring_and_generation_happen_on_the_own_device(
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

    def narrowed(dense: PreTrainedModel, *arguments: Any, **settings: Any) -> PreTrainedModel:
        assert there[-1] is dense, "the channels of dense_narrow are chosen on a model that was not moved"
        worked.append("narrow_dense")
        return narrow_dense(dense, *arguments, **settings)

    monkeypatch.setattr(pipeline, "on_own_device", moved)
    monkeypatch.setattr(controls, "on_own_device", moved)
    monkeypatch.setattr(controls, "narrow_dense", narrowed)
    steps = ("perplexity_and_recall", "active_fraction", "generate_text")
    for name in steps:
        monkeypatch.setattr(pipeline, name, checked(name))
    model = write_model(tmp_path / "dense", tiny_dense(), tokenizer)
    texts = write_texts(tmp_path / "texts")
    bankwise.run(tiny_recipe(model, texts, tmp_path / "run", controls=["dense_narrow"]), quiet=True)
    assert set(worked) == {*steps, "narrow_dense"}
