"""Whole tiny models of the four families: the kernels give the reference's logits and its text."""

import pytest
import torch
from transformers import DynamicCache

import bankwise
from bankwise import SparsityConfig
from bankwise.errors import ConfigError, KernelError
from bankwise.ffn import sparse_layers
from bankwise.inference import prepare
from bankwise.models.checkpoint import load_checkpoint, save_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(params=FAMILIES)
def model(request, tiny_dense, tokens):
    form = "linear" if request.param in ("mistral", "qwen3") else "gated_product"
    sparsity = SparsityConfig(predictor_rank=32, predictor_form=form)
    dense = tiny_dense(request.param, scale=0.15)
    return bankwise.upcycle(dense, sparsity, calibration=tokens(4, 24), progress=False)


def greedy(model, ids, **settings):
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258, **settings)


@torch.no_grad()
def one_by_one(model, ids):
    cache = DynamicCache(config=model.config)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], dim=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_and_text_are_those_of_the_reference(model, tokens, rows, monkeypatch):
    ids = tokens(rows, 16, seed=3)
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    logits, text = one_by_one(model, ids), greedy(model, ids)
    assert all(layer.packed is None for layer in sparse_layers(model))
    monkeypatch.setenv("BANKWISE_KERNEL", "cpu")
    torch.testing.assert_close(one_by_one(model, ids), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(model, ids), text)
    assert all(layer.packed is not None for layer in sparse_layers(model))
    torch.testing.assert_close(one_by_one(model, ids), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), text)


def test_preparing_is_reported_and_changes_no_weight(model, tokens):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert prepare(model) == ["2 x sparse feed-forward, packed", "9 x linear layer", "2 x decoder layer"]
    assert prepare(model) == ["2 x feed-forward packed already"]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_prepared_model_saves_the_ordinary_checkpoint_and_trains(model, tokenizer, tokens, tmp_path):
    save_checkpoint(model, tokenizer, tmp_path / "before")
    prepare(model)
    greedy(model, tokens(1, 4))
    save_checkpoint(model, tokenizer, tmp_path / "after")
    for name in ("model.safetensors", "config.json", "modeling_bankwise.py"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    fresh, _ = load_checkpoint(tmp_path / "after")
    ids = tokens(2, 12)
    losses = []
    for one in (model, fresh):
        one.train()
        loss = one(ids, labels=ids).loss
        loss.backward()
        losses.append((loss, one.model.layers[0].mlp.down_proj.weight.grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


def test_int8_follows_the_model_and_cannot_be_saved_or_trained(model, tokens, tmp_path, monkeypatch):
    ids = tokens(2, 16, seed=3)
    with torch.no_grad():
        exact = model(ids).logits
    bytes_before = sum(value.nbytes for value in model.parameters())
    done = prepare(model, weights="int8")
    assert done == ["2 x sparse feed-forward, int8", "9 x linear layer, int8", "2 x decoder layer"]
    assert sum(value.nbytes for value in model.parameters() if not value.is_meta) < bytes_before / 2
    with torch.no_grad():
        prompt = model(ids).logits
    # Weights of this random scale amplify: 8-bit rows move the logits by 11 %, and a channel at the cut now and then.
    assert (prompt - exact).square().mean().sqrt() < 0.2 * exact.square().mean().sqrt()
    for rows in (ids, ids[:1]):  # two rows go through the family's own layers, one through those of `prepare`
        difference = one_by_one(model, rows) - prompt[: len(rows)]
        assert difference.square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    assert greedy(model, ids[:1]).shape == (1, 28)
    with pytest.raises(KernelError, match=r"int8 weights only.*load the checkpoint again"):
        model.save_pretrained(tmp_path)
    with pytest.raises(KernelError, match="int8 weights only"):
        model.train()


def test_what_prepare_refuses(model, monkeypatch):
    with pytest.raises(ConfigError, match="weights='int4' is not known"):
        prepare(model, weights="int4")
    model.train()
    assert prepare(model) == ["reference: the model is in training mode; call model.eval() first"]
    model.eval()
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    assert prepare(model) == ["reference: BANKWISE_KERNEL=reference"]
    with pytest.raises(KernelError, match="weights='int8' needs the CPU operators: BANKWISE_KERNEL=reference"):
        prepare(model, weights="int8")


def test_compiled_decoding_equals_eager(model, tokens):
    ids = tokens(1, 4)
    prepare(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        program = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(program(ids, use_cache=False).logits, expected)
