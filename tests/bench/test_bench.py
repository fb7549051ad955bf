"""`bankwise bench` on tiny shapes: what is measured and written, never how long it took."""

import csv
import json

import pytest
import torch

from bankwise.bench import (
    bench_crossover,
    bench_decode,
    bench_ffn,
    bench_prefill,
    bench_train_step,
    crossover_of,
    llama_cpp_baseline,
    shapes,
)
from bankwise.bench import decode as decode_module
from bankwise.bench import ffn as ffn_module
from bankwise.bench.results import BenchResult
from bankwise.bench.shapes import Shape, named_shape, random_model
from bankwise.bench.timing import Timing, interleave, quantiles
from bankwise.cli import main
from bankwise.errors import ConfigError

TINY = Shape(family="qwen2", hidden=64, ffn=256, layers=2, heads=4, kv_heads=2, rank=16, vocab=300)


def ran(results):
    assert all(row.status == "ok" and row.p50_ms > 0 for row in results)
    assert all(row.commit and row.utc and row.torch and row.isa and row.threads for row in results)
    return [(row.impl, row.baseline) for row in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ffn_rows(dtype):
    rows = bench_ffn(TINY, dtype=dtype, tokens=3, pairs=2, compiled=False)
    assert ran(rows) == [("op", name) for name in ("torch-eager", "torch-fused", "op-all-channels", "stream")]
    assert {(row.D, row.F, row.R, row.tokens, row.pairs) for row in rows} == {(64, 256, 16, 3, 2)}


def test_ffn_int8_rows():
    rows = bench_ffn(TINY, pairs=2, compiled=False, int8=True)
    assert ran(rows)[-1] == ("op-int8", "op-bfloat16")


def test_an_operator_that_is_wrong_is_a_row_and_not_timed(monkeypatch):
    monkeypatch.setattr(ffn_module.dispatch, "run_packed", lambda layer, packed, x: torch.zeros_like(x))
    (row,) = bench_ffn(TINY, pairs=2, compiled=False)
    assert row.status == "wrong"
    assert "relative error 1.00e+00" in row.reason
    assert row.p50_ms == 0


@pytest.fixture
def no_llama_cpp(monkeypatch):
    monkeypatch.setattr(llama_cpp_baseline.importlib.util, "find_spec", lambda name: None)


needs_llama_cpp = pytest.mark.skipif(
    llama_cpp_baseline.unavailable("llama") is not None, reason=str(llama_cpp_baseline.unavailable("llama"))
)


@pytest.mark.parametrize("weights", ["as_is", "int8"])
def test_decode_rows(weights, monkeypatch):
    monkeypatch.setattr(llama_cpp_baseline, "unavailable", lambda family: "not asked for")
    impl = "sparse" if weights == "as_is" else "sparse-int8"
    rows = bench_decode(TINY, dtype=torch.float32, pairs=2, weights=weights)
    skipped = rows.pop(2)
    assert (skipped.baseline, skipped.status, skipped.reason) == ("llama.cpp", "skipped", "not asked for")
    assert ran(rows) == [(impl, "hf-dense"), (impl, "op-dense"), (impl, "share outside operators")]
    assert 0 < rows[-1].ratio_p50 < 1


def test_without_llama_cpp_its_row_says_what_to_install(no_llama_cpp, monkeypatch, capsys):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    assert main(["bench", "decode", "--shape", "tiny", "--pairs", "1"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "llama.cpp" in line)
    assert line.split()[:3] == ["sparse", "llama.cpp", "skipped:"]
    assert 'llama-cpp-python and gguf not installed; pip install "bankwise[bench]"' in line
    assert main(["env"]) == 0
    assert "llama.cpp     llama-cpp-python and gguf not installed" in capsys.readouterr().out


def test_a_family_without_a_gguf_layout_is_named():
    if llama_cpp_baseline.unavailable("llama") is None:
        assert "no GGUF layout for the family 'qwen3'" in llama_cpp_baseline.unavailable("qwen3")


def tiny_dense(family, dtype):
    """Biases and norms that are not the identity, and weights large enough for the attention to matter."""
    model = random_model(Shape(family=family, hidden=128, ffn=256, layers=2, heads=4, kv_heads=2, rank=16, vocab=300),
                         torch.float32, None)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + float("norm" in name))
    return model.to(dtype)


@pytest.mark.parametrize("family", llama_cpp_baseline.FAMILIES)
@torch.no_grad()
def test_the_gguf_file_holds_the_same_model(family, tmp_path):
    """transformers, which reads GGUF on its own, gives the same logits."""
    from transformers import AutoModelForCausalLM

    model = tiny_dense(family, torch.bfloat16)
    llama_cpp_baseline.write_gguf(model, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = model.float()(ids).logits
    # Its product with packed matrices rounds; rows in a wrong order would give about 1.
    assert (read(ids).logits - expected).square().mean() < 0.01**2 * expected.square().mean()


@needs_llama_cpp
@pytest.mark.parametrize("family", llama_cpp_baseline.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_llama_cpp_computes_the_same_model(family, dtype):
    model = tiny_dense(family, dtype)
    ids = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[0]
    with llama_cpp_baseline.loaded(model, 16) as llama:
        assert decode_module._differs(llama, model, ids) is None
        # Token by token, and again after the cache was cropped, as it is timed.
        for _ in range(2):
            llama.crop(0)
            for place, token in enumerate(ids[0].tolist()):
                logits = torch.from_numpy(llama.append([token]).copy())
                assert (logits - expected[place]).square().mean() < 0.05**2 * expected[place].square().mean()
        llama.decoder(ids[0].tolist(), 3)()
        assert llama.length == 12
        wrong = tiny_dense(family, dtype)
        wrong.model.layers[1].self_attn.q_proj.weight.mul_(-1)
        assert "logits differ from those of hf-dense" in decode_module._differs(llama, wrong, ids)


@needs_llama_cpp
def test_decode_rows_with_llama_cpp():
    rows = bench_decode(TINY, pairs=1)
    assert [baseline for _, baseline in ran(rows)] == ["hf-dense", "op-dense", "llama.cpp", "share outside operators"]


@needs_llama_cpp
def test_llama_cpp_that_computes_another_model_is_a_row_and_not_timed(monkeypatch):
    monkeypatch.setattr(llama_cpp_baseline, "_interleaved", lambda weight, head: weight)
    monkeypatch.setattr(decode_module, "_LLAMA_ERROR", 1e-6)
    (row,) = (row for row in bench_decode(TINY, pairs=1) if row.baseline == "llama.cpp")
    assert (row.status, row.p50_ms) == ("wrong", 0)


def test_crossover_rows_and_what_dispatch_makes_of_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    rows = bench_crossover(TINY, dtype=torch.float32, pairs=1)
    assert ran(rows) == [("op", "masked-dense")] * 8
    assert [row.tokens for row in rows] == list(range(1, 9))
    assert not list(tmp_path.rglob("crossover.json"))
    assert main(["bench", "crossover", "--shape", "tiny", "--pairs", "1", "--save"]) == 0
    ((key, tokens),) = json.loads((tmp_path / "kernels/crossover.json").read_text()).items()
    assert key.endswith("bfloat16, 64 x 256")
    assert f"crossover: the operator takes up to {tokens} tokens at once" in capsys.readouterr().out


def test_the_crossover_is_the_last_count_before_the_operator_loses():
    def rows(*ratios):
        return [BenchResult(bench="crossover", impl="op", tokens=i, ratio_p50=r) for i, r in enumerate(ratios, start=1)]

    assert crossover_of(rows(3.0, 1.5, 1.0, 0.9, 1.2)) == 3
    assert crossover_of(rows(2.0, 1.1)) == 2
    assert crossover_of(rows(0.5, 2.0)) == 1


def test_prefill_and_train_step_rows():
    assert ran(bench_prefill(TINY, dtype=torch.float32, tokens=12, pairs=1)) == [
        ("sparse", "hf-dense"),
        ("sparse", "sparse-unpacked"),
    ]
    assert ran(bench_train_step(TINY, tokens=16, pairs=1)) == [("sparse", "hf-dense")]


def test_pairs_alternate_and_ratios_are_of_neighbours():
    calls = []
    timings = interleave(lambda: calls.append("op"), {"base": lambda: calls.append("base")}, pairs=4, min_seconds=0.0)
    assert len(timings["base"].seconds) == len(timings["base"].base_seconds) == 4
    # Four calls of each to find the repeats, then six pairs in alternating order.
    assert calls[8:] == ["base", "op", "op", "base"] * 3
    assert Timing([1.0, 2.0], [3.0, 8.0]).ratios() == [3.0, 4.0]
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert quantiles([float(i) for i in range(11)]) == (1.0, 5.0, 9.0)


def test_the_command_prints_and_writes_the_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    path = tmp_path / "rows.csv"
    arguments = ["bench", "ffn", "--shape", "tiny", "--pairs", "2", "--no-compile", "--csv", str(path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert [row["baseline"] for row in rows] == ["torch-eager", "torch-fused", "op-all-channels", "stream"]
    assert all(row["baseline"] in out for row in rows)
    assert {"commit", "utc", "isa", "threads", "p10_ms", "ratio_p50", "bytes", "status", "reason"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ffn", "--shape", "gpt-5"], "shape 'gpt-5' is not known; use one of"),
        (["ffn", "--tokens", "9"], "tokens=9 does not fit"),
        (["decode", "--tokens", "2"], "tokens=2 does not fit"),
        (["crossover", "--tokens", "2"], "tokens=2 does not fit"),
        (["ffn", "--save"], "--save keeps what `bench crossover` measures"),
        (["ffn", "--pairs", "0"], "pairs=0 must be at least 1"),
        (["ffn", "--threads", "0"], "threads=0 must be at least 1"),
    ],
)
def test_mistakes(arguments, words, capfd):
    assert main(["bench", *arguments]) == 2
    assert words in capfd.readouterr().err
    with pytest.raises(ConfigError, match="use one of"):
        named_shape("none")
