"""The dense model in llama.cpp, through the package llama-cpp-python where it is installed: same weights, same dtype.

The weights go through a GGUF file in a temporary folder, which is deleted before anything is timed.

Shapes: O output and I input columns of a linear layer, H heads.
"""

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bankwise.errors import KernelError

FAMILIES = ("llama", "qwen2")
"""Families of the named shapes, called the same in GGUF."""

_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module in transformers (within its layer) -> tensor in GGUF."""


def unavailable(family: str) -> str | None:
    """Why a model of this family cannot be measured in llama.cpp here, or None."""
    missing = [
        package
        for package, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        return f'{" and ".join(missing)} not installed; pip install "bankwise[bench]" (compiles llama.cpp)'
    if family not in FAMILIES:
        return f"no GGUF layout for the family {family!r} (known: {', '.join(FAMILIES)})"
    return None


def version_line() -> str:
    """Version of llama-cpp-python and whether `bench decode` measures it, for `bankwise env`."""
    reason = unavailable(FAMILIES[0])
    return reason if reason is not None else f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


class LlamaCppModel:
    """A model loaded in llama.cpp, its cache at `length` tokens."""

    def __init__(self, llama: Any, vocab: int) -> None:
        self._llama = llama
        self._vocab = vocab

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._llama.n_tokens)

    def append(self, ids: list[int]) -> np.ndarray:
        """Run these tokens; returns the logits [vocab] of the last one, valid until the next call."""
        import llama_cpp

        self._llama.eval(ids)
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        if not pointer:
            raise KernelError("llama.cpp gave no logits; its version does not fit this benchmark")
        return np.ctypeslib.as_array(pointer, shape=(self._vocab,))

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`: the next call overwrites them."""
        self._llama.n_tokens = length

    def decoder(self, ids: list[int], steps: int) -> Callable[[], None]:
        """A step that decodes `steps` tokens greedily after `ids`, as `bench.decode.decoder` does for transformers."""
        self.crop(0)
        token = int(self.append(ids).argmax())

        def step() -> None:
            following = token
            for _ in range(steps):
                following = int(self.append([following]).argmax())
            self.crop(len(ids))

        return step


@contextmanager
def loaded(model: PreTrainedModel, context: int) -> Iterator[LlamaCppModel]:
    """`model` in llama.cpp with room for `context` tokens, on as many threads as torch uses.

    The weights are read into memory instead of being mapped: a mapped file could be evicted while others are timed.
    """
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="bankwise-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path)
        llama = Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
            use_mmap=False, verbose=False,
        )  # fmt: skip
    with closing(llama):
        yield LlamaCppModel(llama, model.config.vocab_size)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The dense model as GGUF without a tokenizer: matrices in its dtype, vectors in float32 (llama.cpp wants that)."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _interleaved(value, head)
        data = value if value.dim() > 1 else value.float()
        is_half = data.dtype == torch.bfloat16
        writer.add_tensor(
            _tensor_name(name),
            data.contiguous().view(torch.uint8).numpy() if is_half else data.contiguous().numpy(),
            raw_dtype=gguf.GGMLQuantizationType.BF16 if is_half else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    prefix, layers = "", "model.layers."
    if module.startswith(layers):
        layer, module = module.removeprefix(layers).split(".", 1)
        prefix = f"blk.{layer}."
    return f"{prefix}{_TENSORS[module]}.{kind}"


def _interleaved(weight_OI: Tensor, head: int) -> Tensor:
    """Rows of every head as GGUF orders them for this family: both halves of a rotated pair beside each other."""
    weight_H2I = weight_OI.unflatten(0, (-1, 2, head // 2))
    return weight_H2I.transpose(1, 2).flatten(0, 2)
