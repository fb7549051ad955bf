"""transformers model classes of the sparse families; importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

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

SPARSE_FAMILIES = {
    "llama": (BankwiseLlamaConfig, BankwiseLlamaForCausalLM),
    "mistral": (BankwiseMistralConfig, BankwiseMistralForCausalLM),
    "qwen2": (BankwiseQwen2Config, BankwiseQwen2ForCausalLM),
    "qwen3": (BankwiseQwen3Config, BankwiseQwen3ForCausalLM),
}
"""Dense model type -> config and causal-LM class of the sparse family."""

for _config, _model in (
    (BankwiseLlamaConfig, modeling.BankwiseLlamaModel),
    (BankwiseMistralConfig, modeling.BankwiseMistralModel),
    (BankwiseQwen2Config, modeling.BankwiseQwen2Model),
    (BankwiseQwen3Config, modeling.BankwiseQwen3Model),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
for _config, _causal in SPARSE_FAMILIES.values():
    AutoModelForCausalLM.register(_config, _causal)

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
]
