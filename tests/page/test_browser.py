"""The page in a real browser: figures load, tables sort, figures enlarge, nothing is asked for."""

import json
import re
import shutil
import subprocess

import pytest

from vlm_latency.page import build_page, collect_results

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--dump-dom",
]
# Does what a reader does, and writes down what came of it.
VISIT = """
<pre id="seen"></pre><script>
const seen = { violations: [] };
document.addEventListener("securitypolicyviolation", (e) => seen.violations.push(e.blockedURI));
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const first = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join("");
  const click = (i) => { table.tHead.rows[0].cells[i].querySelector("button").click(); return first(); };
  seen.images = [...document.querySelectorAll("figure img")].map((image) => image.naturalWidth);
  seen.orders = [first(), click(0), click(0), click(1), click(1), click(2)];
  seen.sorted = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
  document.querySelector("button.zoom").click();
  const lightbox = document.getElementById("lightbox");
  seen.open = lightbox.open && lightbox.querySelector("img").src.startsWith("data:image/png");
  lightbox.click();
  seen.closed = !lightbox.open;
  seen.requests = performance.getEntriesByType("resource").map((e) => e.name.slice(0, 5));
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_visit(folder, tmp_path_factory):
    page = build_page(collect_results(folder))
    report = folder / "report" / "index.html"
    report.parent.mkdir()
    report.write_text(page.replace("<script>", VISIT + "<script>", 1), encoding="utf-8")
    profile = tmp_path_factory.mktemp("profile")
    visit = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", report.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in visit.stderr
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', visit.stdout)[1])
    assert seen["images"] == [1800, 1800, 1800]
    # as written; by name up and down; by time up and down, what has none last; by count
    assert seen["orders"] == ["bac", "abc", "cba", "cba", "bca", "bca"]
    assert seen["sorted"] == "ascending"
    assert seen["open"] and seen["closed"]
    assert seen["violations"] == []
    assert set(seen["requests"]) <= {"data:"}
