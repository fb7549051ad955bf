"""The benchmark of the GPU kernels runs, and refuses to time a wrong answer."""

import pytest
import torch
from kernels.triton_cases import DEVICE

from bankwise.bench import bench_ffn_cuda
from bankwise.bench.shapes import Shape
from bankwise.cli import main
from bankwise.kernels import dispatch
from bankwise.kernels.triton import support

SHAPE = Shape(family="llama", hidden=32, ffn=128, layers=1, heads=2, kv_heads=2, rank=16)


def test_rows_of_a_tiny_layer():
    rows = bench_ffn_cuda(SHAPE, dtype=torch.float32, tokens=2, pairs=1)
    assert [row.baseline for row in rows] == ["torch-eager", "torch-fused", "op-all-channels"]
    for row in rows:
        assert (row.status, row.impl, row.device, row.tokens) == ("ok", "op", support.device_name(), 2)
        assert row.p50_ms > 0
        assert row.triton


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "run_packed", lambda layer, packed, x: torch.zeros_like(x))
    rows = bench_ffn_cuda(SHAPE, dtype=torch.float32, pairs=1)
    assert [(row.status, row.p50_ms) for row in rows] == [("wrong", 0.0)]


@pytest.mark.parametrize("arguments", [["decode"], ["ffn", "--int8"]])
def test_what_the_gpu_benchmark_does_not_measure(arguments, capsys):
    assert main(["bench", *arguments, "--device", "cuda"]) == 2
    assert "--device cuda measures `bench ffn` without --int8" in capsys.readouterr().err


def test_without_a_gpu_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(support, "unavailable", lambda: "no CUDA device is available")
    assert main(["bench", "ffn", "--device", "cuda"]) == 2
    assert "needs the Triton kernels: no CUDA device is available" in capsys.readouterr().err


def test_the_device_of_the_tests():
    assert support.decode_limits(forced=True).device == DEVICE
