"""Small sparse models of a text that repeats itself, so that a few seconds of training are enough to be damaged."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config import CalibrationConfig, DataSource, SparsityConfig
from bankwise.data import mixed_windows
from bankwise.data.aggregation import aggregation_words
from bankwise.repair.counting_model import counting_tokenizer
from bankwise.upcycle import upcycle


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """The word-level tokenizer, under which official common-words prompts fit 512 tokens."""
    return counting_tokenizer()


@pytest.fixture(scope="session")
def untrained(
    tiny_dense: Callable[..., PreTrainedModel], words: PreTrainedTokenizerFast
) -> Callable[..., PreTrainedModel]:
    """Factory: a random sparse model of any family that reads the word-level tokenizer, with wide activations."""

    def make(family: str = "llama", **sparsity: object) -> PreTrainedModel:
        dense = tiny_dense(
            family, vocab_size=len(words), max_position_embeddings=1024, num_hidden_layers=3, ffn_scale=0.3,
            eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return upcycle(dense, SparsityConfig(**{"predictor_rank": 16} | sparsity), progress=False)  # type: ignore[arg-type]

    return make


@dataclass(frozen=True)
class Chain:
    """A text in which each word follows from the two before it (one in seven is chance), and models that know it."""

    data: list[DataSource]
    sparse: PreTrainedModel
    companion: PreTrainedModel


SYMBOLS, STEPS = 12, 260


def chain_text(generator: random.Random, follows: dict[tuple[str, str], str], symbols: list[str]) -> str:
    text = generator.sample(symbols, 2)
    while len(text) < 600:
        is_chance = generator.random() < 1 / 7
        text.append(generator.choice(symbols) if is_chance else follows[text[-2], text[-1]])
    return " ".join(text)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    by_token = {tuple(words(word)["input_ids"]): word for word in aggregation_words()}
    symbols = sorted(by_token.values())[:SYMBOLS]
    generator = random.Random(0)
    follows = {(a, b): generator.choice(symbols) for a in symbols for b in symbols}
    for number in range(160):
        (folder / f"{number}.txt").write_text(chain_text(generator, follows, symbols), encoding="utf-8")
    data = [DataSource(path=str(folder))]
    windows = mixed_windows(data, words, seq_len=64, num_windows=400, split="train", held_out_fraction=0.2)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            head_dim=16, vocab_size=len(words), max_position_embeddings=256, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(dense.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1.02 - step / STEPS)
        batch = windows[torch.arange(step * 12, step * 12 + 12) % len(windows)]
        loss = dense(batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    dense.zero_grad(set_to_none=True)
    sparse = upcycle(
        dense.eval(), SparsityConfig(predictor_rank=32), calibration=windows[:128],
        settings=CalibrationConfig(), progress=False,
    )  # fmt: skip
    return Chain(data, sparse, dense)
