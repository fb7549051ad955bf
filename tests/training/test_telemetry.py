"""Telemetry: its figures, its files and trackers, what it costs, and that it leaves the training alone."""

import json
import logging
import math
import sys
from importlib.machinery import ModuleSpec
from statistics import mean
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from training.tiny_run import tiny_recipe, weights, write_model, write_texts
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import bankwise
from bankwise.config import Stage
from bankwise.data import probe_windows
from bankwise.errors import ConfigError, TrainingError
from bankwise.evaluation.routing import routing_statistics
from bankwise.ffn import SparseSwiGLU, record_routing, sparse_layers
from bankwise.training import telemetry, trackers
from bankwise.training.probe import RoutingProbe
from bankwise.training.telemetry import probe_size
from bankwise.training.trackers import check_trackers

TIMES = {"step_seconds", "probe_seconds", "cost_share"}


@pytest.fixture(autouse=True)
def any_cost(monkeypatch):
    """On models this small a reading costs far more than the allowed share; only one test is about that."""
    monkeypatch.setattr(telemetry, "MOST_COST", 0.9999)


class Copies(TrainerCallback):
    """Keeps the weights at the end of some steps."""

    def __init__(self, *steps):
        self.steps, self.kept = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.kept[state.global_step] = weights(model)


def read(model, windows, probe=None):
    probe = RoutingProbe(windows) if probe is None else probe
    return probe.read(model, model, batch_size=2, loss_chunk=8)


def without_times(line):
    return {name: value for name, value in line.items() if name not in TIMES}


# Figures


SETTINGS = [
    {},
    {"active_per_bank": [8, 64]},
    {"gate_mode": "stat_topk"},
    {"gate_mode": "sigmoid", "center": "ema"},
    {"dense_layers": [0]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_reading_equals_the_evaluation_of_the_same_windows(sparse, windows, settings):
    model = sparse(sparsity=settings, scale=0.2)
    model.train()
    figures = read(model, windows(5, 16))
    for place, expected in enumerate(routing_statistics(model, {"a": windows(5, 16)})["layers"]):
        assert figures["layers"][place] == expected["layer"]
        for name in ("recall", "retained_energy", "retained_energy_oracle", "retained_energy_global", "margin",
                     "usage_gini", "dead", "always_on"):  # fmt: skip
            assert figures[name][place] == pytest.approx(expected[name], abs=1e-6), name
        for width in ("2", "4", "8", "16"):
            assert figures["union"][width][place] == pytest.approx(expected["union"][width], abs=1e-6)
        assert figures["recall_by_position"] == {"0-1K": figures["recall"]}
    assert figures["probe_tokens"] == figures["usage_tokens"] == 5 * 16


def test_the_loss_of_a_reading_is_the_mean_over_the_windows(sparse, windows):
    model = sparse(scale=0.2).eval()
    with torch.no_grad():
        expected = model(input_ids=windows(5), labels=windows(5)).loss.item()
    assert read(model, windows(5))["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_low_margin_bounds_a_twentieth_of_the_margins(sparse, windows):
    model = sparse(scale=0.2)
    inputs = {layer.layer: [] for layer in sparse_layers(model)}
    for layer in sparse_layers(model):
        layer.register_forward_pre_hook(lambda layer, values: inputs[layer.layer].append(values[0]))
    figures = read(model, windows(4))
    for place, layer in enumerate(sparse_layers(model)):
        banks = layer.logits(torch.cat(inputs[layer.layer])).unflatten(-1, (-1, 64)).detach()
        ordered = banks.sort(descending=True).values
        margins = ((ordered[..., 15] - ordered[..., 16]) / banks.std(dim=-1, correction=0)).flatten().sort().values
        assert figures["margin_p5"][place] == pytest.approx(
            margins[math.ceil(0.05 * len(margins)) - 1].item(), abs=1e-6
        )


def test_churn_compares_with_the_reading_before_and_use_adds_up(sparse, windows):
    model = sparse(scale=0.2)
    probe = RoutingProbe(windows(4))
    masks = []

    def masks_now():
        kept = {}

        def keep(layer, values, _):
            kept[layer.layer] = layer.active_mask(*values)

        hooks = [layer.register_forward_hook(keep) for layer in sparse_layers(model)]
        with torch.no_grad():
            model.eval()(windows(4))
        for hook in hooks:
            hook.remove()
        masks.append([kept[layer.layer] for layer in sparse_layers(model)])

    first = read(model, windows(4), probe)
    assert first["churn"] == [None, None]
    masks_now()
    unchanged = read(model, windows(4), probe)
    assert unchanged["churn"] == [0, 0]
    masks_now()
    with torch.no_grad():
        sparse_layers(model)[1].predictor.expand.bias += torch.linspace(-3, 3, 256)
    changed = read(model, windows(4), probe)
    masks_now()
    before, after = masks[1], masks[2]
    lost = [((b & ~a).sum() / b.sum()).item() for b, a in zip(before, after, strict=True)]
    assert changed["churn"] == pytest.approx(lost)
    assert lost[0] == 0
    assert lost[1] > 0
    assert changed["usage_tokens"] == 3 * 64
    never = [sum(m[place].flatten(0, 1).sum(dim=0) for m in masks) == 0 for place in range(2)]
    assert changed["dead"] == pytest.approx([dead.double().mean().item() for dead in never])


def test_recall_is_reported_by_position(sparse, windows):
    model = sparse(scale=0.2, max_position_embeddings=2048)
    figures = read(model, windows(1, 1500))
    near, far = (figures["recall_by_position"][name][0] for name in ("0-1K", "1-4K"))
    assert near != far
    assert figures["recall"][0] == pytest.approx((1024 * near + 476 * far) / 1500)


def test_a_reading_leaves_the_model_as_it_was(sparse, windows):
    model = sparse(sparsity={"center": "ema"}).train()
    before, state = weights(model), torch.random.get_rng_state()
    read(model, windows())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(layer.routing_record is None for layer in sparse_layers(model))


def test_a_reading_looks_at_the_reference_path_where_a_kernel_is_plugged_in(sparse, windows, monkeypatch):
    monkeypatch.setattr(SparseSwiGLU, "fast_forward", lambda layer, x: layer.down_proj(layer.dense_activation(x)))
    assert len(read(sparse(), windows())["recall"]) == 2


# Router gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_router_gradients_are_those_of_the_two_losses(sparse, windows, training, micro_batch, checkpointing):
    model = sparse(scale=0.2)
    run = training(
        model, windows(), tokens=32, batch_tokens=32, micro_batch=micro_batch, telemetry_steps=1, aux_weight=0.5,
        aux_token_fraction=0.25, gradient_checkpointing=checkpointing,
    ).run()  # fmt: skip
    line = run.lines("telemetry.jsonl")[-1]

    # The same two losses of the same step, from logits that are leaves.
    reference = sparse(scale=0.2).train()
    seen, own = {}, {}
    for layer in sparse_layers(reference):

        def logits(x, layer=layer, plain=layer.logits):
            z = plain(x)
            z.retain_grad()
            (own if x.ndim == 2 else seen).setdefault(layer.layer, []).append(z)
            return z

        layer.logits = logits
    for window in windows()[:2].split(micro_batch):
        with record_routing(reference, token_fraction=0.25, with_statistics=False) as record:
            loss = reference(input_ids=window, labels=window, num_items_in_batch=30, use_cache=False).loss
            loss = loss + 0.5 * torch.stack(record.losses).mean() / (2 // micro_batch)
            loss.backward()
    for kind, logits_of in (("lm", seen), ("aux", own)):
        expected = [torch.cat([z.grad.flatten() for z in logits_of[layer]]).norm().item() for layer in (0, 1)]
        assert line["router_gradient"][kind] == pytest.approx(expected, rel=1e-4), kind
        assert min(expected) > 0


@pytest.mark.parametrize(
    ("sparsity", "stage", "has_lm", "has_aux"),
    [
        ({}, {}, True, True),
        ({}, {"aux_weight": 0.0}, True, False),
        ({"predictor_grad": "aux"}, {}, False, True),
        ({"gate_mode": "detached"}, {}, False, True),
        ({"gate_mode": "hard"}, {}, False, True),
        ({}, {"k_schedule": "dense"}, False, True),
        ({}, {"ce_weight": 0.0, "trains": "predictor"}, False, True),
        ({"active_per_bank": 64}, {}, False, True),
    ],
    ids=str,
)
def test_a_gradient_that_the_mode_does_not_pass_is_none(sparse, windows, training, sparsity, stage, has_lm, has_aux):
    run = training(sparse(sparsity=sparsity), windows(), tokens=32, telemetry_steps=1, **stage).run()
    first, last = run.lines("telemetry.jsonl")
    assert first["router_gradient"] == {"lm": [None, None], "aux": [None, None]}  # no step has been made
    gradient = last["router_gradient"]
    assert [norm is not None for norm in gradient["lm"]] == [has_lm, has_lm]
    assert [norm is not None for norm in gradient["aux"]] == [has_aux, has_aux]


def test_a_router_that_gets_nothing_for_a_hundred_steps_stops_the_run(sparse, windows, training):
    run = training(
        sparse(sparsity={"gate_mode": "affine"}), windows(length=4), tokens=300 * 4, batch_tokens=4, micro_batch=1,
        telemetry_steps=50, aux_weight=0.0, log_steps=100,
    )  # fmt: skip
    sparse_layers(run.model)[1].gate_weight.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"sparse model stopped at step 150 of 300: layer 1: .*exactly 0"):
        run.run()
    assert run.lines("telemetry.jsonl")[-1]["warning"] == "zero_router_gradient"


# Lines


def test_a_line_is_written_at_the_start_every_so_many_steps_and_at_the_end(sparse, windows, training):
    run = training(sparse(), windows(), tokens=7 * 32, telemetry_steps=3, name="sparse", tokens_before=320).run()
    lines = run.lines("telemetry.jsonl")
    assert [(line["model"], line["step"], line["tokens"]) for line in lines] == [
        ("sparse", step, 320 + 32 * step) for step in (0, 3, 6, 7)
    ]
    assert lines[0]["churn"] == [None, None]
    assert all(0 < churn < 0.75 for line in lines[1:] for churn in line["churn"])
    assert [line["usage_tokens"] for line in lines] == [48, 96, 144, 192]
    assert (lines[0]["cost_share"], lines[0]["step_seconds"]) == (None, None)
    for line in lines[1:]:
        assert 0 < line["cost_share"] < 1
        assert line["probe_seconds"] > 0
        assert line["step_seconds"] > 0
    assert lines[-1]["loss"] != lines[0]["loss"]


def test_lines_are_plain_json_and_describe_the_model_at_that_step(sparse, windows, training):
    copies = Copies(2, 4)
    copies.kept[0] = weights(sparse())
    run = training(sparse(), windows(), tokens=4 * 32, telemetry_steps=2, callback=copies, lr=1e-2).run()
    for line in run.lines("telemetry.jsonl"):
        json.dumps(line, allow_nan=False)
        model = sparse()
        model.load_state_dict(copies.kept[line["step"]])
        expected = read(model, windows()[:3])
        for name in ("loss", "recall", "margin", "margin_p5"):
            assert line[name] == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("settings", [{}, {"k_schedule": "linear", "aux_weight": 0.0, "bf16": True}], ids=str)
def test_telemetry_changes_nothing_of_the_training(sparse, windows, training, settings):
    sparsity = {"center": "ema"}
    runs = [
        training(
            sparse(sparsity=sparsity), windows(), tokens=6 * 32, telemetry_steps=steps, log_steps=4, lr=1e-3, **settings
        ).run()
        for steps in (0, 1)
    ]
    first, second = (weights(run.model) for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [row["loss"] for row in runs[0].rows] == [row["loss"] for row in runs[1].rows]
    assert not (runs[0].folder / "telemetry.jsonl").exists()


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_training_goes_on_with_its_lines_and_signs(sparse, windows, training, tmp_path):
    settings = {"tokens": 300 * 4, "batch_tokens": 4, "micro_batch": 1, "telemetry_steps": 40, "aux_weight": 0.0}
    settings |= {"log_steps": 100, "save_steps": 50, "folder": tmp_path / "run"}

    def start(**more):
        run = training(sparse(sparsity={"gate_mode": "affine"}), windows(length=4), **settings, **more)
        sparse_layers(run.model)[1].gate_weight.requires_grad_(False)
        return run

    with pytest.raises(KeyboardInterrupt):
        start(callback=Stop(90)).run()
    with (tmp_path / "run" / "telemetry.jsonl").open("a") as file:
        file.write('{"model": "sparse", "st')  # torn by a kill
    run = start()
    with pytest.raises(TrainingError, match=r"stopped at step 160 of 300: layer 1"):
        run.run(tmp_path / "run" / "work" / "checkpoint-50")
    lines = run.lines("telemetry.jsonl")
    assert [line["step"] for line in lines] == [0, 40, 80, 120, 160, 160]
    assert [line["usage_tokens"] for line in lines[:4]] == [12, 24, 12, 24]
    assert lines[2]["churn"] == [None, None]


def test_a_kill_between_two_readings_changes_no_gap_and_repeats_no_line(
    sparse, tiny_dense, windows, training, tmp_path
):
    rows, folder = windows(8), tmp_path / "run"
    stage = {"folder": folder, "tokens": 6 * 32, "lr": 1e-3, "save_steps": 2}
    training(tiny_dense(), rows, name="companion", **stage).run()
    work = training(sparse(), rows, telemetry_steps=3, **stage)
    expected = [line["companion_gap"] for line in work.run().lines("telemetry.jsonl")]
    for file in ("metrics.jsonl", "telemetry.jsonl"):
        kept = [line for line in (folder / file).read_text().splitlines() if '"companion",' in line]
        (folder / file).write_text("".join(line + "\n" for line in kept))
    for last in (1, 5):  # before the first checkpoint, and from the start again to after the second
        with pytest.raises(KeyboardInterrupt):
            training(sparse(), rows, telemetry_steps=3, callback=Stop(last), **stage).run()
    run = training(sparse(), rows, telemetry_steps=3, **stage)
    run.run(folder / "work" / "checkpoint-4")
    lines = run.lines("telemetry.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert [line["companion_gap"] for line in lines] == pytest.approx(expected)


@pytest.mark.parametrize("k_schedule", ["fixed", "linear"])
def test_the_gap_to_the_companion_is_that_of_the_same_steps(
    sparse, tiny_dense, windows, training, tmp_path, k_schedule
):
    rows, folder = windows(8), tmp_path / "run"
    stage = {"folder": folder, "tokens": 6 * 32, "lr": 1e-3, "k_schedule": k_schedule}
    training(tiny_dense(), rows, name="companion", **stage).run()
    run = training(sparse(), rows, telemetry_steps=3, **stage).run()
    losses = {(row["model"], row["step"]): row["ce"] for row in run.rows}
    gaps = [losses["sparse", step] - losses["companion", step] for step in range(1, 7)]
    readings = [line["companion_gap"] for line in run.lines("telemetry.jsonl")]
    if k_schedule == "fixed":
        # The step that ends with a reading is logged after it.
        assert readings == [None, pytest.approx(sum(gaps[:2]) / 2), pytest.approx(sum(gaps[2:5]) / 3)]
    else:
        assert readings == [None, None, None]


def test_a_dense_model_has_no_telemetry(tiny_dense, windows, training):
    run = training(tiny_dense(), windows(), name="companion", tokens=64, telemetry_steps=1).run()
    assert not (run.folder / "telemetry.jsonl").exists()


# Cost


def test_readings_become_rarer_where_they_cost_too_much(sparse, windows, training, monkeypatch, caplog):
    monkeypatch.setattr(telemetry, "MOST_COST", 0.03)
    seconds = iter(range(10_000))
    # Each look at the clock is one second later, so that a reading takes one second.
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(seconds))
    with caplog.at_level(logging.WARNING):
        run = training(sparse(), windows(length=4), tokens=70 * 8, telemetry_steps=2, probe=windows(1, 4)).run()
    lines = run.lines("telemetry.jsonl")
    # Started at 0, readings from 1 to 2 and from 3 to 4: 2 s of 4 for 2 steps, so 1 s is 3 % after 33 steps.
    assert lines[1] | {"step": 2, "step_seconds": 1.0, "probe_seconds": 1.0, "cost_share": 0.5} == lines[1]
    assert [line["step"] for line in lines][:3] == [0, 2, 34]
    assert [line["interval"] for line in lines][:3] == [2, 2, 34]
    assert len([record for record in caplog.records if "at most 3 % of the run" in record.message]) == 1


def test_the_probe_is_sized_for_the_cost():
    stage = Stage(seq_len=512, batch_tokens=1024)
    assert probe_size(stage, 50) == 1
    assert probe_size(stage, 500) == 10
    assert probe_size(stage, 500, processes=2) == 5
    assert probe_size(Stage(seq_len=512, batch_tokens=2**20), 50) == 16
    assert probe_size(Stage(seq_len=32768, batch_tokens=2**20), 50) == 1


def test_probe_windows_come_from_every_source_in_turn():
    held_out = {"a": torch.arange(24).view(3, 8), "b": 100 + torch.arange(16).view(2, 8)}
    assert probe_windows(held_out, seq_len=8, num_windows=3)[:, 0].tolist() == [0, 100, 8]
    assert probe_windows(held_out, seq_len=4, num_windows=99)[:, 0].tolist()[:5] == [0, 100, 4, 104, 8]
    assert probe_windows(held_out, seq_len=12, num_windows=9)[:, 0].tolist() == [0, 100, 12]
    assert probe_windows(held_out, seq_len=30, num_windows=9).tolist() == [[*range(24), *range(100, 106)]]
    assert probe_windows(held_out, seq_len=64, num_windows=9).shape == (1, 40)


# Trackers


def test_tensorboard_shows_the_means_and_the_worst_layer(sparse, windows, training, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = training(
        sparse(), windows(), tokens=4 * 32, telemetry_steps=2, arguments={"report_to": ["tensorboard"]}
    ).run()  # fmt: skip
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    lines = run.lines("telemetry.jsonl")
    expected = {
        "recall": {line["step"]: mean(line["recall"]) for line in lines},
        "recall_worst_layer": {line["step"]: min(line["recall"]) for line in lines},
        "router_gradient_lm": {line["step"]: mean(line["router_gradient"]["lm"]) for line in lines[1:]},
        "churn_worst_layer": {line["step"]: max(line["churn"]) for line in lines[1:]},
        "loss": {line["step"]: line["loss"] for line in lines},
    }
    assert list(expected["recall"]) == [0, 2, 4]
    for name, values in expected.items():
        scalars = {event.step: event.value for event in events.Scalars(f"train/telemetry/{name}")}
        assert scalars == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        (["clearml"], r"report_to='clearml' needs the package clearml: pip install clearml"),
        ("comet_ml", r"pip install comet-ml"),
        (["tensorbord"], r"report_to='tensorbord' is no tracker.*tensorboard"),
    ],
)
def test_a_tracker_that_cannot_be_loaded_is_refused(report_to, message, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message) as caught:
        check_trackers(report_to)
    assert "\n" not in str(caught.value)


def test_trackers_that_are_there_are_accepted():
    for report_to in ([], "none", ["all"], ["tensorboard"], ["kubeflow"]):
        check_trackers(report_to)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, of what transformers calls; `opened` and `closed` name the runs."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run, module.opened, module.closed, module.config = None, [], [], MagicMock()

    def init(name: str | None = None, **settings: object) -> None:
        module.run = MagicMock()
        module.opened.append(name)

    def finish() -> None:
        module.run = None
        module.closed.append(module.opened[-1])

    module.init, module.finish, module.log, module.define_metric = init, finish, MagicMock(), MagicMock()
    config_util = ModuleType("wandb.sdk.lib.config_util")
    config_util.ConfigError = ValueError
    monkeypatch.setenv("WANDB_WATCH", "false")
    for name, part in {"wandb": module, config_util.__name__: config_util}.items():
        monkeypatch.setitem(sys.modules, name, part)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return module


@pytest.fixture
def tracked_run(tiny_dense, tokenizer, tmp_path):
    """A run of two models and two stages that reports to W&B; its trackers' name is `demo`."""
    model = write_model(tmp_path / "dense", tiny_dense(), tokenizer)
    settings = tiny_recipe(model, write_texts(tmp_path / "texts"), tmp_path / "demo", report_to=["wandb"])
    settings["stages"] *= 2
    return lambda: bankwise.run(settings, quiet=True)


def test_every_model_and_stage_has_its_own_tracker_run(tracked_run, wandb):
    tracked_run()
    assert wandb.opened == ["demo/companion/0", "demo/companion/1", "demo/sparse/0", "demo/sparse/1"]
    assert wandb.closed == wandb.opened


def test_a_tracker_run_that_was_open_before_stays_open(tracked_run, wandb):
    wandb.init(name="sweep")
    tracked_run()
    assert (wandb.opened, wandb.closed) == (["sweep"], [])
