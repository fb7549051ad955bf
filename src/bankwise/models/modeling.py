"""The transformers model classes: a dense family's model with `SparseSwiGLU` in place of its feed-forward.

Everything but the feed-forward and the chunked loss is the dense family's own code, so caches, attention back ends,
generation, gradient checkpointing and `device_map` work as they do there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from bankwise.config.sparsity import SparsityConfig
from bankwise.ffn.layer import SparseSwiGLU, recorded_loss, sparse_layers
from bankwise.ffn.predictor import Predictor
from bankwise.models.export import modeling_source
from bankwise.models.lm_loss import IGNORED_LABEL, LMLoss, chunked_lm_loss
from bankwise.models.tensor_parallel import SPARSE_TP_PLAN

MODELING_MODULE = "modeling_bankwise"


def validate_sparsity(config: Any) -> SparsityConfig:
    """The `SparsityConfig` of a model config, checked against the model's shape."""
    sparsity = SparsityConfig.from_dict(config.sparsity or {})
    sparsity.validate_for(
        ffn_size=config.intermediate_size, num_layers=config.num_hidden_layers, hidden_act=config.hidden_act
    )
    return sparsity


def install_sparse_ffn(base_model: Any, config: Any) -> None:
    """Replace the feed-forward of every layer that is not in `dense_layers`."""
    sparsity = validate_sparsity(config)
    for index, layer in enumerate(base_model.layers):
        if index not in sparsity.dense_layers:
            layer.mlp = SparseSwiGLU(
                config.hidden_size,
                config.intermediate_size,
                sparsity,
                index,
                bias=getattr(config, "mlp_bias", False),
            )


@dataclass
class TrainingOutput(CausalLMOutputWithPast):
    """What a causal LM returns in training, where `logits` is None."""

    routing_loss: Tensor | None = None
    """Mean over layers of the auxiliary routing loss; None where it is not recorded. As an output of the forward it is
    seen by DDP, which otherwise takes a predictor that nothing else trains for unused."""


def chunked_causal_lm_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    loss_chunk: int = 1024,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Forward of a causal LM whose training loss never materialises the logits.

    In training mode with `labels`, `logits` is None and `loss` is the mean over target tokens (over
    `num_items_in_batch` where given) of ce_weight * cross entropy + kd_weight * KL(teacher || student), the teacher
    given as its last hidden states and its head. In every other case this is the dense family's own forward.
    """
    if labels is None or not self.training:
        if labels is not None and num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        dense_forward = getattr(type(self), "dense_forward", type(self).forward)
        return dense_forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )
    hidden_TD = outputs.last_hidden_state[:, :-1].flatten(0, 1)
    labels_T = labels[:, 1:].flatten()
    loss = _head_loss(
        self.lm_head,
        hidden_TD,
        labels_T,
        chunk_size=loss_chunk,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        teacher_TD=None if teacher_hidden is None else teacher_hidden[:, :-1].flatten(0, 1),
        teacher_head_VD=teacher_head,
    )
    items = num_items_in_batch if num_items_in_batch is not None else (labels_T != IGNORED_LABEL).sum().clamp_min(1)
    self.last_loss_parts = (loss.cross_entropy / items, loss.distillation / items)
    return TrainingOutput(
        loss=loss.total / items,
        routing_loss=recorded_loss(layer.mlp for layer in self.model.layers),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _head_loss(head: Any, hidden_TD: Tensor, labels_T: Tensor, **settings: Any) -> LMLoss:
    """`chunked_lm_loss` with the whole weight of the head, wherever its parts are."""

    def loss(hidden_TD: Tensor) -> LMLoss:
        weight_VD = head.weight
        if hasattr(weight_VD, "full_tensor"):  # sharded by tensor parallelism: the ranks compute the same loss
            weight_VD = weight_VD.full_tensor()
        return chunked_lm_loss(hidden_TD, weight_VD, labels_T, **settings)

    if not head._forward_pre_hooks:
        return loss(hidden_TD)
    # FSDP2 and ZeRO-3 gather a module's weights in hooks around its forward, so the loss has to run as that forward.
    own = head.__dict__.get("forward")
    head.forward = loss
    try:
        return head(hidden_TD)
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def use_chunked_loss(dense: nn.Module) -> None:
    """Give a dense causal LM the same chunked training loss, for its training as a companion."""
    dense.forward = MethodType(chunked_causal_lm_forward, dense)


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")  # `fully_shard` makes a subclass of that name


class _SparseModel(PreTrainedModel):
    """What the sparse classes of the four families share."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder also carries the modelling file, so that it opens without bankwise.

        Weights that a kernel packed go back to their ordinary layout first.
        """
        self.config.auto_map = {
            "AutoConfig": f"{MODELING_MODULE}.{type(self.config).__name__}",
            "AutoModel": f"{MODELING_MODULE}.{_class_name(self.base_model)}",
        }
        if hasattr(self, "lm_head"):
            self.config.auto_map["AutoModelForCausalLM"] = f"{MODELING_MODULE}.{_class_name(self)}"
        for layer in sparse_layers(self):
            if layer.packed is not None:
                layer.unpack()
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.should_save_on_this_rank(kwargs.get("is_main_process", True)):
            Path(save_directory, f"{MODELING_MODULE}.py").write_text(modeling_source(), encoding="utf-8")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SparseSwiGLU | Predictor):
            for name, value in module.start_values().items():
                init.constant_(getattr(module, name), value)
        if isinstance(module, Predictor):
            init.copy_(module.bank_layout, torch.arange(module.bank_layout.numel()))


class _SparseCausalLM(_SparseModel, GenerationMixin):
    """What their causal language models share."""

    prepare_decoding: ClassVar[Callable[[Any], Any] | None] = None
    """Set by `bankwise.inference`: makes a model in evaluation mode ready for the fast kernels."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; in evaluation mode the fast kernels do the decoding."""
        prepare = _SparseCausalLM.prepare_decoding
        if not self.training and self.device.type in ("cpu", "cuda") and prepare is not None:
            prepare(self)
        # transformers types `self` of generate as a protocol of its own, which mypy does not find fulfilled.
        return super().generate(*args, **kwargs)  # type: ignore[misc]


class BankwiseLlamaConfig(LlamaConfig):
    """LlamaConfig plus `sparsity`, a `SparsityConfig` as a plain dict."""

    model_type = "bankwise_llama"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | SPARSE_TP_PLAN
    sparsity: dict | None = None


class BankwiseMistralConfig(MistralConfig):
    """MistralConfig plus `sparsity`, a `SparsityConfig` as a plain dict."""

    model_type = "bankwise_mistral"
    base_model_tp_plan = MistralConfig.base_model_tp_plan | SPARSE_TP_PLAN
    sparsity: dict | None = None


class BankwiseQwen2Config(Qwen2Config):
    """Qwen2Config plus `sparsity`, a `SparsityConfig` as a plain dict."""

    model_type = "bankwise_qwen2"
    base_model_tp_plan = Qwen2Config.base_model_tp_plan | SPARSE_TP_PLAN
    sparsity: dict | None = None


class BankwiseQwen3Config(Qwen3Config):
    """Qwen3Config plus `sparsity`, a `SparsityConfig` as a plain dict."""

    model_type = "bankwise_qwen3"
    base_model_tp_plan = Qwen3Config.base_model_tp_plan | SPARSE_TP_PLAN
    sparsity: dict | None = None


class BankwiseLlamaModel(_SparseModel, LlamaModel):
    config_class = BankwiseLlamaConfig

    def __init__(self, config: BankwiseLlamaConfig) -> None:
        super().__init__(config)
        install_sparse_ffn(self, config)
        self.post_init()


class BankwiseMistralModel(_SparseModel, MistralModel):
    config_class = BankwiseMistralConfig

    def __init__(self, config: BankwiseMistralConfig) -> None:
        super().__init__(config)
        install_sparse_ffn(self, config)
        self.post_init()


class BankwiseQwen2Model(_SparseModel, Qwen2Model):
    config_class = BankwiseQwen2Config

    def __init__(self, config: BankwiseQwen2Config) -> None:
        super().__init__(config)
        install_sparse_ffn(self, config)
        self.post_init()


class BankwiseQwen3Model(_SparseModel, Qwen3Model):
    config_class = BankwiseQwen3Config

    def __init__(self, config: BankwiseQwen3Config) -> None:
        super().__init__(config)
        install_sparse_ffn(self, config)
        self.post_init()


class BankwiseLlamaForCausalLM(_SparseCausalLM, LlamaForCausalLM):
    config_class = BankwiseLlamaConfig
    dense_forward = LlamaForCausalLM.forward
    forward = chunked_causal_lm_forward

    def __init__(self, config: BankwiseLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = BankwiseLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class BankwiseMistralForCausalLM(_SparseCausalLM, MistralForCausalLM):
    config_class = BankwiseMistralConfig
    dense_forward = MistralForCausalLM.forward
    forward = chunked_causal_lm_forward

    def __init__(self, config: BankwiseMistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)
        self.model = BankwiseMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class BankwiseQwen2ForCausalLM(_SparseCausalLM, Qwen2ForCausalLM):
    config_class = BankwiseQwen2Config
    dense_forward = Qwen2ForCausalLM.forward
    forward = chunked_causal_lm_forward

    def __init__(self, config: BankwiseQwen2Config) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = BankwiseQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class BankwiseQwen3ForCausalLM(_SparseCausalLM, Qwen3ForCausalLM):
    config_class = BankwiseQwen3Config
    dense_forward = Qwen3ForCausalLM.forward
    forward = chunked_causal_lm_forward

    def __init__(self, config: BankwiseQwen3Config) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = BankwiseQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
