"""The dense model cut to its strongest FFN channels: the control `dense_narrow` of `method.md` section 7.

The result is an ordinary dense model of the same family, to be trained on the same tokens as the sparse one. It is this
project's reading of the "Dense-4x" that arXiv 2606.10722 compares with and does not define in public.

Shapes: T tokens, D hidden, F FFN channels of the dense model, K kept ones.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.errors import ConfigError
from bankwise.precision import bf16_autocast
from bankwise.upcycle.convert import calibration_windows, check_convertible
from bankwise.upcycle.statistics import LayerStatistics, channel_values
from bankwise.upcycle.stream import HiddenStream

_CHUNK = 4096


def kept_channels(total: int, fraction: float, of: str) -> int:
    """`fraction` of `total`, an integer from 1 to `total`; `of` says of what, for the error."""
    kept = round(total * fraction)
    if not 1 <= kept <= total or abs(kept - total * fraction) > 1e-6 * total:
        nearest = min(max(kept, 1), total)
        raise ConfigError(
            f"fraction={fraction} of {total} {of} is {total * fraction:.6g}, no whole number from 1 to {total}; "
            f"use fraction={nearest / total:.6g}"
        )
    return kept


@torch.no_grad()
def narrow_dense(
    dense: PreTrainedModel, fraction: float = 0.25, *, calibration: Tensor | None = None
) -> PreTrainedModel:
    """A new model of the same class whose FFN keeps the channels with the largest mean contribution energy.

    `calibration`: token windows [n, S] that the mean is taken over; None: a guess from the weights alone. Kept channels
    stay in their order. `dense` is left unchanged.
    """
    check_convertible(dense, SparsityConfig(bank_size=1, active_per_bank=1))
    kept = kept_channels(dense.config.intermediate_size, fraction, "FFN channels")
    if calibration is not None:
        calibration = calibration_windows(calibration, None, CalibrationConfig())
    weights = {name: value.detach() for name, value in dense.state_dict().items()}
    for index, energy_F in enumerate(_mean_energies(dense, calibration)):
        chosen_K = energy_F.argsort(descending=True, stable=True)[:kept].sort().values
        for name in [name for name in weights if name.startswith(f"model.layers.{index}.mlp.")]:
            if name.endswith("down_proj.weight"):
                weights[name] = weights[name][:, chosen_K]
            elif not name.endswith("down_proj.bias"):
                weights[name] = weights[name][chosen_K]
    config = copy.deepcopy(dense.config)
    config.intermediate_size = kept
    model: Any = type(dense).from_pretrained(
        None,
        config=config,
        state_dict={name: value.clone() for name, value in weights.items()},
        dtype=dense.dtype,
        attn_implementation=dense.config._attn_implementation,
    )
    model.generation_config = copy.deepcopy(dense.generation_config)
    narrow: PreTrainedModel = model.to(dense.device)
    return narrow


def _mean_energies(dense: PreTrainedModel, windows: Tensor | None) -> list[Tensor]:
    """E[e] [F] (float64) of each layer."""
    blocks = dense.model.layers
    if windows is None:
        return [
            LayerStatistics.from_norm(block.mlp, block.post_attention_layernorm.weight).energy_F for block in blocks
        ]
    stream = HiddenStream(dense, windows, "dense")
    energies = []
    for block in blocks:
        stream.ffn_inputs(block)
        x_TD = torch.cat(stream.ffn_input).flatten(0, 1)
        with bf16_autocast(x_TD.device):
            parts = [channel_values(block.mlp, part_TD)[2].double().sum(dim=0) for part_TD in x_TD.split(_CHUNK)]
        energies.append(torch.stack(parts).sum(dim=0) / x_TD.shape[0])
        stream.advance(block, block.mlp)
    return energies
