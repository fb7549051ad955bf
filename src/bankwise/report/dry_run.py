"""The budget of a run, as text for a terminal and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bankwise.config import Stage
from bankwise.dry_run import RunBudget, StageBudget
from bankwise.report.formats import count, short_count
from bankwise.report.table import Table
from bankwise.training.memory import Memory

_SHARDINGS = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
_PARTS = {
    "weights": "weights (float32)",
    "gradients": "gradients",
    "optimizer": "AdamW states",
    "buckets": "gradients in transit",
    "teacher": "teacher",
    "copies": "matrices as read",
    "activations": "activations",
    "temporaries": "temporaries",
}
_NOTES = (
    "Memory is the peak of a step of the sparse model, by formula. The CUDA context, NCCL and fragmentation come on\n"
    "top (1 to 3 GB), and so do other models that the run still holds on the device.",
    "FLOPs are those of matrix products. Attention counts whole rows; packed documents do less. A teacher counts with\n"
    "its student.",
)


def dry_run_text(budget: RunBudget) -> str:
    """The budget as a few tables, at most 120 columns wide for four stages."""
    parts = [_head(budget)]
    if budget.stages:
        parts += [_stage_table(budget).text(), *_memory_tables(budget), _flops_table(budget).text()]
    parts += [_disk(budget), *_NOTES, "Nothing was loaded or written."]
    return "\n\n".join(parts)


def dry_run_values(budget: RunBudget) -> dict[str, Any]:
    """The budget as plain values, with the totals."""
    values = asdict(budget) | {"flops": budget.flops, "seconds": budget.seconds(sum(budget.flops.values()))}
    for stage, own in zip(values["stages"], budget.stages, strict=True):
        stage["total_flops"] = own.total_flops
        for sharding, memory in own.memory.items():
            stage["memory"][sharding]["total"] = memory.total
    return values


def _head(budget: RunBudget) -> str:
    sparsity = budget.sparsity
    active = sparsity.active_per_bank
    kept = f"{active}" if isinstance(active, int) else f"{min(active)} to {max(active)}"
    dense, added = budget.dense_parameters, budget.predictor_parameters
    rows = {
        "model": budget.model,
        "shape": budget.origin,
        "parameters": f"dense {_amount(dense)}, predictors {_amount(added)} ({added / dense:.1%} more)",
        "channels": f"{kept} of {sparsity.bank_size} active, gate {sparsity.gate_mode}, {sparsity.predictor_form}",
        "processes": f"{budget.processes}, one device each",
    }
    if budget.device_flops:
        rows["speed"] = f"{budget.device_flops / 1e12:g} TFLOPS per device, as stated"
    return "\n".join(f"{name:11} {text}" for name, text in rows.items())


def _stage_table(budget: RunBudget) -> Table:
    def row(name: str, value: Any) -> tuple[str, ...]:
        return (name, *(value(own) for own in budget.stages))

    def rates(stage: Stage) -> str:
        return f"{stage.lr:g} / {stage.predictor_lr:g}"

    rows = [
        row("trains", lambda own: own.stage.trains),
        row("active channels", lambda own: own.stage.k_schedule),
        row("tokens", lambda own: _amount(own.tokens)),
        row("steps", lambda own: count(own.steps)),
        row("tokens of a step", lambda own: _amount(int(own.stage.batch_tokens))),
        row("rows", lambda own: count(own.rows)),
        row("tokens of a row", lambda own: count(own.stage.seq_len)),
        row("context", lambda own: count(own.context)),
        row("rows x passes per process", lambda own: f"{own.stage.micro_batch} x {own.accumulation}"),
        row("ce / kd / state / aux weight", lambda own: _weights(own.stage)),
        row("learning rates", lambda own: rates(own.stage)),
        row("trained: model", lambda own: _amount(own.trained.model)),
        row("trained: predictors", lambda own: _amount(own.trained.predictor)),
        row("checkpointing", lambda own: "on" if own.stage.gradient_checkpointing else "off"),
    ]
    return Table(title="Stages", header=_header("stage", budget), rows=rows)


def _weights(stage: Stage) -> str:
    aux = f"{stage.aux_weight:g}" + ("" if stage.aux_weight_end is None else f"-{stage.aux_weight_end:g}")
    return f"{stage.ce_weight:g} / {stage.kd_weight:g} / {stage.state_weight:g} / {aux}"


def _memory_tables(budget: RunBudget) -> list[str]:
    tables = []
    for sharding in budget.stages[0].memory:
        memories = [own.memory[sharding] for own in budget.stages]
        rows = [
            (label, *(_gigabytes(getattr(memory, part)) for memory in memories))
            for part, label in _PARTS.items()
            if any(getattr(memory, part) for memory in memories)
        ]
        rows.append(("total", *(_gigabytes(memory.total) for memory in memories)))
        rows += [_share("of it routing, masks", memories, "routing"), _share("loss: logits chunk", memories, "logits")]
        header = _header(f"GB per device, {_SHARDINGS[sharding]}", budget)
        tables.append(Table(title="Memory", header=header, rows=rows).text())
    return tables


def _share(label: str, memories: list[Memory], part: str) -> tuple[str, ...]:
    return (label, *(_gigabytes(getattr(memory, part)) for memory in memories))


def _flops_table(budget: RunBudget) -> Table:
    def line(label: str, flops: list[int]) -> list[str]:
        return [label, *(f"{value:.3g}" if value else "-" for value in [*flops, sum(flops)])]

    rows = [
        ["a token, sparse", *(f"{own.flops.total:.3g}" for own in budget.stages), ""],
        ["a step, sparse", *(f"{own.step_flops['sparse']:.3g}" for own in budget.stages), ""],
        *(line(f"all: {name}", [own.total_flops.get(name, 0) for own in budget.stages]) for name in budget.flops),
    ]
    if budget.device_flops:
        by_stage = [sum(own.total_flops.values()) for own in budget.stages]
        rows.append(["time", *(_duration(budget.seconds(flops)) for flops in [*by_stage, sum(by_stage)])])
    else:
        rows.append(["time", *["-"] * len(budget.stages), "state --device-tflops"])
    return Table(title="FLOPs", header=(*_header("FLOPs", budget), "all"), rows=rows)


def _disk(budget: RunBudget) -> str:
    lines = ["disk", *(f"  {_gigabytes(size):>8} GB  {name}" for name, size in budget.disk.items())]
    lines.append(f"  {_gigabytes(sum(budget.disk.values())):>8} GB  in all")
    host = f"{_gigabytes(budget.host_bytes)} GB a process"
    if budget.processes > 1:
        host += f", {_gigabytes(budget.host_bytes * budget.processes)} GB for all {budget.processes}"
    lines += ["", f"host memory  {host}, for models"]
    return "\n".join([*lines, "", "writes", *(f"  {place}" for place in budget.writes)])


def _header(first: str, budget: RunBudget) -> tuple[str, ...]:
    return (first, *(_name(number, own) for number, own in enumerate(budget.stages)))


def _name(number: int, own: StageBudget) -> str:
    return f"{number} {own.stage.name}".strip()


def _amount(value: int) -> str:
    """1543714304 -> 1.544B."""
    return short_count(float(f"{value:.4g}"))


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.2f}"


def _duration(seconds: float | None) -> str:
    assert seconds is not None
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
