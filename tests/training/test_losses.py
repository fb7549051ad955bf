"""The loss of a stage and its parts, against a computation from full logits and the formulas of the method."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from training.tiny_run import weights

from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers


@torch.no_grad()
def naive_parts(model, teacher, windows_WS):
    """(ce, kd, state, aux) of windows in float64: mean NLL, KL(teacher || student), |s - t|^2 / |t|^2 of the layers'
    outputs, and KL(q || softmax(z)) over the banks."""
    model = copy.deepcopy(model).double().eval()
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.__setitem__(layer, args[0]))
        for layer in sparse_layers(model)
    ]
    student, taught = (
        each(windows_WS, output_hidden_states=True) for each in (model, copy.deepcopy(teacher).double().eval())
    )
    log_p, log_q = (each.logits[:, :-1].log_softmax(dim=-1) for each in (student, taught))
    distances = [
        (s - t).square().sum(dim=-1) / t.square().sum(dim=-1)
        for s, t in zip(student.hidden_states[1:], taught.hidden_states[1:], strict=True)
    ]
    for hook in hooks:
        hook.remove()
    aux = []
    for layer, x in inputs.items():
        h = functional.silu(x @ layer.gate_proj.weight.T) * (x @ layer.up_proj.weight.T)
        energy = (h * layer.down_proj.weight.norm(dim=0)).square().unflatten(-1, (-1, layer.bank_size))
        share = energy / energy.sum(dim=-1, keepdim=True)
        log_z = layer.predictor(x).unflatten(-1, (-1, layer.bank_size)).log_softmax(dim=-1)
        aux.append((share * (share.log() - log_z)).sum(dim=-1).mean())
    ce = -log_p.gather(-1, windows_WS[:, 1:, None]).mean()
    kd = (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean()
    targets = windows_WS.shape[0] * (windows_WS.shape[1] - 1)
    state = torch.stack(distances).mean(dim=0).sum() / targets
    return ce.item(), kd.item(), state.item(), torch.stack(aux).mean().item()


def test_recorded_parts_are_those_of_the_definition(sparse, tiny_dense, windows, training):
    model, teacher = sparse(), tiny_dense(seed=7)
    rows = training(
        model, windows(8), teacher=teacher, tokens=128, batch_tokens=64, lr=0, predictor_lr=0,
        ce_weight=0.5, kd_weight=2, state_weight=3, aux_weight=0.3, aux_token_fraction=1, loss_chunk=7,
    ).run().rows  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["tokens"] for row in rows] == [64, 128]
    for row, batch in zip(rows, windows(8).split(4), strict=True):
        ce, kd, state, aux = naive_parts(model, teacher, batch)
        assert (row["ce"], row["kd"], row["state"], row["aux"]) == pytest.approx((ce, kd, state, aux), rel=2e-5)
        assert row["loss"] == pytest.approx(0.5 * ce + 2 * kd + 3 * state + 0.3 * aux, rel=2e-5)


def test_a_quarter_of_the_tokens_gives_about_the_same_routing_loss(sparse, windows, training):
    def aux(fraction: float) -> float:
        return training(sparse(), windows(), tokens=256, batch_tokens=256, aux_token_fraction=fraction).run().rows[0][
            "aux"
        ]  # fmt: skip

    assert aux(0.25) != aux(1)
    assert aux(0.25) == pytest.approx(aux(1), rel=0.2)


def test_no_routing_loss_is_computed_where_its_weight_is_zero(sparse, windows, training):
    rows = training(sparse(), windows(), tokens=64, aux_weight=0).run().rows
    assert [row["aux"] for row in rows] == [None, None]
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce"], rel=1e-6)


def test_every_line_has_the_routing_of_each_layer(sparse, windows, training):
    for row in training(sparse(), windows(), tokens=64).run().rows:
        assert len(row["recall"]) == len(row["retained"]) == 2
        assert all(0 < value < 1 for value in row["recall"] + row["retained"])


def test_distillation_pulls_the_student_to_its_teacher(sparse, tiny_dense, windows, training):
    teacher = tiny_dense()
    before = weights(teacher)
    rows = training(
        sparse(), windows(8), teacher=teacher, tokens=2560, batch_tokens=128, micro_batch=8,
        lr=3e-3, ce_weight=0, kd_weight=1, aux_weight=0,
    ).run().rows  # fmt: skip
    assert rows[-1]["kd"] < 0.3 * rows[0]["kd"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_bfloat16_teacher_teaches_the_same_and_is_a_copy(sparse, tiny_dense, windows, training):
    teacher = tiny_dense(seed=7)
    before = weights(teacher)
    settings = {"teacher": teacher, "tokens": 64, "kd_weight": 1, "state_weight": 1}
    exact, rounded = (
        training(sparse(), windows(8), teacher_dtype=dtype, **settings).run().rows for dtype in ("float32", "bfloat16")
    )
    for row, other in zip(exact, rounded, strict=True):
        assert row["kd"] != other["kd"]
        assert (other["kd"], other["state"]) == pytest.approx((row["kd"], row["state"]), rel=0.05)
    assert teacher.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_states_alone_pull_the_student_to_its_teacher(sparse, tiny_dense, windows, training):
    rows = training(
        sparse(), windows(8), teacher=tiny_dense(), tokens=2560, batch_tokens=128, micro_batch=8,
        lr=3e-3, ce_weight=0, state_weight=1, aux_weight=0,
    ).run().rows  # fmt: skip
    assert rows[-1]["state"] < 0.5 * rows[0]["state"]
    assert rows[0]["kd"] == 0


@pytest.mark.parametrize("weight", ["kd_weight", "state_weight"])
def test_distillation_without_a_teacher_is_refused(sparse, windows, training, weight):
    with pytest.raises(ConfigError, match=rf"{weight}=1.*teacher="):
        training(sparse(), windows(), **{weight: 1})


def test_the_companion_of_a_stage_of_distillation_alone_learns_by_cross_entropy(tiny_dense, windows, training):
    rows = training(
        tiny_dense(), windows(8), name="companion", tokens=1280, batch_tokens=128, micro_batch=8, lr=3e-3,
        ce_weight=0, kd_weight=1,
    ).run().rows  # fmt: skip
    assert rows[-1]["ce"] < rows[0]["ce"] - 1
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce"], rel=1e-6)
    assert {"aux": None, "recall": None, "kd": 0.0}.items() <= rows[0].items()


def test_a_tiny_model_learns_to_count(sparse, windows, training):
    rows = training(sparse(), windows(8), tokens=30 * 128, batch_tokens=128, micro_batch=8, lr=3e-3).run().rows
    assert len(rows) == 30
    assert rows[-1]["ce"] < 0.4 * rows[0]["ce"]


def test_the_routing_loss_alone_teaches_the_predictor(sparse, windows, training):
    rows = training(
        sparse(init="zero"), windows(8), tokens=30 * 128, batch_tokens=128, micro_batch=8, trains="predictor",
        ce_weight=0, aux_weight=1, aux_token_fraction=1, predictor_lr=1e-2,
    ).run().rows  # fmt: skip
    for layer in range(2):
        assert rows[-1]["recall"][layer] > rows[0]["recall"][layer] + 0.15
        assert rows[-1]["retained"][layer] > rows[0]["retained"][layer]
    assert rows[-1]["aux"] < 0.7 * rows[0]["aux"]
