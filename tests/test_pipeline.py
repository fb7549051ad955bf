"""A whole run on a tiny dense model: its files, its numbers, what it refuses, and resuming after an interruption."""

import errno
import json
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training.tiny_run import tiny_recipe, without_time, write_model, write_texts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import bankwise
from bankwise import pipeline
from bankwise.config import dump_recipe, load_recipe
from bankwise.errors import BankwiseError, ConfigError, DataError, ModelLoadError, TrainingError
from bankwise.pipeline import load_data
from bankwise.report import summary_table
from bankwise.report.folder import read_run
from bankwise.training import UpcyclingTrainer

FILES = {
    "recipe.yaml", "metrics.jsonl", "telemetry.jsonl", "upcycle.json", "summary.json", "report.html", "report.md",
    "checkpoint", "companion", "untrained",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_dense, tokenizer, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "dense", tiny_dense(), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture
def recipe(model, texts, tmp_path):
    """Factory of recipes as dicts; the output is a new folder."""
    return lambda **changes: tiny_recipe(model, texts, tmp_path / "run", **changes)


@pytest.fixture(scope="module")
def finished(model, texts, tmp_path_factory) -> bankwise.RunResult:
    """One run with distillation, routing loss and companion."""
    settings = tiny_recipe(model, texts, tmp_path_factory.mktemp("runs") / "run", stage={"kd_weight": 0.5})
    return bankwise.run(settings, quiet=True)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What a run leaves


def test_a_run_writes_these_files_and_no_others(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert finished.checkpoint == finished.folder / "checkpoint"
    assert finished.report == finished.folder / "report.html"
    assert json.loads((finished.folder / "summary.json").read_text()) == finished.summary
    assert "<html" in finished.report.read_text()


def test_the_summary_has_four_models_measured_on_the_same_windows(finished):
    summary = finished.summary
    assert {"dense", "untrained", "companion", "sparse", "closed", "provenance", "calibration"} <= set(summary)
    for name, tokens, active in (
        ("dense", 0, 1.0),
        ("untrained", 0, 0.25),
        ("companion", 256, 1.0),
        ("sparse", 256, 0.25),
    ):
        row = summary[name]
        assert (row["tokens"], row["active_fraction"], row["n"]) == (tokens, active, 4)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert set(row["by_source"]) == {"texts"}
    assert summary["sparse"]["loss"] < summary["untrained"]["loss"]
    assert summary["companion"]["loss"] < summary["dense"]["loss"]
    gap = summary["untrained"]["loss"] - summary["companion"]["loss"]
    assert summary["closed"] == pytest.approx((summary["untrained"]["loss"] - summary["sparse"]["loss"]) / gap)
    assert summary["continuations"]["prompt"] == "we the"
    assert {"model", "model_sha256", "seed", "versions", "git_revision", "seconds"} <= set(summary["provenance"])


def test_the_record_has_both_trainings_and_only_the_sparse_one_has_routing(finished):
    record = rows(finished.folder)
    assert [(row["model"], row["step"], row["tokens"]) for row in record] == [
        ("companion", 2, 128), ("companion", 4, 256), ("sparse", 2, 128), ("sparse", 4, 256),
    ]  # fmt: skip
    for row in record:
        is_sparse = row["model"] == "sparse"
        assert (row["aux"] is not None, row["recall"] is not None, row["kd"] > 0) == (is_sparse,) * 3


def test_the_routing_is_read_on_held_out_windows_of_the_sparse_model(finished, recipe):
    _, line = [json.loads(text) for text in (finished.folder / "telemetry.jsonl").read_text().splitlines()]
    assert (line["model"], line["step"], line["tokens"], line["probe_tokens"]) == ("sparse", 4, 256, 32)
    assert len(line["recall"]) == 2
    folder = bankwise.run(recipe(telemetry_steps=0, companion=False), quiet=True).folder
    assert not (folder / "telemetry.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    for field in ({"report_to": ["wandb"]}, {"trainer": {"report_to": "wandb"}}):
        with pytest.raises(ConfigError, match=r"report_to='wandb'.*pip install wandb"):
            bankwise.run(recipe(**field))
    assert not Path(recipe()["output"]).exists()


def test_checkpoints_open_as_ordinary_models_with_their_tokenizer(finished, texts):
    sparse = AutoModelForCausalLM.from_pretrained(finished.checkpoint)
    companion = AutoModelForCausalLM.from_pretrained(finished.folder / "companion")
    assert sparse.config.model_type == "bankwise_llama"
    assert sparse.config.sparsity["active_per_bank"] == 16
    assert type(companion) is LlamaForCausalLM
    assert AutoTokenizer.from_pretrained(finished.checkpoint)("we the")["input_ids"]
    untrained = load_file(finished.folder / "untrained" / "model.safetensors")
    trained = load_file(finished.checkpoint / "model.safetensors")
    assert untrained.keys() == trained.keys()
    assert not torch.equal(untrained["lm_head.weight"], trained["lm_head.weight"])


def test_evaluate_repeats_the_loss_of_the_summary_from_the_checkpoint(finished, texts):
    model = AutoModelForCausalLM.from_pretrained(finished.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(finished.checkpoint)
    plan = {"perplexity": {"data": [{"path": str(texts)}], "windows": 4, "seq_len": 32, "held_out_fraction": 0.2}}
    scores = bankwise.evaluate(model, tokenizer, ["perplexity"], plan=plan, progress=False)["perplexity"]
    assert scores["loss"] == pytest.approx(finished.summary["sparse"]["loss"], rel=1e-6)
    assert scores["active_fraction"] == 0.25


def test_the_saved_recipe_is_the_resolved_one_and_repeats_the_run(finished, tmp_path):
    saved = load_recipe(finished.folder / "recipe.yaml")
    assert saved.stages[0].batch_tokens == 64
    assert saved.sparsity.predictor_rank == 32
    again = bankwise.run(
        finished.folder / "recipe.yaml", overrides=[f"output={tmp_path / 'again'}"], quiet=True
    )  # fmt: skip
    for name in ("dense", "untrained", "companion", "sparse", "closed", "continuations"):
        assert again.summary[name] == finished.summary[name]
    assert without_time(rows(again.folder)) == without_time(rows(finished.folder))


def test_a_dict_a_file_and_a_recipe_object_give_the_same_run(recipe, tmp_path):
    settings = recipe(companion=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    changed = [f"output={tmp_path / 'file'}", "stages.0.tokens=128"]
    from_file = bankwise.run(path, overrides=changed, quiet=True)
    object_ = load_recipe(settings, [f"output={tmp_path / 'object'}", "stages.0.tokens=128"])
    from_object = bankwise.run(object_, quiet=True)
    from_dict = bankwise.run(settings, overrides=["stages.0.tokens=128"], quiet=True)
    assert settings == recipe(companion=False), "the caller's dict was changed"
    assert from_file.summary["sparse"] == from_object.summary["sparse"] == from_dict.summary["sparse"]
    assert from_file.summary["sparse"]["tokens"] == 128
    with pytest.raises(ConfigError, match="set the fields of the Recipe object"):
        bankwise.run(object_, overrides=["seed=1"])


# Variants


def test_without_a_stage_the_result_is_the_conversion(recipe):
    result = bankwise.run(recipe(stages=[]), quiet=True)
    assert result.summary["sparse"] == result.summary["untrained"]
    assert "companion" not in result.summary
    assert "closed" not in result.summary
    one, other = (load_file(result.folder / name / "model.safetensors") for name in ("checkpoint", "untrained"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert result.report.is_file()


def test_without_a_companion_there_is_none(recipe):
    result = bankwise.run(recipe(companion=False), quiet=True)
    assert {path.name for path in result.folder.iterdir()} == FILES - {"companion"}
    assert "companion" not in result.summary
    assert {row["model"] for row in rows(result.folder)} == {"sparse"}


def test_a_run_of_fewer_steps_than_log_steps_is_reported(recipe):
    result = bankwise.run(recipe(companion=False, stage={"log_steps": 50}), quiet=True)
    assert [row["step"] for row in rows(result.folder)] == [4]
    assert result.report.is_file()


def test_the_companion_can_be_the_teacher(recipe):
    kd = {}
    for teacher in ("companion", "dense"):
        stage = {"kd_weight": 1, "teacher": teacher, "lr": 1e-2, "log_steps": 1}
        result = bankwise.run(recipe(stage=stage), overwrite=True, quiet=True)
        kd[teacher] = {(row["model"], row["step"]): row["kd"] for row in rows(result.folder)}
        assert kd[teacher]["companion", 1] == 0 < kd[teacher]["sparse", 1]
    # Before any training of the student: only the teachers differ.
    assert kd["companion"]["sparse", 1] > 1.5 * kd["dense"]["sparse", 1]


def test_only_the_predictors_change_where_only_they_train(recipe):
    result = bankwise.run(recipe(companion=False, stage={"trains": "predictor", "predictor_lr": 1e-2}), quiet=True)
    before = load_file(result.folder / "untrained" / "model.safetensors")
    after = load_file(result.checkpoint / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".mlp.predictor." in name for name in changed)


def test_a_run_prints_its_progress_unless_quiet(recipe, capsys):
    bankwise.run(recipe())
    out = capsys.readouterr().out
    for words in (
        "loading",
        "upcycling dense",
        "retained energy",
        "companion, stage 0  step 2/4",
        "sparse, stage 0  step 4/4",
        "aux",
    ):
        assert words in out
    bankwise.run(recipe(), overwrite=True, quiet=True)
    assert capsys.readouterr().out == ""


# Controls

CONTROL_NAMES = ["random_predictor", "oracle_bank", "post_hoc", "dense_narrow"]


@pytest.fixture(scope="module")
def controlled(model, texts, tmp_path_factory) -> bankwise.RunResult:
    """A run with a predictor warm-up, a sparse stage, and controls of every kind."""
    settings = tiny_recipe(model, texts, tmp_path_factory.mktemp("runs") / "run", controls=CONTROL_NAMES[:2])
    warm_up = settings["stages"][0] | {"trains": "predictor", "tokens": 128, "aux_weight": 1.0}
    settings["stages"].insert(0, warm_up)
    first = bankwise.run(settings, quiet=True)
    assert set(first.summary) & set(CONTROL_NAMES) == {"random_predictor", "oracle_bank"}
    more = f"controls={json.dumps(CONTROL_NAMES)}"
    return bankwise.run(first.folder / "recipe.yaml", overrides=[more], resume=True, quiet=True)


def test_controls_are_rows_of_the_summary_and_folders_of_the_run(controlled):
    summary = controlled.summary
    for name, tokens, active, bytes_read in (
        ("companion", 256, 1.0, 1.0),
        ("sparse", 384, 0.25, None),
        ("random_predictor", 256, 0.25, None),
        ("oracle_bank", 256, 0.25, 1.0),
        ("post_hoc", 384, 0.25, None),
        ("dense_narrow", 256, 0.25, 0.25),
    ):
        row = summary[name]
        assert (row["tokens"], row["active_fraction"], row["n"]) == (tokens, active, 4)
        assert row["ffn_bytes_fraction"] == (bytes_read or summary["sparse"]["ffn_bytes_fraction"])
        folder = controlled.checkpoint if name == "sparse" else controlled.folder / name
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 261
    assert summary["companion"]["recall"] is summary["dense_narrow"]["recall"] is None
    assert summary["oracle_bank"]["recall"] == 1.0
    assert summary["random_predictor"]["recall"] == pytest.approx(0.25, abs=0.05)
    assert all(0.5 < summary[name]["recall"] < 1.0 for name in ("untrained", "sparse", "post_hoc"))


def test_lines_of_the_record_name_their_stage(controlled):
    places = [(row["model"], row["stage"], row["step"], row["tokens"]) for row in rows(controlled.folder)]
    assert places[:5] == [
        ("companion", "1", 2, 128), ("companion", "1", 4, 256),
        ("sparse", "0", 2, 128), ("sparse", "1", 2, 256), ("sparse", "1", 4, 384),
    ]  # fmt: skip
    assert len(read_run(controlled.folder).metrics) == len(places)


def test_the_oracle_learns_more_than_random_routing(controlled):
    summary = controlled.summary
    assert summary["oracle_bank"]["loss"] < summary["random_predictor"]["loss"]
    assert summary["post_hoc"]["loss"] != summary["untrained"]["loss"]


def test_controls_have_their_table_on_the_terminal_and_on_the_page(controlled):
    table = summary_table(controlled.summary)
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    for name in CONTROL_NAMES:
        row = controlled.summary[name]
        assert rows[name][1] == f"{row['loss']:.4f}"
        assert rows[name][5] == ("n/a" if row["recall"] is None else f"{row['recall']:.3f}")
        assert rows[name][-1] == f"{row['tokens']:,}"
    page = controlled.report.read_text()
    assert "<caption>Controls</caption>" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in CONTROL_NAMES)


def test_all_models_of_a_run_read_the_same_rows_in_the_same_order(recipe, monkeypatch):
    read: dict[str, list] = {}
    step = UpcyclingTrainer.training_step

    def watched(self, model, inputs, *args):
        read.setdefault(self.name, []).append(inputs["input_ids"])
        return step(self, model, inputs, *args)

    monkeypatch.setattr(UpcyclingTrainer, "training_step", watched)
    names = ["random_per_token", "oracle_global", "detached", "dense_narrow"]
    bankwise.run(recipe(controls=names), quiet=True)
    assert set(read) == {"companion", "sparse", *names}
    assert all(torch.equal(torch.cat(batches), torch.cat(read["sparse"])) for batches in read.values())


def test_one_model_is_in_memory_beside_the_dense_one(recipe, monkeypatch):
    made, alive = [], {}
    create = UpcyclingTrainer.__init__

    def watched(self, model, *args, **settings):
        alive[settings["name"]] = [name for name, seen in made if seen() is not None]
        made.append((settings["name"], weakref.ref(model)))
        create(self, model, *args, **settings)

    monkeypatch.setattr(UpcyclingTrainer, "__init__", watched)
    bankwise.run(recipe(controls=["dense_narrow", "detached", "random_fixed"]), quiet=True)
    assert list(alive) == ["companion", "sparse", "dense_narrow", "detached", "random_fixed"]
    assert not any(alive.values()), alive


def test_controls_may_grow_on_resume_and_nothing_that_is_done_is_trained_again(controlled, tmp_path):
    settings = load_recipe(controlled.folder / "recipe.yaml", [f"output={tmp_path / 'whole'}"])
    assert settings.controls == CONTROL_NAMES
    whole = bankwise.run(settings, quiet=True)
    for name in ("dense", "untrained", "companion", "sparse", *CONTROL_NAMES):
        assert whole.summary[name] == controlled.summary[name]
    # A model that was trained twice would have its lines twice.
    assert [row["model"] for row in rows(controlled.folder)] == [row["model"] for row in rows(whole.folder)]


@pytest.mark.parametrize("change", [["controls=[oracle_bank]"], ["controls=[]"], ["seed=3"]], ids=str)
def test_a_resumed_run_keeps_its_controls_and_everything_else(controlled, change):
    before = (controlled.folder / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match="only its controls may grow"):
        bankwise.run(controlled.folder / "recipe.yaml", overrides=change, resume=True, quiet=True)
    assert (controlled.folder / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("name", ["untrained", "companion", "checkpoint"])
def test_a_damaged_model_is_named_and_not_gone_on_from(finished, tmp_path, name):
    settings = load_recipe(finished.folder / "recipe.yaml", [f"output={tmp_path / 'run'}"])
    folder = Path(shutil.copytree(finished.folder, settings.output))
    (folder / "recipe.yaml").write_text(dump_recipe(settings))
    weights = folder / name / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{folder / name} is damaged \(model.safetensors: sha256 differs\); delete"):
        bankwise.run(settings, resume=True, quiet=True)
    (folder / name / "manifest.json").unlink()
    bankwise.run(settings, resume=True, quiet=True)
    assert weights.read_bytes() == content


def test_an_interrupted_control_goes_on_from_its_checkpoint(recipe, tmp_path, monkeypatch):
    changes = {"stage": {"save_steps": 2}, "controls": ["random_fixed"], "companion": False}
    whole = bankwise.run(recipe(**changes, output=str(tmp_path / "whole")), quiet=True)
    settings = recipe(**changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "random_fixed", passes=5)
        with pytest.raises(KeyboardInterrupt):
            bankwise.run(settings, quiet=True)
    interrupt_after(monkeypatch, "random_fixed", passes=4)  # two steps of two passes are left
    resumed = bankwise.run(settings, resume=True, quiet=True)
    assert resumed.summary["random_fixed"] == whole.summary["random_fixed"]
    assert without_time(rows(resumed.folder)) == without_time(rows(whole.folder))


# Data


def test_no_held_out_text_is_trained_on(recipe, tokenizer, monkeypatch):
    trained = []
    step = UpcyclingTrainer.training_step

    def watched(self, model, inputs, *args):
        trained.append((self.name, inputs["input_ids"]))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(UpcyclingTrainer, "training_step", watched)
    settings = recipe(stage={"tokens": 2048})
    bankwise.run(settings, quiet=True)
    by_model = {
        name: torch.cat([ids for who, ids in trained if who == name]) for name in ("sparse", "companion")
    }  # fmt: skip
    assert torch.equal(by_model["sparse"], by_model["companion"])
    data = load_data(load_recipe(settings), tokenizer)
    rows = data.rows(0)
    assert torch.equal(by_model["sparse"].view(len(rows), -1), torch.stack([row["input_ids"] for row in rows]))

    def pieces(windows_WS):
        # 16 bytes hold a document's own name and place, or reach one.
        return {tuple(piece) for piece in windows_WS.unfold(1, 16, 1).flatten(0, 1).tolist()}

    held_out = pieces(data.held_out["texts"])
    assert len(held_out) > 50
    assert not held_out & pieces(by_model["sparse"].view(len(rows), -1))
    assert not held_out & pieces(data.calibration)
    assert len(torch.unique(data.held_out["texts"], dim=0)) == 4


# Refusals


def test_a_folder_with_files_is_refused_and_left_alone(recipe):
    settings = recipe()
    folder = Path(settings["output"])
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for options, words in (
        ({}, "already holds files; continue that run with --resume"),
        ({"resume": True}, "was started with another recipe"),
        ({"overwrite": True}, "is not the folder of a run"),
        ({"overwrite": True, "resume": True}, "exclude each other"),
    ):
        with pytest.raises(ConfigError, match=words):
            bankwise.run(settings, quiet=True, **options)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(recipe):
    settings = recipe(stages=[])
    Path(settings["output"]).mkdir()
    assert bankwise.run(settings, quiet=True).report.is_file()


def test_resuming_with_another_recipe_is_refused(finished):
    before = (finished.folder / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=r"another recipe.*recipe\.yaml"):
        bankwise.run(finished.folder / "recipe.yaml", overrides=["stages.0.lr=0.5"], resume=True, quiet=True)
    assert (finished.folder / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("key", ["model", "data", "data of a stage", "hub data", "working folder"])
def test_overwrite_never_deletes_what_the_run_needs(finished, recipe, key, monkeypatch):
    inside = str(finished.folder / "companion")
    settings = recipe(output=str(finished.folder))
    if key == "working folder":
        monkeypatch.chdir(inside)
    elif key == "data of a stage":
        settings["stages"][0]["data"] = [{"path": inside}]
    else:
        prefix = "hf:" if key == "hub data" else ""
        settings["model" if key == "model" else "data"] = inside if key == "model" else [{"path": prefix + inside}]
    with pytest.raises(ConfigError, match="overwrite would delete"):
        bankwise.run(settings, overwrite=True, quiet=True)
    assert {path.name for path in finished.folder.iterdir()} == FILES


def test_training_does_not_overwrite_the_checkpoint_that_it_starts_from(finished, recipe):
    with pytest.raises(ConfigError, match=r"overwrite would delete .*checkpoint"):
        bankwise.train(load_recipe(recipe(output=str(finished.folder))), finished.checkpoint, overwrite=True)
    assert (finished.checkpoint / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "no/such/model"}, ModelLoadError, "no/such/model does not exist"),
        ({"data": [{"path": "no/such/text.txt"}]}, DataError, "no/such/text.txt does not exist"),
        ({"data": [{"path": "text.pdf"}]}, DataError, "text.pdf does not exist"),
        ({"eval": {"windows": 1000, "seq_len": 64}}, DataError, "ask for fewer"),
        ({"stage": {"trains": "predictor"}}, ConfigError, "companion: false"),
        ({"stages": [], "controls": ["post_hoc"]}, ConfigError, "no stages"),
        ({"trainer": {"optim": "adafactor"}}, ConfigError, "trainer sets optim, which"),
        ({"trainer": {"save_only_model": True}}, ConfigError, "trainer sets save_only_model, which"),
        ({"trainer": {"eval_strategy": "steps"}}, ConfigError, "trainer sets eval_strategy, which"),
        ({"trainer": {"accelerator_config": {"split_batches": True}}}, ConfigError, "sets split_batches"),
        ({"trainer": {"save_step": 5}}, ConfigError, "no training argument 'save_step'"),
        ({"sparsity": {"center": "ema"}, "controls": ["oracle_bank"]}, ConfigError, "center='ema'"),
    ],
)
def test_what_cannot_work_leaves_nothing_behind(recipe, change, error, words):
    settings = recipe(**change)
    with pytest.raises(error, match=words):
        bankwise.run(settings, quiet=True)
    assert not Path(settings["output"]).exists()


def test_a_failed_overwrite_keeps_the_earlier_run(recipe):
    settings = recipe(stages=[])
    first = bankwise.run(settings, quiet=True)
    with pytest.raises(ModelLoadError):
        bankwise.run(settings | {"model": "no/such/model"}, overwrite=True, quiet=True)
    assert json.loads((first.folder / "summary.json").read_text()) == first.summary


def test_overwrite_follows_a_link(recipe, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    settings = recipe(stages=[], output=str(tmp_path / "link"))
    bankwise.run(settings, quiet=True)
    (tmp_path / "scratch" / "old.txt").write_text("old")
    bankwise.run(settings, overwrite=True, quiet=True)
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "scratch" / "old.txt").exists()
    assert (tmp_path / "scratch" / "summary.json").is_file()


def test_a_disk_that_is_full_at_the_conversion_is_named(recipe, monkeypatch):
    def full(model, tokenizer, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "save_checkpoint", full)
    with pytest.raises(TrainingError, match=r"untrained could not be written .No space left on device.; free some"):
        bankwise.run(recipe(), quiet=True)


def test_an_output_that_cannot_be_a_folder_is_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    for output, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot be created")):
        with pytest.raises(ConfigError, match=words):
            bankwise.run(recipe(output=str(output)), quiet=True)


# Resuming


def interrupt_after(monkeypatch, name: str, passes: int) -> None:
    """The next run is interrupted in the training of `name` once it has made this many passes."""
    step, made = UpcyclingTrainer.training_step, []

    def interrupted(self, *args):
        if self.name == name:
            if len(made) == passes:
                raise KeyboardInterrupt
            made.append(None)
        return step(self, *args)

    monkeypatch.setattr(UpcyclingTrainer, "training_step", interrupted)


def test_an_interrupted_run_resumes_to_the_same_end_bit_for_bit(recipe, tmp_path, monkeypatch):
    stage = {"tokens": 384, "save_steps": 2, "log_steps": 3, "kd_weight": 0.5, "teacher": "companion"}
    whole = bankwise.run(recipe(stage=stage, output=str(tmp_path / "whole")), quiet=True)
    settings = recipe(stage=stage)
    for name in ("companion", "sparse"):
        with monkeypatch.context() as patch:
            interrupt_after(patch, name, passes=7)
            with pytest.raises(KeyboardInterrupt):
                bankwise.run(settings, resume=Path(settings["output"]).exists(), quiet=True)
        assert (Path(settings["output"]) / "training" / name / "stage-0" / "checkpoint-2").is_dir()
        assert not (Path(settings["output"]) / "summary.json").exists()
    step, made = UpcyclingTrainer.training_step, []

    def counted(self, *args):
        made.append(self.name)
        return step(self, *args)

    monkeypatch.setattr(UpcyclingTrainer, "training_step", counted)
    resumed = bankwise.run(settings, resume=True, quiet=True)
    assert made == ["sparse"] * 8, "steps 3 to 6, of two passes each, are what was left"
    for name in ("dense", "untrained", "companion", "sparse", "closed", "continuations"):
        assert resumed.summary[name] == whole.summary[name]
    assert without_time(rows(resumed.folder)) == without_time(rows(whole.folder))
    for name in ("checkpoint", "companion", "untrained"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (resumed.folder, whole.folder))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_run_interrupted_before_its_first_checkpoint_starts_its_training_again(recipe, monkeypatch):
    settings = recipe(companion=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "sparse", passes=3)
        with pytest.raises(KeyboardInterrupt):
            bankwise.run(settings, quiet=True)
    resumed = bankwise.run(settings, resume=True, quiet=True)
    assert set(without_time(rows(resumed.folder))) == {("sparse", 128), ("sparse", 256)}
    assert {path.name for path in resumed.folder.iterdir()} == FILES - {"companion"}


@pytest.mark.parametrize("harm", ["kill", "full disk"])
def test_a_run_that_ends_while_its_model_is_saved_trains_nothing_again(recipe, monkeypatch, harm):
    settings = recipe(companion=False)
    save = pipeline.save_checkpoint

    def harmed(model, tokenizer, target):
        if target.name == "checkpoint":
            raise KeyboardInterrupt if harm == "kill" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(model, tokenizer, target)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_checkpoint", harmed)
        error, words = KeyboardInterrupt, None
        if harm == "full disk":
            error, words = TrainingError, "checkpoint could not be written .No space left on device.; free some space"
        with pytest.raises(error, match=words):
            bankwise.run(settings, quiet=True)
    interrupt_after(monkeypatch, "sparse", passes=0)
    resumed = bankwise.run(settings, resume=True, quiet=True)
    assert set(without_time(rows(resumed.folder))) == {("sparse", 128), ("sparse", 256)}
    assert {path.name for path in resumed.folder.iterdir()} == FILES - {"companion"}


def test_resuming_a_finished_run_trains_nothing_and_measures_the_same(recipe, monkeypatch):
    settings = recipe()
    first = bankwise.run(settings, quiet=True)
    interrupt_after(monkeypatch, "sparse", passes=0)
    again = bankwise.run(settings, resume=True, quiet=True)
    for name in ("dense", "untrained", "companion", "sparse", "closed"):
        assert again.summary[name] == first.summary[name]


def test_a_rope_change_reaches_models_that_skip_its_stage_and_models_that_are_loaded_again(recipe, monkeypatch):
    settings = recipe(controls=["dense_narrow"])
    (stage,) = settings["stages"]
    stage |= {"seq_len": 256, "batch_tokens": 256, "teacher": "companion", "kd_weight": 0.5}
    rope = {"trains": "predictor", "aux_weight": 1.0, "kd_weight": 0.0, "rope": {"kind": "theta", "theta": 5e4}}
    settings["stages"].insert(0, stage | rope)
    first = bankwise.run(settings, quiet=True)
    for name in ("checkpoint", "companion", "dense_narrow"):
        config = AutoConfig.from_pretrained(first.folder / name)
        assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (256, 5e4)
    interrupt_after(monkeypatch, "sparse", passes=0)
    again = bankwise.run(settings, resume=True, quiet=True)
    for name in ("companion", "sparse", "dense_narrow"):
        assert again.summary[name] == first.summary[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": {}}, r"stages.0: seq_len=256 is longer than the model's context of 128"),
        ({"kd_weight": 1.0}, r"stages.0: .* context of the dense teacher, 128"),
    ],
    ids=["rows", "teacher"],
)
def test_rows_that_a_model_cannot_place_are_refused_before_the_conversion(recipe, finished, change, words):
    stage = {"seq_len": 256, "batch_tokens": 256, "rope": {"kind": "theta", "theta": 5e4}} | change
    settings = load_recipe(recipe(stage=stage))
    with pytest.raises(ConfigError, match=words):
        bankwise.run(settings, quiet=True)
    with pytest.raises(ConfigError, match=words):
        bankwise.train(settings, finished.folder / "untrained", quiet=True)
    assert not Path(settings.output).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": [{"path": "nowhere.txt"}]}, "nowhere.txt does not exist"),
        ({"data": [{"path": "package:pydoc", "min_tokens": "1M"}]}, "no training document of min_tokens=1000000"),
        ({"trains": "layer: 9"}, r"stages.1: trains='layer: 9', but the model has layers 0 to 1"),
        ({"trains": "predictor", "k_schedule": "dense", "aux_weight": 1, "aux_weight_end": 0}, r"stages.1 trains only"),
    ],
    ids=["source", "lengths", "layer", "no loss"],
)
def test_a_mistake_in_a_later_stage_is_refused_before_the_conversion(recipe, change, words):
    settings = recipe()
    settings["stages"].append(settings["stages"][0] | change)
    with pytest.raises(BankwiseError, match=words):
        bankwise.run(settings, quiet=True)
    assert not Path(settings["output"]).exists()


# train


def test_train_gives_the_checkpoint_of_the_whole_run(finished, tmp_path):
    settings = load_recipe(finished.folder / "recipe.yaml", [f"output={tmp_path / 'train'}"])
    folder = bankwise.train(settings, finished.folder / "untrained", quiet=True)
    one, other = (load_file(path / "checkpoint" / "model.safetensors") for path in (folder, finished.folder))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "telemetry.jsonl", "checkpoint", "started_from.json",
    }  # fmt: skip
    assert bankwise.train(settings, finished.folder / "untrained", resume=True, quiet=True) == folder
    with pytest.raises(ConfigError, match=r"began from .*untrained, and .*checkpoint is another checkpoint"):
        bankwise.train(settings, finished.checkpoint, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": []}, "no stages"),
        ({"stage": {"kd_weight": 1, "teacher": "companion"}}, "teacher='companion' needs"),
    ],
)
def test_train_refuses_a_recipe_without_its_stage_or_teacher(finished, recipe, change, words):
    with pytest.raises(ConfigError, match=words):
        bankwise.train(load_recipe(recipe(**change)), finished.folder / "untrained")


def test_train_needs_a_sparse_checkpoint(recipe, model):
    settings = recipe()
    with pytest.raises(ModelLoadError, match="holds no sparse checkpoint"):
        bankwise.train(load_recipe(settings), model)
    assert not Path(settings["output"]).exists()
