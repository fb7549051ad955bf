"""Documents packed into one row compute what they compute alone, in every family, with and without recomputation."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bankwise.config import CalibrationConfig, Packing, SparsityConfig
from bankwise.data import RowCollator
from bankwise.errors import ConfigError
from bankwise.models.document_attention import NAME, document_attention
from bankwise.upcycle import convert

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = (7, 1, 40, 16)  # with mistral's window of 12 below and above it
WINDOW_LENGTHS = (150, 5, 90)  # with more than one block of queries under the window


def packed(ids, lengths, reset_positions=False, padding=0):
    row = torch.cat([ids, torch.zeros(padding, dtype=torch.long)])
    packing = Packing(reset_positions=reset_positions)
    return RowCollator(packing)([{"input_ids": row, "document_lengths": torch.tensor(lengths)}])


def model_inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def alone(model, ids, lengths):
    return torch.cat([model(part[None]).logits[0] for part in ids.split(lengths)])


@pytest.fixture
def sparse_of(tiny_dense):
    """Factory: a sparse model of a family with random predictors."""

    def make(family):
        settings = CalibrationConfig(tokens=0, init="zero")
        model = convert(tiny_dense(family), SparsityConfig(predictor_rank=8), None, settings, progress=False).model
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if ".predictor." in name:
                    value.copy_(torch.randn(value.shape, generator=generator))
        return model

    return make


@pytest.mark.parametrize("reset_positions", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_the_logits_they_have_alone(tiny_dense, tokens, family, attention, reset_positions):
    model = tiny_dense(family, attn_implementation=attention).double()
    (ids,) = tokens(1, sum(LENGTHS))
    with torch.no_grad():
        expected = alone(model, ids, LENGTHS)
        with document_attention(model):
            (logits,) = model(**model_inputs(packed(ids, LENGTHS, reset_positions))).logits
        (joined,) = model(ids[None]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # rotary angles are float32
    assert (joined - expected).abs().max() > 1e-2, "without the borders the documents do see each other"


@pytest.mark.parametrize(("checkpointing", "reset_positions"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_sum_of_those_of_the_documents_alone(
    sparse_of, tokens, family, checkpointing, reset_positions
):
    model = sparse_of(family).train()
    (ids,) = tokens(1, sum(LENGTHS))
    batch = packed(ids, LENGTHS, reset_positions, padding=9)
    reference = copy.deepcopy(model)
    for part in ids.split(LENGTHS):
        if len(part) > 1:
            reference(input_ids=part[None], labels=part[None], num_items_in_batch=60).loss.backward()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with document_attention(model):
        model(**batch, num_items_in_batch=60, use_cache=False).loss.backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=2e-6, msg=name)


def test_a_long_document_is_read_through_the_sliding_window(tiny_dense, tokens):
    model = tiny_dense("mistral", max_position_embeddings=512).double()
    (ids,) = tokens(1, sum(WINDOW_LENGTHS))
    with torch.no_grad():
        expected = alone(model, ids, WINDOW_LENGTHS)
        model.config.sliding_window = 1000
        wide = alone(model, ids, WINDOW_LENGTHS)
        model.config.sliding_window = 12
        with document_attention(model):
            (logits,) = model(**model_inputs(packed(ids, WINDOW_LENGTHS))).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (wide - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_document_moves_no_logit_of_another(tiny_dense, tokens, family):
    model = tiny_dense(family)
    (ids,) = tokens(1, sum(LENGTHS))
    changed = ids.clone()
    place = slice(8, 48)  # the third document
    changed[place] = (changed[place] + 1) % 258
    with torch.no_grad(), document_attention(model):
        before, after = (model(**model_inputs(packed(x, LENGTHS, padding=5))).logits[0] for x in (ids, changed))
    moved = (before != after).any(dim=-1)
    assert moved[place].all()
    assert not moved[:8].any()
    assert not moved[48:].any()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_borders_it_is_the_models_own_attention(tiny_dense, tokens, family):
    model = tiny_dense(family)
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        plain, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        with document_attention(model):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, 6:], padded[1, 6:])
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 16)])
@pytest.mark.parametrize("reset_positions", [False, True])
def test_nothing_as_large_as_a_mask_is_made(tiny_dense, tokens, family, window, reset_positions):
    length = 4096
    model = tiny_dense(
        family, max_position_embeddings=length, num_hidden_layers=1, **({"sliding_window": window} if window else {})
    )
    batch = model_inputs(packed(tokens(1, length)[0], (length - 96, 96), reset_positions))
    with torch.no_grad(), document_attention(model), LargestTensor() as watched:
        model.model(**batch, use_cache=False)
    assert watched.numel <= length * 256  # the feed-forward's activation


def test_the_switch_is_undone_and_never_saved(tiny_dense, tmp_path):
    student, teacher = tiny_dense("llama"), tiny_dense("qwen3", attn_implementation="eager")
    with document_attention(student, teacher):
        assert student.config._attn_implementation == teacher.config._attn_implementation == NAME
        student.save_pretrained(tmp_path)
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == ("sdpa", "eager")
    with pytest.raises(KeyboardInterrupt), document_attention(student, teacher):
        raise KeyboardInterrupt
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == ("sdpa", "eager")
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_flash_attention_is_kept_and_flex_attention_refused(tiny_dense):
    model = tiny_dense("llama")
    model.config._attn_implementation = "flash_attention_2"
    with document_attention(model):
        assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"flex_attention.*doc_mask: false"), document_attention(model):
        pass
