"""`python -m kvlab.report RUN... --out DIR`: a report from results files alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvlab.core import KvlabError
from kvlab.report import write_report
from kvlab.report.build import FIGURES


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 with one sentence on stderr for results that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, sweep or report")
    parser.add_argument("--out", help="folder of the report (default: report/ inside the first)")
    parser.add_argument("--title", default="", help="heading of the page")
    parser.add_argument("--text", default="", help="Markdown file to put above the tables")
    parser.add_argument("--figures", default=FIGURES, type=_count, metavar="N|all",
                        help=f"at most so many figures (default: {FIGURES})")  # fmt: skip
    told = parser.parse_args(arguments)
    out = told.out or str(Path(told.runs[0]) / "report")
    try:
        text = Path(told.text).read_text(encoding="utf-8").strip() if told.text else ""
        print(write_report(told.runs, out, title=told.title, text=text,
                           figures=told.figures))  # fmt: skip
    except KvlabError as error:
        print(f"kvlab.report: {error}", file=sys.stderr)
        return 2
    except (OSError, UnicodeDecodeError) as error:
        print(f"kvlab.report: text={told.text}: cannot be read ({error})", file=sys.stderr)
        return 2
    return 0


def _count(text: str) -> int | None:
    """How many figures; None for `all`."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: give a number or `all`")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
