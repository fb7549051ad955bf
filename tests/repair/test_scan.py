"""The scan: its values are those of plain readings, it resumes, and it refuses what it cannot read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config import DataSource
from bankwise.errors import BankwiseError, ConfigError, DataError
from bankwise.evaluation.cwe import measure_rows
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.reading_cache import model_fingerprint
from bankwise.evaluation.ruler import generate
from bankwise.ffn import bank_topk_mask, channel_energy, sparse_layers
from bankwise.repair import Scan, scan

Untrained = Callable[..., PreTrainedModel]


def plain_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int = 4) -> list[float]:
    rows = generate("cwe", tokenizer, max_seq_length=512, num_samples=count, seed=42, permutation="per_sample")
    return [record.nll.total / record.nll.tokens for record in measure_rows(Engine(model, tokenizer), rows)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_more_channels_read_from_the_middle_equal_a_whole_reading(
    untrained: Untrained, words: PreTrainedTokenizerFast, family: str
) -> None:
    model = untrained(family)
    result = scan(model, words, lengths=[512], samples=4)
    for layer in sparse_layers(model):
        for change, active in (("dense", 64), ("1.5k", 24), ("2k", 32)):
            layer.active_per_bank = active
            expected = plain_nll(model, words)
            layer.active_per_bank = 16
            assert result.changed[change][str(layer.layer)]["512"] == pytest.approx(expected, abs=2e-4)
    assert result.sparse["512"] == pytest.approx(plain_nll(model, words), abs=2e-4)
    for layer in sparse_layers(model):
        layer.active_per_bank = 64
    assert result.dense["512"] == pytest.approx(plain_nll(model, words), abs=2e-4)
    sparse_layers(model)[1].active_per_bank = 16
    assert result.changed["damage"]["1"]["512"] == pytest.approx(plain_nll(model, words), abs=2e-4)


def test_oracle_keeps_the_strongest_channels_at_the_current_k(
    untrained: Untrained, words: PreTrainedTokenizerFast
) -> None:
    model = untrained()
    result = scan(model, words, lengths=[512], samples=4, layers=[1])
    layer = sparse_layers(model)[1]

    def masked(x: torch.Tensor) -> torch.Tensor:
        h = layer.dense_activation(x)
        return layer.down_proj(h * bank_topk_mask(channel_energy(h, layer.down_proj.weight)))

    layer.forward = masked  # type: ignore[method-assign]
    assert result.changed["oracle"]["1"]["512"] == pytest.approx(plain_nll(model, words), abs=2e-4)


def test_damage_of_a_companion_masks_its_layer_by_an_oracle(
    untrained: Untrained, words: PreTrainedTokenizerFast, tiny_dense: Untrained
) -> None:
    model = untrained()
    companion = tiny_dense(
        vocab_size=len(words), max_position_embeddings=1024, num_hidden_layers=3, ffn_scale=0.3, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    result = scan(model, words, lengths=[512], samples=4, layers=[2], companion=companion)
    assert result.dense["512"] == pytest.approx(plain_nll(companion, words), abs=2e-4)
    mlp = companion.model.layers[2].mlp

    def masked(x: torch.Tensor) -> torch.Tensor:
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(h * bank_topk_mask(channel_energy(h, mlp.down_proj.weight)))

    mlp.forward = masked
    assert result.changed["damage"]["2"]["512"] == pytest.approx(plain_nll(companion, words), abs=2e-4)


@pytest.mark.parametrize("metric", ["cwe_auc", "ruler:cwe", "perplexity:0-1K"])
def test_other_metrics_too(untrained: Untrained, words: PreTrainedTokenizerFast, metric: str) -> None:
    model = untrained()
    data = [DataSource(path="package:pydoc")]
    result = scan(model, words, metric, lengths=[512], samples=4, layers=[1], data=data)
    sparse_layers(model)[1].active_per_bank = 64
    again = scan(model, words, metric, lengths=[512], samples=4, layers=[1], data=data)
    assert result.changed["dense"]["1"]["512"] == pytest.approx(again.sparse["512"], abs=2e-4)


def test_model_is_left_as_it_was(untrained: Untrained, words: PreTrainedTokenizerFast) -> None:
    model = untrained()
    before = model_fingerprint(model)
    result = scan(model, words, lengths=[512], samples=4)
    assert model_fingerprint(model) == before == result.fingerprint


def test_interrupted_scan_goes_on_and_reads_nothing_twice(
    untrained: Untrained, words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, file = untrained(), tmp_path / "values.jsonl"
    whole = scan(model, words, lengths=[512], samples=4, resume=file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:20]) + lines[20][:7])  # killed while it wrote
    assert scan(model, words, lengths=[512], samples=4, resume=file) == whole
    full = file.read_bytes()
    said: list[str] = []
    assert scan(model, words, lengths=[512], samples=4, resume=file, say=said.append) == whole
    assert file.read_bytes() == full
    assert "0 of 4 samples" in said[0]
    # Another model takes nothing from this file.
    sparse_layers(model)[0].active_per_bank = 32
    assert scan(model, words, lengths=[512], samples=4, resume=file).sparse != whole.sparse


def test_estimate_comes_before_the_layers(untrained: Untrained, words: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    scan(untrained(), words, lengths=[512], samples=4, say=said.append)
    assert said[1].startswith("estimate: ")
    assert "100%" in said[-1]
    percents = [int(re.search(r"(\d+)%", line).group(1)) for line in said[2:]]
    assert percents == sorted(set(percents))


def test_saved_scan_comes_back(untrained: Untrained, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    result = scan(untrained(), words, lengths=[512], samples=4)
    result.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == result
    (tmp_path / "other.json").write_text(json.dumps({"format": "else"}), encoding="utf-8")
    with pytest.raises(DataError, match="no scan of this version"):
        Scan.load(tmp_path / "other.json")


def test_heat_map_is_the_change_of_the_value(untrained: Untrained, words: PreTrainedTokenizerFast) -> None:
    result = scan(untrained(), words, lengths=[512, 640], samples=4)
    map_ = result.heat_map()
    assert map_["layers"] == [0, 1, 2]
    assert map_["lengths"] == [512, 640]
    means = [sum(values["640"]) / 4 for values in (result.changed["dense"]["1"], result.sparse)]
    assert map_["values"][1][1] == pytest.approx(means[0] - means[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [7]}, r"layer 7 is no sparse layer.*0\.\.2"),
        ({"lengths": [4096]}, "4096, longer than the model's context of 1024"),
        ({"lengths": []}, "lengths is empty"),
        ({"samples": 2}, "samples=2 is too few"),
        ({"metric": "cwe"}, "metric='cwe' is not known"),
        ({"metric": "perplexity:1-4K", "lengths": [512]}, "begins at position 1024"),
        ({"metric": "perplexity:0-1K"}, "no data source"),
    ],
)
def test_bad_input_is_refused(
    untrained: Untrained, words: PreTrainedTokenizerFast, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(BankwiseError, match=message):
        scan(untrained(), words, **{"lengths": [512], "samples": 4} | wrong)  # type: ignore[arg-type]


def test_dense_model_is_refused(words: PreTrainedTokenizerFast, tiny_dense: Untrained) -> None:
    with pytest.raises(ConfigError, match="has no sparse layer"):
        scan(tiny_dense(), words, lengths=[128])
