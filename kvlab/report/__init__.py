"""Results files -> tables, figures and one page. Imports no torch; knows files, not caches."""

from kvlab.report.book import ANCHOR, Book
from kvlab.report.build import draw_all, write_page, write_report, write_results
from kvlab.report.console import console_table
from kvlab.report.overview import Overview, pictures
from kvlab.report.page import markdown_table, study

__all__ = ["ANCHOR", "Book", "Overview", "console_table", "draw_all", "markdown_table", "pictures",
           "study", "write_page", "write_report", "write_results"]  # fmt: skip
