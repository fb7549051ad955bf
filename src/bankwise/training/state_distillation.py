"""Distillation of the residual stream: how far each layer's output is from the teacher's.

The KL over the vocabulary tells a layer in the middle little about what it should have done. The teacher's hidden
states say it directly, at every layer and token (docs/research-log.md, 2026-11-28).

Shapes: T leading dimensions, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def state_distance(states: Sequence[Tensor], teacher_states: Sequence[Tensor], kept_T: Tensor) -> Tensor:
    """Mean over layers of |s - t|^2 / |t|^2, summed over the kept tokens; float32 scalar.

    `states` and `teacher_states` are one tensor [T, D] for each layer, `kept_T` bool. The norm is that of the token's
    own state: residual streams grow with depth, and some tokens' are a hundred times longer than others'.
    """
    total = torch.zeros((), device=kept_T.device)
    for state_TD, teacher_TD in zip(states, teacher_states, strict=True):
        target_TD = teacher_TD.float()
        error_T = (state_TD.float() - target_TD).square().sum(-1) / target_TD.square().sum(-1).clamp_min(1e-12)
        # Picking out the kept tokens would copy both states, and make a GPU wait for their number in every layer.
        total = total + torch.where(kept_T, error_T, 0.0).sum()
    return total / len(states)
