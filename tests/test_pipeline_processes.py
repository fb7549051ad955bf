"""`bankwise run` under torchrun: the files of two processes are those of one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training.tiny_run import tiny_recipe, without_time, write_model, write_texts
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import bankwise
from bankwise.errors import ConfigError

WITHOUT_TEXTS = """
import os
import sys
from bankwise import cli
from bankwise.data import sources

if os.environ["RANK"] != "0":
    def read(source):
        raise AssertionError(f"a process that is not the main one reads {source.path}")
    sources._read = read
sys.exit(cli.main(sys.argv[1:]))
"""
"""`bankwise` in which only the main process can read texts."""


def torchrun(recipe: dict[str, Any], file: Path, program: str) -> subprocess.CompletedProcess[str]:
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    file.with_suffix(".py").write_text(program, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(file.with_suffix(".py")), "run", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_processes_writes_what_one_process_writes(
    tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "dense", tiny_dense(), tokenizer)
    texts = write_texts(tmp_path / "texts")
    changes = {"stage": {"kd_weight": 0.5, "teacher": "companion", "aux_token_fraction": 0.5}}
    changes |= {"controls": ["dense_narrow"]}
    alone = bankwise.run(tiny_recipe(model, texts, tmp_path / "alone", **changes), quiet=True)
    recipe = tiny_recipe(model, texts, tmp_path / "together", **changes)
    finished = torchrun(recipe, tmp_path / "recipe.yaml", WITHOUT_TEXTS)
    assert finished.returncode == 0, finished.stderr[-4000:]

    together = tmp_path / "together"
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.folder.iterdir()}
    assert finished.stdout.count("checkpoint  ") == finished.stdout.count("loading ") == 1, finished.stdout
    rows, expected_rows = lines(together), lines(alone.folder)
    assert len(rows) == len(expected_rows)
    for key, expected in without_time(expected_rows).items():
        own = without_time(rows)[key]
        for name in ("tokens", "loss", "ce", "kd", "aux", "grad_norm", "lr"):
            assert own[name] == (expected[name] and pytest.approx(expected[name], rel=1e-5)), (key, name)
    summary = json.loads((together / "summary.json").read_text())
    for name in ("dense", "untrained", "companion", "dense_narrow", "sparse"):
        assert summary[name]["loss"] == pytest.approx(alone.summary[name]["loss"], rel=1e-5)
        assert summary[name]["tokens"] == alone.summary[name]["tokens"]
    assert summary["continuations"] == alone.summary["continuations"]


def test_stages_that_the_processes_cannot_share_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bankwise.run_checks.join_processes", lambda: 3)
    recipe = tiny_recipe(tmp_path / "no-model", tmp_path / "no-texts", tmp_path / "run")
    with pytest.raises(ConfigError, match="batch_tokens=64 cannot be shared by 3 processes"):
        bankwise.run(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
