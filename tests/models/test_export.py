"""A checkpoint opens where bankwise is not installed, with the same logits, and can be saved again from there."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

import bankwise
from bankwise import SparsityConfig
from bankwise.models.checkpoint import save_checkpoint
from bankwise.models.export import modeling_source

ELSEWHERE = """
import sys

class NoBankwise:
    def find_spec(self, name, path=None, target=None):
        if name == "bankwise" or name.startswith("bankwise."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoBankwise())
try:
    import bankwise
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("bankwise can be imported")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder, again = sys.argv[1:]
ids = torch.arange(40).view(2, 20)
load = {"trust_remote_code": True}
results = {}
for family in FAMILIES:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", **load)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        results[family] = model(ids).logits
        hidden = model.model(ids).last_hidden_state
    results[f"{family} text"] = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    model.save_pretrained(f"{again}/{family}")
    AutoTokenizer.from_pretrained(f"{folder}/{family}").save_pretrained(f"{again}/{family}")
    reloaded = AutoModelForCausalLM.from_pretrained(f"{again}/{family}", **load)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, results[family])
        base = AutoModel.from_pretrained(f"{again}/{family}", **load)
        assert type(base).__name__ == type(model.model).__name__
        assert torch.equal(base(ids).last_hidden_state, hidden)
    assert AutoConfig.from_pretrained(f"{again}/{family}", **load).sparsity == model.config.sparsity
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.predictor.reduce.weight.grad.abs().max() > 0
    assert not any(name.split(".")[0] == "bankwise" for name in sys.modules)
torch.save(results, f"{again}/results.pt")
"""
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def source():
    return modeling_source()


@torch.no_grad()
def test_checkpoints_open_and_run_without_bankwise(tiny_dense, tokenizer, tmp_path):
    models = {}
    for index, family in enumerate(FAMILIES):
        form = "linear" if index % 2 else "gated_product"
        sparsity = SparsityConfig(predictor_rank=16, predictor_form=form)
        models[family] = bankwise.upcycle(tiny_dense(family), sparsity, progress=False)
        save_checkpoint(models[family], tokenizer, tmp_path / "folder" / family)
    script = tmp_path / "elsewhere.py"
    script.write_text(f"FAMILIES = {FAMILIES}\n{ELSEWHERE}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "folder"), str(tmp_path / "again")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    results, ids = torch.load(tmp_path / "again" / "results.pt"), torch.arange(40).view(2, 20)
    for family, model in models.items():
        assert torch.equal(results[family], model(ids).logits)
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(results[f"{family} text"], expected)
        # What was saved without bankwise is an ordinary checkpoint for bankwise.
        loaded, _ = bankwise.models.checkpoint.load_checkpoint(tmp_path / "again" / family)
        assert type(loaded) is type(model)
        assert torch.equal(loaded(ids).logits, results[family])
        for folder in ("folder", "again"):
            assert (tmp_path / folder / family / "modeling_bankwise.py").read_text() == modeling_source()


def test_the_modelling_file_compiles_and_knows_no_bankwise(source):
    tree = ast.parse(source)
    compile(tree, "modeling_bankwise.py", "exec")
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "torch", "transformers"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def test_every_top_level_name_is_defined_once(source):
    defined = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign):
            defined += [target.id for target in node.targets if isinstance(target, ast.Name)]
    assert [name for name, count in Counter(defined).items() if count > 1] == []
    assert "BankwiseQwen3ForCausalLM" in defined
    assert "modeling_source" in defined  # saving from the exported file needs it


def test_every_family_can_be_found_from_its_config(tiny_dense, source, tmp_path):
    classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for family in FAMILIES:
        model = bankwise.upcycle(tiny_dense(family), SparsityConfig(predictor_rank=8), progress=False)
        model.save_pretrained(tmp_path / family)
        auto_map = json.loads((tmp_path / family / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        for target in auto_map.values():
            module, name = target.split(".")
            assert module == "modeling_bankwise"
            assert name in classes
