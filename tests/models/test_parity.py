"""An upcycled model that keeps every channel is the dense model; one that keeps 16 of 64 keeps exactly those."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import bankwise
from bankwise import CalibrationConfig, SparsityConfig
from bankwise.ffn import SparseSwiGLU, sparse_layers
from bankwise.models import SPARSE_FAMILIES

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
LAYOUTS = ["none", "random", "snake", "coact"]
FORMS = ["linear", "gated_product"]


def upcycled(dense, calibration=None, **settings):
    return bankwise.upcycle(dense, SparsityConfig(**settings), calibration=calibration, progress=False)


@torch.no_grad()
def largest_difference(left, right, ids):
    return (left(ids).logits - right(ids).logits).abs().max().item()


def masks_of(model, ids):
    """The mask of every sparse layer for the hidden states that it meets in a forward pass."""
    masks = {}

    def keep(layer, arguments):
        masks[layer.layer] = layer.active_mask(arguments[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in sparse_layers(model)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return masks


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_all_channels_equals_its_dense_model(family, tied, tiny_dense, tokens):
    dense = tiny_dense(family, tie_word_embeddings=tied)
    sparse = upcycled(dense, tokens(4, 24), active_per_bank=64)
    assert type(sparse) is SPARSE_FAMILIES[family][1]
    assert (sparse.lm_head.weight is sparse.model.embed_tokens.weight) is tied
    assert largest_difference(sparse, dense, tokens()) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_no_way_of_fitting_changes_the_function_of_all_channels(calibrated, layout, form, tiny_dense, tokens):
    dense = tiny_dense("qwen3")
    sparse = upcycled(
        dense,
        tokens(4, 24) if calibrated else None,
        active_per_bank=64,
        bank_layout=layout,
        predictor_form=form,
        predictor_rank=16,
    )
    assert largest_difference(sparse, dense, tokens()) <= 1e-5


@pytest.mark.parametrize("mode", ["detached", "affine", "default_ema", "hard"])
def test_every_unit_gate_keeps_the_dense_function(mode, tiny_dense, tokens):
    dense = tiny_dense()
    assert largest_difference(upcycled(dense, active_per_bank=64, gate_mode=mode), dense, tokens()) <= 1e-5


@pytest.mark.parametrize("center", ["mean", "learnable", "ema"])
def test_centres_cancel_where_no_channel_is_dropped(center, tiny_dense, tokens):
    dense = tiny_dense()
    sparse = upcycled(dense, tokens(4, 24), center=center)
    assert largest_difference(sparse, dense, tokens()) > 1e-2
    for layer in sparse_layers(sparse):
        assert layer.center.abs().max() > 1e-3
        layer.active_per_bank = layer.bank_size
    assert largest_difference(sparse, dense, tokens()) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_biased_projections_keep_the_dense_function(form, tiny_dense, tokens):
    dense = tiny_dense("llama", mlp_bias=True)
    assert dense.model.layers[0].mlp.gate_proj.bias.abs().max() > 0.1
    sparse = upcycled(dense, tokens(4, 24), active_per_bank=64, predictor_form=form)
    assert largest_difference(sparse, dense, tokens()) <= 1e-5


def test_bfloat16_model_stays_bfloat16_and_routes_in_float32(tiny_dense, tokens, tmp_path):
    tiny_dense().save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sparse = upcycled(dense, tokens(4, 24), active_per_bank=64, bank_layout="none")
    assert {value.dtype for value in sparse.parameters()} == {torch.bfloat16}
    layer = sparse.model.layers[0].mlp
    assert layer.logits(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.float32
    assert largest_difference(sparse, dense, tokens()) == 0  # same channel order, hence the same sums


def test_smollm2_with_all_channels_equals_its_dense_model(smollm2):
    sparse = bankwise.upcycle(
        smollm2.model,
        SparsityConfig(active_per_bank=64),
        settings=CalibrationConfig(init="zero"),
        progress=False,
    )
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert largest_difference(sparse, smollm2.model, ids) <= 1e-5
    assert sparse_layers(sparse)[0].predictor.expand.weight.shape == (1536, 128)


@pytest.mark.parametrize("form", FORMS)
def test_exactly_16_of_64_for_every_bank_token_and_layer(form, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(num_hidden_layers=3), tokens(4, 24), predictor_form=form)
    masks = masks_of(sparse, tokens(3, 17))
    assert sorted(masks) == [0, 1, 2]
    for mask in masks.values():
        assert mask.shape == (3, 17, 256)
        assert mask.dtype == torch.bool
        assert (mask.unflatten(-1, (4, 64)).sum(-1) == 16).all()
        assert mask.flatten(0, 1).unique(dim=0).shape[0] > 1  # the choice depends on the token


def test_a_tokens_channels_do_not_depend_on_its_batch(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense(), tokens(4, 24)), tokens(3, 9)
    together = masks_of(sparse, ids)
    for row in range(3):
        alone = masks_of(sparse, ids[row : row + 1])
        assert all(torch.equal(alone[layer][0], together[layer][row]) for layer in together)


def test_each_layer_has_its_own_number_of_channels(tiny_dense, tokens):
    sparse = upcycled(tiny_dense(num_hidden_layers=3), tokens(4, 24), active_per_bank=[8, 64, 24])
    counts = {
        index: mask.unflatten(-1, (4, 64)).sum(-1).unique().tolist()
        for index, mask in masks_of(sparse, tokens()).items()
    }
    assert counts == {0: [8], 1: [64], 2: [24]}


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_dense_layers_keep_the_plain_ffn(calibrated, tiny_dense, tokens):
    dense = tiny_dense(num_hidden_layers=3)
    sparse = upcycled(dense, tokens(4, 24) if calibrated else None, dense_layers=[1])
    mlps = [layer.mlp for layer in sparse.model.layers]
    assert [type(mlp) for mlp in mlps] == [SparseSwiGLU, LlamaMLP, SparseSwiGLU]
    for name, value in dense.model.layers[1].mlp.state_dict().items():
        assert torch.equal(mlps[1].state_dict()[name], value)
    assert sorted(masks_of(sparse, tokens())) == [0, 2]


def test_all_layers_dense_is_the_dense_model(tiny_dense, tokens):
    dense = tiny_dense()
    assert largest_difference(upcycled(dense, tokens(2, 8), dense_layers=[0, 1]), dense, tokens()) == 0


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_the_dense_model_is_left_as_it_was(calibrated, tiny_dense, tokens):
    dense = tiny_dense("qwen2").train()
    weights, config = copy.deepcopy(dense.state_dict()), dense.config.to_dict()
    generation = dense.generation_config.to_dict()
    sparse = upcycled(dense, tokens(4, 24) if calibrated else None, center="mean")
    with torch.no_grad():
        for value in sparse.parameters():
            value.add_(1)
    sparse.generation_config.max_new_tokens = 7
    assert dense.training
    assert dense.config.to_dict() == config
    assert dense.generation_config.to_dict() == generation
    assert dense.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in dense.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_back_end_is_the_dense_models(implementation, tiny_dense):
    dense = tiny_dense()
    dense.set_attn_implementation(implementation)
    assert upcycled(dense).config._attn_implementation == implementation


@pytest.mark.parametrize("rank", [8, "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_parameters_have_the_names_and_shapes_of_the_design(form, rank, tiny_dense):
    dense = tiny_dense()
    sparse = upcycled(dense, predictor_form=form, predictor_rank=rank)
    shapes = {name: tuple(value.shape) for name, value in sparse.named_parameters()}
    dense_shapes = {name: tuple(value.shape) for name, value in dense.named_parameters()}
    resolved = 128 if rank == "auto" else rank
    for index in range(2):
        predictor = f"model.layers.{index}.mlp.predictor"
        assert shapes[f"{predictor}.reduce.weight"] == (resolved, 64)
        assert shapes[f"{predictor}.expand.weight"] == (256, resolved)
        assert shapes[f"{predictor}.expand.bias"] == (256,)
    assert {name: shape for name, shape in shapes.items() if ".predictor." not in name} == dense_shapes
    assert type(sparse.config.sparsity) is dict
    assert SparsityConfig.from_dict(sparse.config.sparsity) == SparsityConfig(predictor_form=form, predictor_rank=rank)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_checkpoint_misses_only_predictor_tensors(family, form, tiny_dense, tmp_path):
    dense = tiny_dense(family)
    dense.save_pretrained(tmp_path)
    config_class, model_class = SPARSE_FAMILIES[family]
    values = dense.config.to_dict()
    values.pop("model_type")
    config = config_class(**values, sparsity=SparsityConfig(predictor_form=form, predictor_rank=8).to_dict())
    model, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    predictor = {name for name in model.state_dict() if ".mlp.predictor." in name}
    assert set(info["missing_keys"]) == predictor
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    for layer in sparse_layers(model):
        assert torch.equal(layer.predictor.bank_layout, torch.arange(256))
        assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_the_recorded_layout_turns_dense_channels_into_sparse_ones(calibrated, layout, tiny_dense, tokens):
    dense = tiny_dense("llama", mlp_bias=True)
    sparse = upcycled(dense, tokens(4, 24) if calibrated else None, bank_layout=layout)
    for dense_layer, sparse_layer in zip(dense.model.layers, sparse_layers(sparse), strict=True):
        order = sparse_layer.predictor.bank_layout
        assert torch.equal(order.sort().values, torch.arange(256))
        assert layout != "none" or torch.equal(order, torch.arange(256))
        for name in ("gate_proj", "up_proj"):
            old, new = getattr(dense_layer.mlp, name), getattr(sparse_layer, name)
            assert torch.equal(new.weight, old.weight[order])
            assert torch.equal(new.bias, old.bias[order])
        assert torch.equal(sparse_layer.down_proj.weight, dense_layer.mlp.down_proj.weight[:, order])
        assert torch.equal(sparse_layer.down_proj.bias, dense_layer.mlp.down_proj.bias)
    if not calibrated and layout != "none":  # with data a layout that retains less is taken back
        assert not torch.equal(order, torch.arange(256))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_know_the_sparse_families(family, tiny_dense):
    config = upcycled(tiny_dense(family)).config
    assert config.model_type == f"bankwise_{family}"
    assert type(AutoModelForCausalLM.from_config(config)) is SPARSE_FAMILIES[family][1]


def test_compiled_model_equals_the_eager_one(tiny_dense, tokens):
    sparse, ids = upcycled(tiny_dense(), tokens(4, 24)), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, sparse(ids).logits, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
