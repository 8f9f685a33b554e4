"""Results files -> tables, figures and one page. Imports no torch; knows files, not caches."""

from kvlab.report.build import write_report
from kvlab.report.console import console_table

__all__ = ["console_table", "write_report"]
