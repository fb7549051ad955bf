"""The sparse feed-forward layer: predictor -> bank top-k -> gated SwiGLU. Controls put other scores in its place.

This is the reference path: gate and up are computed for all channels and masked before `down`, which is what training
needs (the straight-through gradient reads dropped channels too). Parameter names and shapes are those of the dense FFN,
so a dense checkpoint loads with only predictor keys missing. `bankwise.kernels` plugs in a faster path for decoding.

Shapes: T leading dimensions (tokens), D hidden, F channels, N banks, K active per bank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bankwise.config.sparsity import SparsityConfig
from bankwise.errors import KernelError
from bankwise.ffn.bank import bank_topk_mask, cut_banks
from bankwise.ffn.gates import SteUnitGate, gate_activation, selected_channels
from bankwise.ffn.predictor import Predictor
from bankwise.ffn.routing_loss import channel_energy, channel_recall, retained_energy, routing_loss
from bankwise.ffn.selection import bank_rule, random_scores


@dataclass
class RoutingRecord:
    """What the sparse layers report while `record_routing` is active; one entry per layer and forward."""

    loss_kind: str = "kl"
    """Form of the auxiliary loss: `kl` or `bce`."""

    scope: str = "all"
    """Channels that the auxiliary loss looks at: `all`, or the `selected` ones."""

    with_loss: bool = True
    """Whether the auxiliary loss is computed (it costs several passes over [T, F])."""

    with_statistics: bool = True
    """Whether recall and retained energy are computed."""

    with_gradients: bool = False
    """Whether the backward pass adds up what reaches the routers: `lm_gradients`, `aux_gradients`."""

    token_fraction: float = 1.0
    """Share of the tokens (evenly spaced) that the auxiliary loss and the statistics read."""

    text_places: Tensor | None = None
    """int64, places of the tokens that are text in the flattened batch; the others are padding, which neither reads.
    None: all are text."""

    observe: Callable[["SparseSwiGLU", Tensor, Tensor], None] | None = None
    """Called with each layer, its dense activation h and its logits z, both [..., F] of all tokens."""

    layers: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)
    retained: list[Tensor] = field(default_factory=list)
    """Retained energy of the predictor's choice."""
    retained_oracle: list[Tensor] = field(default_factory=list)
    """Retained energy of the oracle's choice."""
    lm_gradients: dict[int, Tensor] = field(default_factory=dict)
    """By layer: squared norm of d(loss without the auxiliary part)/dz, summed over tokens and backward passes. Only
    layers whose router that loss should train: not frozen, not detached, and with something to choose."""
    aux_gradients: dict[int, Tensor] = field(default_factory=dict)
    """By layer: the same of the auxiliary part, as weighted in the loss."""

    def read(self, values: Tensor) -> Tensor:
        """Rows [tokens, n] of the tokens that are read, of the values [..., n] of all tokens."""
        stride = max(1, round(1 / self.token_fraction))
        rows = values.flatten(0, -2)
        return rows[::stride] if self.text_places is None else rows[self.text_places[::stride]]


class SparseSwiGLU(nn.Module):
    """y = Wd (mask * gate * (h - c) + c), h = silu(Wg x) * (Wu x), mask = bank top-K of the predictor's logits.

    Under another `selection` than `predictor` the mask is the bank top-K of that selection's scores, and the gate 1.
    `active_per_bank` is a plain attribute: setting it to `bank_size` re-densifies the layer.
    """

    gate_weight: Tensor
    activation_mean: Tensor
    center: Tensor

    fast_forward: ClassVar[Callable[[Any, Tensor], Tensor | None] | None] = None
    """Set by `bankwise.kernels`: y of (layer, x) in inference, or None where the reference has to run."""

    unit_gate: ClassVar[Callable[..., Tensor]] = SteUnitGate.apply
    """`SteUnitGate`, or a function of the same arguments and gradients set by `bankwise.kernels`."""

    scheduled_active: int | None = None
    """Active channels per bank in training while a schedule is under way; None: `active_per_bank`."""

    leak: float = 0.0
    """Share of a dropped channel that still passes in training (`k_schedule: leak`)."""

    packed: Any = None
    """The same weights in a kernel's layout. The dense parameters are views of it, so it is never out of date."""

    def __init__(
        self, hidden_size: int, ffn_size: int, sparsity: SparsityConfig, layer: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self.sparsity = sparsity
        self.bank_size = sparsity.bank_size
        self.active_per_bank = sparsity.active_in_layer(layer)
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=bias)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=bias)
        rank = sparsity.resolve_rank(hidden_size, ffn_size)
        self.predictor = Predictor(hidden_size, ffn_size, rank, sparsity.predictor_form)
        trained = {"gate_weight"} | ({"center"} if sparsity.center == "learnable" else set())
        for name, value in self.start_values().items():
            start_F = torch.full((ffn_size,), value)
            if name in trained:
                self.register_parameter(name, nn.Parameter(start_F))
            else:
                self.register_buffer(name, start_F)
        self.routing_record: RoutingRecord | None = None

    def start_values(self) -> dict[str, float]:
        """Constant start of the layer's own vectors, by name: what neither the dense FFN nor the predictor holds."""
        values = {}
        if self.sparsity.gate_mode == "affine":
            values["gate_weight"] = 0.0
        if self.sparsity.gate_mode == "relu_rms":
            # With equal positive logits this makes the gate 1 (method.md section 2.4).
            values["gate_weight"] = (self.active_per_bank / self.bank_size) ** 0.5
        if self.sparsity.gate_mode == "default_ema":
            values["activation_mean"] = 0.0
        if self.sparsity.center != "off":
            values["center"] = 0.0
        return values

    def logits(self, x_TD: Tensor) -> Tensor:
        """Routing logits z [..., F], float32, for FFN inputs x [..., D]."""
        return self.predictor(x_TD)

    def active_mask(self, x_TD: Tensor) -> Tensor:
        """bool [..., F]: the channels that each token reads; exactly K per bank (but see `stat_topk`, and
        `oracle_global`, which keeps K / B of the whole layer)."""
        return self.chosen(
            self._scores(x_TD, self.dense_activation(x_TD) if self.sparsity.reads_all_channels else None)
        )

    def chosen(self, scores_TF: Tensor) -> Tensor:
        """`active_mask` for the channels' scores, which are the routing logits where a predictor chooses."""
        if self.sparsity.gate_mode == "stat_topk":
            cut = cut_banks(scores_TF, bank_size=self.bank_size, active_per_bank=self.active_per_bank)
            return selected_channels(scores_TF, cut, "stat_topk", self.bank_size, self.active_per_bank)
        return bank_topk_mask(scores_TF, **self._rule(self.active_per_bank))

    def _scores(self, x_TD: Tensor, h_TF: Tensor | None) -> Tensor:
        """What decides between the channels of a bank [..., F]; the oracles need h."""
        if self.sparsity.selection == "predictor":
            return self.logits(x_TD)
        if self.sparsity.reads_all_channels:
            assert h_TF is not None
            return self.energy(h_TF)
        return random_scores(self.sparsity, self.layer, x_TD, self.gate_proj.out_features)

    def _rule(self, active_per_bank: int) -> dict[str, int]:
        return bank_rule(self.sparsity, self.gate_proj.out_features, active_per_bank)

    def dense_activation(self, x_TD: Tensor) -> Tensor:
        """h_TF of the dense SwiGLU."""
        return functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)

    def energy(self, h_TF: Tensor) -> Tensor:
        """`channel_energy` of h with the layer's own matrix and, where it has one, its centre."""
        return channel_energy(h_TF, self.down_proj.weight, None if self.sparsity.center == "off" else self.center)

    def train(self, mode: bool = True) -> Self:
        """As in torch. Training gets the dense weights back in their ordinary layout."""
        if mode and self.packed is not None:
            self.unpack()
        return super().train(mode)

    def unpack(self) -> None:
        """Undo a kernel's packing: every dense weight is contiguous and owns its memory again."""
        self.packed = None
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if linear.weight.is_meta:
                raise KernelError(
                    f"layer {self.layer} holds int8 weights only, made for inference; load the checkpoint again to "
                    "train or save it"
                )
            linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)

    def forward(self, x_TD: Tensor) -> Tensor:
        is_plain = self.routing_record is None and not self.training and not torch.is_grad_enabled()
        if is_plain and SparseSwiGLU.fast_forward is not None:
            y_TD = SparseSwiGLU.fast_forward(self, x_TD)
            if y_TD is not None:
                return y_TD
        h_TF = self.dense_activation(x_TD)
        scores_TF = self._scores(x_TD, h_TF)
        has_running_mean = self.sparsity.center == "ema" or self.sparsity.gate_mode == "default_ema"
        if self.training and has_running_mean and not _is_recomputing():
            # Before anything reads it, so that one forward, and its recomputation, use one centre throughout.
            self._update_running_mean(h_TF, scores_TF)
        if self.routing_record is not None:
            self._record(self.routing_record, x_TD, h_TF, scores_TF)
        if not self._has_router_gradient:
            scores_TF = scores_TF.detach()
        return self.down_proj(self._gate(h_TF, scores_TF))

    @property
    def _has_router_gradient(self) -> bool:
        """Whether the gate passes a gradient of the model's loss to the logits."""
        settings = self.sparsity
        return (
            settings.selection == "predictor"
            and settings.predictor_grad in ("lm", "both")
            and settings.gate_mode not in ("detached", "hard")
        )

    @property
    def _active_now(self) -> int:
        """Active channels per bank of this forward: the schedule's in training."""
        if self.training and self.scheduled_active is not None:
            return self.scheduled_active
        return self.active_per_bank

    def _gate(self, h_TF: Tensor, scores_TF: Tensor) -> Tensor:
        settings = self.sparsity
        if settings.center == "off":
            center_F = None
            moved_TF = h_TF
        else:
            center_F = self.center.to(h_TF.dtype)
            moved_TF = h_TF - center_F
        active = self._active_now
        # Without a predictor nothing would learn from a gate's gradient: it is the plain mask.
        gate_mode = settings.gate_mode if settings.selection == "predictor" else "hard"
        if gate_mode == "ste_unit" and settings.h_grad == "masked":
            gated_TF = SparseSwiGLU.unit_gate(
                moved_TF, scores_TF, self.bank_size, active, settings.ste_alpha, settings.ste_tau
            )
        else:
            gated_TF = gate_activation(
                moved_TF,
                scores_TF,
                gate_mode=gate_mode,
                **self._rule(active),
                gate_norm=settings.gate_norm,
                ste_alpha=settings.ste_alpha,
                ste_tau=settings.ste_tau,
                h_grad=settings.h_grad,
                gate_weight_F=getattr(self, "gate_weight", None),
                default_F=getattr(self, "activation_mean", None),
            )
        if self.training and self.leak:
            gated_TF = torch.lerp(gated_TF, moved_TF, self.leak)
        return gated_TF if center_F is None else gated_TF + center_F

    @torch.no_grad()
    def _update_running_mean(self, h_TF: Tensor, scores_TF: Tensor) -> None:
        # default_ema: mean over the tokens that kept the channel. center=ema: over those that dropped it, which is the
        # least-squares value of a dropped channel (method.md section 2.5).
        mask_TF = cut_banks(scores_TF, **self._rule(self.active_per_bank)).mask_TF
        is_default = self.sparsity.gate_mode == "default_ema"
        counted_TF = (mask_TF if is_default else ~mask_TF).flatten(0, -2).float()
        count_F = counted_TF.sum(dim=0)
        mean_F = (h_TF.flatten(0, -2).float() * counted_TF).sum(dim=0) / count_F.clamp_min(1)
        running_F = self.activation_mean if is_default else self.center
        running_F.lerp_(mean_F.to(running_F.dtype), 0.01 * (count_F > 0).to(running_F.dtype))

    def _record(self, record: RoutingRecord, x_TD: Tensor, h_TF: Tensor, scores_TF: Tensor) -> None:
        if record.observe is not None:
            record.observe(self, h_TF, scores_TF)
        is_taught = self._has_router_gradient and self._active_now < self.bank_size and scores_TF.requires_grad
        if record.with_gradients and is_taught:
            _add_squared_gradient(record.lm_gradients, self.layer, scores_TF)
        if not record.with_loss and not record.with_statistics:
            return
        energy_TF = self.energy(record.read(h_TF.detach()))
        mask_TF = self.chosen(record.read(scores_TF.detach()))
        record.layers.append(self.layer)
        if record.with_loss and self.sparsity.trains_predictor and self.sparsity.predictor_grad != "lm":
            # The loss sees the input detached: it may train the predictor, never reshape the trunk.
            own_TF = self.logits(record.read(x_TD.detach()))
            if record.with_gradients and own_TF.requires_grad:
                _add_squared_gradient(record.aux_gradients, self.layer, own_TF)
            record.losses.append(
                routing_loss(
                    own_TF, energy_TF, bank_size=self.bank_size, active_per_bank=self.active_per_bank,
                    kind=record.loss_kind, selected_TF=mask_TF if record.scope == "selected" else None,
                )
            )  # fmt: skip
        if not record.with_statistics:
            return
        oracle_TF = bank_topk_mask(energy_TF, bank_size=self.bank_size, active_per_bank=self.active_per_bank)
        record.recalls.append(channel_recall(mask_TF, oracle_TF))
        record.retained.append(retained_energy(energy_TF, mask_TF))
        record.retained_oracle.append(retained_energy(energy_TF, oracle_TF))

    def extra_repr(self) -> str:
        return (
            f"active={self.active_per_bank} of {self.bank_size}, gate_mode={self.sparsity.gate_mode}, "
            f"selection={self.sparsity.selection}"
        )


@torch.compiler.disable
def _add_squared_gradient(sums: dict[int, Tensor], layer: int, logits_TF: Tensor) -> None:
    """Let the backward pass add the squared norm of the gradient of `logits_TF` to the layer's sum."""
    sums.setdefault(layer, torch.zeros((), device=logits_TF.device))

    def add(gradient_TF: Tensor) -> None:
        sums[layer] = sums[layer] + gradient_TF.detach().float().square().sum()

    logits_TF.register_hook(add)


def _is_recomputing() -> bool:
    """Whether a backward pass runs this forward again (activation checkpointing); its tokens were counted already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def sparse_layers(model: nn.Module) -> list[SparseSwiGLU]:
    """The sparse layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, SparseSwiGLU)]


def recorded_loss(layers: Iterable[nn.Module]) -> Tensor | None:
    """Mean over layers of the auxiliary losses recorded so far; None where none is."""
    records = (layer.routing_record for layer in layers if isinstance(layer, SparseSwiGLU))
    record = next(records, None)
    return torch.stack(record.losses).mean() if record is not None and record.losses else None


class record_routing:
    """Context manager: every sparse layer of `model` reports into the returned `RoutingRecord` while it is active."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.layers = sparse_layers(model)
        self.record = RoutingRecord(**settings)

    def __enter__(self) -> RoutingRecord:
        for layer in self.layers:
            layer.routing_record = self.record
        return self.record

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.routing_record = None
