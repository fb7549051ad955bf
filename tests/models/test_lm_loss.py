"""The chunked language-model loss equals the loss from full logits, in value, in gradients, and not in memory."""

import pytest
import torch
import torch.nn.functional as functional
from torch.utils._python_dispatch import TorchDispatchMode

from bankwise.models.lm_loss import chunked_lm_loss, lm_loss_reference

T, D, V = 23, 6, 17
WEIGHTS = [(1.0, 0.0), (1.0, 0.7), (0.0, 1.0), (0.3, 0.0)]


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_inputs(dtype=torch.float64, tokens=T, vocabulary=V, ignored=(0, 4, 5, 22)):
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(5))
    labels[[i for i in ignored if i < tokens]] = -100
    student = [draw(tokens, D, seed=1, dtype=dtype), draw(vocabulary, D, seed=2, dtype=dtype)]
    teacher = {
        "teacher_TD": draw(tokens, D, seed=3, dtype=dtype),
        "teacher_head_VD": draw(vocabulary, D, seed=4, dtype=dtype),
    }
    return [values.requires_grad_() for values in student], labels, teacher


def value_and_gradients(loss, student):
    wanted = [values for values in student if values.requires_grad]
    return [*loss, *torch.autograd.grad(loss.total * 1.7, wanted)]


def assert_all_near(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ignored", [(), (0, 4, 5, 22)], ids=["all kept", "some ignored"])
@pytest.mark.parametrize(("ce_weight", "kd_weight"), WEIGHTS)
def test_the_reference_is_the_textbook_definition(ce_weight, kd_weight, ignored):
    (hidden, head), labels, teacher = make_inputs(ignored=ignored)
    kept = labels != -100
    student = (hidden @ head.T)[kept]
    taught = (teacher["teacher_TD"] @ teacher["teacher_head_VD"].T)[kept]
    cross_entropy = functional.cross_entropy(student, labels[kept], reduction="sum")
    distillation = functional.kl_div(student.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)
    loss = lm_loss_reference(hidden, head, labels, ce_weight=ce_weight, kd_weight=kd_weight, **teacher)
    expected = [
        ce_weight * cross_entropy + kd_weight * distillation,
        cross_entropy,
        distillation if kd_weight else torch.zeros(()),
    ]
    for one, other in zip(loss, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 5, T, 1000])
@pytest.mark.parametrize(("ce_weight", "kd_weight"), WEIGHTS)
@pytest.mark.parametrize("ignored", [(), (0, 4, 5, 22)], ids=["all kept", "some ignored"])
def test_chunks_change_neither_the_loss_nor_its_gradients(dtype, chunk_size, ce_weight, kd_weight, ignored):
    student, labels, teacher = make_inputs(dtype, ignored=ignored)
    settings = {"ce_weight": ce_weight, "kd_weight": kd_weight} | teacher
    chunked = value_and_gradients(chunked_lm_loss(*student, labels, chunk_size=chunk_size, **settings), student)
    assert_all_near(chunked, value_and_gradients(lm_loss_reference(*student, labels, **settings), student), 1e-5)


def test_ignored_tokens_get_no_gradient():
    (hidden, head), labels, teacher = make_inputs()
    chunked_lm_loss(hidden, head, labels, chunk_size=5, kd_weight=1.0, **teacher).total.backward()
    assert torch.equal((hidden.grad != 0).any(-1), labels != -100)


def test_a_batch_without_labels_has_loss_zero_and_gradients_zero():
    student, _, teacher = make_inputs()
    loss = chunked_lm_loss(*student, torch.full((T,), -100), kd_weight=1.0, **teacher)
    value, cross_entropy, distillation, *gradients = value_and_gradients(loss, student)
    assert [values.item() for values in (value.detach(), cross_entropy, distillation)] == [0, 0, 0]
    for gradient, values in zip(gradients, student, strict=True):
        assert torch.equal(gradient, torch.zeros_like(values))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
def test_only_what_learns_gets_a_gradient(frozen):
    student, labels, teacher = make_inputs()
    student[frozen].requires_grad_(False)
    settings = {"kd_weight": 0.5} | teacher
    chunked = value_and_gradients(chunked_lm_loss(*student, labels, chunk_size=5, **settings), student)
    assert_all_near(chunked, value_and_gradients(lm_loss_reference(*student, labels, **settings), student), 1e-5)
    assert len(chunked) == 4


def test_without_anything_that_learns_the_loss_is_a_constant():
    student, labels, teacher = make_inputs()
    frozen = [values.detach() for values in student]
    loss = chunked_lm_loss(*frozen, labels, kd_weight=0.5, **teacher)
    assert not loss.total.requires_grad
    assert_all_near(loss, lm_loss_reference(*frozen, labels, kd_weight=0.5, **teacher), 1e-5)


def test_only_the_total_carries_the_gradient_and_the_teacher_gets_none():
    student, labels, teacher = make_inputs()
    for values in teacher.values():
        values.requires_grad_()
    loss = chunked_lm_loss(*student, labels, kd_weight=0.5, **teacher)
    assert loss.total.requires_grad
    assert not loss.cross_entropy.requires_grad
    assert not loss.distillation.requires_grad
    loss.total.backward()
    assert all(values.grad is None for values in teacher.values())


@pytest.mark.parametrize("kd_weight", [0.0, 0.7])
def test_bf16_autocast_stays_close_to_float32(kd_weight):
    student, labels, teacher = make_inputs(torch.float32)
    settings = {"chunk_size": 5, "kd_weight": kd_weight} | teacher
    exact = value_and_gradients(chunked_lm_loss(*student, labels, **settings), student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_lm_loss(*student, labels, **settings)
    rounded = value_and_gradients(loss, student)
    assert not torch.equal(rounded[0], exact[0]), "autocast changed nothing, so nothing is tested"
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()


def test_a_bf16_model_gets_bf16_gradients():
    student, labels, teacher = make_inputs(torch.bfloat16)
    settings = {"chunk_size": 5, "kd_weight": 0.7} | teacher
    rounded = value_and_gradients(chunked_lm_loss(*student, labels, **settings), student)
    as_float = [values.detach().float().requires_grad_() for values in student]
    settings |= {name: values.float() for name, values in teacher.items()}
    exact = value_and_gradients(chunked_lm_loss(*as_float, labels, **settings), as_float)
    assert [values.dtype for values in rounded] == [torch.float32] * 3 + [torch.bfloat16] * 2
    for one, other in zip(rounded, exact, strict=True):
        assert (one.float() - other).norm() <= 0.03 * other.norm()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        self.products += operation is torch.ops.aten.mm.default
        return result


@pytest.mark.parametrize("ignored", [(), (0, 4)], ids=["all kept", "some ignored"])
def test_no_tensor_is_larger_than_one_chunk_of_logits(ignored):
    tokens, vocabulary, chunk_size = 64, 101, 8
    student, labels, teacher = make_inputs(tokens=tokens, vocabulary=vocabulary, ignored=ignored)
    with LargestTensor() as full:
        lm_loss_reference(*student, labels, kd_weight=0.7, **teacher).total.backward()
    with LargestTensor() as chunked:
        chunked_lm_loss(*student, labels, chunk_size=chunk_size, kd_weight=0.7, **teacher).total.backward()
    assert full.elements == tokens * vocabulary
    assert chunked.elements == chunk_size * vocabulary


def test_nothing_of_the_size_of_the_logits_waits_for_the_backward_pass():
    student, labels, teacher = make_inputs(ignored=())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda values: saved.append(values.numel()) or values, lambda v: v):
        chunked_lm_loss(*student, labels, chunk_size=5, kd_weight=0.7, **teacher)
    assert sorted(saved) == sorted([T * D, V * D])


def test_an_evaluation_computes_no_gradients():
    student, labels, _ = make_inputs(ignored=())
    with torch.no_grad(), LargestTensor() as evaluation:
        loss = chunked_lm_loss(*student, labels, chunk_size=T)
    assert evaluation.products == 1
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, lm_loss_reference(*student, labels).total.detach())


def test_a_second_derivative_raises():
    student, labels, _ = make_inputs()
    loss = chunked_lm_loss(*student, labels).total
    (gradient,) = torch.autograd.grad(loss * student[0].sum(), student[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
