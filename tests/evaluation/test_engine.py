"""Readings equal a naive full forward of each prompt alone, whatever the batch; a cache gives them back."""

import json
from dataclasses import asdict

import pytest
import torch

import bankwise
from bankwise import SparsityConfig
from bankwise.data.tokenized import tokenizer_fingerprint
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.engine import Engine, Probe, Prompt
from bankwise.evaluation.reading_cache import ReadingCache, model_fingerprint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROMPTS = [
    Prompt(text="hello world", continuations=(" abc", " x", " he said"), max_new_tokens=5),
    Prompt(
        text="a prompt that is much longer than the first one, and than the window of the sliding attention",
        continuations=(" yes",),
        probes=(Probe(suffix=" 1.", token_ids=(3, 4)), Probe(suffix="", token_ids=(5,))),
        max_new_tokens=3,
    ),
    Prompt(text="", continuations=("q",), max_new_tokens=9),
    Prompt(text="hello world", probes=(Probe(suffix=" 1.", token_ids=(9,)),)),
]


@pytest.fixture(params=[*FAMILIES, "sparse"])
def model(request, tiny_dense):
    if request.param != "sparse":
        return tiny_dense(request.param, scale=0.2)
    return bankwise.upcycle(tiny_dense(scale=0.2), SparsityConfig(predictor_rank=16), progress=False)


@torch.no_grad()
def log_probs(model, ids):
    return model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_readings_equal_a_full_forward_of_each_prompt_alone(model, tokenizer, batch_tokens):
    engine = Engine(model, tokenizer, batch_tokens=batch_tokens)
    for prompt, reading in zip(PROMPTS, engine.read(PROMPTS), strict=True):
        ids = engine.encode(prompt.text) or [tokenizer.eos_token_id]
        assert reading.prompt_tokens == len(ids)
        assert not reading.truncated
        for text, score in zip(prompt.continuations, reading.continuations, strict=True):
            assert list(score.token_ids) == engine.encode(text)
            log_p = log_probs(model, [*ids, *score.token_ids])[len(ids) - 1 : -1]
            expected = log_p.gather(-1, torch.tensor(score.token_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(score.logprobs), expected, rtol=1e-4, atol=1e-4)
            assert score.is_greedy == bool((log_p.argmax(-1) == torch.tensor(score.token_ids)).all())
            assert score.logprob == pytest.approx(sum(score.logprobs))
        for probe, values in zip(prompt.probes, reading.probes, strict=True):
            log_p = log_probs(model, [*ids, *engine.encode(probe.suffix)])[-1]
            assert values == pytest.approx([log_p[token].item() for token in probe.token_ids], rel=1e-4, abs=1e-4)
        if prompt.max_new_tokens:
            new = model.generate(torch.tensor([ids]), max_new_tokens=prompt.max_new_tokens, do_sample=False)[0]
            assert reading.generated == tokenizer.decode(new[len(ids) :], skip_special_tokens=True)
            assert reading.new_tokens <= prompt.max_new_tokens


def test_a_greedy_continuation_is_recognised(tiny_dense, tokenizer):
    engine = Engine(tiny_dense(scale=0.2), tokenizer)
    letters = [Prompt(text=chr(code), max_new_tokens=1) for code in range(33, 127)]
    # A random model mostly writes bytes that are no text; of its answers, one that is text serves.
    prompt, answer = next(
        (prompt.text, reading.generated)
        for prompt, reading in zip(letters, engine.read(letters), strict=True)
        if len(reading.generated) == 1 and reading.generated.isascii() and reading.generated.isprintable()
    )
    other = "~" if answer != "~" else "!"
    scores = engine.read([Prompt(text=prompt, continuations=(answer, other))])[0].continuations
    assert [score.is_greedy for score in scores] == [True, False]


def test_long_prompts_are_read_in_parts(tiny_dense, tokenizer, monkeypatch):
    dense = tiny_dense(scale=0.2)
    prompts = [Prompt(text="words and more words " * 4, continuations=(" end",), max_new_tokens=3), PROMPTS[0]]
    whole = Engine(dense, tokenizer).read(prompts)
    monkeypatch.setattr("bankwise.evaluation.engine._PREFILL_COLUMNS", 7)
    for part, reading in zip(Engine(dense, tokenizer).read(prompts), whole, strict=True):
        assert part.generated == reading.generated
        assert part.continuations[0].logprob == pytest.approx(reading.continuations[0].logprob, abs=1e-4)


def test_generation_stops_before_a_stop_string_and_leaves_the_batch(tiny_dense, tokenizer):
    engine = Engine(tiny_dense(scale=0.2), tokenizer)
    free = engine.read([Prompt(text="hello", max_new_tokens=12)])[0]
    end = free.generated[3:5]
    stopped, other = engine.read(
        [Prompt(text="hello", max_new_tokens=12, stop=(end, "~none~")), Prompt(text="world", max_new_tokens=12)]
    )
    assert stopped.generated == free.generated[: free.generated.find(end)]
    assert stopped.new_tokens < free.new_tokens
    assert other == engine.read([Prompt(text="world", max_new_tokens=12)])[0]


def test_a_prompt_beyond_the_context_is_cut_on_the_left(tiny_dense, tokenizer):
    engine = Engine(tiny_dense(scale=0.2, max_position_embeddings=32), tokenizer)
    text = "abcdefghij" * 5
    reading = engine.read([Prompt(text=text, continuations=(" xyz",))])[0]
    assert reading.truncated
    assert reading.prompt_tokens == 32 + 1 - 4
    cut = engine.read([Prompt(text=text[-29:], continuations=(" xyz",))])[0]
    assert reading.continuations == cut.continuations
    with pytest.raises(ConfigError, match="an answer of 40 tokens leaves no room"):
        engine.read([Prompt(text="a", max_new_tokens=40)])


def test_an_empty_continuation_is_refused(tiny_dense, tokenizer):
    with pytest.raises(ConfigError, match="is empty"):
        Engine(tiny_dense(), tokenizer).read([Prompt(text="a", continuations=("",))])


def test_bos_is_read_where_the_tokenizer_adds_it(tiny_dense, tokenizer):
    from tokenizers.processors import TemplateProcessing

    class WithBos(type(tokenizer)):
        pass

    marked = WithBos(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()))
    marked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 258)]
    )
    dense = tiny_dense(scale=0.2)
    engine = Engine(dense, marked)
    assert engine.lead_ids == [258]
    reading = engine.read([Prompt(text="hello", continuations=(" x",))])[0]
    ids = [258, *engine.encode("hello")]
    assert reading.prompt_tokens == len(ids)
    expected = log_probs(dense, ids)[-1][engine.encode(" x")[0]].item()
    assert reading.continuations[0].logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_the_model_keeps_its_mode(tiny_dense, tokenizer):
    dense = tiny_dense().train()
    Engine(dense, tokenizer).read(PROMPTS[:1])
    assert dense.training


@pytest.mark.usefixtures("bf16_products")
def test_bf16_reads_close_to_float32(tiny_dense, tokenizer):
    dense = tiny_dense(scale=0.2)
    prompt = Prompt(text="a prompt of many words " * 4, continuations=(" and so on",))
    exact, rounded = (Engine(dense, tokenizer, bf16=bf16).read([prompt])[0].continuations[0] for bf16 in (False, True))
    assert rounded.logprob != exact.logprob
    assert rounded.logprob == pytest.approx(exact.logprob, abs=0.5)


def test_a_cache_gives_back_readings_without_the_model(tiny_dense, tokenizer, tmp_path, monkeypatch):
    dense = tiny_dense(scale=0.2)
    fingerprint = model_fingerprint(dense)
    first = Engine(dense, tokenizer, cache=ReadingCache(tmp_path, fingerprint)).read(PROMPTS[:2])
    again = Engine(dense, tokenizer, cache=ReadingCache(tmp_path, fingerprint))
    monkeypatch.setattr(dense, "forward", lambda *_, **__: pytest.fail("the model was read again"))
    monkeypatch.setattr(dense.model, "forward", lambda *_, **__: pytest.fail("the model was read again"))
    assert again.read(PROMPTS[:2]) == first


def test_a_cache_without_a_folder_keeps_readings_in_memory(tiny_dense, tokenizer):
    cache = ReadingCache(None, "f")
    cache.put({"a": {"x": 1}})
    assert cache.get("a") == {"x": 1}
    engine = Engine(tiny_dense(scale=0.2), tokenizer, cache=cache)
    assert engine.read(PROMPTS[:2]) == engine.read(PROMPTS[:2])
    assert ReadingCache(None, "f").get("a") is None


def test_an_interrupted_reading_goes_on_where_it_stopped(tiny_dense, tokenizer, tmp_path, monkeypatch):
    dense = tiny_dense(scale=0.2)
    whole = Engine(dense, tokenizer).read(PROMPTS)
    engine = Engine(dense, tokenizer, batch_tokens=1, cache=ReadingCache(tmp_path, "f"))
    read_batch, calls = engine._read_batch, []

    def stop_at_the_third(requests):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(requests)
        return read_batch(requests)

    monkeypatch.setattr(engine, "_read_batch", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        engine.read(PROMPTS)
    resumed = Engine(dense, tokenizer, batch_tokens=1, cache=ReadingCache(tmp_path, "f"))
    count = []
    original = resumed._read_batch
    monkeypatch.setattr(resumed, "_read_batch", lambda requests: count.append(requests) or original(requests))
    readings = resumed.read(PROMPTS)
    assert len(count) == len(PROMPTS) - 2
    assert [reading.generated for reading in readings] == [reading.generated for reading in whole]


def test_half_a_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    cache = ReadingCache(tmp_path, "f")
    cache.put({"a": {"x": 1}})
    with cache.path.open("a") as file:
        file.write('{"key": "b", "rea')
    torn = ReadingCache(tmp_path, "f")
    assert torn.get("a") == {"x": 1}
    torn.put({"c": {"x": 2}})
    assert ReadingCache(tmp_path, "f").get("c") == {"x": 2}
    cache.path.write_text('nonsense\n{"key": "a", "reading": {}}\n')
    with pytest.raises(DataError, match="line 1 is damaged"):
        ReadingCache(tmp_path, "f")


def test_a_fingerprint_tells_weights_and_active_channels_apart(tiny_dense, tmp_path):
    dense = tiny_dense()
    same, other = tiny_dense(), tiny_dense(seed=1)
    assert model_fingerprint(dense) == model_fingerprint(same)
    assert model_fingerprint(dense) != model_fingerprint(other)
    sparse = bankwise.upcycle(dense, SparsityConfig(predictor_rank=16), progress=False)
    before = model_fingerprint(sparse)
    sparse.save_pretrained(tmp_path)
    assert model_fingerprint(type(sparse).from_pretrained(tmp_path)) == before
    sparse.model.layers[0].mlp.active_per_bank = 64
    assert model_fingerprint(sparse) != before


def test_a_tokenizers_fingerprint_outlives_saving_and_padding(tokenizer, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    again(["a", "b c"], padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(again) == before


def test_a_reading_survives_json(tiny_dense, tokenizer):
    from bankwise.evaluation.engine import Reading

    reading = Engine(tiny_dense(), tokenizer).read(PROMPTS[1:2])[0]
    assert Reading.from_dict(json.loads(json.dumps(asdict(reading)))) == reading
