"""The plan of a training against the training itself: parameters, FLOPs and memory counted on tiny models."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training.peak_memory import PeakMemory
from transformers import AutoModelForCausalLM, PreTrainedModel

from bankwise.config import SparsityConfig, Stage
from bankwise.ffn import RoutingRecord, record_routing, sparse_layers
from bankwise.models import sparse_config
from bankwise.models.cost import token_cost
from bankwise.models.modeling import use_chunked_loss
from bankwise.models.public import PUBLIC_MODELS, public_config
from bankwise.training import parameter_groups
from bankwise.training.budget import meta_model, parameter_count, teacher_flops, token_flops, trained_parameters
from bankwise.training.memory import step_memory
from bankwise.training.state_distillation import state_distance

PUBLISHED = {  # parameters, as the models' files count them
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
}
ROWS = 2


def a_stage(seq_len: int = 32, **changes: Any) -> Stage:
    settings = {"seq_len": seq_len, "micro_batch": ROWS, "batch_tokens": ROWS * seq_len, "loss_chunk": 32}
    return Stage(**settings | changes)


def config_of(dense: PreTrainedModel, sparsity: dict[str, Any] | None) -> Any:
    """Config of the dense model, or of its sparse twin."""
    return dense.config if sparsity is None else sparse_config(dense.config, SparsityConfig(**sparsity))


def student(config: Any, stage: Stage, *, attention: str = "sdpa") -> PreTrainedModel:
    """A model with random weights, as a stage starts with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if not sparse_layers(model):
        use_chunked_loss(model)
    trained_parameters(model, stage)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def one_pass(model: PreTrainedModel, stage: Stage, ids: torch.Tensor, teacher: PreTrainedModel | None = None) -> None:
    """Forward and backward of one pass, as in the trainer."""
    recording = record_routing(model, with_statistics=False, token_fraction=stage.aux_token_fraction)
    with recording if stage.aux_weight else nullcontext(RoutingRecord()) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bf16):
            distill = {}
            taught = None
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher.model(ids, use_cache=False, output_hidden_states=bool(stage.state_weight))
                distill = {
                    "teacher_hidden": taught.last_hidden_state, "teacher_head": teacher.lm_head.weight,
                    "kd_weight": 1.0, "output_hidden_states": bool(stage.state_weight),
                }  # fmt: skip
            outputs = model(ids, labels=ids, use_cache=False, loss_chunk=stage.loss_chunk, **distill)
            loss = outputs.loss
            if stage.state_weight:
                loss = loss + state_distance(outputs.hidden_states[1:], taught.hidden_states[1:], ids >= 0)
            del outputs, taught, distill
        if record.losses:
            loss = loss + stage.aux_weight * torch.stack(record.losses).mean()
        loss.backward()


# Parameters


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_the_built_in_shapes_have_the_published_number_of_parameters(name):
    assert parameter_count(meta_model(public_config(name))) == PUBLISHED[name]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_without_weights_are_those_of_the_model(family, tiny_dense):
    dense = tiny_dense(family, tie_word_embeddings=family == "qwen2")
    assert parameter_count(meta_model(dense.config)) == parameter_count(dense)
    config = sparse_config(dense.config, SparsityConfig(predictor_rank=16, dense_layers=[1]))
    added = parameter_count(meta_model(config)) - parameter_count(dense)
    assert added == 16 * (64 + 256) + 5 * 256  # one sparse layer: both matrices, bias, offsets and noises


@pytest.mark.parametrize(
    ("trains", "model", "predictor"),
    [
        ("all", "all", 2),
        ("ffn", 2 * 3 * 64 * 256, 2),
        ("predictor", 0, 2),
        ("layer: 1", 3 * 64 * 256, 1),
    ],
)
def test_trained_parameters_by_stage(trains, model, predictor, tiny_dense):
    dense = tiny_dense()
    config = sparse_config(dense.config, SparsityConfig(predictor_rank=16))
    trained = trained_parameters(meta_model(config), a_stage(trains=trains))
    assert trained.model == (parameter_count(dense) if model == "all" else model)
    assert trained.predictor == predictor * (16 * (64 + 256) + 5 * 256)


# FLOPs


@pytest.mark.parametrize(
    "sparsity", [{}, {"gate_mode": "detached"}, {"predictor_grad": "lm", "dense_layers": [0]}, None], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"trains": "ffn"},
        {"trains": "predictor", "aux_token_fraction": 0.5},
        {"trains": "layer: 1", "gradient_checkpointing": True},
        {"aux_weight": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_flops_of_a_step_are_those_that_torch_counts(settings, sparsity, tiny_dense):
    if sparsity is None and settings.get("trains") == "predictor":
        settings = {}  # a dense model has no predictor
    stage = a_stage(bf16=False, **settings)
    dense = tiny_dense("qwen3", num_hidden_layers=3)
    config = config_of(dense, None if sparsity is None else {"predictor_rank": 16} | sparsity)
    # Eager attention is made of products that the counter sees; it multiplies the whole square.
    model = student(config, stage, attention="eager")
    ids = torch.randint(258, (ROWS, stage.seq_len), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        one_pass(model, stage, ids)
    budget = token_flops(config, stage)
    whole_square = budget.attention * (2 * stage.seq_len / (stage.seq_len + 1) - 1)
    expected = (budget.total + whole_square) * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_forward_and_teacher_are_the_cost_of_a_token_with_all_channels(tiny_dense):
    dense = tiny_dense(num_hidden_layers=3)
    config = sparse_config(dense.config, SparsityConfig(predictor_rank=16))
    stage = a_stage(trains="ffn", aux_weight=0.0, kd_weight=1.0)
    budget, cost = token_flops(config, stage), token_cost(config, dtype_bytes=2, active_fraction=1.0)
    attention = 3 * 2 * 2 * 64 * (stage.seq_len + 1) / 2  # layers x (scores, values) x 2 x width x mean of tokens seen
    assert budget.forward == cost.flops + attention
    assert teacher_flops(dense.config, stage) == cost.dense_flops + attention
    assert teacher_flops(dense.config, a_stage()) == 0


def test_a_sliding_window_bounds_the_attention(tiny_dense):
    config = tiny_dense("mistral", sliding_window=12).config
    short, long = (token_flops(config, a_stage(seq_len)).attention for seq_len in (128, 1 << 14))
    assert long == pytest.approx(short, rel=0.06)
    config.sliding_window = None
    assert token_flops(config, a_stage(1 << 14)).attention == pytest.approx(
        128 * token_flops(config, a_stage(128)).attention, rel=0.01
    )


# Memory


def test_a_bfloat16_teacher_takes_half_the_memory(tiny_dense):
    config = tiny_dense().config
    exact, rounded = (
        step_memory(config, a_stage(kd_weight=1.0, teacher_dtype=dtype), parameters=9, trained=9, teacher_parameters=8)
        for dtype in ("float32", "bfloat16")
    )
    assert (exact.teacher, rounded.teacher) == (32, 16)


@pytest.mark.parametrize(
    ("sparsity", "settings"),
    [
        ({}, {}),
        ({}, {"seq_len": 256, "gradient_checkpointing": True}),
        ({}, {"bf16": False}),
        ({}, {"kd_weight": 1.0}),
        ({}, {"kd_weight": 1.0, "state_weight": 1.0, "seq_len": 256}),
        ({}, {"kd_weight": 1.0, "state_weight": 1.0, "seq_len": 256, "gradient_checkpointing": True}),
        ({}, {"trains": "predictor"}),
        ({}, {"trains": "ffn"}),
        ({"predictor_form": "linear"}, {"seq_len": 128}),
        (None, {}),
        (None, {"seq_len": 256, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_memory_of_a_step_is_within_a_fifth_of_the_measured_peak(sparsity, settings, tiny_dense, monkeypatch):
    # The formula is that of the reference; the fused operators of a CPU keep less.
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    stage = a_stage(**{"seq_len": 64} | settings)
    sizes = {"num_hidden_layers": 4, "intermediate_size": 512, "hidden_size": 128, "max_position_embeddings": 256}
    dense = tiny_dense("llama", **sizes)
    config = config_of(dense, None if sparsity is None else {"predictor_rank": 16} | sparsity)
    model = student(config, stage)
    teacher = dense.requires_grad_(False) if stage.kd_weight else None
    optimizer = torch.optim.AdamW(list(parameter_groups(model, stage)), fused=True)
    ids = torch.randint(258, (ROWS, stage.seq_len), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        for _ in range(2):
            one_pass(model, stage, ids, teacher)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimiser's states
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *model.buffers(), *([] if teacher is None else teacher.parameters()), *moments]
    with PeakMemory(held) as memory:
        step()
    budget = step_memory(
        config,
        stage,
        parameters=parameter_count(model),
        trained=trained_parameters(model, stage).total,
        teacher_parameters=0 if teacher is None else parameter_count(teacher),
    )
    assert budget.total / memory.peak == pytest.approx(1, abs=0.2), budget


def test_checkpointing_bounds_what_grows_with_the_layers(tiny_dense):
    config = config_of(tiny_dense(num_hidden_layers=16, max_position_embeddings=4096), {"predictor_rank": 16})
    plain, checkpointed = (
        step_memory(config, a_stage(4096, gradient_checkpointing=on), parameters=10, trained=10) for on in (False, True)
    )
    assert checkpointed.activations < plain.activations / 8
    assert checkpointed.routing == plain.routing / 16


def test_the_loss_does_not_grow_with_vocabulary_times_length(tiny_dense):
    config = config_of(tiny_dense(vocab_size=100_000), {"predictor_rank": 16})
    short, long = (step_memory(config, a_stage(seq_len), parameters=10, trained=10) for seq_len in (512, 32_768))
    assert long.logits == short.logits


def test_sharding(tiny_dense):
    config = config_of(tiny_dense(), {"predictor_rank": 16})
    one, ddp, fsdp = (
        step_memory(config, a_stage(), parameters=8000, trained=4000, processes=processes, sharding=sharding)
        for processes, sharding in ((1, "none"), (8, "ddp"), (8, "fsdp2"))
    )
    assert (one.weights, one.gradients, one.optimizer, one.buckets) == (32_000, 16_000, 32_000, 0)
    assert (ddp.weights, ddp.optimizer, ddp.buckets) == (32_000, 32_000, 16_000)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (4000, 2000, 4000)
    assert fsdp.buckets == ddp.buckets == 16_000  # two layers at a time, and the model has two
    assert fsdp.activations == ddp.activations == one.activations
