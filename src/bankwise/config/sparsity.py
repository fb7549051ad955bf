"""How the sparse FFN of a model is built. Stored as a plain dict under `sparsity` in the model's `config.json`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from bankwise.errors import ConfigError

GateMode = Literal["ste_unit", "sigmoid", "affine", "relu_rms", "stat_topk", "detached", "default_ema", "hard"]


GateNorm = Literal["none", "2sigma", "bank_mean_1"]
ActivationGrad = Literal["masked", "straight"]
PredictorForm = Literal["linear", "gated_product"]
PredictorGrad = Literal["lm", "aux", "both", "frozen"]
Selection = Literal["predictor", "oracle_bank", "oracle_global", "random_fixed", "random_per_token"]
Center = Literal["off", "mean", "learnable", "ema"]
BankLayout = Literal["none", "random", "snake", "coact"]
_CHOICES = {
    "gate_mode": GateMode,
    "gate_norm": GateNorm,
    "h_grad": ActivationGrad,
    "predictor_form": PredictorForm,
    "predictor_grad": PredictorGrad,
    "center": Center,
    "bank_layout": BankLayout,
    "selection": Selection,
}


@dataclass(kw_only=True)
class SparsityConfig:
    """How much of the FFN one token may use, and how the channels are chosen (`method.md` section 2)."""

    bank_size: int = 64
    """B: channels per bank; must divide the FFN width of the model."""

    active_per_bank: int | list[int] = 16
    """k: channels kept per bank and token, 1..bank_size; one integer, or one per layer. bank_size keeps all."""

    predictor_rank: int | Literal["auto"] = "auto"
    """R: rows of the predictor's `reduce` matrix. `auto`: 128 below hidden size 2048, 512 above FFN width 14336, else
    256. More rank is the strongest lever on quality, and costs speed (docs/training.md)."""

    predictor_form: PredictorForm = "gated_product"
    """`linear`: logits = V U x + b. `gated_product`: half of the rank rebuilds the gate, half the up projection,
    logits = log of the expected squared product. Same parameter bytes at equal rank."""

    gate_mode: GateMode = "ste_unit"
    """What a kept channel is multiplied by, and how the language-model loss reaches the router."""

    gate_norm: GateNorm = "2sigma"
    """Normalisation of gate_mode `sigmoid`; ignored by the other modes."""

    ste_alpha: float = 1.0
    """Scale of the straight-through router gradient (`ste_unit`, `default_ema`)."""

    ste_tau: float = 1.0
    """Width of the straight-through sigmoid, in standard deviations of a bank's logits."""

    h_grad: ActivationGrad = "masked"
    """Gradient to the FFN activation: only through kept channels, or (`straight`, Q-Sparse) through all."""

    predictor_grad: PredictorGrad = "both"
    """Which loss trains the predictor: the language-model loss, the auxiliary routing loss, both, or neither: `frozen`
    stays as it is whatever a stage trains."""

    center: Center = "off"
    """What a dropped channel contributes: 0 (`off`), or its centre: the calibrated conditional mean, a trained
    vector started there, or a running mean over the tokens that dropped it."""

    bank_layout: BankLayout = "none"
    """How channels are dealt into banks at conversion; exact for the dense function up to summation order, recorded in
    the checkpoint. `none` keeps the dense order, and the dense logits bit for bit at active_per_bank = bank_size; on
    SmolLM2 the others gain nothing (docs/research-log.md, "Calibration")."""

    dense_layers: list[int] = field(default_factory=list)
    """Layers that keep the plain dense FFN without a predictor."""

    selection: Selection = "predictor"
    """Who chooses the channels, in training and evaluation. Everything but `predictor` is a control: its gate is the
    plain mask, and the predictor is neither read nor trained. `oracle_bank`: the largest true contributions of each
    bank; `oracle_global`: those of the whole layer, equally many; both compute every channel. `random_fixed`: channels
    of each bank drawn once per layer; `random_per_token`: drawn by a hash of the signs of the FFN input."""

    selection_seed: int = 0
    """Seed of the random selections."""

    def __post_init__(self) -> None:
        for name, choice in _CHOICES.items():
            value, allowed = getattr(self, name), get_args(choice)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")
        if not _is_int(self.bank_size) or self.bank_size < 1:
            raise ConfigError(f"bank_size={self.bank_size!r} is not a positive integer; the usual value is 64")
        per_layer = self.active_per_bank if isinstance(self.active_per_bank, list) else [self.active_per_bank]
        for active in per_layer:
            if not _is_int(active) or not 1 <= active <= self.bank_size:
                raise ConfigError(
                    f"active_per_bank={active!r} is outside 1..bank_size={self.bank_size}; "
                    f"use active_per_bank={self.bank_size} to keep every channel"
                )
        if self.predictor_rank != "auto" and (not _is_int(self.predictor_rank) or self.predictor_rank < 1):
            raise ConfigError(f"predictor_rank={self.predictor_rank!r} is neither 'auto' nor a positive integer")
        if self.predictor_form == "gated_product" and _is_int(self.predictor_rank) and int(self.predictor_rank) % 2:
            raise ConfigError(
                f"predictor_rank={self.predictor_rank} is odd, but predictor_form='gated_product' gives half of it "
                f"to each projection; use {int(self.predictor_rank) + 1}"
            )
        if not self.ste_tau > 0:
            raise ConfigError(f"ste_tau={self.ste_tau} must be positive; the default is 1.0")
        if self.gate_mode == "default_ema" and self.center != "off":
            raise ConfigError(
                f"gate_mode='default_ema' with center={self.center!r} gives the router no gradient: the running mean "
                "is the centre. Use center='off' or gate_mode='ste_unit'"
            )
        if self.h_grad == "straight" and self.center == "learnable":
            raise ConfigError(
                "h_grad='straight' with center='learnable' gives the centre no gradient: what it loses on kept "
                "channels it gains on dropped ones. Use h_grad='masked' or center='mean'"
            )
        if self.predictor_grad == "lm" and self.gate_mode in ("detached", "hard"):
            raise ConfigError(
                f"predictor_grad='lm' with gate_mode={self.gate_mode!r} would never train the predictor: this mode "
                "passes no language-model gradient to it. Use predictor_grad='aux' or gate_mode='ste_unit'"
            )
        if self.selection != "predictor" and self.gate_mode not in ("ste_unit", "hard", "detached"):
            raise ConfigError(
                f"selection={self.selection!r} keeps channels without the predictor, but "
                f"gate_mode={self.gate_mode!r} reads its logits; use gate_mode='hard'"
            )
        if self.reads_all_channels and self.center == "ema":
            raise ConfigError(
                f"selection={self.selection!r} with center='ema' would choose by a centre that moves between a forward "
                "and its recomputation; use center='mean'"
            )
        if not _is_int(self.selection_seed):
            raise ConfigError(f"selection_seed={self.selection_seed!r} is not an integer")

    @property
    def trains_predictor(self) -> bool:
        """Whether any stage may change the predictors."""
        return self.selection == "predictor" and self.predictor_grad != "frozen"

    @property
    def reads_all_channels(self) -> bool:
        """Whether every channel has to be computed before the choice is known."""
        return self.selection in ("oracle_bank", "oracle_global")

    def active_in_layer(self, layer: int) -> int:
        """k of one layer."""
        return self.active_per_bank[layer] if isinstance(self.active_per_bank, list) else self.active_per_bank

    def resolve_rank(self, hidden_size: int, ffn_size: int) -> int:
        """R for a layer of this width (`method.md` section 2.6)."""
        if self.predictor_rank != "auto":
            return int(self.predictor_rank)
        if hidden_size < 2048:
            return 128
        return 512 if ffn_size > 14336 else 256

    def validate_for(self, *, ffn_size: int, num_layers: int, hidden_act: str) -> None:
        """Raise `ConfigError` when this sparsity cannot be put on a model of the given shape."""
        if hidden_act not in ("silu", "swish"):
            raise ConfigError(
                f"hidden_act={hidden_act!r} is not a gated-SiLU feed-forward; bankwise converts SwiGLU models "
                "(llama, mistral, qwen2, qwen3) only"
            )
        if ffn_size % self.bank_size:
            fits = [size for size in range(8, 257) if ffn_size % size == 0]
            nearest = min(fits, key=lambda size: abs(size - self.bank_size)) if fits else None
            raise ConfigError(
                f"bank_size={self.bank_size} does not divide the FFN width {ffn_size} "
                f"(remainder {ffn_size % self.bank_size}); "
                + (f"use bank_size={nearest}" if nearest else "no bank size from 8 to 256 divides it")
            )
        if isinstance(self.active_per_bank, list) and len(self.active_per_bank) != num_layers:
            raise ConfigError(
                f"active_per_bank lists {len(self.active_per_bank)} layers, but the model has {num_layers}; "
                "give one integer, or one per layer"
            )
        outside = [layer for layer in self.dense_layers if not 0 <= layer < num_layers]
        if outside:
            raise ConfigError(f"dense_layers={outside} do not exist: the model's layers are 0..{num_layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, as stored in `config.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; unknown keys raise `ConfigError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown sparsity settings {unknown}; known are {sorted(known)}")
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
