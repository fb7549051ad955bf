"""The layer: bank top-k, gate modes, predictor, `SparseSwiGLU`. Pure PyTorch, the reference for every kernel."""

from bankwise.ffn.bank import bank_topk_mask, bank_topk_mask_reference
from bankwise.ffn.gates import gate_activation
from bankwise.ffn.layer import RoutingRecord, SparseSwiGLU, record_routing, sparse_layers
from bankwise.ffn.predictor import Predictor
from bankwise.ffn.routing_loss import channel_energy, channel_recall, retained_energy, routing_loss

__all__ = [
    "Predictor",
    "RoutingRecord",
    "SparseSwiGLU",
    "bank_topk_mask",
    "bank_topk_mask_reference",
    "channel_energy",
    "channel_recall",
    "gate_activation",
    "record_routing",
    "retained_energy",
    "routing_loss",
    "sparse_layers",
]
