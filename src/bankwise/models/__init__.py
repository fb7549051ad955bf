"""transformers model classes of the sparse families; importing this registers them with the Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bankwise.config import SparsityConfig
from bankwise.models import modeling
from bankwise.models.modeling import (
    BankwiseLlamaConfig,
    BankwiseLlamaForCausalLM,
    BankwiseMistralConfig,
    BankwiseMistralForCausalLM,
    BankwiseQwen2Config,
    BankwiseQwen2ForCausalLM,
    BankwiseQwen3Config,
    BankwiseQwen3ForCausalLM,
)

SPARSE_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (BankwiseLlamaConfig, BankwiseLlamaForCausalLM),
    "mistral": (BankwiseMistralConfig, BankwiseMistralForCausalLM),
    "qwen2": (BankwiseQwen2Config, BankwiseQwen2ForCausalLM),
    "qwen3": (BankwiseQwen3Config, BankwiseQwen3ForCausalLM),
}
"""Dense model type -> config and causal-LM class of the sparse family."""

for _config, _causal in SPARSE_FAMILIES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _causal)
AutoModel.register(BankwiseLlamaConfig, modeling.BankwiseLlamaModel)
AutoModel.register(BankwiseMistralConfig, modeling.BankwiseMistralModel)
AutoModel.register(BankwiseQwen2Config, modeling.BankwiseQwen2Model)
AutoModel.register(BankwiseQwen3Config, modeling.BankwiseQwen3Model)

_OF_THE_DENSE_CLASS = ("model_type", "architectures", "transformers_version", "auto_map")


def sparse_config(dense: Any, sparsity: SparsityConfig) -> Any:
    """Config of the sparse twin of a dense model's config."""
    values = {name: value for name, value in dense.to_dict().items() if name not in _OF_THE_DENSE_CLASS}
    return SPARSE_FAMILIES[dense.model_type][0](**values, sparsity=sparsity.to_dict())


__all__ = [
    "SPARSE_FAMILIES",
    "BankwiseLlamaConfig",
    "BankwiseLlamaForCausalLM",
    "BankwiseMistralConfig",
    "BankwiseMistralForCausalLM",
    "BankwiseQwen2Config",
    "BankwiseQwen2ForCausalLM",
    "BankwiseQwen3Config",
    "BankwiseQwen3ForCausalLM",
    "sparse_config",
]
