"""One reading of a model's routing on a fixed batch of held-out windows, and what has changed since the last one.

The model is read as it will be used: its own number of active channels, no leak, no dropout, no running mean moved.

Shapes: W windows, S tokens of a window, T tokens of a chunk, F FFN channels, P bytes of F bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bankwise.data.positions import bucket_of, buckets_below
from bankwise.ffn import SparseSwiGLU, record_routing, sparse_layers
from bankwise.ffn.routing_counts import RoutingCounts, usage_figures
from bankwise.ffn.routing_statistics import mask_churn

UNIONS = (2, 4, 8, 16)
_CHUNK = 1024  # tokens whose energies exist at one time; divides every border of the position buckets
_CHURN_TOKENS = 2048  # evenly spaced tokens whose masks are remembered: at 7B and 28 layers 136 MB


class RoutingProbe:
    """Reads the windows [W, S] again and again; remembers the masks of the last reading and all choices so far."""

    def __init__(self, windows_WS: Tensor) -> None:
        self.windows_WS = windows_WS
        self.read_tokens = 0
        self._stride = -(-windows_WS.numel() // _CHURN_TOKENS)
        self._kept_F: dict[int, Tensor] = {}
        self._masks_TP: dict[int, np.ndarray] = {}

    @torch.no_grad()
    def read(self, model: nn.Module, wrapped: nn.Module, *, batch_size: int, loss_chunk: int) -> dict[str, Any]:
        """Figures of every sparse layer as lists in the order of `layers`, and the held-out loss in nats per token.

        `model` is the causal LM and `wrapped` what the processes share it through: a sharded model is whole only in a
        forward pass of its wrapper, so all processes have to read.
        """
        layers = sparse_layers(model)
        counts = {layer.layer: RoutingCounts(layer, unions=UNIONS, keeps_margins=True) for layer in layers}
        masks: dict[int, list[Tensor]] = {layer.layer: [] for layer in layers}

        @torch.compiler.disable
        def observe(layer: SparseSwiGLU, h_WSF: Tensor, logits_WSF: Tensor) -> None:
            for h_SF, logits_SF in zip(h_WSF, logits_WSF, strict=True):
                mask_SF = _count_window(counts[layer.layer], h_SF, logits_SF)
                masks[layer.layer].append(mask_SF[:: self._stride].clone())  # a view would keep the whole mask

        loss = 0.0
        device = next(model.parameters()).device
        wrapped.eval()
        # The head alone: in training mode it computes the loss in chunks, without the logits of a whole window.
        model.training = True
        cuda = [device] if device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices=cuda),
                record_routing(model, with_loss=False, with_statistics=False, observe=observe),
            ):
                for batch_WS in self.windows_WS.to(device).split(batch_size):
                    outputs = wrapped(input_ids=batch_WS, labels=batch_WS, use_cache=False, loss_chunk=loss_chunk)
                    loss += outputs.loss.item() * len(batch_WS)
        finally:
            wrapped.train()
        self.read_tokens += self.windows_WS.numel()
        buckets = list(buckets_below(self.windows_WS.shape[1]))
        rows = [
            self._with_history(counts[layer.layer], torch.cat(masks[layer.layer]), buckets) for layer in layers
        ]  # fmt: skip
        return {
            "loss": loss / len(self.windows_WS),
            "probe_tokens": self.windows_WS.numel(),
            "usage_tokens": self.read_tokens,
            "layers": [layer.layer for layer in layers],
            **_by_figure(rows),
        }

    def _with_history(self, counts: RoutingCounts, mask_TF: Tensor, buckets: list[str]) -> dict[str, Any]:
        number = counts.layer.layer
        self._kept_F[number] = self._kept_F.get(number, 0) + counts.kept_F
        bits_TP = np.packbits(mask_TF.cpu().numpy(), axis=-1)
        before_TP = self._masks_TP.get(number)
        self._masks_TP[number] = bits_TP
        churn = None if before_TP is None else mask_churn(_unpacked(before_TP), _unpacked(bits_TP)).item()
        return {
            **counts.figures(buckets),
            "margin_p5": counts.low_margin(),
            "churn": churn,
            **usage_figures(self._kept_F[number].double() / self.read_tokens),
        }


def _count_window(counts: RoutingCounts, h_SF: Tensor, logits_SF: Tensor) -> Tensor:
    """Count one window of a layer; return its mask [S, F]."""
    layer = counts.layer
    masks = []
    for start in range(0, len(h_SF), _CHUNK):
        h_TF, logits_TF = h_SF[start : start + _CHUNK], logits_SF[start : start + _CHUNK]
        masks.append(layer.chosen(logits_TF))
        counts.add_tokens(layer.energy(h_TF), logits_TF, masks[-1], bucket_of(start))
    mask_SF = torch.cat(masks)
    counts.add_neighbours(mask_SF)
    return mask_SF


def _by_figure(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A dict of lists of a list of equal dicts, also of the dicts in it."""
    return {
        name: _by_figure([row[name] for row in rows]) if isinstance(value, dict) else [row[name] for row in rows]
        for name, value in rows[0].items()
    }


def _unpacked(bits_TP: np.ndarray) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits_TP, axis=-1)).bool()
