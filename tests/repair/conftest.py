"""Small sparse models of a text that repeats itself, so that a few seconds of training are enough to be damaged."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config import CalibrationConfig, DataSource, SparsityConfig
from bankwise.data import mixed_windows
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
