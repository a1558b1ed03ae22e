"""The verdict for a CI: JUnit XML with a test case per gate and per stage, and a Markdown summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from quantpress.core.files import whole_file

from ..measure.formatting import plain
from ..measure.lines import lines
from ..measure.results import Results
from ..measure.sections import GateCheck, GateReport
from .page_text import cell

_SIGNS = {"ACCEPT": "✅", "REGRESSION": "❌", "INCONCLUSIVE": "❔", "NONE": ""}


@dataclass(frozen=True)
class Stage:
    """A stage of a run. failed: why it failed; None where it did not."""

    name: str
    seconds: float
    failed: str | None = None


def write_junit(path: Path, name: str, results: Results | None, stages: Sequence[Stage] = ()) -> None:
    """Write the suite quantpress.gates with a case per gate, and quantpress.stages with one per stage.

    A missed gate fails; an inconclusive one is skipped with its reason, or fails too where the recipe is strict.
    results: None for a run without an evaluation. stages: by default the evaluation, which fails while it is not
    complete, so that the file is never empty.
    """
    gates, seconds = (GateReport(), 0.0) if results is None else (results.gates, results.seconds)
    own = "the evaluation was interrupted: sections are missing" if results and not results.complete else None
    done = stages or (Stage("eval", seconds, own),)
    suite = ElementTree.Element("testsuite", name="quantpress.gates", tests=str(len(gates.checks)))
    failed = skipped = 0
    for check in gates.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(name), name=check.name)
        if fails(check, gates):
            failed += 1
            kind = {"message": check.reason, "type": check.verdict}
            ElementTree.SubElement(case, "failure", kind).text = check.reason
        elif check.verdict == "INCONCLUSIVE":
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=f"inconclusive: {check.reason}")
    suite.attrib |= {"failures": str(failed), "skipped": str(skipped), "errors": "0", "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    root.append(_stages(name, done))
    ElementTree.indent(root)
    with whole_file(path) as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _stages(name: str, done: Sequence[Stage]) -> ElementTree.Element:
    failed = sum(stage.failed is not None for stage in done)
    counts = {"tests": str(len(done)), "failures": str(failed), "skipped": "0", "errors": "0"}
    seconds = sum(stage.seconds for stage in done)
    suite = ElementTree.Element("testsuite", {"name": "quantpress.stages", "time": f"{seconds:.3f}"} | counts)
    for stage in done:
        about = {"classname": _clean(name), "name": stage.name, "time": f"{stage.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", about)
        if stage.failed is not None:
            ElementTree.SubElement(case, "failure", {"message": stage.failed, "type": "FAILED"}).text = stage.failed
    return suite


def fails(check: GateCheck, gates: GateReport) -> bool:
    """Whether the check fails the run."""
    return check.verdict == "REGRESSION" or (gates.strict and check.verdict == "INCONCLUSIVE")


def step_summary(name: str, results: Results) -> str:
    """Markdown for $GITHUB_STEP_SUMMARY: the verdict, the metrics, each gate with its reason."""
    gates = results.gates
    said = "measured" if gates.verdict == "NONE" else gates.verdict
    out = [f"### {_SIGNS[gates.verdict]} quantpress: {cell(name)} {said}".replace("###  ", "### "), ""]
    out += [cell(gates.reason), "", "| figure | |", "|---|---|"]
    out += [f"| {cell(name)} | {cell(told)} |" for name, told in lines(results)]
    if gates.checks:
        out += ["", "| gate | |", "|---|---|"]
        out += [f"| {_SIGNS[check.verdict]} {check.verdict} | {cell(check.reason)} |" for check in gates.checks]
    return plain("\n".join(out)) + "\n"


def _clean(text: str) -> str:
    """Without the control characters that XML does not allow."""
    return "".join(c for c in text if c.isprintable())
