"""A repair of one layer as two small files that can be put on a model and taken off again, bit for bit.

`patch.json` names the model that the patch belongs to, the layer, the remedy and the figures; `patch.safetensors` holds
the layer's tensors before and after.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.reading_cache import model_fingerprint
from bankwise.ffn import SparseSwiGLU, sparse_layers
from bankwise.files import write_json
from bankwise.models.checkpoint import save_checkpoint
from bankwise.repair.changes import find_layer

FORMAT = "bankwise-patch/1"
_BEFORE, _AFTER = "before.", "after."


@dataclass
class LayerState:
    """Everything of one layer that a remedy may change, and k of all layers."""

    tensors: dict[str, Tensor]
    active_per_bank: int
    config_active: int | list[int]
    """`active_per_bank` of the model's config."""

    @classmethod
    def of(cls, model: PreTrainedModel, layer: SparseSwiGLU) -> Self:
        """A copy of what the layer is now."""
        tensors = {name: value.detach().cpu().clone() for name, value in layer.state_dict().items()}
        active = model.config.sparsity["active_per_bank"]
        return cls(tensors, layer.active_per_bank, list(active) if isinstance(active, list) else active)

    def restore(self, model: PreTrainedModel, layer: SparseSwiGLU) -> None:
        """Make the layer what it was."""
        write_tensors(layer, self.tensors)
        layer.active_per_bank = self.active_per_bank
        _write_config(model, layer, self.config_active)


def set_active(model: PreTrainedModel, layer: SparseSwiGLU, active_per_bank: int) -> None:
    """Change k of one layer, in the model and in its config."""
    layer.active_per_bank = active_per_bank
    own = {other.layer: other.active_per_bank for other in sparse_layers(model)}
    default = layer.sparsity.active_in_layer(layer.layer)
    _write_config(model, layer, [own.get(index, default) for index in range(model.config.num_hidden_layers)])


def _write_config(model: PreTrainedModel, layer: SparseSwiGLU, active: int | list[int]) -> None:
    model.config.sparsity = model.config.sparsity | {"active_per_bank": active}
    layer.sparsity.active_per_bank = active  # the layers share one object


@torch.no_grad()
def write_tensors(layer: SparseSwiGLU, tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors of a layer, by their names in it."""
    own = layer.state_dict()
    for name, value in tensors.items():
        own[name].copy_(value)


@dataclass(kw_only=True)
class Patch:
    """The repair of one layer; or, with remedy `none`, the finding that there is nothing to repair."""

    base: str
    """Hash of the model that the patch belongs to."""
    layer: int | None
    remedy: str
    """`centre`, `more channels`, `predictor`, `layer`, `new banks`, or `none`."""
    reason: str
    """Why this remedy, or why none."""
    repaired: str = ""
    """Hash of the model with the patch on it."""
    active_per_bank: int = 0
    """k of the layer after the repair."""
    config_before: int | list[int] = 0
    """`active_per_bank` of the model's config without the patch, and k of the layer."""
    active_before: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that the remedy changed, by their names in the layer."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured."""

    @property
    def is_repair(self) -> bool:
        """Whether there is something to apply."""
        return self.layer is not None and self.remedy != "none"

    @classmethod
    def of(
        cls, model: PreTrainedModel, layer: SparseSwiGLU, before: LayerState, base: str, remedy: str, reason: str
    ) -> Self:
        """The difference between a layer as it is now and what it was."""
        now = LayerState.of(model, layer)
        changed = [name for name, value in now.tensors.items() if not torch.equal(value, before.tensors[name])]
        return cls(
            base=base,
            layer=layer.layer,
            remedy=remedy,
            reason=reason,
            repaired=model_fingerprint(model),
            active_per_bank=now.active_per_bank,
            config_before=before.config_active,
            active_before=before.active_per_bank,
            before={name: before.tensors[name] for name in changed},
            after={name: now.tensors[name] for name in changed},
        )

    def apply(self, model: PreTrainedModel) -> None:
        """Put the patch on its model, in place."""
        layer = self._layer_of(model, self.base, "the model that it was made for")
        if layer is None:
            return
        write_tensors(layer, self.after)
        if self.active_per_bank != layer.active_per_bank:
            set_active(model, layer, self.active_per_bank)

    def revert(self, model: PreTrainedModel) -> None:
        """Take the patch off again, in place."""
        layer = self._layer_of(model, self.repaired, "the model with this patch on it")
        if layer is not None:
            LayerState(self.before, self.active_before, self.config_before).restore(model, layer)

    def _layer_of(self, model: PreTrainedModel, expected: str, name: str) -> SparseSwiGLU | None:
        if not self.is_repair:
            return None
        found = model_fingerprint(model)
        if found != expected:
            raise ConfigError(
                f"this model (sha256 {found[:12]}...) is not {name} (sha256 {expected[:12]}...); use that one, or scan "
                "and repair this model"
            )
        assert self.layer is not None
        return find_layer(model, self.layer)

    def save(self, folder: str | Path) -> Path:
        """Write `patch.json` and `patch.safetensors` into a new folder, both or none."""
        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"{folder} exists already; choose another folder or remove it")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            tensors = {f"{_BEFORE}{name}": value for name, value in self.before.items()}
            tensors |= {f"{_AFTER}{name}": value for name, value in self.after.items()}
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "patch.safetensors")
            values = {name: value for name, value in asdict(self).items() if name not in ("before", "after")}
            digest = hashlib.sha256((partial / "patch.safetensors").read_bytes()).hexdigest()
            values = {"format": FORMAT, **values, "tensors": sorted(self.after), "tensors_sha256": digest}
            write_json(partial / "patch.json", values)
            os.replace(partial, folder)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote."""
        folder = Path(folder)
        try:
            values = json.loads((folder / "patch.json").read_text(encoding="utf-8"))
            content = (folder / "patch.safetensors").read_bytes()
            if values.pop("format") != FORMAT or values.pop("tensors_sha256") != hashlib.sha256(content).hexdigest():
                raise KeyError("format")
            del values["tensors"]
            tensors = load_file(folder / "patch.safetensors")
            before = {name.removeprefix(_BEFORE): value for name, value in tensors.items() if name.startswith(_BEFORE)}
            after = {name.removeprefix(_AFTER): value for name, value in tensors.items() if name.startswith(_AFTER)}
            return cls(before=before, after=after, **values)
        except OSError as error:
            raise DataError(f"{folder} holds no patch ({error.strerror}); name the folder that was saved") from error
        except (ValueError, AttributeError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{folder} holds a patch that is damaged, or of another version; make it anew") from error


def save_repaired(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, patch: Patch, folder: str | Path
) -> Path:
    """Write the patched model as a checkpoint, with the patch in its folder `patch`; whole or not at all.

    `model` is the patch's model without it, and stays so.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder or remove it")
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    patch.apply(model)
    try:
        save_checkpoint(model, tokenizer, work)
        patch.save(work / "patch")
        os.replace(work, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        patch.revert(model)
    return folder
