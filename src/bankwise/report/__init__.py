"""The report of a finished run: the same tables for the terminal, `report.md` and one self-contained `report.html`."""

from bankwise.report.html import write_report
from bankwise.report.tables import summary_table

__all__ = ["summary_table", "write_report"]
