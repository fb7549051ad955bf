"""What the trainer changes and what it leaves, equal ways through one stage, stops, and resuming."""

import math

import pytest
import torch
from training.tiny_run import weights, without_time
from transformers import TrainerCallback

from bankwise.config import Stage
from bankwise.errors import ConfigError, TrainingError
from bankwise.ffn import sparse_layers
from bankwise.training import parameter_groups, select_trained
from bankwise.training.checkpointing import last_whole_checkpoint


class AtStep(TrainerCallback):
    """Calls `action` with the model when `step` ends, before its line and its checkpoint are written."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def interrupt(model):
    raise KeyboardInterrupt


def distance(one, other, start):
    """RMS of the difference of two trainings, relative to how far they went."""
    apart = sum((one[name] - other[name]).square().sum().item() for name in start)
    moved = sum((one[name] - start[name]).square().sum().item() for name in start)
    return math.sqrt(apart / moved)


# Parameter groups and what is trained


@pytest.mark.parametrize("tied", [False, True])
def test_predictors_have_their_own_rate_and_every_tensor_is_in_one_group(sparse, tied):
    model = sparse(tie_word_embeddings=tied)
    stage = Stage(lr=1e-4, predictor_lr=1e-3, weight_decay=0.1)
    groups = list(parameter_groups(model, stage))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_groups = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(in_groups) == sorted(names.values())
    assert ("lm_head.weight" in in_groups) is not tied
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_predictor, is_matrix = ".mlp.predictor." in name, parameter.ndim == 2
            assert group["lr"] == (1e-3 if is_predictor else 1e-4), name
            assert group["weight_decay"] == (0.1 if is_matrix and not is_predictor else 0.0), name


def test_the_optimiser_keeps_the_rates_of_the_groups_through_the_schedule(sparse, windows, training):
    run = training(
        sparse(), windows(), tokens=10 * 32, lr=1e-4, predictor_lr=1e-3, warmup=0.2, min_lr_ratio=0.1
    ).run()  # fmt: skip
    rates = [row["lr"] for row in run.rows]
    assert max(rates) == pytest.approx(1e-4)
    assert rates.index(max(rates)) in (1, 2)
    ends = [group["lr"] for group in run.trainer.optimizer.param_groups]
    assert ends == pytest.approx([1e-5, 1e-5, 1e-4])


@pytest.mark.parametrize("trains", ["predictor", "ffn", "all"])
def test_a_stage_changes_the_parameters_that_it_trains_and_no_others(sparse, windows, training, trains):
    model = sparse()
    before = weights(model)
    training(
        model, windows(), tokens=64, trains=trains, lr=1e-2, predictor_lr=1e-2, weight_decay=0.1, aux_token_fraction=1
    ).run()  # fmt: skip
    parts = {"predictor": ".mlp.predictor.", "ffn": ".mlp.", "all": ""}
    trained = {name for name, _ in model.named_parameters() if parts[trains] in name}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained


def test_a_dense_model_has_no_predictor_to_train(tiny_dense):
    with pytest.raises(ConfigError, match=r"trains='predictor'.*trains='all'"):
        select_trained(tiny_dense(), Stage(trains="predictor"))


# Equal ways through one stage


def test_two_passes_of_one_window_equal_one_pass_of_two(sparse, windows, training):
    runs = [
        training(sparse(), windows(), tokens=5 * 64, batch_tokens=64, micro_batch=micro_batch, lr=1e-3).run()
        for micro_batch in (1, 2, 4)
    ]
    assert [run.stage.accumulation() for run in runs] == [4, 2, 1]
    start = weights(sparse())
    for run in runs[1:]:
        for key in ("loss", "ce", "aux", "grad_norm"):
            assert [row[key] for row in run.rows] == pytest.approx([row[key] for row in runs[0].rows], rel=1e-4)
        assert distance(weights(run.model), weights(runs[0].model), start) < 1e-3


def test_recomputed_activations_change_nothing(sparse, windows, training):
    plain, recomputed = (
        training(
            sparse(), windows(), tokens=4 * 32, lr=1e-3, aux_weight=0.5, gradient_checkpointing=checkpointing
        ).run()
        for checkpointing in (False, True)
    )  # fmt: skip
    assert recomputed.model.is_gradient_checkpointing
    assert without_time(recomputed.rows) == without_time(plain.rows)
    after = weights(plain.model)
    assert all(torch.equal(value, after[name]) for name, value in weights(recomputed.model).items())


def test_a_stage_recomputes_only_where_it_asks_for_it(sparse, windows, training):
    model, asked = sparse(), {}
    for checkpointing in (True, True, False):
        training(model, windows(), tokens=32, gradient_checkpointing=checkpointing).run()
        hooks = len(model.get_input_embeddings()._forward_hooks)
        asked.setdefault(checkpointing, []).append(
            (any(layer.gradient_checkpointing for layer in model.model.layers), hooks)
        )
    assert asked == {True: [(True, 1), (True, 1)], False: [(False, 0)]}


def test_chunks_of_the_loss_change_nothing_but_rounding(sparse, windows, training):
    whole, chunked = (
        training(sparse(), windows(), tokens=4 * 32, lr=1e-3, loss_chunk=chunk).run() for chunk in (512, 5)
    )
    assert [row["loss"] for row in chunked.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-4)
    assert distance(weights(chunked.model), weights(whole.model), weights(sparse())) < 1e-3


def test_the_companion_reads_the_same_windows_in_the_same_order(sparse, tiny_dense, windows, training, monkeypatch):
    seen = {"sparse": [], "companion": []}
    for name, model in (("sparse", sparse()), ("companion", tiny_dense())):
        run = training(model, windows(), name=name, tokens=256, batch_tokens=64)
        step = run.trainer.training_step

        def watched(model, inputs, *args, step=step, name=name):
            seen[name].append(inputs["input_ids"])
            return step(model, inputs, *args)

        monkeypatch.setattr(run.trainer, "training_step", watched)
        run.run()
    assert torch.equal(torch.cat(seen["sparse"]), windows())
    assert torch.equal(torch.cat(seen["companion"]), windows())


# bfloat16


@pytest.mark.usefixtures("bf16_products")
def test_under_autocast_routing_and_weights_stay_in_float32(sparse, windows, training):
    model, dtypes = sparse(), {"logits": set(), "up": set()}
    for layer in sparse_layers(model):
        layer.predictor.register_forward_hook(lambda *args: dtypes["logits"].add(args[-1].dtype))
        layer.up_proj.register_forward_hook(lambda *args: dtypes["up"].add(args[-1].dtype))
    precision = torch.get_float32_matmul_precision()
    run = training(model, windows(), tokens=10 * 32, bf16=True, lr=3e-3).run()
    assert dtypes == {"logits": {torch.float32}, "up": {torch.bfloat16}}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert run.rows[-1]["ce"] < run.rows[0]["ce"]
    assert torch.get_float32_matmul_precision() == precision


def test_bfloat16_is_left_alone_where_its_products_are_slow(sparse, windows, training, monkeypatch):
    monkeypatch.setattr("bankwise.training.trainer.multiplies_bf16", lambda kind: False)
    settings = {"tokens": 2 * 32, "aux_token_fraction": 1}
    asked, never = (training(sparse(), windows(), bf16=bf16, **settings).run() for bf16 in (True, False))
    assert [row["loss"] for row in asked.rows] == [row["loss"] for row in never.rows]


# The record


def test_a_line_is_written_every_log_steps_and_at_the_end(sparse, windows, training):
    run = training(sparse(), windows(), tokens=10 * 32, log_steps=4, save_steps=3).run()
    assert [row["step"] for row in run.rows] == [4, 8, 10]
    assert all(row["recall"] for row in run.rows)


def test_a_stage_shorter_than_log_steps_has_a_line(sparse, windows, training):
    run = training(sparse(), windows(), tokens=2 * 32, log_steps=5).run()
    assert [(row["step"], row["tokens"]) for row in run.rows] == [(2, 64)]


# Stops


def poison(name):
    def action(model):
        with torch.no_grad():
            model.get_parameter(name)[0] = math.nan

    return action


POISONED = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.predictor.reduce.weight"]


@pytest.mark.parametrize("name", POISONED)
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(sparse, windows, training, name):
    run = training(sparse(), windows(), tokens=6 * 32, save_steps=2, callback=AtStep(3, poison(name)))
    with pytest.raises(TrainingError, match=r"the sparse model stopped at step 4 of 6") as caught:
        run.run()
    assert f"{run.folder / 'work' / 'checkpoint-2'};" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_checkpoint_of_the_weights_that_failed_is_not_called_good(sparse, windows, training):
    run = training(sparse(), windows(), tokens=6 * 32, save_steps=1, callback=AtStep(2, poison("lm_head.weight")))
    with pytest.raises(TrainingError, match=r"checkpoint-1;"):
        run.run()
    assert (run.folder / "work" / "checkpoint-2").is_dir()


def test_without_a_checkpoint_the_message_says_so(sparse, windows, training):
    run = training(sparse(), windows(), tokens=6 * 32, callback=AtStep(1, poison("lm_head.weight")))
    with pytest.raises(TrainingError, match=r"step 2 of 6.*No checkpoint was saved yet \(set save_steps\)"):
        run.run()


def test_a_learning_rate_that_is_far_too_high_is_an_error_not_a_result(sparse, windows, training):
    run = training(sparse(), windows(), tokens=20 * 32, lr=1e30, predictor_lr=1e30)
    with pytest.raises(TrainingError, match=r"lower lr or predictor_lr"):
        run.run()


# Resuming


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "micro_batch": 1}, {"trains": "ffn", "weight_decay": 0.1}])
def test_a_resumed_stage_equals_the_uninterrupted_one_bit_for_bit(sparse, windows, training, tmp_path, settings):
    settings = {"tokens": 6 * 32, "save_steps": 3, "log_steps": 2, "lr": 1e-3, "warmup": 0.3} | settings
    whole = training(sparse(), windows(), folder=tmp_path / "whole", **settings).run()
    parts = training(sparse(), windows(), folder=tmp_path / "parts", callback=AtStep(5, interrupt), **settings)
    with pytest.raises(KeyboardInterrupt):
        parts.run()
    last = last_whole_checkpoint(tmp_path / "parts" / "work")
    assert last.name == "checkpoint-3"
    resumed = training(sparse(seed=1), windows(), folder=tmp_path / "parts", **settings).run(last)
    assert [row["step"] for row in resumed.rows] == [2, 4, 6]
    assert without_time(resumed.rows) == without_time(whole.rows)
    after = weights(whole.model)
    assert all(torch.equal(value, after[name]) for name, value in weights(resumed.model).items())
