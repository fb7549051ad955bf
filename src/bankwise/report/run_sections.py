"""The sections of a training run: results, curves, routing, continuations, provenance."""

from __future__ import annotations

from bankwise.report import run_figures, run_tables
from bankwise.report.document import Code, Figures, Part, Quotes, Section, Shown, Tiles
from bankwise.report.folder import RunFolder, controls_of
from bankwise.report.formats import NOT_RUN, delta, nats, percent

_TEXTS = ("prompt", "dense", "sparse")


def run_tiles(run: RunFolder) -> Tiles:
    sparse, companion, closed = (run.summary.get(name) for name in ("sparse", "companion", "closed"))
    return Tiles(
        {
            "sparse loss, nats/token": nats(sparse["loss"]) if sparse else NOT_RUN,
            "delta to companion": delta(sparse["loss"] - companion["loss"]) if sparse and companion else NOT_RUN,
            "distance closed by training": percent(closed) if closed is not None else NOT_RUN,
            "FFN channels active": percent((sparse or run.summary["untrained"])["active_fraction"]),
        }
    )


def run_sections(run: RunFolder, *, prefix: str = "", opening: list[Part] | None = None) -> list[Section]:
    """Everything but the provenance; `opening` stands first in the first section."""
    texts = run.summary.get("continuations") or {}
    return [
        Section(
            _heading(prefix, "Results"),
            [
                *(opening or []),
                Shown(run_tables.results_table(run.summary)),
                *([Shown(run_tables.controls_table(run.summary))] if controls_of(run.summary) else []),
                Figures([run_figures.results_figure(run)]),
                Shown(run_tables.sources_table(run.summary), is_folded=True),
            ],
        ),
        Section(
            _heading(prefix, "Training curves"),
            [Figures([run_figures.training_figure(run), run_figures.held_out_curve_figure(run)])],
        ),
        Section(
            _heading(prefix, "Routing"),
            [
                Figures(
                    [
                        run_figures.recall_figure(run),
                        run_figures.retained_figure(run),
                        run_figures.recall_over_training_figure(run),
                        run_figures.telemetry_figure(run),
                    ]
                ),
                Shown(run_tables.layers_table(run), is_folded=True),
                Shown(run_tables.calibration_table(run.summary), is_folded=True),
            ],
        ),
        Section(
            _heading(prefix, "Continuations"), [Quotes({name: str(texts.get(name) or NOT_RUN) for name in _TEXTS})]
        ),
    ]


def _heading(prefix: str, name: str) -> str:
    return f"{prefix}{name.lower()}" if prefix else name


def run_provenance(run: RunFolder) -> list[Part]:
    return [Shown(run_tables.provenance_table(run.summary)), Code("Resolved recipe", run.recipe, "yaml")]
