"""The launch configurations that are shipped are ones that the tools read and that training accepts."""

import json
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from training.tiny_run import tiny_recipe
from transformers import PreTrainedModel

import bankwise
from bankwise.cli import _parser
from bankwise.errors import ConfigError
from bankwise.training.sharding import check_deepspeed, check_fsdp, check_sharding

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "recipes" / "launch"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
}


def fsdp_environment(config: dict[str, Any]) -> dict[str, str]:
    """As `accelerate launch` passes it on."""
    values = {name.upper(): str(value) for name, value in config.items()}
    return {"ACCELERATE_USE_FSDP": "true"} | values


def test_every_launch_file_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_launch_file(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8
    known = set(vars(launch_command_parser().parse_args(["script"])))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    if config.deepspeed_config:
        settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])
        check_deepspeed(settings)


def test_the_fsdp2_launch_file_is_accepted_and_others_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    for name, value in fsdp_environment(config).items():
        monkeypatch.setenv(name, value)
    check_fsdp(FullyShardedDataParallelPlugin())
    for name, value, message in (
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "SHARDED_STATE_DICT writes checkpoints in pieces"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "leaves the models of all processes but one empty"),
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(ConfigError, match=message):
                bankwise.run(tiny_recipe(tmp_path / "none", tmp_path / "none", tmp_path / "run"), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "has its own scheduler"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save: true"),
    ],
)
def test_a_deepspeed_config_that_contradicts_the_recipe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_deepspeed(json.loads((FOLDER / "zero2.json").read_text()) | changes)


def test_running_means_are_refused_where_processes_would_differ(sparse: Any) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    accelerator: Any = Namespace(state=Namespace(fsdp_plugin=plugin, deepspeed_plugin=None))
    model: PreTrainedModel = sparse()
    check_sharding(accelerator, model)
    with pytest.raises(ConfigError, match="running means"):
        check_sharding(accelerator, sparse(sparsity={"gate_mode": "default_ema"}))


def test_commands_of_the_launch_page_are_ones_that_the_tools_take() -> None:
    text = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith(("accelerate launch ", "torchrun "))]
    assert len(commands) >= 4
    for command in commands:
        start = command.index("bankwise.cli")
        options = _parser(with_fields=False).parse_args(command[start + 1 :])
        assert (ROOT / options.recipe).is_file(), options.recipe
        if command[0] == "accelerate":
            launch = launch_command_parser().parse_args(command[2:])
            assert launch.module
            assert (ROOT / launch.config_file).is_file()
