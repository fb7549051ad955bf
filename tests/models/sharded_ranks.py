"""One of two gloo processes that hold a model together; started by test_sharded.py, which reads `result-RANK.json`.

    python sharded_ranks.py FOLDER

FOLDER/models holds checkpoints. Differences are relative to the largest value of the tensor compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from bankwise.errors import ConfigError
from bankwise.ffn import record_routing, sparse_layers
from bankwise.processes import copy_whole

WORLD = 2


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gradient_difference(model: Any, reference: Any) -> float:
    worst = 0.0
    for (name, own), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (own.grad is None) == (expected.grad is None), name
        if own.grad is not None:
            worst = max(worst, difference(whole(own.grad), expected.grad))
    return worst


def same_files(folder: Path, reference: Any) -> bool:
    loaded, expected = load(folder).state_dict(), reference.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def tensor_parallel(folder: Path, saved: Path) -> dict[str, Any]:
    ids = torch.arange(40).view(2, 20)
    reference, model = load(folder), load(folder, distributed_config=DistributedConfig(tp_size=WORLD))
    with torch.no_grad():
        result = {"logits": difference(model(ids).logits, reference(ids).logits)}
    layer, expected = sparse_layers(model)[0], sparse_layers(reference)[0]
    hidden_TD = torch.randn(6, reference.config.hidden_size, generator=torch.Generator().manual_seed(0))
    own_TF = expected.active_mask(hidden_TD).chunk(WORLD, dim=-1)[dist.get_rank()]
    result["own_banks"] = torch.equal(layer.active_mask(hidden_TD), own_TF)
    result["generated"] = torch.equal(
        model.generate(ids[:1, :6], max_new_tokens=4), reference.generate(ids[:1, :6], max_new_tokens=4)
    )
    for one in (model, reference):
        one.train()(ids, labels=ids).loss.backward()
    result["gradients"] = gradient_difference(model, reference)
    model.save_pretrained(saved)
    result["saved"] = same_files(saved, reference)
    return result


def fsdp(folder: Path, saved: Path, *, with_tail: bool) -> dict[str, Any]:
    """`with_tail`: the embedding and the head in groups of their own too, as Accelerate and transformers wrap them."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(258, (WORLD, 20), generator=generator) for _ in range(2)]
    items = sum(batch[:, 1:].numel() for batch in batches)
    reference, model = load(folder).train(), load(folder).train()
    for layer in model.model.layers:
        fully_shard(layer)
    if with_tail:
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        if is_tied:
            fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], reshard_after_forward=False)
        else:
            fully_shard(model.model.embed_tokens)
            fully_shard(model.lm_head)
    fully_shard(model)
    for batch in batches:
        reference(batch, labels=batch, num_items_in_batch=items).loss.backward()
        own = batch[dist.get_rank() :][:1]
        (WORLD * model(own, labels=own, num_items_in_batch=items).loss).backward()
    result = {"gradients": gradient_difference(model, reference)}
    with torch.no_grad():
        ids = batches[0]
        result["logits"] = difference(model.eval()(ids).logits, reference.eval()(ids).logits)
        model(ids[:, :1])  # few enough tokens for the decode kernels
    result["repacked"] = any(layer.packed is not None for layer in sparse_layers(model))
    gathered = load(folder)
    for value in gathered.parameters():
        value.data.zero_()
    copy_whole(model, gathered)
    gathered.save_pretrained(saved)
    dist.barrier()
    result["saved"] = same_files(saved, reference)
    return result


def refusal(folder: Path, act: Any = lambda model: None) -> str:
    try:
        act(load(folder, distributed_config=DistributedConfig(tp_size=WORLD)))
    except ConfigError as error:
        return str(error)
    return ""


def record(model: Any) -> None:
    with record_routing(model):
        model(torch.arange(4)[None])


def train(model: Any) -> None:
    model.train()(torch.arange(4)[None], labels=torch.arange(4)[None])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models, saved = folder / "models", folder / "saved"
    results: dict[str, Any] = {}
    for name in sorted(path.name for path in models.iterdir() if not path.name.startswith("refused")):
        results[f"tp-{name}"] = tensor_parallel(models / name, saved / f"tp-{name}")
    for name in ("product", "linear", "tied"):
        for with_tail in (False, True):
            case = f"fsdp-{name}{'-tail' if with_tail else ''}"
            results[case] = fsdp(models / name, saved / case, with_tail=with_tail)
    results["refused"] = {
        "cut bank": refusal(models / "refused-banks"),
        "coupled banks": refusal(models / "refused-gate"),
        "recording": refusal(models / "product", record),
        "running mean": refusal(models / "refused-ema", train),
    }
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
