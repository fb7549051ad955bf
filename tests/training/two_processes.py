"""Trainings that a test runs once alone and once on two gloo processes; every process calls `run_case`.

    python two_processes.py FOLDER MODELS

FOLDER/ddp/NAME and FOLDER/fsdp/NAME get metrics.jsonl, the trained weights and the trainer's checkpoints of each case;
the trainings in FOLDER/resumed/NAME go on from the checkpoints that lie there, that in FOLDER/fsdp-resumed from one of
FOLDER/fsdp; FOLDER/fsdp-bf16 is `distilled` in bfloat16.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from training.tiny_run import TokenWindows
from transformers import AutoModelForCausalLM

from bankwise.config import Stage
from bankwise.models.modeling import use_chunked_loss
from bankwise.processes import is_main, join_processes, wait_for_all
from bankwise.training import train_stages

ROW, ROWS = 16, 64
STAGE: dict[str, Any] = {
    "tokens": 4 * 4 * ROW, "seq_len": ROW, "batch_tokens": 4 * ROW, "micro_batch": 1, "lr": 1e-3, "log_steps": 1,
    "aux_token_fraction": 0.5,
}  # fmt: skip
CASES: dict[str, list[dict[str, Any]]] = {
    "distilled": [{"kd_weight": 1.0, "state_weight": 0.5, "save_steps": 2}],
    # The routing loss is all that reaches these predictors: first alone, then until its weight has fallen to 0.
    "detached": [
        {"tokens": 2 * 4 * ROW, "trains": "predictor"},
        {"aux_weight_end": 0.0, "gradient_checkpointing": True},
    ],
    "tied": [{"tokens": 2 * 4 * ROW, "trains": "predictor", "k_schedule": "dense"}, {"trains": "ffn"}],
    "companion": [{}],
}
"""Stages of each case; MODELS/NAME is the model that it starts from, MODELS/companion also the teacher."""


def windows() -> torch.Tensor:
    return torch.randint(258, (ROWS, ROW), generator=torch.Generator().manual_seed(5))


class Rows(TokenWindows):
    """Two documents a row; every third row ends in padding, so that processes hold different numbers of targets."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        lengths = [5, 4] if index % 3 == 0 else [5, ROW - 5]
        return {"input_ids": self.windows[index], "document_lengths": torch.tensor(lengths)}


def run_case(name: str, folder: Path, models: Path, *, resume: bool = False, bf16: bool = False) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / name)
    if name == "companion":
        use_chunked_loss(model)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    stages = [Stage(**STAGE | {"bf16": bf16} | changes) for changes in CASES[name]]
    needs_teacher = any(stage.kd_weight for stage in stages)
    train_stages(
        model,
        stages,
        lambda number: Rows(windows()[: stages[number].rows]),
        folder / "work",
        name="companion" if name == "companion" else "sparse",
        teacher=AutoModelForCausalLM.from_pretrained(models / "companion") if needs_teacher else None,
        resume=resume,
        metrics_file=folder / "metrics.jsonl",
        quiet=True,
    )
    if is_main():
        save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    every = [value.double().sum().item() for value in model.parameters()]
    (folder / f"sums-{PartialState().process_index}.json").write_text(json.dumps(every), encoding="utf-8")


def use_fsdp() -> None:
    """Train through Accelerate's FSDP2 from here on.

    Accelerate refuses it on CPUs: `AcceleratorState` turns only MULTI_GPU and the like into FSDP. So the state is told
    that the processes have accelerators; everything behind that, the sharding included, is what runs on GPUs.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    set_device: Any = PartialState.set_device

    def set_device_and_kind(self: Any) -> None:
        set_device(self)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.set_device = set_device_and_kind


def main(folder: Path, models: Path) -> None:
    torch.set_num_threads(1)
    join_processes()
    for name in CASES:
        run_case(name, folder / "ddp" / name, models)
    for path in sorted((folder / "resumed").iterdir()):
        run_case(path.name, path, models, resume=True)
    use_fsdp()
    for name in CASES:
        run_case(name, folder / "fsdp" / name, models)
    run_case("distilled", folder / "fsdp-bf16", models, bf16=True)
    resumed = folder / "fsdp-resumed"
    if is_main():
        copy_first_half(folder / "fsdp" / "distilled", resumed)
    wait_for_all()
    run_case("distilled", resumed, models, resume=True)


def copy_first_half(training: Path, folder: Path) -> None:
    """The state of `training` after step 2 of 4."""
    shutil.copytree(training / "work" / "stage-0" / "checkpoint-2", folder / "work" / "stage-0" / "checkpoint-2")
    kept = training.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    folder.joinpath("metrics.jsonl").write_text("".join(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
