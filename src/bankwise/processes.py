"""The processes of one launch (`accelerate launch`, `torchrun`): who writes, who waits, what all must know.

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

T = TypeVar("T")

_LONGEST_WORK = timedelta(hours=6)  # of the main process alone, while the others wait for it


def join_processes() -> int:
    """Number of processes of this launch. The first call joins them: NCCL where there is a GPU, gloo elsewhere."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WORK).num_processes


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
