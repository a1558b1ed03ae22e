"""The pages under axe-core, the accessibility checker of browsers, in a real Chromium: not one violation."""

import html
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.files import write_json
from quantpress.eval.report.page import write_comparison, write_report

from ..release.test_recommend import SERVING
from .test_report import BROWSER, fake_manifest, in_browser, write_run
from .test_sections import full_results

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium here")]
PACKAGE = "axe-core@4.10.3"
RUN = """<script>
addEventListener("load", () => axe.run(document).then(found => {
  const out = document.createElement("pre")
  out.id = "axe"
  out.textContent = JSON.stringify({passes: found.passes.map(rule => rule.id),
    violations: found.violations.map(rule => [rule.id, rule.help, rule.nodes.map(node => node.html.slice(0, 160))])})
  document.body.append(out)
}))
</script>"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here to fetch axe-core")
    done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    packed = next(folder.glob("axe-core-*.tgz"), None)
    if packed is None:
        pytest.skip(f"npm cannot fetch {PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(packed) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode("utf-8").replace("</script", "<\\/script")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A report and a comparison of runs of which everything was measured; one of them missed a gate."""
    folder, runs = tmp_path_factory.mktemp("pages"), []
    for name, size, perplexity in (("good", 114_000_000, 18.0), ("missed", 90_000_000, 19.0), ("beaten", 120e6, 18.5)):
        results = full_results(perplexity)
        if name == "missed":
            check = {"name": "max_kl", "limit": 0.01, "value": 0.14, "verdict": "REGRESSION", "reason": "too much"}
            results["gates"] = {"verdict": "REGRESSION", "reason": "too much", "checks": [check]}
        runs.append(write_run(folder / name, fake_manifest(name, size=int(size), blocks=3), results))
        write_json(runs[-1] / "eval" / "serving.json", SERVING)
    found = {"report": write_report(runs[1]), "comparison": write_comparison(runs, folder / "compare")}
    return {name: page.read_text(encoding="utf-8") for name, page in found.items()}


def checked(page: str, axe: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What axe says of a page with its details open."""
    opened = page.replace("<details", "<details open").replace("</body>", f"<script>{axe}</script>{RUN}</body>")
    file = folder / "page.html"
    file.write_text(opened, encoding="utf-8")
    document, _ = in_browser(file, folder / "profile", "--virtual-time-budget=60000", *flags)
    said = re.search(r'<pre id="axe">(.*?)</pre>', document, re.DOTALL)
    assert said is not None, "axe has not run"
    found: dict[str, Any] = json.loads(html.unescape(said[1]))
    return found


@pytest.mark.parametrize("which", ["report", "comparison"])
@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_axe_finds_no_violation(look: str, which: str, pages: dict[str, str], axe: str, tmp_path: Path) -> None:
    page = pages[which]
    if look == "dark":
        assert "@media screen and (prefers-color-scheme: dark)" in page
        page = page.replace("@media screen and (prefers-color-scheme: dark)", "@media screen")
    found = checked(page, axe, tmp_path, *(["--window-size=390,900"] if look == "narrow" else []))
    assert {"color-contrast", "document-title", "heading-order", "html-has-lang", "list"} <= set(found["passes"])
    assert found["violations"] == []


def test_axe_would_see_one(pages: dict[str, str], axe: str, tmp_path: Path) -> None:
    page = pages["report"].replace("--muted: #59636e", "--muted: #c9d0d8").replace(' lang="en"', "")
    rules = {rule for rule, *_ in checked(page, axe, tmp_path)["violations"]}
    assert {"color-contrast", "html-has-lang"} <= rules
