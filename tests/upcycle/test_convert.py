"""upcycle: every start runs, calibration helps where routing matters, inputs of every kind, mistakes are named."""

import datasets
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bankwise
from bankwise import CalibrationConfig, SparsityConfig
from bankwise.errors import BankwiseError, ConfigError, DataError, ModelLoadError
from bankwise.ffn import record_routing, sparse_layers
from bankwise.upcycle import calibration_windows, convert
from bankwise.upcycle.loading import load_dense

STARTS = [
    *((form, init) for form in ("linear", "gated_product") for init in ("auto", "svd_act", "svd_gate", "zero")),
    ("linear", "ridge"),
]


def fit(dense, windows=None, *, init="auto", epochs=1, seed=0, stream="sparse", **sparsity):
    settings = CalibrationConfig(init=init, refine_epochs=epochs, seed=seed, stream=stream)
    return convert(dense, SparsityConfig(**{"predictor_rank": 16} | sparsity), windows, settings, progress=False)


@torch.no_grad()
def routing_of(model, ids):
    with record_routing(model) as record:
        model(ids)
    return {
        "loss": torch.stack(record.losses).mean().item(),
        "recall": torch.stack(record.recalls).mean().item(),
        "retained": torch.stack(record.retained).mean().item(),
    }


@torch.no_grad()
def divergence(dense, sparse, ids):
    """KL(dense || sparse) of the next token, in nats."""
    p, q = (model(ids).logits.log_softmax(-1) for model in (dense, sparse))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def routed(tiny_dense):
    """A dense model whose FFN is large and nonlinear enough that the choice of channels matters."""
    return tiny_dense(ffn_scale=0.3)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
@pytest.mark.parametrize(("form", "init"), STARTS)
def test_every_start_gives_a_working_model(form, init, calibrated, tiny_dense, tokens):
    conversion = fit(tiny_dense(), tokens(4, 24) if calibrated else None, init=init, predictor_form=form)
    with torch.no_grad():
        assert conversion.model(tokens()).logits.isfinite().all()
    assert all(value.isfinite().all() for value in conversion.model.parameters())
    assert conversion.report["tokens"] == (96 if calibrated else 0)
    assert [layer["layer"] for layer in conversion.report["layers"]] == ([0, 1] if calibrated else [])


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_calibrated_predictor_finds_the_oracles_channels(form, routed, tokens):
    windows, new = tokens(32, 64, seed=2), tokens(4, 64, seed=3)
    fitted, static = (
        fit(routed, windows, init=init, epochs=epochs, predictor_form=form, predictor_rank=64).model
        for init, epochs in (("auto", 2), ("zero", 0))
    )
    scrambled = fit(routed, windows, init="auto", epochs=2, predictor_form=form, predictor_rank=64).model
    for layer in sparse_layers(scrambled):
        layer.predictor.expand.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    by_name = {
        name: routing_of(model, new) for name, model in (("fit", fitted), ("zero", static), ("random", scrambled))
    }
    assert by_name["fit"]["recall"] > by_name["zero"]["recall"] + 0.1
    assert by_name["fit"]["recall"] > by_name["random"]["recall"] + 0.1
    assert by_name["fit"]["retained"] > by_name["zero"]["retained"] + 0.1
    assert divergence(routed, fitted, new) < 0.8 * divergence(routed, static, new)
    assert divergence(routed, fitted, new) < 0.8 * divergence(routed, scrambled, new)


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_refinement_lowers_the_routing_loss(form, routed, tokens):
    windows, new = tokens(32, 64, seed=2), tokens(4, 64, seed=3)
    before, after = (
        routing_of(fit(routed, windows, epochs=epochs, predictor_form=form).model, new) for epochs in (0, 8)
    )
    assert after["loss"] < before["loss"]


def test_the_report_states_recall_and_retained_energy(routed, tokens):
    for layer in fit(routed, tokens(16, 32), predictor_rank=64).report["layers"]:
        shares = {name: value for name, value in layer.items() if name != "layer"}
        assert all(0 <= value <= 1 for value in shares.values())
        assert layer["retained_random"] == 0.25
        assert layer["retained_random"] < layer["retained"] <= layer["retained_oracle"] <= layer["retained_global"]
        assert layer["retained_oracle_before"] <= layer["retained_oracle"]
        assert layer["recall"] > 0.3


def test_the_stream_of_hidden_states_is_the_one_asked_for(routed, tokens):
    sparse, dense = (fit(routed, tokens(4, 24), stream=stream).model for stream in ("sparse", "dense"))
    first, second = (
        [torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True)]
        for left, right in zip(sparse_layers(sparse), sparse_layers(dense), strict=True)
    )
    assert all(first)  # nothing before the first layer is sparse
    assert not all(second)


@pytest.mark.parametrize("center", ["mean", "learnable", "ema"])
def test_the_centre_is_the_mean_over_the_tokens_that_dropped_the_channel(center, tiny_dense, tokens):
    windows = tokens(17, 24)
    model = fit(tiny_dense("mistral"), windows, center=center).model
    seen = {}
    for layer in sparse_layers(model):
        layer.register_forward_pre_hook(lambda layer, arguments: seen.update({layer: arguments[0].flatten(0, 1)}))
    with torch.no_grad():
        model(windows[:15])  # the last two of seventeen are for the check
        assert len(seen) == 2
        for layer, x in seen.items():
            dropped, h = ~layer.active_mask(x), layer.dense_activation(x)
            often = dropped.sum(0) > 100
            expected = (h * dropped).sum(0) / dropped.sum(0).clamp_min(1)
            assert often.sum() > 200
            # bfloat16 activations during the fit move a few tokens across the cut.
            error, to_plain_mean = ((value - expected)[often].abs() for value in (layer.center, h.mean(0)))
            assert error.max() < 0.03
            assert error.mean() < 0.1 * to_plain_mean.mean()


@pytest.mark.parametrize("layout", ["random", "snake", "coact"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_the_same_seed_gives_the_same_tensors(calibrated, layout, tiny_dense, tokens):
    windows = tokens(4, 24) if calibrated else None
    first = fit(tiny_dense(), windows, bank_layout=layout, init="zero").model.state_dict()
    torch.manual_seed(123)
    torch.rand(5)
    second = fit(tiny_dense(), windows, bank_layout=layout, init="zero").model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = fit(tiny_dense(), windows, bank_layout=layout, init="zero", seed=1).model.state_dict()
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


# Calibration data

TEXTS = ["hello world, this is one text. " * 8, "and here is the second of them! " * 8]
SMALL = CalibrationConfig(tokens=64, seq_len=16)


def same_model(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_texts_rows_and_datasets_of_the_same_text_are_the_same_calibration(tiny_dense, tokenizer):
    rows = [{"text": text, "source": "test"} for text in TEXTS]
    kinds = [TEXTS, rows, iter(TEXTS), datasets.Dataset.from_list(rows)]
    windows = [calibration_windows(kind, tokenizer, SMALL) for kind in kinds]
    assert windows[0].shape == (4, 16)
    assert all(torch.equal(windows[0], other) for other in windows)
    models = [
        bankwise.upcycle(tiny_dense(), calibration=given, tokenizer=tokenizer, settings=SMALL, progress=False)
        for given in (TEXTS, rows, windows[0])
    ]
    assert same_model(models[0], models[1])
    assert same_model(models[0], models[2])


def test_one_string_is_one_text(tokenizer):
    assert torch.equal(
        calibration_windows(TEXTS[0], tokenizer, SMALL), calibration_windows([TEXTS[0]], tokenizer, SMALL)
    )


def test_no_calibration_with_a_tokenizer_reads_the_python_reference(tiny_dense, tokenizer):
    windows = calibration_windows(None, tokenizer, SMALL)
    assert windows.shape == (4, 16)
    assert tokenizer.decode(windows[0]).isprintable() or "\n" in tokenizer.decode(windows[0])
    model = bankwise.upcycle(tiny_dense(), tokenizer=tokenizer, settings=SMALL, progress=False)
    given = bankwise.upcycle(tiny_dense(), calibration=windows, settings=SMALL, progress=False)
    assert same_model(model, given)


def test_no_calibration_without_a_tokenizer_reads_the_weights_alone(tiny_dense, tokenizer):
    assert calibration_windows(None, None, SMALL) is None
    alone = bankwise.upcycle(tiny_dense(), progress=False)
    none = CalibrationConfig(tokens=0)
    assert calibration_windows(TEXTS, tokenizer, none) is None
    assert same_model(alone, bankwise.upcycle(tiny_dense(), tokenizer=tokenizer, settings=none, progress=False))
    assert not same_model(alone, bankwise.upcycle(tiny_dense(), tokenizer=tokenizer, settings=SMALL, progress=False))


def test_a_directory_is_upcycled_with_its_own_tokenizer(tiny_dense, tokenizer, tmp_path):
    tiny_dense().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = bankwise.upcycle(tmp_path, calibration=TEXTS, settings=SMALL, progress=False)
    given = bankwise.upcycle(
        load_dense(tmp_path).model, calibration=TEXTS, tokenizer=tokenizer, settings=SMALL, progress=False
    )
    assert same_model(model, given)


def test_one_window_is_enough(tiny_dense, tokens):
    assert fit(tiny_dense(), tokens(1, 8)).report["tokens"] == 8


# Mistakes


def test_texts_without_a_tokenizer_are_refused(tiny_dense):
    with pytest.raises(ConfigError, match="calibration texts need a tokenizer; pass tokenizer="):
        bankwise.upcycle(tiny_dense(), calibration=TEXTS)


@pytest.mark.parametrize(
    "windows",
    [torch.rand(2, 8), *(torch.zeros(shape, dtype=torch.long) for shape in ((8,), (2, 1), (0, 8)))],
    ids=lambda windows: f"{tuple(windows.shape)}-{windows.dtype}",
)
def test_tensors_that_are_no_windows_are_refused(windows, tiny_dense):
    with pytest.raises(ConfigError, match=r"give token ids \[windows, length\]"):
        bankwise.upcycle(tiny_dense(), calibration=windows)


def test_rows_without_text_are_refused(tiny_dense, tokenizer):
    with pytest.raises(ConfigError, match="calibration rows have no column 'text'"):
        bankwise.upcycle(tiny_dense(), calibration=[{"content": "hello"}], tokenizer=tokenizer)


def test_a_short_text_makes_one_short_window(tiny_dense, tokenizer, caplog):
    windows = calibration_windows(["a short text"], tokenizer, CalibrationConfig(seq_len=512))
    assert windows.shape[0] == 1
    assert 2 <= windows.shape[1] < 512
    assert "less than one window of 512" in caplog.text


def test_text_without_tokens_is_refused(tokenizer):
    with pytest.raises(DataError, match="hold 0 tokens"):
        calibration_windows([""], tokenizer, CalibrationConfig())


def test_other_families_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(ModelLoadError, match="model type 'gpt2' cannot be upcycled; bankwise converts llama, mistral"):
        bankwise.upcycle(gpt2)


def test_a_sparse_model_is_not_upcycled_again(tiny_dense):
    sparse = bankwise.upcycle(tiny_dense(), progress=False)
    with pytest.raises(ModelLoadError, match="this model is sparse already"):
        bankwise.upcycle(sparse)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank_size": 60}, r"bank_size=60 does not divide the FFN width 256 .*; use bank_size=64"),
        ({"active_per_bank": [16] * 3}, "active_per_bank lists 3 layers, but the model has 2"),
        ({"dense_layers": [2]}, r"dense_layers=\[2\] do not exist: the model's layers are 0..1"),
    ],
)
def test_a_sparsity_that_does_not_fit_the_model_is_refused(settings, message, tiny_dense):
    with pytest.raises(ConfigError, match=message):
        bankwise.upcycle(tiny_dense(), SparsityConfig(**settings))


def test_another_activation_is_refused(tiny_dense):
    with pytest.raises(BankwiseError, match="hidden_act='gelu' is not a gated-SiLU"):
        bankwise.upcycle(tiny_dense(hidden_act="gelu"))


@pytest.mark.parametrize("with_windows", [True, False])
def test_ridge_is_refused_for_the_product_form(with_windows, tiny_dense, tokens):
    windows = tokens(2, 16) if with_windows else None
    with pytest.raises(ConfigError, match=r"init='ridge' fits predictor_form='linear' only; use 'svd_act'"):
        bankwise.upcycle(
            tiny_dense(),
            SparsityConfig(predictor_form="gated_product"),
            calibration=windows,
            settings=CalibrationConfig(init="ridge"),
        )
