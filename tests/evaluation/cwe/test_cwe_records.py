"""Records of rows equal a naive full forward, and one prompt asks everything of a row."""

from typing import Any

import pytest
import torch

from bankwise.evaluation.cwe import cwe_prompt, lite, measure_rows, read_answer
from bankwise.evaluation.cwe.likelihood import answer_text
from bankwise.evaluation.engine import Engine


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[dict[str, Any]]:
    drawn = lite.generate("lite-20-3", tokenizer, num_samples=6)
    return [row for row in drawn if "".join(row["outputs"]).isascii()][:3]


@torch.no_grad()
def log_probs(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_nll_equals_a_full_forward_over_prompt_and_answer(tiny_dense, tokenizer, rows):
    model = tiny_dense(scale=0.2, max_position_embeddings=4096)
    for row, record in zip(rows, measure_rows(Engine(model, tokenizer), rows), strict=True):
        prompt, answer = row["input"] + row["answer_prefix"], answer_text(row["outputs"])
        ids = tokenizer(prompt + answer)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        log_p = log_probs(model, ids)
        costs = [-log_p[place - 1, ids[place]].item() for place in range(start, len(ids))]
        pieces = [tokenizer.decode([token]) for token in ids[start:]]
        assert "".join(pieces) == answer
        # In this tokenizer no piece mixes letters with anything else.
        is_word = [piece.isalpha() or piece == "-" for piece in pieces]
        assert record.nll.tokens == sum(is_word)
        assert record.nll.total == pytest.approx(
            sum(c for c, word in zip(costs, is_word, strict=True) if word), rel=1e-4
        )
        first = [place for place, word in enumerate(is_word) if word][: record.nll.first_tokens]
        assert "".join(pieces[place] for place in first) == row["outputs"][0]
        assert record.nll.first_total == pytest.approx(sum(costs[place] for place in first), rel=1e-4)
        assert not record.truncated


def test_auc_and_mass_equal_the_distribution_after_the_number(tiny_dense, smollm2_tokenizer):
    model = tiny_dense(scale=0.2, max_position_embeddings=1024, vocab_size=49152)
    rows = lite.generate("lite-20-3", smollm2_tokenizer, num_samples=2)
    for row, record in zip(rows, measure_rows(Engine(model, smollm2_tokenizer), rows), strict=True):
        log_p = log_probs(model, smollm2_tokenizer(row["input"] + row["answer_prefix"] + " 1.")["input_ids"])[-1]
        common, rest = (
            [smollm2_tokenizer(f" {word}")["input_ids"][0] for word in row["details"][side]]
            for side in ("common", "rest")
        )
        wins = [1.0 if log_p[c] > log_p[u] else 0.5 if c == u else 0.0 for c in common for u in rest]
        assert record.first.auc == pytest.approx(sum(wins) / len(wins), abs=1e-6)
        assert 0 < record.first.auc < 1
        assert record.first.mass_common == pytest.approx(log_p[sorted(set(common))].exp().sum().item(), rel=1e-3)
        assert record.first.mass_uncommon == pytest.approx(
            log_p[sorted(set(rest) - set(common))].exp().sum().item(), rel=1e-3
        )


def test_one_prompt_asks_everything_of_a_row(smollm2_tokenizer):
    (row,) = lite.generate("lite-52-10", smollm2_tokenizer, num_samples=1)
    prompt = cwe_prompt(row, smollm2_tokenizer)
    words = [*row["details"]["common"], *row["details"]["rest"]]
    assert prompt.text == row["input"] + row["answer_prefix"]
    assert prompt.continuations == (" " + " ".join(f"{i}. {word}" for i, word in enumerate(row["outputs"], start=1)),)
    (probe,) = prompt.probes
    assert probe.suffix == " 1."
    assert len(set(probe.token_ids)) == len(probe.token_ids)
    assert set(probe.token_ids) == {smollm2_tokenizer(f" {word}")["input_ids"][0] for word in words}
    assert (prompt.max_new_tokens, prompt.stop) == (0, ())
    assert cwe_prompt(row, smollm2_tokenizer, 120).max_new_tokens == 120
    assert cwe_prompt(row, smollm2_tokenizer, 120) == cwe_prompt(dict(row), smollm2_tokenizer, 120)


def test_answers_are_read_where_they_are_generated(tiny_dense, tokenizer, rows):
    engine = Engine(tiny_dense(scale=0.2, max_position_embeddings=4096), tokenizer)
    cheap, whole = measure_rows(engine, rows), measure_rows(engine, rows, 20)
    assert all(record.answer is None and record.prediction == "" for record in cheap)
    assert [record.nll.total for record in cheap] == pytest.approx([record.nll.total for record in whole])
    for row, record in zip(rows, whole, strict=True):
        assert record.prediction
        assert record.answer == read_answer(record.prediction, row["details"])


def test_lists_that_do_not_fit_are_marked(tiny_dense, tokenizer, rows):
    engine = Engine(tiny_dense(max_position_embeddings=512), tokenizer)
    assert all(record.truncated for record in measure_rows(engine, rows))
