"""The processes of one launch (`accelerate launch`, `torchrun`): who writes, who waits, what all must know, and the
device that each works on.

Work that needs one process (conversion, measuring, files) is done by the main one, rank 0; training by all. A failure
of one process ends it, and the launcher then ends the others, so nothing here waits for a process that has failed.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from bankwise.config import Device
from bankwise.errors import ConfigError

T = TypeVar("T")

_LONGEST_WORK = timedelta(hours=6)  # of the main process alone, while the others wait for it


def use_device(choice: Device) -> None:
    """Decide on what the processes of this launch work from here on: conversion, training and measuring.

    `auto`: a CUDA device where there is one, the CPU elsewhere. Without this call it is `auto`.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA device; use device=auto or device=cpu")
    wants_cpu = choice == "cpu" or not torch.cuda.is_available()
    if PartialState._shared_state and (PartialState().device.type == "cpu") != wants_cpu:
        PartialState._reset_state()  # an earlier run in this Python session worked on another device
    _join(cpu=wants_cpu)


def own_device() -> torch.device:
    """The device that this process works on: with several processes on one machine, the GPU of its local rank."""
    return _join(cpu=not torch.cuda.is_available()).device


@contextmanager
def on_own_device(model: nn.Module) -> Iterator[None]:
    """`model` on this process's device for the work inside, and then back where it was.

    Models are loaded into the machine's memory and stay there, so that a GPU holds those at work only: beside the one
    that is trained, none but its teacher.
    """
    home = next(model.parameters()).device
    model.to(own_device())
    try:
        yield
    finally:
        model.to(home)


def join_processes() -> int:
    """Number of processes of this launch. The first call joins them: NCCL where they work on GPUs, gloo elsewhere."""
    return _join(cpu=not torch.cuda.is_available()).num_processes


def _join(*, cpu: bool) -> PartialState:
    return PartialState(cpu=cpu, timeout=_LONGEST_WORK)  # its settings are those of the first call


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return not _are_several() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    if _are_several():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def from_main(compute: Callable[[], T]) -> T:
    """What `compute` returns on the main process, given to all; it must be picklable. The others wait."""
    box: list[Any] = [compute() if is_main() else None]
    if _are_several():
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is inside before the others, which then find its files."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def shards_models(trainer_settings: Mapping[str, Any]) -> bool:
    """Whether training under this launch takes a model apart: FSDP or DeepSpeed, by environment or by setting."""
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(flag, "").lower() in ("1", "true") for flag in flags) or any(
        trainer_settings.get(name) for name in ("fsdp", "deepspeed")
    )


@torch.no_grad()
def copy_whole(sharded: nn.Module, target: nn.Module) -> None:
    """Copy the values of `sharded` into `target`, an ordinary model of the same structure, on every process.

    One tensor at a time is put together, so it costs no more memory than the largest one.
    """
    for source, own in zip(sharded.parameters(), target.parameters(), strict=True):
        with _gathered(source) as whole:
            own.copy_(whole)
    for buffer, own_buffer in zip(sharded.buffers(), target.buffers(), strict=True):
        own_buffer.copy_(buffer)


@contextmanager
def _gathered(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "full_tensor"):  # DTensor of FSDP2
        yield value.full_tensor()
    elif hasattr(value, "ds_id"):  # parameter of ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value
    else:
        yield value


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
