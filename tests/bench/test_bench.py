"""`bankwise bench` on tiny shapes: what is measured and written, never how long it took."""

import csv

import pytest
import torch

from bankwise.bench import bench_decode, bench_ffn, bench_prefill, bench_train_step, shapes
from bankwise.bench import ffn as ffn_module
from bankwise.bench.shapes import Shape, named_shape
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


@pytest.mark.parametrize("weights", ["as_is", "int8"])
def test_decode_rows(weights):
    impl = "sparse" if weights == "as_is" else "sparse-int8"
    rows = bench_decode(TINY, dtype=torch.float32, pairs=2, weights=weights)
    assert ran(rows) == [(impl, "hf-dense"), (impl, "op-dense"), (impl, "share outside operators")]
    assert 0 < rows[-1].ratio_p50 < 1


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
        (["ffn", "--pairs", "0"], "pairs=0 must be at least 1"),
        (["ffn", "--threads", "0"], "threads=0 must be at least 1"),
    ],
)
def test_mistakes(arguments, words, capfd):
    assert main(["bench", *arguments]) == 2
    assert words in capfd.readouterr().err
    with pytest.raises(ConfigError, match="use one of"):
        named_shape("none")
