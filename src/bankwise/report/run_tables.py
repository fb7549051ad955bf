"""The tables and sentences of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bankwise.report.folder import RunFolder, check_summary, controls_of, is_number, models_of
from bankwise.report.formats import (
    NOT_APPLICABLE,
    NOT_RUN,
    count,
    delta,
    flatten,
    fraction,
    nats,
    percent,
    perplexity,
    plain,
)
from bankwise.report.table import Table

Column = Mapping[str, Any]
CONTROL_NOTES = {
    "dense_narrow": "the dense FFN cut to its strongest channels, as many as the sparse model keeps",
    "random_predictor": "predictors frozen at a random start; as good as sparse means that routing is not learnt",
    "random_fixed": "random channels of each bank, drawn once per layer",
    "random_per_token": "random channels of each bank, drawn for every token",
    "oracle_bank": "the channels of each bank that truly contribute most, for which all are computed",
    "oracle_global": "the same over the whole layer; its distance to oracle_bank is the price of banks",
    "detached": "predictors trained by the auxiliary routing loss alone",
    "post_hoc": "the dense weights frozen, only the predictors trained",
}
"""What each control is."""


def summary_table(summary: dict[str, Any]) -> str:
    """Return the final table of a run as plain text with aligned columns, then one line on the distance closed.

    Controls have a table of their own, one row each.
    """
    check_summary(summary, "summary")
    tables = [results_table(summary), *([controls_table(summary)] if controls_of(summary) else [])]
    return "\n\n".join([*(table.text() for table in tables), closed_sentence(summary)])


def results_table(summary: Column) -> Table:
    """The final table: one row per measure, one column per model."""
    companion, models = summary.get("companion"), models_of(summary)

    def against(measure: Callable[[Column, Column], str]) -> Callable[[Column], str]:
        return lambda column: measure(column, companion) if companion else NOT_APPLICABLE

    measures: list[tuple[str, Callable[[Column], str]]] = [
        ("loss (nats per token)", lambda column: nats(column["loss"])),
        ("standard error", lambda column: nats(column["standard_error"])),
        ("delta to companion", against(lambda column, other: delta(column["loss"] - other["loss"]))),
        ("perplexity", lambda column: perplexity(column["perplexity"])),
        ("recovery", against(lambda column, other: f"{100 * _ratio(other['perplexity'], column['perplexity']):.1f} %")),
        ("active channels", lambda column: percent(column["active_fraction"])),
        *([("recall", _recall)] if any((summary.get(model) or {}).get("recall") for model in models) else []),
        ("trained tokens", lambda column: count(column["tokens"])),
        ("windows (n)", lambda column: count(column["n"])),
    ]
    rows = [
        (name, *(measure(summary[model]) if summary.get(model) else NOT_RUN for model in models))
        for name, measure in measures
    ]
    note = (
        "dense: the model before conversion. untrained: converted and calibrated, not trained. companion: the dense "
        "model trained on the same tokens, in the same order, with the same optimiser. sparse: the converted model "
        "after training. Recovery is the companion's perplexity over the model's own; recall is the share of the truly "
        "largest channels of each bank that were read. All columns share the same "
        "held-out windows; the standard error is that of one column's mean, over windows, not that of a difference."
    )
    if "dense_narrow" in models:
        note += f" dense_narrow: {CONTROL_NOTES['dense_narrow']}, trained alike."
    if not companion:
        note += " n/a: the companion was not run, so there is nothing to compare with."
    return Table(title="Held-out results", header=("", *models), rows=rows, note=note)


def controls_table(summary: Column) -> Table:
    """One row per control that was run, below the companion and the sparse model."""
    companion, sparse = summary.get("companion"), summary.get("sparse")
    names = controls_of(summary)
    rows = []
    for name in (*(name for name in ("companion", "sparse") if summary.get(name)), *names):
        column = summary[name]
        share = column.get("ffn_bytes_fraction")
        rows.append(
            (
                name,
                nats(column["loss"]),
                nats(column["standard_error"]),
                *(delta(column["loss"] - other["loss"]) if other else NOT_APPLICABLE for other in (companion, sparse)),
                _recall(column),
                percent(column["active_fraction"]),
                NOT_APPLICABLE if share is None else percent(share),
                count(column["tokens"]),
            )
        )
    header = ("", "loss", "error", "to companion", "to sparse", "recall", "channels", "FFN bytes", "tokens")
    note = (
        "Loss, its standard error and its differences in nats per token, on the same windows as above. The rows share "
        "training tokens and their order, but models whose predictors cannot learn skip the stages that train them "
        "alone. Recall: share of the truly largest channels of each bank that were read. Channels: active ones. FFN "
        "bytes: share of the dense FFN's weights that a token reads, predictor included. "
        + " ".join(f"{name}: {CONTROL_NOTES[name]}." for name in names)
    )
    return Table(title="Controls", header=header, rows=rows, note=note)


def sources_table(summary: Column) -> Table:
    """Loss, delta, perplexity and n of each held-out source."""
    models = models_of(summary)
    names = list(dict.fromkeys(name for model in models for name in (summary.get(model) or {}).get("by_source") or {}))
    rows: list[tuple[str, ...]] = []
    for name in names:
        parts = {model: ((summary.get(model) or {}).get("by_source") or {}).get(name) for model in models}
        other = parts["companion"]
        cells: dict[str, Callable[[Column], str]] = {
            "loss": lambda part: nats(part["loss"]),
            # mypy cannot infer a lambda with a default.
            "delta to companion": lambda part, other=other: (  # type: ignore[misc]
                delta(part["loss"] - other["loss"]) if other else NOT_APPLICABLE
            ),
            "perplexity": lambda part: perplexity(part["perplexity"]),
            "windows (n)": lambda part: count(part["n"]),
        }
        for measure, cell in cells.items():
            values = [cell(part) if (part := parts[model]) else NOT_RUN for model in models]
            rows.append((f"{name}: {measure}", *values))
    return Table(title="Held-out results by source", header=("source", *models), rows=rows)


def calibration_table(summary: Column) -> Table:
    """What calibration read, and its measures before and after."""
    calibration = summary.get("calibration") or {}
    parts = [flatten(calibration.get(part) or {}) for part in ("before", "after")]
    rows: list[tuple[str, ...]] = [
        (name, NOT_APPLICABLE, plain(calibration.get(name))) for name in ("tokens", "seconds") if calibration
    ]
    rows += [(name, *(part.get(name, NOT_APPLICABLE) for part in parts)) for name in {**parts[0], **parts[1]}]
    return Table(title="Calibration", header=("measure", "before", "after"), rows=rows)


def layers_table(run: RunFolder) -> Table:
    """Recall and retained energy of every sparse layer, at conversion and on the last training line."""
    header = ("layer", "recall", "recall, trained", "retained", "retained, trained", "oracle", "random")
    recall, retained = run.last_by_layer("recall"), run.last_by_layer("retained")
    rows = [
        (
            str(row["layer"]),
            fraction(row["recall"]),
            fraction(recall[i]) if i < len(recall) else NOT_RUN,
            fraction(row["retained"]),
            fraction(retained[i]) if i < len(retained) else NOT_RUN,
            fraction(row["retained_oracle"]),
            fraction(row["retained_random"]),
        )
        for i, row in enumerate(run.calibrated_layers)
    ]
    note = (
        "At conversion on the calibration's own measurement; trained: on the last training batch that was logged, so "
        "the two are read on different tokens. Oracle and random: retained energy of the best and of a random choice "
        "of equally many channels, at conversion."
    )
    return Table(title="Routing by layer", header=header, rows=rows, note=note)


def provenance_table(summary: Column) -> Table:
    """Every scalar of the provenance, nested keys joined by dots."""
    rows = list(flatten(summary["provenance"]).items())
    return Table(title="Provenance", header=("what", "value"), rows=rows, numeric=False)


def headline(summary: Column) -> list[str]:
    """The result in one to three sentences, with n, standard error and the companion beside it."""
    sparse, companion, untrained, dense = (summary.get(name) for name in ("sparse", "companion", "untrained", "dense"))
    assert untrained is not None
    assert dense is not None
    sentences = []
    if sparse:
        versus = f", {delta(sparse['loss'] - companion['loss'])} from its dense companion" if companion else ""
        sentences.append(
            f"With {percent(sparse['active_fraction'])} of the FFN channels active and {count(sparse['tokens'])} "
            f"trained tokens, the sparse model's held-out loss is {nats(sparse['loss'])} nats per token (standard "
            f"error {nats(sparse['standard_error'])}, n = {count(sparse['n'])} windows){versus}."
        )
    else:
        sentences.append("The converted model was not trained.")
    sentences.append(
        f"Converted but untrained it is {nats(untrained['loss'])}, {delta(untrained['loss'] - dense['loss'])} from the "
        "dense model."
    )
    return [*sentences, closed_sentence(summary)]


def closed_sentence(summary: Column) -> str:
    """How much of the distance from the untrained conversion to the companion training has closed."""
    if not is_number(summary.get("closed")):
        return "Distance from untrained to companion closed by training: not run."
    return f"Distance from untrained to companion closed by training: {percent(summary['closed'])}."


def _recall(column: Column) -> str:
    return NOT_APPLICABLE if column.get("recall") is None else fraction(column["recall"])


def _ratio(over: float, under: float) -> float:
    return over / under if under else math.nan
