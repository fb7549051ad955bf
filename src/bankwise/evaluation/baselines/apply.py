"""The training-free baselines and controls of `method.md` section 7, each put on a dense model by its name.

All keep the same share of the FFN channels, but they do not read the same share of the FFN weights: a rule that must
first know the gate, or the whole activation, reads those weights in full. `ffn_bytes_fraction` says how much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.errors import ConfigError
from bankwise.evaluation.baselines.layers import MaskedSwiGLU, MaskRule, ThresholdedSwiGLU, TokenKeys
from bankwise.evaluation.baselines.rules import oracle_bank_mask, oracle_global_mask, random_token_mask
from bankwise.evaluation.baselines.thresholds import calibrated_layers, cats_layer, teal_layer
from bankwise.ffn import bank_topk_mask
from bankwise.upcycle.convert import calibration_windows, check_convertible
from bankwise.upcycle.narrow import kept_channels


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a baseline is, for the command line and the report."""

    description: str
    """One line."""

    ffn_bytes: str
    """Share of the FFN weights that a token reads, as a formula of the kept share rho."""

    ffn_bytes_of: Callable[[float], float]
    """The same as a function of rho."""

    needs_calibration: bool = False
    """Whether it has thresholds that come from calibration windows."""


def _gate_and_kept(rho: float) -> float:
    return 1 / 3 + 2 * rho / 3


BASELINES: dict[str, Baseline] = {
    "cats": Baseline(
        description="channels whose |silu(gate)| reaches the layer's threshold (CATS)",
        ffn_bytes="1/3 + 2 rho/3",
        ffn_bytes_of=_gate_and_kept,
        needs_calibration=True,
    ),
    "teal": Baseline(
        description="inputs of each FFN matrix whose magnitude reaches its threshold (TEAL style)",
        ffn_bytes="mean kept share of the three matrices",
        ffn_bytes_of=lambda rho: rho,
        needs_calibration=True,
    ),
    "gate_topk": Baseline(
        description="bank top-k of the gate before its SiLU (as in MoC)",
        ffn_bytes="1/3 + 2 rho/3",
        ffn_bytes_of=_gate_and_kept,
    ),
    "oracle_bank": Baseline(
        description="bank top-k of the true contribution energy: upper reference for routing, computes every channel",
        ffn_bytes="1",
        ffn_bytes_of=lambda rho: 1.0,
    ),
    "oracle_global": Baseline(
        description="top channels of the true contribution energy over the whole layer: oracle_bank without banks",
        ffn_bytes="1",
        ffn_bytes_of=lambda rho: 1.0,
    ),
    "random_fixed": Baseline(
        description="random channels of each bank, drawn once per layer",
        ffn_bytes="rho",
        ffn_bytes_of=lambda rho: rho,
    ),
    "random_per_token": Baseline(
        description="random channels of each bank, drawn afresh for each token (a hash of its id and position)",
        ffn_bytes="rho",
        ffn_bytes_of=lambda rho: rho,
    ),
}
"""The baselines that `apply_baseline` knows, in the order of the report's table."""


class AppliedBaseline:
    """A dense model with a baseline active, until `remove` is called or the `with` block ends."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        layers: list[nn.Module],
        *,
        active_fraction: float,
        token_keys: TokenKeys | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.active_fraction = active_fraction
        """Share of the channels (TEAL: of the inputs) that a token keeps; of the thresholds, as calibrated."""
        self._token_keys = token_keys
        self._dense = [block.mlp for block in model.model.layers]
        for block, layer in zip(model.model.layers, layers, strict=True):
            block.mlp = layer.train(model.training)
        if token_keys is not None:
            token_keys.watch(model)

    @property
    def description(self) -> str:
        return BASELINES[self.name].description

    @property
    def ffn_bytes_fraction(self) -> float:
        """Share of the dense FFN's weight bytes that a token reads, were the rule run sparsely."""
        return BASELINES[self.name].ffn_bytes_of(self.active_fraction)

    def remove(self) -> None:
        """Make the model dense again. A second call does nothing."""
        for block, mlp in zip(self.model.model.layers, self._dense, strict=False):
            block.mlp = mlp
        self._dense = []
        if self._token_keys is not None:
            self._token_keys.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@torch.no_grad()
def apply_baseline(
    dense_model: PreTrainedModel,
    name: str,
    *,
    fraction: float = 0.25,
    bank_size: int = 64,
    calibration: Tensor | None = None,
    seed: int = 0,
) -> AppliedBaseline:
    """`dense_model` with baseline `name` active, changed in place; its weights are shared and stay as they are.

    `fraction` of the channels is kept, of each bank of `bank_size` where the rule has banks. `calibration`: token
    windows [n, S], which `cats` and `teal` need. `seed` is that of the random controls.
    """
    if name not in BASELINES:
        raise ConfigError(f"baseline {name!r} is not known; use one of {', '.join(BASELINES)}")
    check_convertible(dense_model, SparsityConfig(bank_size=1, active_per_bank=1))
    if any(isinstance(block.mlp, MaskedSwiGLU | ThresholdedSwiGLU) for block in dense_model.model.layers):
        raise ConfigError("the model has a baseline already; remove() that one first")
    if BASELINES[name].needs_calibration:
        if calibration is None:
            raise ConfigError(f"baseline {name!r} has thresholds to calibrate; give token windows as `calibration`")
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction={fraction} is outside (0, 1]")
        windows = calibration_windows(calibration, None, CalibrationConfig())
        assert windows is not None
        layers, kept_share = calibrated_layers(
            dense_model, windows, fraction, cats_layer if name == "cats" else teal_layer
        )
        return AppliedBaseline(dense_model, name, layers, active_fraction=kept_share)
    keys = TokenKeys() if name == "random_per_token" else None
    rules = _rules(dense_model, name, fraction, bank_size, seed, keys)
    layers = [MaskedSwiGLU(block.mlp, rule) for block, rule in zip(dense_model.model.layers, rules, strict=True)]
    return AppliedBaseline(dense_model, name, layers, active_fraction=fraction, token_keys=keys)


def _rules(
    dense: PreTrainedModel, name: str, fraction: float, bank_size: int, seed: int, keys: TokenKeys | None
) -> list[MaskRule]:
    """The rule of each layer."""
    blocks, channels = dense.model.layers, dense.config.intermediate_size
    if name == "oracle_global":
        kept = kept_channels(channels, fraction, "FFN channels")
        return [lambda _gate_TF, h_TF, down_DF: oracle_global_mask(h_TF, down_DF, kept=kept)] * len(blocks)
    active = kept_channels(bank_size, fraction, "channels of a bank")
    check_convertible(dense, SparsityConfig(bank_size=bank_size, active_per_bank=active))
    cut = {"bank_size": bank_size, "active_per_bank": active}
    if name == "gate_topk":
        return [lambda gate_TF, _h_TF, _down_DF: bank_topk_mask(gate_TF, **cut)] * len(blocks)
    if name == "oracle_bank":
        return [lambda _gate_TF, h_TF, down_DF: oracle_bank_mask(h_TF, down_DF, **cut)] * len(blocks)
    generator = torch.Generator().manual_seed(seed)
    devices = [block.mlp.down_proj.weight.device for block in blocks]
    if keys is None:
        masks_LF = bank_topk_mask(torch.rand(len(blocks), channels, generator=generator), **cut)
        return [partial(_fixed_rule, mask_F.to(device)) for mask_F, device in zip(masks_LF, devices, strict=True)]
    limits = torch.iinfo(torch.int64)
    channels_LF = torch.randint(limits.min, limits.max, (len(blocks), channels), generator=generator)
    return [
        partial(_token_rule, keys, channel_F.to(device), cut)
        for channel_F, device in zip(channels_LF, devices, strict=True)
    ]


def _fixed_rule(mask_F: Tensor, _gate_TF: Tensor, _h_TF: Tensor, _down_DF: Tensor) -> Tensor:
    return mask_F


def _token_rule(
    keys: TokenKeys, channel_F: Tensor, cut: dict[str, int], gate_TF: Tensor, _h_TF: Tensor, _down_DF: Tensor
) -> Tensor:
    return random_token_mask(keys.current().to(gate_TF.device), channel_F, **cut)
