"""The front page and a report in a real browser, on a laptop and on a phone: nothing is cut.

Needs the package playwright and a Chromium: its own (`playwright install chromium`), or one of the
system (Debian's chromium-headless-shell, or CHROMIUM=/path).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kvlab.report import write_report

api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not here")

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"laptop": (1366, 768), "phone": (390, 844)}
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # ms; on a busy machine a browser takes its time
CUT = """() => {
  const told = e => e.tagName + ' ' + (e.textContent || '').trim().slice(0, 60);
  const wide = window.innerWidth, found = [];
  const root = document.documentElement;
  if (root.scrollWidth > wide) found.push('the page is ' + root.scrollWidth + ' wide');
  for (const e of document.querySelectorAll('h1,h2,h3,p,ul,pre,figure,svg,table,th,td,td>div')) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.left < -1 || box.right > wide + 1)) found.push('outside: ' + told(e));
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth && getComputedStyle(e).overflowX
        !== 'visible') found.push('cut: ' + told(e));
  }
  for (const e of document.querySelectorAll('.wide'))
    if (e.scrollWidth > e.clientWidth + 1) found.push('a table is wider than its place');
  return found;
}"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skipped where none starts."""
    own = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as play:
        try:
            started = play.chromium.launch(
                executable_path=own, args=["--no-sandbox"], timeout=PATIENCE)  # fmt: skip
        except api.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A committed report with a long table and many figures, written anew."""
    text = (ROOT / "experiments/window_quality/README.md").read_text(encoding="utf-8")
    out = tmp_path_factory.mktemp("report")
    return write_report(ROOT / "reports/window_quality", out, text=text, figures=2).parent


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["front", "report"])
def test_nothing_is_cut_and_nothing_fetched(browser, report, which, size):
    file = (ROOT / "reports" if which == "front" else report) / "index.html"
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert asked == [file.as_uri()]  # one file is the whole page
    assert page.evaluate(CUT) == []
    assert page.locator("h1").count() == 1 and page.locator("figure svg").count() >= 2
    first = page.locator("td").first
    cards = first.evaluate("e => getComputedStyle(e).display") == "grid"
    assert cards == (size == "phone")  # a table that does not fit becomes cards
    page.close()
