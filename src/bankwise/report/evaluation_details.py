"""What an evaluation knows about one model beside its measures: routing, RULER summaries, answer classes, speed.

Every part may be missing; every number may be None, which means that it does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bankwise.report.json_node import Node

LAYER_FIELDS = (
    "recall",
    "retained_energy",
    "retained_energy_oracle",
    "retained_energy_global",
    "usage_entropy",
    "usage_gini",
    "dead",
    "always_on",
    "overlap",
    "margin",
)
_ORIGINS = ("source", "lead_tokens", "tasks")
"""Fields of the benchmarks' details that say where the questions came from and how they were put."""

Number = float | None


@dataclass(frozen=True, kw_only=True)
class RoutingLayer:
    """How one sparse layer chooses its channels."""

    layer: int
    values: Mapping[str, Number]
    """By the names of `LAYER_FIELDS`."""
    union: Mapping[int, Number]
    """Share of the channels that 2, 4, ... neighbouring tokens keep together, by the number of tokens, ascending."""
    recall_by_position: Mapping[str, Number]
    usage: Sequence[Number]
    """Share of the tokens that keep a channel, for groups of channels from the most to the least used."""


@dataclass(frozen=True, kw_only=True)
class ActivePerBank:
    """Whether each bank kept exactly as many channels as it must, for every token."""

    expected: str
    violations: int
    checked: int


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routing statistics of one model."""

    layers: Sequence[RoutingLayer]
    active_per_bank: ActivePerBank | None
    """None: the gate promises no exact number."""
    active_fraction: Number
    ffn_bytes_fraction: Number
    bytes_per_token: Mapping[str, Number]
    """Keys `dense` and `model`; likewise below."""
    flops_per_token: Mapping[str, Number]
    tokens: int | None

    def mean(self, field: str) -> Number:
        """Mean over layers; None where no layer has the number."""
        return mean([layer.values[field] for layer in self.layers])


@dataclass(frozen=True, kw_only=True)
class RulerSummary:
    """Mean over the tasks of one length and permutation."""

    length: int
    permutation: str
    mean: Number
    tasks: Sequence[str]
    nulls: str
    is_compatible: bool


@dataclass(frozen=True, kw_only=True)
class AnswerClasses:
    """Shares of what the answers to common-words prompts consist of."""

    items: Mapping[str, Number]
    answers: Mapping[str, Number]
    substring_only: Number
    n: int


@dataclass(frozen=True, kw_only=True)
class Details:
    """Everything about one model."""

    routing: Routing | None
    ruler: Sequence[RulerSummary]
    effective_length: Mapping[str, int | None]
    """By permutation; None: no length reaches the threshold."""
    weighted: Mapping[str, Number]
    answers: Mapping[str, AnswerClasses]
    """By length (or preset) and permutation, joined by a slash."""
    speed: Mapping[str, Number]
    origins: Mapping[str, Any]
    """Where the prompts came from: generator, word list, files with their hashes, shots."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Change of one metric when one layer is changed, per layer and length."""

    metric: str
    lengths: Sequence[int]
    layers: Sequence[int]
    values: Sequence[Sequence[Number]]
    """One list per layer, one number per length."""


def mean(values: Sequence[Number]) -> Number:
    """Mean of the numbers that exist; None where none does."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_details(node: Node) -> Details:
    ruler, cwe, benchmarks = (_part(node, name) for name in ("ruler", "cwe", "benchmarks"))
    return Details(
        routing=_routing(node["routing"]) if node["routing"].value else None,
        ruler=[_ruler_summary(item) for item in ruler["summary"].items()],
        effective_length={name: item.integer_or_null() for name, item in ruler["effective_length"].fields()},
        weighted=_flat_numbers(ruler["weighted"]),
        answers={name: _answer_classes(item) for name, item in cwe["answers"].fields()},
        speed=_numbers(node["speed"]),
        origins={
            **({} if ruler["generator"].is_null else {"ruler": ruler["generator"].value}),
            **({} if benchmarks["source"].is_null else {"benchmarks": benchmarks.fields_of(*_ORIGINS)}),
        },
    )


def read_scan(node: Node) -> Scan | None:
    if node.is_null:
        return None
    lengths = [item.integer() for item in node["lengths"].items()]
    layers = [item.integer() for item in node["layers"].items()]
    values = [[cell.number_or_null() for cell in line.items()] for line in node["values"].items()]
    if not layers or not lengths or [len(line) for line in values] != [len(lengths)] * len(layers):
        raise node["values"].error(f"{len(layers)} lists (layers) of {len(lengths)} numbers (lengths) each")
    return Scan(metric=node["metric"].text(), lengths=lengths, layers=layers, values=values)


def _routing(node: Node) -> Routing:
    bank = node["active_per_bank"]
    return Routing(
        layers=[
            RoutingLayer(
                layer=item["layer"].integer(),
                values={field: item[field].number_or_null() for field in LAYER_FIELDS},
                union=_by_token_count(item["union"]),
                recall_by_position=_numbers(item["recall_by_position"]),
                usage=sorted(
                    (rate.number_or_null() for rate in item["usage"].items()), key=lambda rate: -(rate or 0.0)
                ),
            )
            for item in node["layers"].items()
        ],
        active_per_bank=None
        if bank.is_null or bank["expected"].is_null
        else ActivePerBank(
            expected=_expected(bank["expected"]),
            violations=bank["violations"].integer(),
            checked=bank["checked"].integer(),
        ),
        active_fraction=node["active_fraction"].number_or_null(),
        ffn_bytes_fraction=node["ffn_bytes_fraction"].number_or_null(),
        bytes_per_token=_numbers(node["bytes_per_token"]),
        flops_per_token=_numbers(node["flops_per_token"]),
        tokens=node["tokens"].integer_or_null(),
    )


def _by_token_count(node: Node) -> dict[int, Number]:
    for name, item in node.fields():
        if not (name.isascii() and name.isdigit()):
            raise item.error("named by a number of tokens")
    return dict(sorted((int(name), item.number_or_null()) for name, item in node.fields()))


def _expected(node: Node) -> str:
    """One number, or the range of a list of them (one per layer)."""
    if not isinstance(node.value, list):
        return str(node.integer())
    counts = [item.integer() for item in node.items()] or [0]
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high} (set per layer)"


def _ruler_summary(node: Node) -> RulerSummary:
    return RulerSummary(
        length=node["length"].integer(),
        permutation=node["permutation"].text(""),
        mean=node["mean"].number_or_null(),
        tasks=[task.text() for task in node["tasks"].items()],
        nulls=node["nulls"].text(""),
        is_compatible=node["compatible"].flag(),
    )


def _answer_classes(node: Node) -> AnswerClasses:
    return AnswerClasses(
        items=_numbers(node["item_classes"]),
        answers=_numbers(node["answer_classes"]),
        substring_only=node["substring_only"].number_or_null(),
        n=node["n"].integer(),
    )


def _part(node: Node, name: str) -> Node:
    """The field, read as an empty object where it is missing."""
    part = node[name]
    return Node({}, part.source, part.path) if part.is_null else part


def _numbers(node: Node) -> dict[str, Number]:
    return {name: item.number_or_null() for name, item in node.fields()}


def _flat_numbers(node: Node) -> dict[str, Number]:
    """Numbers of an object that may hold objects, with their names joined by a blank."""
    flat: dict[str, Number] = {}
    for name, item in node.fields():
        if isinstance(item.value, dict):
            flat |= {f"{name} {inner}": number for inner, number in _flat_numbers(item).items()}
        else:
            flat[name] = item.number_or_null()
    return flat
