"""The remedies for one layer, from cheap to dear. Each changes only this layer, and nothing else of the model.

    centre         re-fit the centre of dropped channels, where centring is on
    new banks      deal the channels anew into banks, by their energy; exact for the dense function
    more channels  raise k
    predictor      train the predictor: routing loss, positions stratified
    layer          train predictor and feed-forward: squared error to the layer's own dense output, KL on the logits;
                   with as many channels as now, then with twice and four times as many

Shapes: W windows, S tokens of a window, T tokens, D hidden, F channels, V vocabulary.
"""

import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.ffn import SparseSwiGLU, routing_loss
from bankwise.models.lm_loss import chunked_lm_loss
from bankwise.repair.banks import permute_layer
from bankwise.repair.changes import all_dense, keep, wider
from bankwise.repair.diagnose import Fault
from bankwise.repair.patch import set_active
from bankwise.repair.training_data import ffn_inputs, stratified, training_windows
from bankwise.upcycle.fit import dropped_mean
from bankwise.upcycle.initialise import initialise_predictor, standardise_logits
from bankwise.upcycle.permutation import bank_order
from bankwise.upcycle.refine import refine_predictor
from bankwise.upcycle.statistics import LayerStatistics, channel_values

_ORDER: dict[Fault, tuple[str, ...]] = {
    "routing": ("centre", "predictor", "more channels", "layer"),
    "bank": ("centre", "new banks", "more channels", "layer"),
    "capacity": ("centre", "more channels", "layer"),
    "distributed": ("centre", "more channels", "layer"),
    "upstream": (),
}
"""What is tried for each fault. More channels cost every later token, so a better predictor goes before them."""
_CHECK_SHARE = 8  # one token in so many checks the predictor


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """How a remedy learns."""

    windows: int = 32
    """Windows of training text, each as long as the longest affected length."""
    bucket_tokens: int = 16_384
    """Tokens of each position bucket that the predictor learns from."""
    predictor_epochs: int = 4
    predictor_lr: float = 3e-3
    layer_steps: int = 100
    """Steps of the last remedy, for each width; each reads one window."""
    layer_lr: float = 1e-4
    """Of the feed-forward in the last remedy."""
    layer_predictor_lr: float = 1e-3
    """Of the predictor in the last remedy."""


@dataclass(kw_only=True)
class Workshop:
    """What the remedies need to know."""

    model: PreTrainedModel
    companion: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    layer: SparseSwiGLU
    seq_len: int
    data: Sequence[DataSource]
    held_out_fraction: float
    settings: RepairSettings = field(default_factory=RepairSettings)
    batch_tokens: int = 4096
    seed: int = 0

    def attempts(self, fault: Fault) -> Generator[tuple[str, str], None, None]:
        """Make one attempt after the other, in place, and yield its remedy and a description.

        The caller undoes an attempt before it asks for the next one.
        """
        for remedy in _ORDER[fault]:
            match remedy:
                case "centre":
                    if self.layer.sparsity.center != "off":
                        self._refit_centre()
                        yield remedy, "centre of dropped channels fitted anew"
                case "new banks":
                    self._deal_banks()
                    yield remedy, "channels dealt anew into banks by their mean energy"
                case "more channels":
                    yield from self._widen()
                case "predictor":
                    for start in ("its own values", "the weights"):
                        self._train_predictor(from_weights=start == "the weights")
                        yield remedy, f"predictor trained from {start}"
                case "layer":
                    yield from self._distil()

    @cached_property
    def windows_WS(self) -> Tensor:
        """Training text."""
        return training_windows(
            self.tokenizer, seq_len=self.seq_len, num_windows=self.settings.windows, data=self.data,
            held_out_fraction=self.held_out_fraction, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def inputs_TD(self) -> Tensor:
        """What the layer reads in it; the layers below are never changed, so this stays true."""
        inputs_WSD = ffn_inputs(self.model, self.layer.layer, self.windows_WS, batch_tokens=self.batch_tokens)
        return stratified(inputs_WSD, self.settings.bucket_tokens, self.seed)

    def _widen(self) -> Iterator[tuple[str, str]]:
        before = self.layer.active_per_bank
        ladder = [wider(self.layer, factor) for factor in (1.5, 2, 4, 8, 16)] + [self.layer.bank_size]
        for active in sorted(set(ladder)):
            if active > before:
                set_active(self.model, self.layer, active)
                yield "more channels", f"{active} of {self.layer.bank_size} channels instead of {before}"

    def _distil(self) -> Iterator[tuple[str, str]]:
        """What neither training nor more channels can do alone, both may: the rest of the model may have grown used
        to what the layer says with few channels, so that all of them, untrained, harm what was well."""
        before = self.layer.active_per_bank
        for active in sorted({wider(self.layer, factor) for factor in (1, 2, 4)}):
            if active > before:
                set_active(self.model, self.layer, active)
            self._train_layer()
            width = "" if active == before else f", {active} of {self.layer.bank_size} channels instead of {before}"
            yield "layer", f"predictor and feed-forward distilled from the layer with all its channels{width}"

    @torch.no_grad()
    def _refit_centre(self) -> None:
        # The output bias Wd c is not stored: the layer adds the centre before its down projection.
        self.layer.center.copy_(dropped_mean(self.layer, self.inputs_TD))

    @torch.no_grad()
    def _deal_banks(self) -> None:
        layer = self.layer
        energy_TF = channel_values(layer, self.inputs_TD)[2]
        permute_layer(layer, bank_order(energy_TF, bank_size=layer.bank_size, layout="snake", seed=self.seed))

    def _train_predictor(self, *, from_weights: bool) -> None:
        layer, settings = self.layer, self.settings
        check = max(1, len(self.inputs_TD) // _CHECK_SHARE)
        fit_TD = self.inputs_TD[check:]
        if from_weights:
            statistics = LayerStatistics.collect(layer, fit_TD, with_energy_covariance=layer.predictor.form == "linear")
            init = "ridge" if layer.predictor.form == "linear" else "svd_act"
            initialise_predictor(layer, statistics, init=init, ridge=1e-2)
            standardise_logits(layer, fit_TD)
        with only_trainable(self.model, layer.predictor):
            refine_predictor(layer, fit_TD, epochs=settings.predictor_epochs, lr=settings.predictor_lr, seed=self.seed)
            with torch.no_grad():
                standardise_logits(layer, fit_TD)

    def _train_layer(self) -> None:
        model, layer, settings = self.model, self.layer, self.settings
        frozen = copy.deepcopy(layer).eval()
        frozen.active_per_bank = frozen.bank_size
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        predictor = list(layer.predictor.parameters())
        own = [parameter for name, parameter in layer.named_parameters() if not name.startswith("predictor.")]
        with only_trainable(model, layer):
            optimiser = torch.optim.Adam(
                [{"params": own, "lr": settings.layer_lr}, {"params": predictor, "lr": settings.layer_predictor_lr}],
                betas=(0.9, 0.95),
            )
            schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=settings.layer_steps)
            try:
                for step in range(settings.layer_steps):
                    window_1S = self.windows_WS[step % len(self.windows_WS)][None].to(model.device)
                    teacher_TD, head_VD = self._teacher(window_1S)
                    seen.clear()
                    hidden_TD = model.model(window_1S, use_cache=False).last_hidden_state[0]
                    ((x_1SD, y_1SD),) = seen
                    with torch.no_grad():
                        target_1SD = frozen(x_1SD)
                    error = (y_1SD - target_1SD).square().mean() / target_1SD.square().mean().clamp_min(1e-12)
                    kl = chunked_lm_loss(
                        hidden_TD, model.lm_head.weight, window_1S[0], ce_weight=0.0, kd_weight=1.0,
                        teacher_TD=teacher_TD, teacher_head_VD=head_VD,
                    ).total / len(hidden_TD)  # fmt: skip
                    loss = error + kl + self._routing_loss(x_1SD)
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_([*own, *predictor], 1.0)
                    optimiser.step()
                    schedule.step()
            finally:
                hook.remove()

    def _routing_loss(self, x_1SD: Tensor) -> Tensor:
        layer, x_SD = self.layer, x_1SD[0].detach()
        return routing_loss(
            layer.logits(x_SD), channel_values(layer, x_SD)[2], bank_size=layer.bank_size,
            active_per_bank=layer.active_per_bank,
        )  # fmt: skip

    @torch.no_grad()
    def _teacher(self, window_1S: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [S, D] and head [V, D] of the reference model."""
        if self.companion is not None:
            states: Any = self.companion.model(window_1S, use_cache=False)
            return states.last_hidden_state[0], self.companion.lm_head.weight
        with all_dense(self.model), keep(self.layer, self.layer.bank_size):
            states = self.model.model(window_1S, use_cache=False)
        return states.last_hidden_state[0], self.model.lm_head.weight


class only_trainable:
    """Context manager: of a model, only the parameters of one part want gradients; afterwards all is as it was."""

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self._before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._part = part

    def __enter__(self) -> None:
        for parameter, _ in self._before:
            parameter.requires_grad_(False)
        for parameter in self._part.parameters():
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter, wanted in self._before:
            parameter.requires_grad_(wanted)
            parameter.grad = None
