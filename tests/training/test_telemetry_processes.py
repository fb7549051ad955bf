"""Two processes read what one reads, write each line once, and do not wait for ever: under DDP, and sharded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import telemetry_worker

from bankwise.training import telemetry
from bankwise.training.probe import RoutingProbe

TIMES = {"step_seconds", "probe_seconds", "cost_share"}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    own = (Path(telemetry.__file__).parents[2], Path(telemetry_worker.__file__).parents[1])
    paths = [*map(str, own), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, telemetry_worker.__file__, str(folder)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_write_the_lines_of_one(two, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "MOST_COST", 0.9999)
    telemetry_worker.train(tmp_path)
    read = [
        [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
        for folder in (two, tmp_path)
    ]  # fmt: skip
    assert [line["step"] for line in read[0]] == [0, 2, 4]
    for line, expected in zip(*read, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for name in ("recall", "retained_energy", "margin", "usage_gini"):
            assert line[name] == pytest.approx(expected[name], abs=1e-4), name
        for kind in ("lm", "aux") if line["step"] else ():
            assert line["router_gradient"][kind] == pytest.approx(expected["router_gradient"][kind], rel=1e-3)
        assert line.keys() == expected.keys() >= TIMES


@torch.no_grad()
def test_a_sharded_model_is_read_like_a_whole_one(two):
    model = telemetry_worker.model()
    expected = RoutingProbe(telemetry_worker.WINDOWS[20:]).read(model, model, batch_size=2, loss_chunk=8)
    sharded = json.loads((two / "sharded.json").read_text())
    assert sharded.keys() == expected.keys()
    assert sharded["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name in ("recall", "retained_energy", "margin", "margin_p5", "dead"):
        assert sharded[name] == pytest.approx(expected[name], abs=1e-5), name
