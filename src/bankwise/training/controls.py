"""The controls of a run: models trained on the same rows as the sparse one, each without one thing that it claims.

`method.md` section 7. A sparse control is the untrained conversion with other settings, an ordinary checkpoint that
opens anywhere. A control whose predictors cannot learn skips the stages that train predictors alone, as the dense
companion does; in all other stages every control reads the same tokens in the same order.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.config import Control, Recipe, SparsityConfig, Stage
from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers
from bankwise.ffn.predictor import Predictor
from bankwise.models.checkpoint import load_checkpoint
from bankwise.processes import on_own_device
from bankwise.training.optimizer import check_predictors_learn, passes_model_gradient
from bankwise.upcycle.narrow import narrow_dense

COMPANION = "companion"
"""Name of the training whose model is the dense companion."""

DENSE_NARROW = "dense_narrow"
"""The one control that is a dense model."""


def check_controls(recipe: Recipe) -> None:
    """Raise `ConfigError` where a model of the recipe, the sparse one included, would have nothing to learn."""
    if recipe.controls and not recipe.stages:
        raise ConfigError(f"controls={recipe.controls} are trained, but the recipe has no stages; add one")
    if not recipe.stages:
        return
    check_predictors_learn("sparse", recipe.sparsity, recipe.stages)
    idle = [] if recipe.sparsity.trains_predictor else ["sparse"]
    idle += ["companion"] if recipe.companion else []
    for name in recipe.controls:
        if name == DENSE_NARROW or not control_sparsity(name, recipe).trains_predictor:
            idle.append(name)
        else:
            _check_router_learns(name, recipe)
    if idle and all(stage.trains == "predictor" for stage in recipe.stages):
        raise ConfigError(
            f"trains='predictor' in every stage leaves nothing to train to models without trainable predictors: "
            f"{', '.join(idle)}; set companion: false and take such controls out"
        )


def _check_router_learns(name: Control, recipe: Recipe) -> None:
    sparsity, stages = control_sparsity(name, recipe), control_stages(name, recipe.stages)
    check_predictors_learn(name, sparsity, stages)
    from_auxiliary = [
        sparsity.predictor_grad != "lm" and bool(stage.aux_weight or stage.aux_weight_end) for stage in stages
    ]
    if not (passes_model_gradient(sparsity) or any(from_auxiliary)):
        raise ConfigError(
            f"control {name!r}: no loss would train its predictors, because only the auxiliary one reaches them; set "
            "aux_weight, usually 0.1"
        )


def control_sparsity(name: Control, recipe: Recipe) -> SparsityConfig:
    """Settings of a sparse control."""
    changes: dict[str, Any] = {}
    if name == "post_hoc":
        if not recipe.sparsity.trains_predictor:
            raise ConfigError("control 'post_hoc' trains the predictors, but sparsity has none that may learn")
    elif name == "detached":
        changes = {"selection": "predictor", "gate_mode": "detached", "predictor_grad": "aux"}
    elif name == "random_predictor":
        changes = {"selection": "predictor", "gate_mode": "hard", "predictor_grad": "frozen"}
    else:
        changes = {
            "selection": name, "selection_seed": recipe.seed, "gate_mode": "hard", "predictor_grad": "frozen"
        }  # fmt: skip
    return dataclasses.replace(recipe.sparsity, **changes)


def control_stages(name: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages as a model of this name goes through them: of `post_hoc` only the predictors learn."""
    if name != "post_hoc":
        return list(stages)
    return [dataclasses.replace(stage, trains="predictor") for stage in stages]


def control_model(
    name: Control, recipe: Recipe, dense: PreTrainedModel, untrained: Path, calibration: Tensor | None, fraction: float
) -> PreTrainedModel:
    """The untrained model of a control, from the dense model or from the checkpoint of the untrained conversion.

    `fraction` is the share of channels that the sparse model keeps, and with it the width of `dense_narrow`, whose
    channels are chosen on the `calibration` windows.
    """
    if name == DENSE_NARROW:
        with on_own_device(dense):
            narrow: Any = narrow_dense(dense, fraction, calibration=calibration)
        model: PreTrainedModel = narrow.cpu()
        return model
    model = load_checkpoint(untrained, dtype=torch.float32)[0]
    set_sparsity(model, control_sparsity(name, recipe))
    if name == "random_predictor":
        generator = torch.Generator().manual_seed(recipe.seed)
        for layer in sparse_layers(model):
            randomise_predictor(layer.predictor, generator)
    return model


def set_sparsity(model: PreTrainedModel, sparsity: SparsityConfig) -> None:
    """Give a sparse model other settings, in place. Vectors of a gate mode that it no longer has are removed."""
    for layer in sparse_layers(model):
        before = layer.start_values().keys()
        layer.sparsity = sparsity
        for name in before - layer.start_values().keys():
            delattr(layer, name)
    model.config.sparsity = sparsity.to_dict()


@torch.no_grad()
def randomise_predictor(predictor: Predictor, generator: torch.Generator) -> None:
    """Draw the predictor's matrices anew and level its vectors, so that nothing it has learnt about channels is left.

    Each of the R directions keeps its spread, and each vector its mean: the logits keep their scale.
    """
    for linear, dim in ((predictor.reduce, 1), (predictor.expand, 0)):
        weight = linear.weight
        spread = weight.std(dim=dim, keepdim=True)
        # A direction of zeros, as calibration.init='zero' leaves it, gets the spread of a usual start.
        spread = torch.where(spread > 0, spread, weight.shape[1] ** -0.5)
        weight.copy_(torch.randn(weight.shape, generator=generator).to(weight) * spread)
    vectors: list[nn.Parameter] = [value for value in predictor.parameters() if value.ndim == 1]
    for vector in vectors:
        vector.fill_(vector.mean())
