"""Planted faults on a small model: the scan names the layer, the repair mends it and nothing else."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bankwise
from bankwise.config.evaluation import EvaluationPlan, PerplexityPlan
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.reading_cache import model_fingerprint
from bankwise.ffn import sparse_layers
from bankwise.models.checkpoint import load_checkpoint, save_checkpoint
from bankwise.repair import Patch, RepairSettings, Scan, faults, save_repaired
from bankwise.repair.changes import find_layer
from bankwise.repair.metrics import SampleSource, find_metric
from bankwise.repair.patch import LayerState, set_active
from bankwise.repair.repairing import _Bench, _pieces

LAYER = 0
HELD_OUT = 0.2
Plant = Callable[[PreTrainedModel], None]


def keep_one(layer: int) -> Plant:
    return lambda model: set_active(model, find_layer(model, layer), 1)


@torch.no_grad()
def spoil_output(model: PreTrainedModel) -> None:
    weight = find_layer(model, LAYER).down_proj.weight
    weight.add_(4 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


class Case:
    """A damaged copy of the chain's model, with what `scan` and `repair` are given."""

    def __init__(self, chain: Any, tokenizer: PreTrainedTokenizerFast, plant: Plant | None) -> None:
        self.chain, self.tokenizer = chain, tokenizer
        self.model = copy.deepcopy(chain.sparse)
        if plant is not None:
            plant(self.model)

    def scan(self, **changes: Any) -> Scan:
        options = {"lengths": [64, 128], "samples": 16, "companion": self.chain.companion}
        return bankwise.scan(
            self.model, self.tokenizer, "perplexity:0-1K", data=self.chain.data, held_out_fraction=HELD_OUT,
            **options | changes,
        )  # fmt: skip

    def repair(self, scan: Scan, **changes: Any) -> Patch:
        windows = PerplexityPlan(
            data=self.chain.data, windows=16, seq_len=64, held_out_fraction=HELD_OUT, kl_to_dense=False
        )
        options = {"samples": 16, "companion": self.chain.companion, "settings": RepairSettings(layer_steps=20)}
        return bankwise.repair(
            self.model, self.tokenizer, scan=scan, data=self.chain.data, held_out_fraction=HELD_OUT,
            guards=EvaluationPlan(suites=["perplexity"], perplexity=windows), **options | changes,
        )  # fmt: skip


@pytest.fixture
def case(chain: Any, words: PreTrainedTokenizerFast) -> Callable[[Plant | None], Case]:
    return lambda plant: Case(chain, words, plant)


def hashes(model: PreTrainedModel) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("plant", "fault", "remedy"),
    [
        (lambda model: faults.scramble_predictor(model, LAYER, 1), "routing", "predictor"),
        (lambda model: faults.add_predictor_noise(model, LAYER, 1), "routing", "predictor"),
        (keep_one(LAYER), "capacity", "more channels"),
        (lambda model: faults.scramble_late(64)(model, LAYER, 1), "routing", "more channels"),
    ],
    ids=["scrambled", "noise", "one channel", "late"],
)
def test_damaged_layer_is_found_and_mended(case: Any, plant: Plant, fault: str, remedy: str) -> None:
    damaged = case(plant)
    scan = damaged.scan()
    assert scan.finding.layer == LAYER, scan.table()
    before, fingerprint = hashes(damaged.model), model_fingerprint(damaged.model)
    patch = damaged.repair(scan)
    assert (patch.layer, patch.remedy, patch.figures["diagnosis"]["fault"]) == (LAYER, remedy, fault)
    assert patch.figures["tried"][-1]["acceptance"]["closed"] >= 0.8
    assert model_fingerprint(damaged.model) == fingerprint  # repair itself leaves the model alone

    patch.apply(damaged.model)
    changed = {name for name, value in hashes(damaged.model).items() if value != before[name]}
    assert all(name.startswith(f"model.layers.{LAYER}.mlp.predictor.") for name in changed)
    assert bool(changed) == (remedy == "predictor")
    assert damaged.scan().gap(128).value < 0.25 * scan.gap(128).value
    patch.revert(damaged.model)
    assert hashes(damaged.model) == before
    assert model_fingerprint(damaged.model) == fingerprint


def test_late_damage_shows_as_a_band(case: Any) -> None:
    damaged = case(lambda model: faults.scramble_late(64)(model, LAYER, 1))
    assert damaged.scan().affected == (128,)


@pytest.mark.parametrize(
    ("plant", "verdict"),
    [(None, "no affected band"), (spoil_output, "upstream")],
    ids=["healthy", "output weights"],
)
def test_what_no_layer_alone_can_mend_is_left_alone(case: Any, plant: Plant | None, verdict: str) -> None:
    damaged = case(plant)
    scan = damaged.scan()
    assert scan.finding.verdict == verdict, scan.table()
    before = hashes(damaged.model)
    patch = damaged.repair(scan)
    assert not patch.is_repair
    assert verdict in patch.reason
    patch.apply(damaged.model)
    assert hashes(damaged.model) == before


def test_layer_named_by_the_user_that_is_not_at_fault_is_left_alone(case: Any) -> None:
    damaged = case(keep_one(LAYER))
    patch = damaged.repair(damaged.scan(), layer=1)
    assert (patch.layer, patch.remedy) == (1, "none")
    assert patch.figures["diagnosis"]["fault"] == "upstream"


def test_unsorted_banks_are_dealt_anew(case: Any) -> None:
    """The re-deal is exact for the layer with all its channels, and undoes what sorting did."""
    from bankwise.repair.remedies import Workshop

    healthy = case(None)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    layer = find_layer(healthy.model, 2)
    h = layer.down_proj(layer.dense_activation(x))
    mask = layer.active_mask(x)[:, layer.predictor.bank_layout.argsort()]
    workshop = Workshop(
        model=healthy.model, companion=None, tokenizer=healthy.tokenizer, layer=layer, seq_len=64,
        data=healthy.chain.data, held_out_fraction=HELD_OUT,
    )  # fmt: skip
    remedy, _ = next(workshop.attempts("bank"))
    assert remedy == "new banks"
    assert torch.allclose(layer.down_proj(layer.dense_activation(x)), h, atol=1e-5)
    again = layer.active_mask(x)[:, layer.predictor.bank_layout.argsort()]
    assert (again == mask).float().mean() > 0.8  # most channels are kept by the same tokens, now in other banks
    assert not torch.equal(again, mask)


def test_last_remedy_trains_this_layer_alone(case: Any) -> None:
    from bankwise.repair.remedies import Workshop

    damaged = case(lambda model: faults.scramble_predictor(model, LAYER, 1))
    before = hashes(damaged.model)
    workshop = Workshop(
        model=damaged.model, companion=damaged.chain.companion, tokenizer=damaged.tokenizer,
        layer=find_layer(damaged.model, LAYER), seq_len=64, data=damaged.chain.data, held_out_fraction=HELD_OUT,
        settings=RepairSettings(layer_steps=40),
    )  # fmt: skip
    loss = damaged.scan(lengths=[64], layers=[LAYER]).gap(64).value
    workshop._train_layer()
    changed = {name for name, value in hashes(damaged.model).items() if value != before[name]}
    assert all(name.startswith(f"model.layers.{LAYER}.mlp.") for name in changed)
    assert any(".gate_proj." in name for name in changed)
    assert damaged.scan(lengths=[64], layers=[LAYER]).gap(64).value < loss
    assert all(parameter.requires_grad for parameter in damaged.model.parameters())


def test_last_remedy_goes_on_with_more_channels(case: Any) -> None:
    from bankwise.repair.remedies import Workshop

    damaged = case(keep_one(LAYER))
    model, layer = damaged.model, find_layer(damaged.model, LAYER)
    workshop = Workshop(
        model=model, companion=damaged.chain.companion, tokenizer=damaged.tokenizer, layer=layer, seq_len=64,
        data=damaged.chain.data, held_out_fraction=HELD_OUT, settings=RepairSettings(layer_steps=40),
    )  # fmt: skip

    def gap() -> float:
        return damaged.scan(lengths=[64], layers=[LAYER]).gap(64).value

    before = LayerState.of(model, layer)
    trained: dict[int, float] = {}
    for remedy, description in workshop._distil():
        assert remedy == "layer"
        assert model.config.sparsity["active_per_bank"] == [layer.active_per_bank, 16, 16]
        assert ("instead of 1" in description) == (layer.active_per_bank > 1)
        trained[layer.active_per_bank] = gap()
        before.restore(model, layer)
    assert list(trained) == [1, 2, 4]
    for active, value in trained.items():
        set_active(model, layer, active)
        assert value < gap()
    before.restore(model, layer)


def test_centre_is_fitted_anew_where_centring_is_on(chain: Any, words: PreTrainedTokenizerFast, case: Any) -> None:
    from bankwise.config import SparsityConfig
    from bankwise.data import mixed_windows
    from bankwise.repair.remedies import Workshop
    from bankwise.upcycle import upcycle

    windows = mixed_windows(chain.data, words, seq_len=64, num_windows=32, split="train", held_out_fraction=HELD_OUT)
    model = upcycle(
        chain.companion, SparsityConfig(predictor_rank=32, center="mean"), calibration=windows, progress=False
    )
    layer = find_layer(model, LAYER)
    good = layer.center.clone()
    layer.center.add_(1.0)
    workshop = Workshop(
        model=model, companion=chain.companion, tokenizer=words, layer=layer, seq_len=64, data=chain.data,
        held_out_fraction=HELD_OUT,
    )  # fmt: skip
    remedy, _ = next(workshop.attempts("routing"))
    assert remedy == "centre"
    assert (layer.center - good).abs().mean() < 0.05


def test_patch_is_saved_loaded_and_refuses_another_model(case: Any, tmp_path: Path) -> None:
    damaged, other = case(keep_one(LAYER)), case(None)
    patch = damaged.repair(damaged.scan())
    patch.save(tmp_path / "patch")
    loaded = Patch.load(tmp_path / "patch")
    assert (loaded.layer, loaded.remedy, loaded.figures) == (patch.layer, patch.remedy, patch.figures)
    with pytest.raises(ConfigError, match="is not the model that it was made for"):
        loaded.apply(other.model)
    with pytest.raises(ConfigError, match="is not the model with this patch on it"):
        loaded.revert(damaged.model)
    loaded.apply(damaged.model)
    assert model_fingerprint(damaged.model) == patch.repaired
    content = (tmp_path / "patch" / "patch.json").read_text(encoding="utf-8")
    (tmp_path / "patch" / "patch.json").write_text(content.replace("bankwise-patch/1", "other"), encoding="utf-8")
    with pytest.raises(DataError, match="damaged, or of another version"):
        Patch.load(tmp_path / "patch")


def test_repaired_checkpoint_loads_like_any_other(case: Any, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_checkpoint(case(keep_one(LAYER)).model, words, tmp_path / "damaged")
    damaged = case(None)
    damaged.model = load_checkpoint(tmp_path / "damaged")[0]
    patch = damaged.repair(damaged.scan())
    save_repaired(damaged.model, words, patch, tmp_path / "repaired")
    model, _ = load_checkpoint(tmp_path / "repaired")
    assert [layer.active_per_bank for layer in sparse_layers(model)] == [patch.active_per_bank, 16, 16]
    assert model.config.sparsity["active_per_bank"] == [patch.active_per_bank, 16, 16]
    assert model_fingerprint(model) == patch.repaired
    Patch.load(tmp_path / "repaired" / "patch").revert(model)
    assert model_fingerprint(model) == patch.base == model_fingerprint(damaged.model)


def test_interrupted_write_leaves_nothing(
    case: Any, words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = case(keep_one(LAYER))
    patch = damaged.repair(damaged.scan())

    def interrupted(self: Patch, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Patch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_repaired(damaged.model, words, patch, tmp_path / "repaired")
    assert list(tmp_path.iterdir()) == []
    assert model_fingerprint(damaged.model) == patch.base


def test_interrupted_repair_leaves_the_model_as_it_was(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = case(lambda model: faults.scramble_predictor(model, LAYER, 1))
    scan, before = damaged.scan(), model_fingerprint(damaged.model)
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if "trained from" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        damaged.repair(scan, say=interrupt)
    assert model_fingerprint(damaged.model) == before


def test_wrong_input_is_refused(case: Any) -> None:
    damaged = case(keep_one(LAYER))
    scan = damaged.scan()
    with pytest.raises(ConfigError, match=r"layer 9 is no sparse layer.*0\.\.2"):
        damaged.repair(scan, layer=9)
    with pytest.raises(ConfigError, match="the scan is of another model"):
        case(None).repair(scan)
    with pytest.raises(ConfigError, match="the scan's reference was companion"):
        damaged.repair(scan, companion=None)


def test_each_attempt_is_judged_on_samples_that_nothing_has_read(case: Any) -> None:
    """Held-out text gives its first windows whatever the seed: attempts that were refused have read those."""
    healthy = case(None)
    scan = healthy.scan()
    metric = find_metric(scan.metric)
    source = SampleSource(tokenizer=healthy.tokenizer, data=healthy.chain.data, held_out_fraction=HELD_OUT)
    bench = _Bench(healthy.model, None, healthy.tokenizer, metric, source, scan, scan.lengths, False, 4096)
    read = bench.scanned()
    for attempt in range(4):
        fresh = bench.fresh(16, attempt)
        assert [sample.length for sample in fresh] == [64] * 16 + [128] * 16
        known = {piece for sample in read for piece in _pieces(sample)}
        assert not any(_pieces(sample) & known for sample in fresh)
        read += fresh
    with pytest.raises(DataError, match="that the scan and earlier attempts did not read, and 16 are to judge"):
        all(bench.fresh(16, attempt) for attempt in range(4, 40))
