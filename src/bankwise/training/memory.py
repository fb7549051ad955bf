"""Memory that a training step needs on one device, by formula, from configs alone.

What is counted is what the training code keeps: float32 weights, gradients and AdamW states, the copies that autocast
makes of the matrices, what autograd saves for the backward pass, and the largest temporaries of one feed-forward and of
the loss, on the reference path. Compared with the peak of real steps in tests/training/test_budget.py. The CUDA
context, NCCL's buffers and fragmentation come on top: 1 to 3 GB and some per cent.

Names: D hidden, F FFN channels, R rank, V vocabulary, T tokens of one forward pass on one device.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bankwise.config import Stage
from bankwise.models.cost import head_size, matrix_sizes, sparsity_of

Sharding = Literal["none", "ddp", "fsdp2"]
_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """Two moments for each trained parameter."""
    buckets: int
    """Gradients on their way between processes: of the whole model (`ddp`), or of two layers (`fsdp2`)."""
    teacher: int
    copies: int
    """Matrices as the products read them: of all layers, of one under checkpointing, of two gathered ones (`fsdp2`)."""
    activations: int
    """What is saved for the backward pass; under gradient checkpointing the layers' inputs and one whole layer."""
    temporaries: int
    """Of one feed-forward in the backward pass, or of the loss, whichever makes the peak."""
    logits: int
    """Temporaries of the loss: one chunk of logits, and the gradient of the head. No part of the total by itself."""
    routing: int
    """Of the activations, routing logits, what rebuilds them, and masks."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.logits - self.routing


def step_memory(
    config: Any,
    stage: Stage,
    *,
    parameters: int,
    trained: int,
    teacher_parameters: int = 0,
    processes: int = 1,
    sharding: Sharding = "none",
) -> Memory:
    """Peak of one step of a sparse or dense model with so many parameters.

    `fsdp2` shards weights, gradients and optimiser states over the processes and gathers two layers at a time, or the
    head; `ddp` replicates everything.
    """
    shards = processes if sharding == "fsdp2" else 1
    layers, tokens = config.num_hidden_layers, stage.micro_batch * stage.seq_len
    compute = _BFLOAT16 if stage.bf16 else _FLOAT32
    inputs = _FLOAT32 * tokens * config.hidden_size
    saved = tokens * _layer_bytes(config, stage, compute)
    logits = _logits_bytes(config, stage, compute)
    # Last hidden states, their norm and their gradient are there throughout.
    if stage.gradient_checkpointing:
        held = {"loss": layers * inputs, "backward": (layers - 1) * inputs + saved}
        whole = {"loss": layers, "backward": 1}
    else:
        held = dict.fromkeys(("loss", "backward"), layers * saved)
        whole = dict.fromkeys(("loss", "backward"), layers)
    if stage.state_weight:
        # The distances keep the differences for the backward pass; the teacher's states are gone by then.
        held["loss"] += 2 * layers * inputs
        held["backward"] += layers * inputs
    temporaries = {"loss": logits, "backward": tokens * _ffn_temporary_bytes(config, compute)}
    copies = {phase: _copied_bytes(config, stage, sharding, count) for phase, count in whole.items()}
    peak = max(held, key=lambda phase: held[phase] + temporaries[phase] + copies[phase])
    saved_routing = tokens * _routing_bytes(config) * (1 if stage.gradient_checkpointing else layers)
    return Memory(
        weights=_FLOAT32 * parameters // shards,
        gradients=_FLOAT32 * trained // shards,
        optimizer=2 * _FLOAT32 * trained // shards,
        buckets={"none": 0, "ddp": _FLOAT32 * trained, "fsdp2": 2 * _FLOAT32 * trained // layers}[sharding],
        teacher=(_FLOAT32 if stage.teacher_dtype == "float32" else _BFLOAT16) * teacher_parameters,
        copies=copies[peak],
        activations=held[peak] + 4 * inputs,
        temporaries=temporaries[peak],
        logits=logits,
        routing=saved_routing,
    )


def _copied_bytes(config: Any, stage: Stage, sharding: Sharding, layers: int) -> int:
    """The matrices of so many layers in the dtype of the products; the predictor's are read as they are."""
    sizes = matrix_sizes(config)
    layer = sizes.attention + sizes.gate_up + sizes.down
    if sharding == "fsdp2":
        return (_BFLOAT16 if stage.bf16 else _FLOAT32) * 2 * (layer + sizes.reduce + sizes.expand)
    return _BFLOAT16 * layers * layer if stage.bf16 else 0


def _layer_bytes(config: Any, stage: Stage, compute: int) -> int:
    """Saved for one token in one layer."""
    width, channels = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    trains_all, trains_ffn = stage.trains == "all", stage.trains in ("all", "ffn")
    # Each norm: its float32 input; where it learns, its float32 output too. What learns keeps the input of its product.
    norms = 2 * _FLOAT32 * width + trains_all * (2 * _FLOAT32 + compute) * width + trains_ffn * compute * width
    attention = compute * ((2 + trains_all) * queries + 2 * keys) + _FLOAT32 * config.num_attention_heads
    if config.model_type.removeprefix("bankwise_") == "qwen3":
        attention += (2 * _FLOAT32 + compute) * (queries + keys)  # norms of queries and keys
    ffn = (3 + trains_ffn) * compute * channels  # gate, its SiLU, up, and what `down` reads
    sparsity = sparsity_of(config)
    if sparsity is not None:
        ffn += compute * channels + _routing_bytes(config)  # the activation before the gate
        ffn += _FLOAT32 * (width + sparsity.resolve_rank(width, channels))  # input and code of the predictor
        if stage.aux_weight:
            # Logits, rebuilt projections, shares and probabilities of every n-th token.
            ffn += round(stage.aux_token_fraction * 7 * _FLOAT32 * channels)
    return norms + attention + ffn


def _routing_bytes(config: Any) -> int:
    """Routing logits, what rebuilds them, mask and thresholds of one token in one layer."""
    sparsity = sparsity_of(config)
    if sparsity is None:
        return 0
    per_channel = _FLOAT32 * (3 if sparsity.predictor_form == "gated_product" else 1) + 1
    return per_channel * config.intermediate_size + _FLOAT32 * config.intermediate_size // sparsity.bank_size


def _ffn_temporary_bytes(config: Any, compute: int) -> int:
    """Largest temporaries of one token in the backward pass of one feed-forward."""
    sparsity = sparsity_of(config)
    if sparsity is None:
        return 4 * compute * config.intermediate_size
    # Gradients of the activation and of the logits, and the passes through the predictor's product.
    passes = 6 if sparsity.predictor_form == "gated_product" else 4
    return (compute + passes * _FLOAT32) * config.intermediate_size


def _logits_bytes(config: Any, stage: Stage, compute: int) -> int:
    per_token = (compute + 2 * _FLOAT32 + (2 * _FLOAT32 if stage.kd_weight else 0)) * config.vocab_size
    head = matrix_sizes(config).head
    # The head as the products read it; its gradient, and that once more times the gradient of the loss.
    head_bytes = (compute if stage.bf16 else 0) * head + (2 * _FLOAT32 * head if stage.trains == "all" else 0)
    return min(stage.loss_chunk, stage.micro_batch * stage.seq_len) * per_token + head_bytes
