"""A decoder layer that takes one token in three operator calls instead of thirty PyTorch ones.

At the SmolLM2 shape a step of transformers' own layers spends most of its time in Python and in launching small
operations (docs/kernels.md). These classes replace a family's layer class in a model that `prepare` was called on: same
parameters, same names. They take one new token with a cache and no mask; everything else (prompts, batches, padding,
gradients, compilation, hooks, other attention back ends) goes through the family's own forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch
from bankwise.kernels.cpu.packing import is_current

ATTENTION = ("sdpa", "eager")
"""transformers' attention back ends whose result for one token without a mask the operator gives."""


class _DecodeLayer(nn.Module):
    """The shared forward; `super().forward` is the family's own."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        cache = settings.get("past_key_values")
        if (
            not arguments
            and cache is not None
            and hidden_states.numel() == hidden_states.shape[-1]
            and settings.get("attention_mask") is None
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and self._is_plain(hidden_states)
        ):
            return self._decode(hidden_states, cache, *settings["position_embeddings"])
        return super().forward(hidden_states, *arguments, **settings)

    def _is_plain(self, hidden_states: Tensor) -> bool:
        attention: Any = self._modules["self_attn"]
        norm: Any = self._modules["input_layernorm"]
        query, scales = attention._modules["q_proj"].operands
        return (
            not self.training
            and attention.config._attn_implementation in ATTENTION
            and (query if scales is None else norm._parameters["weight"]).dtype == hidden_states.dtype
            and query.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and not _any_hooked(self._modules)
            and not _any_hooked(attention._modules)
        )

    def _decode(self, x: Tensor, cache: Any, cos: Tensor, sin: Tensor) -> Tensor:
        modules: dict[str, Any] = self._modules
        attention = modules["self_attn"]
        parts = attention._modules
        names = ("q_proj", "k_proj", "v_proj")
        projections = [parts[name].operands for name in names]
        q_norm, k_norm = (parts[name]._parameters["weight"] if name in parts else None for name in ("q_norm", "k_norm"))
        before = modules["input_layernorm"]
        query, key, value = torch.ops.bankwise.attention_input(
            x,
            before._parameters["weight"],
            before.variance_epsilon,
            *[weight for weight, _ in projections],
            *[parts[name]._parameters["bias"] for name in names],
            q_norm,
            k_norm,
            cos,
            sin,
            *[scales for _, scales in projections],
        )
        keys, values = cache.update(key, value, attention.layer_idx)
        weight, scales = parts["o_proj"].operands
        x = torch.ops.bankwise.attention_output(
            query, keys, values, attention.scaling, weight, parts["o_proj"]._parameters["bias"], x, scales
        )
        after, mlp = modules["post_attention_layernorm"], modules["mlp"]
        if type(mlp) is SparseSwiGLU and dispatch.runs_packed(mlp) and is_current(mlp, mlp.packed):
            return dispatch.decode(mlp, mlp.packed, x, norm=after._parameters["weight"], epsilon=after.variance_epsilon)
        return x + mlp(after(x))


class DecodeLlamaLayer(_DecodeLayer, LlamaDecoderLayer):
    """LlamaDecoderLayer in a prepared model."""


class DecodeMistralLayer(_DecodeLayer, MistralDecoderLayer):
    """MistralDecoderLayer in a prepared model."""


class DecodeQwen2Layer(_DecodeLayer, Qwen2DecoderLayer):
    """Qwen2DecoderLayer in a prepared model."""


class DecodeQwen3Layer(_DecodeLayer, Qwen3DecoderLayer):
    """Qwen3DecoderLayer in a prepared model."""


DECODE_LAYERS: dict[type, type] = {
    LlamaDecoderLayer: DecodeLlamaLayer,
    MistralDecoderLayer: DecodeMistralLayer,
    Qwen2DecoderLayer: DecodeQwen2Layer,
    Qwen3DecoderLayer: DecodeQwen3Layer,
}
"""Layer class of a family -> its class in a prepared model."""


def _any_hooked(modules: Any) -> bool:
    for module in modules.values():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return False
