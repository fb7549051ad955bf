"""What training accepts of launches that take a model apart (FSDP2, DeepSpeed)."""

import dataclasses
import os
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn

from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers


def keep_sums_in_float32(plugin: Any) -> None:
    """Let FSDP2 sum gradients in float32 and leave the loss as it is; under bf16 Accelerate rounds both to bfloat16."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def check_launch() -> None:
    """Refuse an FSDP launch, as the environment describes it, before anything is loaded."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        check_fsdp(FullyShardedDataParallelPlugin())


def check_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a launch under which training would not do what the recipe says."""
    fsdp, deepspeed = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    if fsdp is None and deepspeed is None:
        return
    for layer in sparse_layers(model):
        if layer.sparsity.center == "ema" or layer.sparsity.gate_mode == "default_ema":
            raise ConfigError(
                "running means (center='ema', gate_mode='default_ema') would differ between the processes of FSDP and "
                "DeepSpeed; launch with plain DDP, or use center='learnable'"
            )
    if fsdp is not None:
        check_fsdp(fsdp)
    if deepspeed is not None:
        check_deepspeed(deepspeed.deepspeed_config)


def check_fsdp(plugin: Any) -> None:
    """Refuse FSDP1, checkpoints in pieces, and models that are loaded by one process only."""
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"FSDP version {plugin.fsdp_version} flattens parameters, so that predictors lose their own learning rate; "
            "set fsdp_version: 2 (recipes/launch/fsdp2.yaml)"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ConfigError(
            f"fsdp_state_dict_type: {getattr(plugin.state_dict_type, 'name', plugin.state_dict_type)} writes "
            "checkpoints in pieces, which a later stage cannot start from; set FULL_STATE_DICT"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading: true leaves the models of all processes but one empty, the teacher among "
            "them; set it to false"
        )


def check_deepspeed(config: dict[str, Any]) -> None:
    """Refuse a DeepSpeed config that brings its own optimiser or schedule, or keeps the weights in pieces."""
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigError(
                f"the DeepSpeed config has its own {name}, which would replace the recipe's (predictor_lr, "
                f"lr_schedule); remove {name} from it"
            )
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "ZeRO-3 would write checkpoints in pieces, which a later stage cannot start from; set "
            "stage3_gather_16bit_weights_on_model_save: true"
        )
