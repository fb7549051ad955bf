"""A tiny model trained at 32,768 tokens on a CPU: one document of a whole row, then many in one, in bounded memory."""

import json
import math
from pathlib import Path

import torch

from bankwise.config import Stage
from bankwise.ffn import sparse_layers
from bankwise.training import train_stages

LENGTH = 32768


def peak_memory() -> int:
    """Bytes of the largest resident size since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def row(lengths, seed):
    ids = torch.randint(258, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "document_lengths": torch.tensor(lengths)}


def test_training_at_32k_tokens_is_bounded_in_memory(sparse, tmp_path):
    model = sparse(
        num_hidden_layers=1, hidden_size=32, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=LENGTH, sparsity={"predictor_rank": 8},
    )  # fmt: skip
    mixed = [9000, 4096, 1, 12000, 300, 5, 2500, 4000]
    rows = [row([LENGTH], 0), row(mixed, 1)]  # the second one ends in padding
    stage = Stage(
        tokens=2 * LENGTH, seq_len=LENGTH, batch_tokens=LENGTH, micro_batch=1, warmup=0.0, log_steps=1, bf16=False,
        gradient_checkpointing=True,
    )  # fmt: skip
    forget_peak()
    before = peak_memory()
    tokens = train_stages(
        model, [stage], lambda number: rows, tmp_path / "work", metrics_file=tmp_path / "metrics.jsonl", quiet=True
    )
    grown = peak_memory() - before
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert tokens == 2 * LENGTH
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(layer.predictor.expand.weight.grad is None for layer in sparse_layers(model))
    # One bool mask [T, T] would be 1024 MB; the activations of one layer are some hundred.
    assert grown < 500 * 2**20
