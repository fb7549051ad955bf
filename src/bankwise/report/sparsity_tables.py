"""Section D in numbers: whether the promised sparsity was kept, and how well the channels are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bankwise.report.evaluation_data import COLUMNS, DENSE, Evaluation
from bankwise.report.evaluation_details import Number, Routing, mean
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN, count, fraction_or_gap, percent, share_or_gap, significant
from bankwise.report.table import Table

HEADER = ("", *COLUMNS.values())
MODEL, ORACLE, GLOBAL = "retained_energy", "retained_energy_oracle", "retained_energy_global"


def routings(evaluation: Evaluation) -> dict[str, Routing]:
    """The routing statistics of those of the six columns that have any."""
    details = evaluation.details
    return {name: routing for name in COLUMNS if name in details and (routing := details[name].routing)}


def violations(evaluation: Evaluation) -> list[str]:
    """One sentence for each column that broke the promise of exactly k channels per bank; empty: none did."""
    found = []
    for name, details in evaluation.details.items():
        bank = details.routing.active_per_bank if details.routing else None
        if bank and bank.violations:
            found.append(
                f"Error: {evaluation.label(name)} keeps other than {bank.expected} channels in "
                f"{count(bank.violations)} of {count(bank.checked)} banks (tokens × layers × banks). Its numbers are "
                "not those of the sparsity that it claims."
            )
    return found


def kept_promises(evaluation: Evaluation) -> list[str]:
    """One sentence for each column whose banks were all as promised, or were not checked."""
    sentences = []
    for name, routing in routings(evaluation).items():
        bank = routing.active_per_bank
        if bank is None:
            sentences.append(f"{COLUMNS[name]}: the gate promises no exact number of active channels per bank.")
        elif not bank.checked:
            sentences.append(f"{COLUMNS[name]}: count of the active channels per bank {NOT_RUN}.")
        elif not bank.violations:
            sentences.append(
                f"{COLUMNS[name]}: exactly {bank.expected} active channels in each of {count(bank.checked)} banks "
                "(tokens × layers × banks); no violation."
            )
    return sentences


def sparsity_table(evaluation: Evaluation) -> Table:
    """Means over the sparse layers, reading and arithmetic per token."""
    measures: list[tuple[str, Callable[[Routing], str]]] = [
        ("active channels", lambda routing: share_or_gap(routing.active_fraction)),
        ("recall", lambda routing: fraction_or_gap(routing.mean("recall"))),
        ("retained energy", lambda routing: fraction_or_gap(routing.mean(MODEL))),
        ("retained energy, oracle by bank", lambda routing: fraction_or_gap(routing.mean(ORACLE))),
        ("retained energy, oracle over all channels", lambda routing: fraction_or_gap(routing.mean(GLOBAL))),
        ("usage entropy (1: uniform)", lambda routing: fraction_or_gap(routing.mean("usage_entropy"))),
        ("usage Gini (0: uniform)", lambda routing: fraction_or_gap(routing.mean("usage_gini"))),
        ("dead channels (rate < 0.0001)", lambda routing: share_or_gap(routing.mean("dead"))),
        ("always-on channels (rate > 0.999)", lambda routing: share_or_gap(routing.mean("always_on"))),
        ("kept by the next token too", lambda routing: share_or_gap(routing.mean("overlap"))),
        ("margin", lambda routing: fraction_or_gap(routing.mean("margin"))),
        ("bytes per token", lambda routing: _of_dense(routing.bytes_per_token)),
        ("FLOPs per token", lambda routing: _of_dense(routing.flops_per_token)),
        ("FFN bytes of dense", lambda routing: share_or_gap(routing.ffn_bytes_fraction)),
        ("tokens read (n)", lambda routing: NOT_APPLICABLE if routing.tokens is None else count(routing.tokens)),
    ]
    found = routings(evaluation)
    rows = [
        (label, *(measure(found[name]) if name in found else _absent(evaluation, name) for name in COLUMNS))
        for label, measure in measures
    ]
    note = (
        "Means over the sparse layers. Recall: share of the dense model's largest channels of each bank, by "
        "contribution, that were chosen. Retained energy: their share of the FFN's squared contributions; the oracles "
        "choose equally many with the true activations, so no predictor can retain more. Margin: distance between the "
        "last chosen and the first left-out predictor value. Bytes: weights read per token at batch 1."
    )
    return Table(title="Sparsity", header=HEADER, rows=rows if found else [], note=note)


def layers_table(evaluation: Evaluation, column: str, routing: Routing) -> Table:
    """Every statistic of every sparse layer of one column."""
    unions = dict.fromkeys(tokens for layer in routing.layers for tokens in layer.union)
    fields: dict[str, Callable[[Number], str]] = {
        "recall": fraction_or_gap,
        MODEL: fraction_or_gap,
        ORACLE: fraction_or_gap,
        GLOBAL: fraction_or_gap,
        "usage_entropy": fraction_or_gap,
        "usage_gini": fraction_or_gap,
        "dead": share_or_gap,
        "always_on": share_or_gap,
        "overlap": share_or_gap,
        "margin": fraction_or_gap,
    }
    header = ("layer", *(field.replace("_", " ") for field in fields), *(f"union of {tokens}" for tokens in unions))
    rows = [
        (
            str(layer.layer),
            *(show(layer.values[field]) for field, show in fields.items()),
            *(share_or_gap(layer.union.get(tokens)) for tokens in unions),
        )
        for layer in routing.layers
    ]
    return Table(title=f"Routing by layer: {evaluation.label(column)}", header=header, rows=rows)


def positions_table(evaluation: Evaluation) -> Table:
    """Recall by position in the window, mean over layers."""
    found = routings(evaluation)
    buckets = position_buckets(found)
    rows = [
        (
            bucket,
            *(
                fraction_or_gap(recall_at(found[name], bucket)) if name in found else _absent(evaluation, name)
                for name in COLUMNS
            ),
        )
        for bucket in buckets
    ]
    return Table(title="Recall by position, mean over layers", header=HEADER, rows=rows)


def union_table(evaluation: Evaluation) -> Table:
    """Share of the channels that neighbouring tokens keep together, mean over layers."""
    found = routings(evaluation)
    sizes = sorted({tokens for routing in found.values() for tokens, _ in union_curve(routing)})
    curves = {name: dict(union_curve(routing)) for name, routing in found.items()}
    rows = [
        (
            "1 token" if tokens == 1 else f"{tokens} tokens",
            *(
                share_or_gap(curves[name].get(tokens)) if name in found else _absent(evaluation, name)
                for name in COLUMNS
            ),
        )
        for tokens in sizes
    ]
    return Table(title="Channels that neighbouring tokens keep together", header=HEADER, rows=rows)


def position_buckets(found: Mapping[str, Routing]) -> list[str]:
    return list(
        dict.fromkeys(
            bucket for routing in found.values() for layer in routing.layers for bucket in layer.recall_by_position
        )
    )


def recall_at(routing: Routing, bucket: str) -> Number:
    return mean([layer.recall_by_position.get(bucket) for layer in routing.layers])


def union_curve(routing: Routing) -> list[tuple[int, float]]:
    """(tokens, share) with the share averaged over layers; one token keeps the active fraction."""
    sizes = dict.fromkeys(tokens for layer in routing.layers for tokens in layer.union)
    points = [
        (1, routing.active_fraction),
        *((n, mean([layer.union.get(n) for layer in routing.layers])) for n in sizes),
    ]
    return [(tokens, share) for tokens, share in points if share is not None]


def choosing(found: Mapping[str, Routing]) -> dict[str, str]:
    """Names and labels of the columns that can choose channels; the dense ones do not."""
    return {name: label for name, label in COLUMNS.items() if name in found or name not in DENSE}


def _absent(evaluation: Evaluation, column: str) -> str:
    """What stands for the routing of a column without any: a dense model that was run has none to measure."""
    return NOT_APPLICABLE if column in DENSE and column in evaluation.columns else NOT_RUN


def _of_dense(amounts: Mapping[str, Number]) -> str:
    """The model's amount and its share of the dense model's."""
    model, dense = amounts.get("model"), amounts.get("dense")
    if model is None:
        return NOT_APPLICABLE
    return f"{significant(model)} ({percent(model / dense)})" if dense else significant(model)
