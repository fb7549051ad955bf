"""How the sparse feed-forward is shared out under transformers' tensor parallelism.

Banks are contiguous, so each rank holds whole banks and selects within them: the routing needs no communication. The
per-channel matrices and vectors are sharded along the channels, `reduce` is replicated. One sum over ranks [T, R] in
the backward pass, at the predictor's code, makes the gradients of `reduce` and of the layer's input whole.

`SPARSE_TP_PLAN` is merged into the plan of the dense family. Shapes: T tokens, D hidden, F channels, R rank.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from bankwise.errors import ConfigError
from bankwise.ffn.layer import SparseSwiGLU

SPARSE_TP_PLAN = {
    "layers.*.mlp": "bankwise_ffn",
    "layers.*.mlp.predictor": "bankwise_predictor",
    "layers.*.mlp.predictor.expand": "bankwise_channels",
}

BANK_LOCAL_GATE_MODES = ("ste_unit", "sigmoid", "affine", "stat_topk", "detached", "default_ema", "hard")
"""Gate modes in which no channel depends on a channel of another bank."""


class ChannelParallel(TensorParallelLayer):
    """Parameters with channels as rows, sharded by rows; the module's own forward is never called."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is not None:
            share = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(share, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return module


class FFNParallel(ChannelParallel):
    """`SparseSwiGLU` on this rank's banks; its projections carry the dense family's own styles."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SparseSwiGLU):
            return module  # a layer of `dense_layers`
        _check_banks(module, mesh.size())
        return TensorParallelLayer.install_forward(self, module, mesh)

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        if module.routing_record is not None:
            raise ConfigError(
                "routing losses and statistics cover all banks of a layer, and under tensor parallelism a process has "
                "some of them; use DDP or FSDP2"
            )
        if module.training and (module.sparsity.center == "ema" or module.sparsity.gate_mode == "default_ema"):
            raise ConfigError(
                "running means (center='ema', gate_mode='default_ema') are not kept under tensor parallelism; "
                "train with DDP, or use center='learnable'"
            )
        return args, kwargs

    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> AbstractContextManager[None]:
        return _own_channels([module], mesh)


class PredictorParallel(ChannelParallel):
    """`Predictor`: x_TD, the same on all ranks, to the logits of this rank's channels."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.code = _summing_gradients(module.code, mesh)
        return TensorParallelLayer.install_forward(self, module, mesh)

    def context_around_forward(self, module: Any, mesh: DeviceMesh) -> AbstractContextManager[None]:
        return _own_channels([module, module.expand], mesh)


_STYLES: dict[str, Any] = {
    "bankwise_ffn": FFNParallel(),
    "bankwise_predictor": PredictorParallel(),
    "bankwise_channels": ChannelParallel(),
}
for _name, _style in _STYLES.items():
    ALL_PARALLEL_STYLES.register(_name, _style)


def _check_banks(layer: SparseSwiGLU, ranks: int) -> None:
    channels = layer.gate_proj.out_features
    if channels % (ranks * layer.bank_size):
        raise ConfigError(
            f"tensor parallelism over {ranks} processes would cut a bank: {channels} channels are "
            f"{channels // layer.bank_size} banks of {layer.bank_size}; the processes must divide the number of banks"
        )
    if layer.sparsity.selection != "predictor":
        raise ConfigError(
            f"selection={layer.sparsity.selection!r} is a control, which tensor parallelism does not run; "
            "it supports selection='predictor'"
        )
    if layer.sparsity.gate_mode not in BANK_LOCAL_GATE_MODES:
        raise ConfigError(
            f"gate_mode={layer.sparsity.gate_mode!r} couples the banks of a layer, which tensor parallelism keeps "
            f"apart; it supports {', '.join(BANK_LOCAL_GATE_MODES)}"
        )


def _summing_gradients(code: Callable[[Tensor], Tensor], mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """`code` with the same values and, in the backward pass, the sum of the ranks' gradients."""

    def summed(x_TD: Tensor) -> Tensor:
        shared_TR = DTensor.from_local(code(x_TD), mesh, [Replicate()], run_check=False)
        return shared_TR.to_local(grad_placements=[Partial()])

    return summed


@contextmanager
def _own_channels(modules: list[nn.Module], mesh: DeviceMesh) -> Iterator[None]:
    """Inside, the modules' parameters and buffers are plain tensors of this rank's channels."""
    whole = [
        (store, name, value)
        for module in modules
        for store in (module._parameters, module._buffers)
        for name, value in store.items()
        if value is not None
    ]
    store: Any
    for store, name, value in whole:
        # Buffers are small and stay whole on every rank.
        store[name] = (
            value.to_local() if isinstance(value, DTensor) else value.chunk(mesh.size())[mesh.get_local_rank()]
        )
    try:
        yield
    finally:
        for store, name, value in whole:
            store[name] = value
