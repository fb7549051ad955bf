"""The suite's numbers equal a naive computation, by source and by position, and the distance to the dense model."""

import math

import pytest
import torch

import bankwise
from bankwise import DataSource, SparsityConfig
from bankwise.config import EvaluationPlan, PerplexityPlan
from bankwise.errors import DataError
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.reading_cache import ReadingCache
from bankwise.evaluation.suites import perplexity


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("a", "the cat sat on a mat "), ("b", "x = y + 1\n")):
        (folder / name).mkdir()
        for index in range(10):
            (folder / name / f"{index}.txt").write_text(f"document {index}: {words * (30 + index)}")
    return [DataSource(path=str(folder / name)) for name in ("a", "b")]


def plan_of(sources, **settings):
    values = {"data": sources, "windows": 5, "seq_len": 48, "held_out_fraction": 0.5} | settings
    return EvaluationPlan(perplexity=PerplexityPlan(**values), batch_tokens=100)


@pytest.fixture
def models(tiny_dense):
    dense = tiny_dense(scale=0.2)
    return dense, bankwise.upcycle(dense, SparsityConfig(predictor_rank=16), progress=False)


def by_key(result):
    return {(measure.task, measure.metric, measure.variant): measure for measure in result.measures}


@torch.no_grad()
def naive(model, windows, other=None):
    """Loss of each window's predicted tokens [W, T], and KL and agreement with another model."""
    log_p = model.eval()(windows).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, windows[:, 1:, None]).squeeze(-1)
    if other is None:
        return nll
    log_q = other.eval()(windows).logits[:, :-1].log_softmax(-1)
    return nll, (log_q.exp() * (log_q - log_p)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)


def test_loss_perplexity_and_bits_per_byte_of_each_source_and_of_all(models, tokenizer, sources):
    plan = plan_of(sources)
    found = by_key(perplexity.run(Engine(models[1], tokenizer, batch_tokens=100), plan))
    windows = perplexity.held_out(plan, tokenizer)
    assert [len(rows) for rows in windows.values()] == [3, 2]
    losses = {name: naive(models[1], rows) for name, rows in windows.items()}
    losses["all sources"] = torch.cat(list(losses.values()))
    for name, nll in losses.items():
        assert found[name, "loss", ""].value == pytest.approx(nll.mean().item(), rel=1e-5)
        assert found[name, "perplexity", ""].value == pytest.approx(math.exp(nll.mean().item()), rel=1e-5)
        assert found[name, "loss", ""].n == len(nll)
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in windows["a"])
    assert found["a", "bits_per_byte", ""].value == pytest.approx(losses["a"].sum().item() / math.log(2) / size)
    assert ("a", "kl_to_dense", "") not in found
    assert not [key for key in found if key[2]], "one position bucket is the whole window"


def test_distance_to_the_dense_model(models, tokenizer, sources, tmp_path):
    dense, sparse = models
    plan = plan_of(sources)
    reference = perplexity.DenseReference("dense", lambda: dense)
    own = by_key(perplexity.run(Engine(dense, tokenizer, cache=ReadingCache(tmp_path, "dense")), plan, reference))
    assert own["a", "kl_to_dense", ""].value == pytest.approx(0, abs=1e-6)
    assert own["a", "top_token_agreement", ""].value == 100
    reference.load = lambda: pytest.fail("the dense model was read twice")
    engine = Engine(sparse, tokenizer, cache=ReadingCache(tmp_path, "sparse"))
    found = by_key(perplexity.run(engine, plan, reference))
    _, kl, agrees = naive(sparse, perplexity.held_out(plan, tokenizer)["b"], dense)
    assert found["b", "kl_to_dense", ""].value == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["b", "top_token_agreement", ""].value == pytest.approx(100 * agrees.float().mean().item())
    assert found["b", "kl_to_dense", ""].value > 1e-3


def test_the_dense_model_is_loaded_where_its_states_were_not_kept(models, tokenizer, sources, tmp_path):
    dense, sparse = models
    plan = plan_of(sources)
    loaded = []
    reference = perplexity.DenseReference("dense", lambda: loaded.append(1) or dense)
    engine = Engine(sparse, tokenizer, cache=ReadingCache(tmp_path, "sparse"))
    first = perplexity.run(engine, plan, reference)
    assert loaded == [1]
    cached = Engine(unreadable(sparse), tokenizer, cache=ReadingCache(tmp_path, "sparse"))
    again = perplexity.run(cached, plan, reference)
    assert again.measures == first.measures


def unreadable(model):
    """The model, with a forward that must not be called: what is in the cache needs no model."""
    model.model.forward = lambda *_, **__: pytest.fail("a cached window was read again")
    return model


def test_position_buckets_share_out_the_tokens(tiny_dense, tokenizer, sources):
    dense = tiny_dense(scale=0.2, max_position_embeddings=2048)
    plan = plan_of(sources[:1], windows=1, seq_len=1100)
    found = by_key(perplexity.run(Engine(dense, tokenizer), plan))
    nll = naive(dense, perplexity.held_out(plan, tokenizer)["a"])[0]
    assert found["a", "perplexity", "0-1K"].value == pytest.approx(math.exp(nll[:1023].mean().item()), rel=1e-4)
    assert found["a", "perplexity", "1-4K"].value == pytest.approx(math.exp(nll[1023:].mean().item()), rel=1e-4)


def test_windows_within_documents_start_where_documents_start(models, tokenizer, sources):
    plan = plan_of(sources, within_documents=True, windows=4, seq_len=60)
    for rows in perplexity.held_out(plan, tokenizer).values():
        for row in rows:
            assert tokenizer.decode(row).startswith("document ")
    with pytest.raises(DataError, match=r"has only 0 held-out documents of at least 5000 tokens"):
        perplexity.held_out(plan_of(sources, within_documents=True, seq_len=5000), tokenizer)


def test_windows_beyond_the_context_are_named_before_any_work(tokenizer, sources):
    assert perplexity.check(plan_of(sources), tokenizer, 48) == []
    assert "perplexity.seq_len=48" in perplexity.check(plan_of(sources), tokenizer, 47)[0]
