"""Checkpoints on disk: ordinary Hugging Face directories, written whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bankwise.errors import ModelLoadError
from bankwise.files import put_folder
from bankwise.manifest import write_manifest


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Path:
    """Write model, tokenizer and a manifest of checksums to `folder`, replacing what is there only once everything is
    on disk."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    write_manifest(partial)
    put_folder(partial, folder)
    return folder


def is_sparse_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint of one of bankwise's model types."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelLoadError(f"{config} is not a model config: {error}") from error
    return str(model_type).startswith("bankwise_")


def load_checkpoint(
    folder: str | Path, *, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Sparse model and tokenizer from a folder that `save_checkpoint` or `save_pretrained` wrote."""
    folder = Path(folder)
    if not is_sparse_checkpoint(folder):
        raise ModelLoadError(
            f"{folder} holds no sparse checkpoint; make one with `bankwise upcycle` or `bankwise run`, "
            "whose checkpoint lies in the run's folder under checkpoint/"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelLoadError(f"{folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    lost = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    lost += sorted(name for name, *_ in info["mismatched_keys"])
    if lost:
        raise ModelLoadError(
            f"{folder}: tensors are missing, unknown or of another shape, the checkpoint is damaged: {lost[:5]}"
        )
    return model.eval(), tokenizer
