"""The predictor: a low-rank map from the FFN input to one routing logit per channel.

Two forms with the same matrices, `reduce.weight` [R, D] and `expand.weight` [F, R]:

- `linear`         z = V (U x) + b.
- `gated_product`  the first R/2 rows of U and columns of V rebuild the gate pre-activation, the others the up
                   projection; z = log E[silu(gate)^2 | x] + log E[up^2 | x] + b, where each rebuilt value carries the
                   variance that the low rank cannot explain. This is the minimiser of the routing loss when the two
                   residuals are independent; without the variances it is far worse (docs/research-log.md,
                   "Predictor form").

Logits are float32 whatever the dtype of the model. Shapes: T leading dimensions, D hidden, F channels, R rank.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bankwise.ffn.bank import to_routing_dtype, token_chunks


def expected_energy_reference(
    gate_TF: Tensor, up_TF: Tensor, gate_log_noise_F: Tensor, up_log_noise_F: Tensor
) -> Tensor:
    """log E[silu(g + n_g)^2] + log E[(u + n_u)^2] for independent noise of variance exp(log_noise), [T, F].

    silu is taken to first order with slope sigmoid(g), so that a confidently closed gate stays closed:
    E[silu(g + n)^2] ~ silu(g)^2 + s sigmoid(g)^2 = sigmoid(g)^2 (g^2 + s).
    """
    gate_energy_TF = (gate_TF.square() + gate_log_noise_F.exp()).log() + 2 * functional.logsigmoid(gate_TF)
    return gate_energy_TF + (up_TF.square() + up_log_noise_F.exp()).log()


class ExpectedEnergy(torch.autograd.Function):
    """`expected_energy_reference`, forward and backward a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, gate_log_noise_F: Tensor, up_log_noise_F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF, gate_log_noise_F, up_log_noise_F)
        logits_TF = torch.empty_like(gate_TF)
        for part in token_chunks(gate_TF.shape[0], gate_TF.device):
            logits_TF[part] = expected_energy_reference(gate_TF[part], up_TF[part], gate_log_noise_F, up_log_noise_F)
        return logits_TF

    @staticmethod
    def backward(ctx: Any, dz_TF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate_TF, up_TF, gate_log_noise_F, up_log_noise_F = ctx.saved_tensors
        gate_noise_F, up_noise_F = gate_log_noise_F.exp(), up_log_noise_F.exp()
        dgate_TF, dup_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
        dgate_noise_F, dup_noise_F = torch.zeros_like(gate_noise_F), torch.zeros_like(up_noise_F)
        for part in token_chunks(gate_TF.shape[0], gate_TF.device):
            per_gate_TF = dz_TF[part] / torch.addcmul(gate_noise_F, gate_TF[part], gate_TF[part])
            per_up_TF = dz_TF[part] / torch.addcmul(up_noise_F, up_TF[part], up_TF[part])
            dgate_noise_F += per_gate_TF.sum(dim=0)
            dup_noise_F += per_up_TF.sum(dim=0)
            dup_TF[part] = per_up_TF.mul_(up_TF[part]).mul_(2)
            open_TF = torch.sigmoid(-gate_TF[part]).mul_(dz_TF[part])
            dgate_TF[part] = per_gate_TF.mul_(gate_TF[part]).add_(open_TF).mul_(2)
        return dgate_TF, dup_TF, dgate_noise_F.mul_(gate_noise_F), dup_noise_F.mul_(up_noise_F)


class Predictor(nn.Module):
    """Router of one layer: x_TD -> z_TF (float32).

    `bank_layout` [F] records the channel order of the layer: channel j was channel bank_layout[j] of the dense model.
    """

    bank_layout: Tensor
    gate_offset: Tensor
    up_offset: Tensor
    gate_log_noise: Tensor
    up_log_noise: Tensor

    product_logits: ClassVar[Callable[..., Tensor | None] | None] = None
    """Set by `bankwise.kernels`: z of (code, expand, the two offsets, the two noises, bias), all float32, or None where
    the reference has to run."""

    def __init__(self, hidden_size: int, ffn_size: int, rank: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.reduce = nn.Linear(hidden_size, rank, bias=False)
        self.expand = nn.Linear(rank, ffn_size)
        self.register_buffer("bank_layout", torch.arange(ffn_size))
        if form == "gated_product":
            for name in self.start_values():
                self.register_parameter(name, nn.Parameter(torch.zeros(ffn_size)))

    def start_values(self) -> dict[str, float]:
        """Constant start of the parameters that are no part of `reduce` and `expand`, by name."""
        if self.form == "linear":
            return {}
        return {"gate_offset": 0.0, "up_offset": 0.0, "gate_log_noise": 0.0, "up_log_noise": 0.0}

    def code(self, x_TD: Tensor) -> Tensor:
        """x U^T [T, R], float32: all that a channel's logit knows of the token."""
        return functional.linear(to_routing_dtype(x_TD), to_routing_dtype(self.reduce.weight))

    def forward(self, x_TD: Tensor) -> Tensor:
        # Autocast would round the logits to bfloat16, where 3.6 % of banks tie at the cut (method.md section 2.3).
        with torch.autocast(x_TD.device.type, enabled=False):
            expand_FR, bias_F = to_routing_dtype(self.expand.weight), to_routing_dtype(self.expand.bias)
            if self.form == "linear":
                return functional.linear(self.code(x_TD), expand_FR, bias_F)
            code_TR = self.code(x_TD.flatten(0, -2))
            half = code_TR.shape[-1] // 2
            names = ("gate_offset", "up_offset", "gate_log_noise", "up_log_noise")
            vectors = [to_routing_dtype(getattr(self, name)) for name in names]
            logits_TF = None
            if Predictor.product_logits is not None:
                logits_TF = Predictor.product_logits(code_TR, expand_FR, *vectors, bias_F)
            if logits_TF is None:
                energy_TF = ExpectedEnergy.apply(
                    functional.linear(code_TR[:, :half], expand_FR[:, :half], vectors[0]),
                    functional.linear(code_TR[:, half:], expand_FR[:, half:], vectors[1]),
                    *vectors[2:],
                )
                logits_TF = energy_TF.add_(bias_F)
            return logits_TF.view(*x_TD.shape[:-1], bias_F.shape[0])
