"""The training forward: chunked loss without logits, distillation, gradients of the predictor, checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as functional

import bankwise
from bankwise import SparsityConfig
from bankwise.ffn import sparse_layers
from bankwise.models.modeling import use_chunked_loss

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def upcycled(dense, **settings):
    return bankwise.upcycle(dense, SparsityConfig(**{"predictor_rank": 16} | settings), progress=False)


def labels_of(ids):
    labels = ids.clone()
    labels[:, 3:6] = -100
    return labels


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_loss_has_no_logits_and_equals_the_dense_models_own(family, chunk, tiny_dense, tokens):
    dense, ids = tiny_dense(family), tokens()
    sparse = upcycled(dense, active_per_bank=64).train()
    output = sparse(ids, labels=labels_of(ids), loss_chunk=chunk)
    assert output.logits is None
    with torch.no_grad():
        expected = dense(ids, labels=labels_of(ids))
    assert abs(output.loss.item() - expected.loss.item()) < 1e-5
    evaluated = sparse.eval()(ids, labels=labels_of(ids))
    assert evaluated.logits.shape == (2, 20, 261)
    assert abs(evaluated.loss.item() - expected.loss.item()) < 1e-5


def test_chunked_gradients_equal_those_of_the_familys_own_loss(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense()), tokens()
    sparse.eval()(ids, labels=labels_of(ids)).loss.backward()
    expected = gradients(sparse)
    sparse.zero_grad()
    sparse.train()(ids, labels=labels_of(ids), loss_chunk=7).loss.backward()
    actual = gradients(sparse)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)


def test_num_items_in_batch_replaces_the_count_of_targets(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense()).train(), tokens(2, 20)
    targets = (labels_of(ids)[:, 1:] != -100).sum()
    mean = sparse(ids, labels=labels_of(ids)).loss
    assert torch.allclose(sparse(ids, labels=labels_of(ids), num_items_in_batch=100).loss * 100, mean * targets)
    torch.testing.assert_close(
        sparse(ids, labels=labels_of(ids), num_items_in_batch=100).loss,
        sparse.eval()(ids, labels=labels_of(ids), num_items_in_batch=100).loss,
    )


def test_a_dense_companion_has_the_same_loss(tiny_dense, tokens):
    dense, ids = tiny_dense(), tokens()
    expected = dense(ids, labels=labels_of(ids)).loss
    use_chunked_loss(dense)
    output = dense.train()(ids, labels=labels_of(ids))
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(1.0, 0.5), (0.0, 1.0)])
def test_distillation_equals_its_formula(ce_weight, kd_weight, tiny_dense, tokens):
    dense, ids = tiny_dense(), tokens()
    sparse, labels = upcycled(dense).train(), labels_of(ids)
    with torch.no_grad():
        teacher_hidden = dense.model(ids).last_hidden_state
        output = sparse(
            ids,
            labels=labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            teacher_hidden=teacher_hidden,
            teacher_head=dense.lm_head.weight,
            loss_chunk=5,
        )
        kept = labels[:, 1:] != -100
        student = sparse.eval()(ids).logits[:, :-1][kept].log_softmax(-1)
        taught = dense(ids).logits[:, :-1][kept].log_softmax(-1)
    divergence = (taught.exp() * (taught - student)).sum(-1).mean()
    assert divergence > 1e-3
    cross_entropy = functional.nll_loss(student, labels[:, 1:][kept])
    torch.testing.assert_close(output.loss, ce_weight * cross_entropy + kd_weight * divergence)
    torch.testing.assert_close(sparse.last_loss_parts[0], cross_entropy)
    torch.testing.assert_close(sparse.last_loss_parts[1], divergence)


def test_distillation_from_itself_is_zero(tiny_dense, tokens):
    dense, ids = tiny_dense(), tokens()
    teacher = {"teacher_hidden": dense.model(ids).last_hidden_state.detach(), "teacher_head": dense.lm_head.weight}
    sparse = upcycled(dense, active_per_bank=64).train()
    assert abs(sparse(ids, labels=ids, ce_weight=0.0, kd_weight=1.0, **teacher).loss.item()) < 1e-6


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_language_model_loss_reaches_every_predictor(form, tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense(), predictor_form=form).train(), tokens()
    sparse(ids, labels=ids).loss.backward()
    for layer in sparse_layers(sparse):
        for name, value in layer.predictor.named_parameters():
            assert value.grad is not None, name
            assert value.grad.abs().max() > 0, name


def test_all_channels_kept_give_the_predictor_no_gradient(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense(), active_per_bank=64).train(), tokens()
    sparse(ids, labels=ids).loss.backward()
    for layer in sparse_layers(sparse):
        assert all(value.grad is None or not value.grad.any() for value in layer.predictor.parameters())
        assert layer.gate_proj.weight.grad.abs().max() > 0


def test_loss_falls_on_one_batch(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense()).train(), tokens(2, 20)
    optimiser = torch.optim.SGD(sparse.parameters(), lr=0.3)
    losses = []
    for _ in range(8):
        loss = sparse(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("settings", [{}, {"center": "ema"}, {"gate_mode": "default_ema"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_checkpointing_changes_nothing(family, settings, tiny_dense, tokens):
    plain, ids = upcycled(tiny_dense(family), **settings).train(), tokens()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forwards = []
    sparse_layers(checkpointed)[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = [model(ids, labels=ids).loss for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert len(forwards) == 2  # the second one is the recomputation
    assert torch.equal(*losses)
    expected, actual = gradients(plain), gradients(checkpointed)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    for (name, value), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(value, other), name
