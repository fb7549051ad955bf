"""Caches, padding and chunks change neither the channels nor the tokens."""

import pytest
import torch
from transformers import DynamicCache

import bankwise
from bankwise import SparsityConfig
from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers
from bankwise.inference.generation import generate_text

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
NEW = 10


@pytest.fixture(scope="module", params=FAMILIES)
def sparse(request, tiny_dense, tokens):
    dense = tiny_dense(request.param, scale=0.15)
    return bankwise.upcycle(dense, SparsityConfig(predictor_rank=32), calibration=tokens(4, 24), progress=False)


class MaskLog:
    """The masks of every layer over all forward passes inside the context, joined along the tokens."""

    def __init__(self, model):
        self.layers, self.seen = sparse_layers(model), {}

    def __enter__(self):
        def keep(layer, arguments):
            self.seen.setdefault(layer.layer, []).append(layer.active_mask(arguments[0]))

        self.hooks = [layer.register_forward_pre_hook(keep) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def joined(self):
        return [torch.cat(self.seen[layer.layer], dim=1) for layer in self.layers]


@torch.no_grad()
def in_chunks(model, ids, lengths):
    cache = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(lengths, dim=1)]
    return torch.cat(pieces, dim=1)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def greedy(model, ids, new=NEW, **settings):
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=258, **settings)


@pytest.mark.parametrize("lengths", [[1] * 24, [7, 9, 8], [16] + [1] * 8], ids=["token by token", "chunks", "decode"])
def test_cached_channels_and_logits_equal_one_full_forward(sparse, lengths, tokens):
    ids = tokens(2, 24, seed=3)
    with MaskLog(sparse) as full, torch.no_grad():
        expected = sparse(ids).logits
    with MaskLog(sparse) as cached:
        actual = in_chunks(sparse, ids, lengths)
    for one, other in zip(cached.joined(), full.joined(), strict=True):
        assert torch.equal(one, other)
    assert_near(actual, expected)


@torch.no_grad()
def test_greedy_generation_equals_uncached_argmax(sparse, tokens):
    ids = tokens(2, 9, seed=4)
    expected = ids
    for _ in range(NEW):
        expected = torch.cat([expected, sparse(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(sparse, ids), expected)
    assert torch.equal(greedy(sparse, ids, use_cache=False), expected)


def test_static_cache_gives_the_tokens_of_the_dynamic_one(sparse, tokens):
    ids = tokens(2, 9, seed=5)
    assert torch.equal(greedy(sparse, ids, cache_implementation="static"), greedy(sparse, ids))


def padded(ids, length, side):
    row, mask = torch.full((length,), 258), torch.zeros(length, dtype=torch.long)
    place = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
    row[place], mask[place] = ids, 1
    return row, mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_row(sparse, side, tokens):
    rows = [tokens(1, length, seed=length)[0] for length in (5, 11, 16)]
    ids, mask = map(torch.stack, zip(*(padded(row, 16, side) for row in rows), strict=True))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with MaskLog(sparse) as batch:
        together = sparse(ids, attention_mask=mask, position_ids=positions).logits
    for index, row in enumerate(rows):
        kept = mask[index].bool()
        with MaskLog(sparse) as alone:
            expected = sparse(row[None]).logits[0]
        for one, other in zip(batch.joined(), alone.joined(), strict=True):
            assert torch.equal(one[index][kept], other[0])
        assert_near(together[index][kept], expected)


def test_left_padded_batch_generates_what_its_rows_do(sparse, tokens):
    rows = [tokens(1, length, seed=length)[0] for length in (5, 11)]
    ids, mask = map(torch.stack, zip(*(padded(row, 11, "left") for row in rows), strict=True))
    together = greedy(sparse, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(together[index, 11:], greedy(sparse, row[None])[0, len(row) :])


def test_sampling_and_beams_run(sparse, tokens):
    ids = tokens(1, 6)
    torch.manual_seed(0)
    sampled = sparse.generate(ids, max_new_tokens=4, do_sample=True, eos_token_id=None, pad_token_id=258)
    assert sampled.shape == (1, 10)
    assert greedy(sparse, ids, new=4, num_beams=3).shape == (1, 10)


def test_text_continuation_is_the_greedy_one_and_refuses_nonsense(tiny_dense, tokens, tokenizer):
    model = bankwise.upcycle(tiny_dense(), SparsityConfig(predictor_rank=32), progress=False)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=258)[0, ids.shape[1] :]
    text = generate_text(model, tokenizer, "hello", max_new_tokens=6)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert text
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate_text(model, tokenizer, "")
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate_text(model, tokenizer, "hello", max_new_tokens=0)
