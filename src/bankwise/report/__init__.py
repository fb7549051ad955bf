"""The report of a finished run or evaluation: one self-contained `report.html`, the same as Markdown and CSV."""

from bankwise.report.html import write_report
from bankwise.report.overview_tables import evaluation_table
from bankwise.report.run_tables import summary_table

__all__ = ["evaluation_table", "summary_table", "write_report"]
