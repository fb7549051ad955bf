"""One process of a training with telemetry, and of a reading of a sharded model. Run by torchrun, or called alone."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from training.tiny_run import TokenWindows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bankwise.config import CalibrationConfig, SparsityConfig, Stage
from bankwise.training import UpcyclingTrainer, telemetry
from bankwise.training.probe import RoutingProbe
from bankwise.training.telemetry import TelemetryPlan
from bankwise.upcycle import convert

WINDOWS = (torch.arange(24)[:, None] * 5 + torch.arange(16)) % 40


def model() -> PreTrainedModel:
    """A tiny sparse model; the same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    settings = CalibrationConfig(tokens=0)
    return convert(LlamaForCausalLM(config), SparsityConfig(predictor_rank=16), None, settings, progress=False).model


def train(folder: Path) -> None:
    """Four steps of four windows, all processes together, with a reading after every second one."""
    stage = Stage(
        tokens=4 * 64, seq_len=16, batch_tokens=64, micro_batch=2, warmup=0, lr=1e-3, bf16=False, aux_token_fraction=1
    )
    plan = TelemetryPlan(windows_WS=WINDOWS[20:], every=2, file=folder / "telemetry.jsonl")
    UpcyclingTrainer(model(), stage, TokenWindows(WINDOWS[:16]), folder / "work", telemetry=plan, quiet=True).train()


def read_sharded(folder: Path) -> None:
    """A reading of a model whose decoder layers and rest are sharded over the processes."""
    sharded = model()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    figures = RoutingProbe(WINDOWS[20:]).read(sharded, sharded, batch_size=2, loss_chunk=8)
    if PartialState().is_main_process:
        (folder / "sharded.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    telemetry.MOST_COST = 0.9999
    PartialState(cpu=True)
    train(Path(sys.argv[1]))
    read_sharded(Path(sys.argv[1]))
