"""Which parameters a stage trains, and the optimiser's groups."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from bankwise.config import SparsityConfig, Stage
from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers


def has_trainable_predictors(model: nn.Module) -> bool:
    """Whether a stage that trains predictors alone would train anything of `model`."""
    return any(layer.sparsity.trains_predictor for layer in sparse_layers(model))


def check_layers(stages: Sequence[Stage], num_layers: int) -> None:
    """Raise `ConfigError` where a stage trains a layer that a model of so many does not have."""
    for number, stage in enumerate(stages):
        if stage.trained_layer is not None and stage.trained_layer >= num_layers:
            raise ConfigError(
                f"stages.{number}: trains={stage.trains!r}, but the model has layers 0 to {num_layers - 1}"
            )


def check_predictors_learn(name: str, sparsity: SparsityConfig, stages: Sequence[Stage]) -> None:
    """Raise `ConfigError` where a stage trains the predictors of the model `name` alone and no loss reaches them.

    The auxiliary loss counts where its weight is above 0 in every step: a step without a gradient cannot be taken.
    """
    if not sparsity.trains_predictor:
        return  # the model skips such stages
    for number, stage in enumerate(stages):
        from_auxiliary = sparsity.predictor_grad != "lm" and stage.aux_weight > 0 and stage.aux_weight_end != 0
        from_model = (
            passes_model_gradient(sparsity)
            and stage.k_schedule != "dense"
            and bool(stage.ce_weight or stage.has_teacher)
        )
        if stage.trains == "predictor" and not (from_auxiliary or from_model):
            raise ConfigError(
                f"stages.{number} trains only the predictors of the {name} model, but in some of its steps no loss "
                f"reaches them: predictor_grad={sparsity.predictor_grad!r}, gate_mode={sparsity.gate_mode!r}, "
                f"k_schedule={stage.k_schedule!r}, aux_weight={stage.aux_weight:g}, aux_weight_end="
                f"{stage.aux_weight_end}; set aux_weight, usually 1, and predictor_grad: both"
            )


def passes_model_gradient(sparsity: SparsityConfig) -> bool:
    """Whether the language-model loss reaches the predictor."""
    return sparsity.gate_mode not in ("detached", "hard") and sparsity.predictor_grad in ("lm", "both")


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
