"""Which parameters a stage trains, and the optimiser's groups."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from bankwise.config import Stage
from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers


def has_trainable_predictors(model: nn.Module) -> bool:
    """Whether a stage that trains predictors alone would train anything of `model`."""
    return any(layer.sparsity.trains_predictor for layer in sparse_layers(model))


def select_trained(model: nn.Module, stage: Stage) -> None:
    """Freeze everything that the stage does not train, and in any stage the predictors that never train."""
    trains_predictors = has_trainable_predictors(model)
    if stage.trains == "predictor" and not trains_predictors:
        raise ConfigError(
            "trains='predictor' was asked of a model without trainable predictors (a dense one, a selection without "
            "predictor, or predictor_grad='frozen'); use trains='all'"
        )
    layer = stage.trained_layer
    if layer is not None and not any(f".layers.{layer}.mlp." in name for name, _ in model.named_parameters()):
        raise ConfigError(f"trains={stage.trains!r}: the model has no layer {layer}")
    for name, parameter in model.named_parameters():
        is_ffn, is_predictor = ".mlp." in name, ".mlp.predictor." in name
        if layer is not None:
            is_trained = f".layers.{layer}.mlp." in name
        else:
            is_trained = stage.trains == "all" or (stage.trains == "ffn" and is_ffn) or is_predictor
        parameter.requires_grad_(is_trained and (trains_predictors or not is_predictor))


def parameter_groups(model: nn.Module, stage: Stage) -> Iterator[dict[str, Any]]:
    """AdamW groups: matrices of the model, its vectors, and the predictors."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    predictor = [parameter for name, parameter in trained if ".mlp.predictor." in name]
    matrices = [p for name, p in trained if ".mlp.predictor." not in name and p.ndim >= 2]
    vectors = [p for name, p in trained if ".mlp.predictor." not in name and p.ndim < 2]
    for parameters, lr, decay in (
        (matrices, stage.lr, stage.weight_decay),
        (vectors, stage.lr, 0.0),
        (predictor, stage.predictor_lr, 0.0),
    ):
        if parameters:
            yield {"params": parameters, "lr": lr, "weight_decay": decay}
