"""Files and settings of a run that takes a second: a tiny dense model on disk, texts, and a recipe for them."""

import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = "we the people of this union hold that peace and trade make citizens free while war does not".split()  # noqa: SIM905


class TokenWindows(Dataset):
    """Windows [n, length] of token ids in a fixed order; labels are the tokens themselves."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def write_model(folder: Path, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(folder: Path, num_documents: int = 12, num_words: int = 300) -> Path:
    """Documents of seeded words, each opening with its own name, so that no two share a window."""
    folder.mkdir(parents=True)
    for index in range(num_documents):
        draw = random.Random(index)
        words = [draw.choice(WORDS) + (f" {index}.{place}" if place % 3 == 0 else "") for place in range(num_words)]
        (folder / f"{index:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def tiny_recipe(model: Path, texts: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """Recipe as a dict; `changes` replace whole fields, `stage` updates the only stage."""
    stage = {
        "tokens": 256,
        "seq_len": 32,
        "batch_tokens": 64,
        "micro_batch": 1,
        "lr": 1e-3,
        "log_steps": 2,
        "bf16": False,
    }
    stage |= changes.pop("stage", {})
    return {
        "model": str(model),
        "output": str(output),
        "sparsity": {"predictor_rank": 32},
        "calibration": {"tokens": 512, "seq_len": 32},
        "data": [{"path": str(texts)}],
        "held_out_fraction": 0.2,
        "stages": [stage],
        "eval": {"windows": 4, "seq_len": 32, "prompt": "we the", "new_tokens": 4},
    } | changes


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def without_time(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Lines of metrics.jsonl by model and tokens; a step that was repeated after a resume counts as the later one."""
    return {(row["model"], row["tokens"]): {name: row[name] for name in row if name != "seconds"} for row in rows}
