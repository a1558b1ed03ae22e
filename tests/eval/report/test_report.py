"""The report: what it says, what it refuses, and that the same input gives the same bytes."""

import html
import json
import math
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quantpress.core.errors import BadInput
from quantpress.eval.report.measured_run import open_run
from quantpress.eval.report.page import _differences, write_comparison, write_report
from quantpress.recipe import Recipe

FILES = ["index.html", "layers.png", "layers.svg", "perplexity.png", "perplexity.svg", "summary.json", "summary.md",
         "tradeoff.png", "tradeoff.svg"]  # fmt: skip
KINDS = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


def fake_manifest(name: str = "int4-gptq", bits: int = 4, size: int = 114_000_000, blocks: int = 30) -> dict[str, Any]:
    """A manifest as `quantpress run` writes it, with errors that grow with depth and block 0's v left in 16 bit."""
    layers = []
    for block in range(blocks):
        for i, (kind, parent) in enumerate(KINDS.items()):
            dense = block == 0 and kind == "v"
            error = 0.25**bits * (1 + block / 4) * (1 + 0.7 * math.sin(3 * i + block)) + 1e-4
            layers.append({
                "name": f"model.layers.{block}.{parent}.{kind}_proj", "block": block, "shape": [576, 576],
                "bits": 16 if dense else bits, "group_size": 64, "symmetric": False,
                "scheme": "16 bit" if dense else f"int{bits} g64 asym", "loss": None if dense else 3.5,
                "relative_error": None if dense else error, "damp": 0.01,
                "note": "ignored by the recipe" if dense else None,
            })  # fmt: skip
    method = {"name": "rtn"} if "rtn" in name else {"name": "gptq", "damp": 0.01}
    return {
        "schema": 1, "name": name,
        "model": {
            "id": "smollm2-135m", "kind": "gguf", "revision": "a1b2c3d", "path": "/somewhere/private",
            "caveat": "its weights already lay on a 4-bit, group-32 grid", "files": {"model.safetensors": "ab" * 32},
        },
        "recipe": {
            "name": name, "model": "smollm2-135m", "calibration": {"source": "default", "samples": 128, "seq_len": 512},
            "method": method, "weights": {"bits": bits, "group_size": 64, "symmetric": False},
            "ignore": ["*.0.self_attn.v_proj"], "gates": {"max_perplexity_increase": 0.03},
        },
        "quantpress": "0.1.0", "versions": {"torch": "2.13.0+cpu", "transformers": "5.17.0", "python": "3.11.2"},
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "device": "cpu", "memory_bytes": 16_000_000_000},
        "calibration": {"source": "c4 sample", "sha256": "cd" * 32, "samples": 128, "seq_len": 512, "tokens": 65536},
        "seed": 0, "layers": layers, "fallbacks": ["model.layers.3.mlp.down_proj: damp raised to 0.1"],
        "artifact": {
            "format": "compressed-tensors", "bytes": size, "original_bytes": 269_060_552,
            "quantized_bits_per_weight": bits + 0.31, "bits_per_parameter": size * 8 / 134_515_008,
            "parameters": 134_515_008,
        },
        "converted": ["gptq"],
        "timing": {
            "seconds": 95.2, "cpu_seconds": 171.0, "peak_rss_bytes": 1_104_000_000,
            "per_block_seconds": [3.1] * blocks,
        },
    }  # fmt: skip


def fake_results(perplexity: float = 18.4, verdict: str = "REGRESSION") -> dict[str, Any]:
    increase, kl = perplexity / 17.05 - 1, max(1e-4, math.log(perplexity / 17.05) * 1.3)
    checks = [
        {
            "name": "max_perplexity_increase",
            "limit": 0.03,
            "value": increase,
            "verdict": "ACCEPT" if verdict == "NONE" else verdict,
            "reason": "as the test says",
        },
        {
            "name": "min_top1_agreement",
            "limit": 0.8,
            "value": max(0.1, 0.97 - kl),
            "verdict": "ACCEPT",
            "reason": "as the test says",
        },
    ]
    return {
        "schema": 2,
        "text": {"source": "wiki sample", "sha256": "ef" * 32, "tokens": 16384, "windows": 16, "window": 1024,
                 "stride": 1024, "bos": True},
        "dtype": "bfloat16", "device": "cpu",
        "original": {"perplexity": 17.05, "nll_stderr": 0.021, "bits_per_byte": 0.9312, "bytes": 71234},
        "artifact": {"perplexity": perplexity, "nll_stderr": 0.022, "bits_per_byte": 0.957, "bytes": 71234},
        "perplexity_increase": increase,
        "divergence": {"kl_mean": kl, "kl_stderr": kl / 40, "kl_median": kl / 3, "kl_p90": 2.5 * kl,
                       "kl_p99": 8 * kl, "kl_max": 30 * kl, "top1_agreement": max(0.1, 0.97 - kl)},
        "gates": {"verdict": verdict, "reason": "as the test says", "checks": [] if verdict == "NONE" else checks},
        "seconds": 61.0,
    }  # fmt: skip


def write_run(folder: Path, manifest: dict[str, Any], results: dict[str, Any]) -> Path:
    """A run folder; the sizes in its results are those of its manifest, as in a real one."""
    sizes = {key: manifest["artifact"][key] for key in ("bytes", "original_bytes", "parameters", "bits_per_parameter")}
    sizes["bits_per_weight"] = manifest["artifact"]["quantized_bits_per_weight"]
    results = results | {"efficiency": results.get("efficiency", {}) | sizes}
    (folder / "eval").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "eval" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def five_runs(folder: Path, blocks: int = 4) -> list[Path]:
    """int3 is good for its size, rtn4 and the larger group-32 are beaten, int8 is almost the original."""
    kinds = [("int3-g64", 3, 100_600_000, 29.78), ("int4-rtn-g64", 4, 114_000_000, 21.91),
             ("int4-gptq-g64", 4, 114_000_000, 18.39), ("int4-gptq-g32-sym", 4, 118_400_000, 18.9),
             ("int8-gptq", 8, 163_200_000, 17.07)]  # fmt: skip
    return [write_run(folder / n, fake_manifest(n, b, s, blocks), fake_results(p, "NONE")) for n, b, s, p in kinds]


CHILDLESS = {
    "meta",
    "input",
    "link",
    "br",
    "line",
    "path",
    "circle",
    "polyline",
}  # browsers close drawings, the page does not


class Page(HTMLParser):
    """Collects what a test asks about: ids of tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in CHILDLESS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in CHILDLESS or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page(index: Path) -> Page:
    parsed = Page(index.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


# ---- one run


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of one run, to look at."""
    run = write_run(tmp_path_factory.mktemp("reported") / "run", fake_manifest(), fake_results())
    return write_report(run).parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", fake_manifest(), fake_results())


def test_a_run_gets_its_files_and_nothing_else(run: Path) -> None:
    assert write_report(run) == run / "report" / "index.html"
    assert sorted(f.name for f in (run / "report").iterdir()) == FILES
    assert (run / "report" / "index.html").stat().st_size < 300_000
    for name in ("tradeoff.png", "layers.png"):
        head = (run / "report" / name).read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert width > 1000
        assert height > 400


def test_the_same_input_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    write_report(run)
    first = {name: (run / "report" / name).read_bytes() for name in FILES}
    again = shutil.copytree(run, tmp_path / "elsewhere" / "run", ignore=shutil.ignore_patterns("report"))
    write_report(again)
    assert {name: (again / "report" / name).read_bytes() for name in FILES} == first


def test_the_page_says_what_was_measured(reported: Path) -> None:
    text = page(reported / "index.html").text
    assert "2.4× smaller weights: 269 MB → 114 MB. Perplexity 17.05 → 18.40 (+7.9 %)." in text
    assert "Misses its gates: as the test says." in text
    assert "What to do Do not release it. Try smaller groups" in text
    for shown in ("its weights already lay on a 4-bit, group-32 grid", "17.05 ± 0.36", "4.31", "damp raised to 0.1",
                  "AMD EPYC 9R14", "cd" * 32, "ef" * 32, "ab" * 32, "transformers 5.17.0", "group_size: 64",
                  "model.safetensors", "ignored by the recipe", "left in 16 bit"):  # fmt: skip
        assert shown in text, shown
    assert "/somewhere/private" not in text


def test_the_page_needs_no_network_and_no_script(reported: Path) -> None:
    parsed = page(reported / "index.html")
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img", "iframe", "object")]
    for tag, attrs in parsed.tags:
        assert not attrs.get("src"), tag
        assert (attrs.get("href") or "data:").startswith("data:"), tag
    assert "url(" not in (reported / "index.html").read_text(encoding="utf-8")


def test_every_chart_has_a_text_for_those_who_do_not_see_it(reported: Path) -> None:
    drawings = [attrs for tag, attrs in page(reported / "index.html").tags if tag == "svg"]
    assert len(drawings) == 5  # two charts for wide and for narrow windows, and the strip
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"] or "") > 40


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>$\\frac|`"
    manifest = fake_manifest(evil)
    manifest["model"]["id"] = manifest["model"]["caveat"] = evil
    manifest["fallbacks"] = [evil, "two\nlines"]
    manifest["layers"][5]["note"] = manifest["layers"][5]["scheme"] = evil
    manifest["recipe"]["description"] = evil
    folder = write_run(tmp_path / "run", manifest, fake_results())
    parsed = page(write_report(folder))
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert evil in parsed.text
    markdown = (folder / "report" / "summary.md").read_text(encoding="utf-8")
    assert "\\<img" in markdown
    assert not re.search(r"(?<!\\)<img", markdown)
    assert "- two lines\n" in markdown


def test_the_summaries(reported: Path) -> None:
    summary = json.loads((reported / "summary.json").read_text(encoding="utf-8"))
    assert summary["schema"] == 1
    assert summary["summary"]["verdict"] == "REGRESSION"
    assert summary["summary"]["size_ratio"] == pytest.approx(269_060_552 / 114_000_000)
    assert summary["summary"]["artifact"]["perplexity"] == 18.4
    lines = (reported / "summary.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert any("**missed**" in line for line in table)
    assert any("Caveat: its weights" in line for line in lines)


def test_a_broken_artifact_is_called_broken(tmp_path: Path) -> None:
    results = fake_results(verdict="NONE")
    results["artifact"]["perplexity"] = results["perplexity_increase"] = math.inf
    results["artifact"]["nll_stderr"] = results["divergence"]["kl_mean"] = math.nan
    folder = write_run(tmp_path / "run", fake_manifest(), results)
    text = page(write_report(folder)).text
    assert "Broken: its perplexity or KL divergence is not a finite number." in text
    assert "17.05 → not finite" in text
    summary = json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert summary["summary"]["artifact"]["perplexity"] is None


def test_a_model_of_126_blocks_still_makes_a_small_page(tmp_path: Path) -> None:
    index = write_report(write_run(tmp_path / "run", fake_manifest(blocks=126), fake_results()))
    assert "block 125" in page(index).text
    assert index.stat().st_size < 300_000


def test_rounding_without_calibration_shows_schemes_and_no_errors(tmp_path: Path) -> None:
    manifest = fake_manifest()
    manifest["calibration"] = None
    for layer in manifest["layers"]:
        layer["relative_error"] = layer["loss"] = None
    text = page(write_report(write_run(tmp_path / "run", manifest, fake_results()))).text
    assert "No layer's error was measured" in text
    assert "error not measured, int4 g64 asym" in text


@pytest.mark.parametrize(
    ("error_measure", "said"),
    [
        ("output_accumulated", "with that of the layers before it, as a share of the original model's squared output"),
        ("output_local", "as a share of the squared output of the original layer on the same inputs"),
        ("weight_by_importance", "squared error of its weights, columns weighted by the importance matrix"),
        ("weight", "the squared error of its weights as a share of the squared weights; no text was run"),
        (None, "as the version of quantpress that made the artifact measured it"),
        ("output", "as the version of quantpress that made the artifact measured it"),
    ],
)
def test_the_strip_says_what_its_errors_are_errors_of(error_measure: str | None, said: str, tmp_path: Path) -> None:
    manifest = fake_manifest(blocks=2) | {"error_measure": error_measure}
    page = html.unescape(write_report(write_run(tmp_path / "run", manifest, fake_results())).read_text())
    assert said in page
    told = page.split("<h2>Where the error is")[1].split("</p>")[0]
    assert ("calibration text" in told) == (error_measure in ("output_accumulated", "output_local"))


def test_a_comparison_says_where_errors_are_not_alike(tmp_path: Path) -> None:
    runs = []
    for name, measure in (("a", "output_local"), ("b", "output_accumulated"), ("c", "output_local")):
        manifest = fake_manifest(name, blocks=2) | {"error_measure": measure}
        runs.append(write_run(tmp_path / name, manifest, fake_results()))
    unlike = html.unescape(write_comparison(runs[:2], tmp_path / "unlike").read_text())
    assert "These runs measured different errors" in unlike
    for name in "ab":
        assert f"<li>{name}: the squared error of its output on the calibration text, " in unlike
    alike = html.unescape(write_comparison([runs[0], runs[2]], tmp_path / "alike").read_text())
    assert "These runs measured different errors" not in alike
    assert "as a share of the squared output of the original layer on the same inputs" in alike


def test_calibrating_on_the_evaluation_text_is_said(tmp_path: Path) -> None:
    manifest = fake_manifest()
    manifest["calibration"]["sha256"] = "ef" * 32
    text = page(write_report(write_run(tmp_path / "run", manifest, fake_results()))).text
    assert "Calibrated on the text it is evaluated on" in text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("manifest.json", None, "no manifest.json; is this a run folder"),
        ("eval/results.json", None, "no eval/results.json; evaluate the run first"),
        ("manifest.json", "{", "manifest.json: cannot be read"),
        ("manifest.json", "[]", "not the manifest of a quantpress run"),
        ("manifest.json", "{}", "schema None is not 1"),
        ("eval/results.json", '{"schema": 1}', "schema 1 is not 2"),
        ("eval/results.json", '{"schema": 2}', "results.json: dtype: Field required"),
        (
            "eval/results.json",
            '{"schema": 2, "dtype": "float32", "device": "cpu", "seconds": 1}',
            "holds no perplexity and divergence",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(run: Path, file: str, content: str | None, said: str) -> None:
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(BadInput, match=re.escape(said)) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report").exists()


# ---- several runs


def test_a_comparison_separates_the_beaten_from_the_rest(tmp_path: Path) -> None:
    runs = five_runs(tmp_path, blocks=30)
    out = tmp_path / "compare"
    parsed = page(write_comparison(runs, out))
    assert sorted({f.name for f in out.iterdir()} - {"runs.parquet"}) == sorted([*FILES, "runs.csv"])
    rows = json.loads((out / "summary.json").read_text(encoding="utf-8"))["runs"]
    assert [(row["label"], row["pareto"]) for row in rows] == [
        ("int3-g64", True), ("int4-gptq-g64", True), ("int4-rtn-g64", False), ("int4-gptq-g32-sym", False),
        ("int8-gptq", True),
    ]  # fmt: skip
    assert "3 of 5 are worth choosing between" in parsed.text
    assert "The smallest that is fine: int8-gptq, 1.6× smaller, KL" in parsed.text
    assert "weights.bits" in parsed.text
    assert (out / "index.html").stat().st_size < 300_000


def test_settings_of_a_method_that_others_lack_are_no_difference_unless_they_were_set(tmp_path: Path) -> None:
    def recipe(**more: Any) -> dict[str, Any]:
        return Recipe.model_validate({"method": more}).model_dump(mode="json")

    runs = []
    for name, method in (("a", {"name": "rtn"}), ("b", {"name": "gptq"}), ("c", {"name": "gptq", "damp": 0.05})):
        manifest = fake_manifest(name) | {"recipe": recipe(**method)}
        runs.append(open_run(write_run(tmp_path / name, manifest, fake_results())))
    assert _differences(runs[:2]) == {"method.name": ["rtn", "gptq"]}
    assert _differences(runs) == {"method.name": ["rtn", "gptq", "gptq"], "method.damp": ["", "null", "0.05"]}


def test_a_comparison_does_not_depend_on_the_order(tmp_path: Path) -> None:
    runs = five_runs(tmp_path)
    write_comparison(runs, tmp_path / "a")
    write_comparison(runs[::-1], tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_runs_of_one_recipe_are_told_apart_by_folder(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f / "int4-gptq", fake_manifest(size=s), fake_results()) for f, s in
            (("first", 114_000_000), ("second", 115_000_000))]  # fmt: skip
    text = page(write_comparison(runs, tmp_path / "out")).text
    assert "first/int4-gptq" in text
    assert "second/int4-gptq" in text


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("results", "window", 2048, "evaluation text differs, window 1024 and 2048"),
        ("results", "bos", False, "evaluation text differs, bos True and False"),
        ("results", "sha256", "00", "evaluation text differs, sha256"),
        (
            "manifest",
            "files",
            {"model.safetensors": "00"},
            "different originals, smollm2-135m and smollm2-135m (model.",
        ),
        ("manifest", "files", {}, "different originals"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, part: str, key: str, value: Any, said: str) -> None:
    manifest, results = fake_manifest(), fake_results()
    (manifest["model"] if part == "manifest" else results["text"])[key] = value
    runs = [write_run(tmp_path / "a", fake_manifest(), fake_results()), write_run(tmp_path / "b", manifest, results)]
    with pytest.raises(BadInput, match=re.escape(said)) as caught:
        write_comparison(runs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_comparison_needs_two_different_runs(run: Path, tmp_path: Path) -> None:
    for runs in ([], [run], [run, run]):
        with pytest.raises(BadInput, match="two or more different runs"):
            write_comparison(runs, tmp_path / "out")


def test_a_comparison_leaves_other_files_alone_and_names_an_unusable_folder(tmp_path: Path) -> None:
    runs = five_runs(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_comparison(runs, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(BadInput, match=r"cannot write the report there"):
        write_comparison(runs, tmp_path / "out" / "notes.txt")


# ---- in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def in_browser(page: Path, profile: Path, *more: str) -> tuple[str, str]:
    """The page's document after loading, and what the browser wrote to its log."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--enable-logging=stderr", f"--user-data-dir={profile}", *more, "--dump-dom"]  # fmt: skip
    done = subprocess.run([str(BROWSER), *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_it_without_complaint(reported: Path, tmp_path: Path) -> None:
    document, log = in_browser(reported / "index.html", tmp_path)
    assert "2.4× smaller weights: 269 MB → 114 MB." in Page(document).text
    assert "CONSOLE" not in log


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_does_not_scroll_sideways_on_a_phone(tmp_path: Path) -> None:
    manifest = fake_manifest("a-recipe-with-a-name-that-is-longer-than-a-phone-is-wide-" + "x" * 60, blocks=126)
    manifest["model"]["caveat"] = manifest["fallbacks"][0] = "word" * 40
    run = write_run(tmp_path / "a", manifest, fake_results())
    other = write_run(tmp_path / "b", manifest | {"name": "short"}, fake_results(19.0))
    for i, page in enumerate((write_report(run), write_comparison([run, other], tmp_path / "compare"))):
        frame = tmp_path / "frame.html"
        frame.write_text(
            f"<iframe id=f src={page.as_uri()} style='width: 390px'></iframe>"
            "<script>onload = () => { const page = f.contentDocument.documentElement;"
            "document.title = `hidden px: ${page.scrollWidth - page.clientWidth}` }</script>"
        )
        document, _ = in_browser(frame, tmp_path / f"profile{i}", "--allow-file-access-from-files")
        assert "<title>hidden px: 0</title>" in document


def test_a_gate_that_is_too_close_to_call_says_on_the_page_what_would_settle_it(tmp_path: Path) -> None:
    results = fake_results(verdict="INCONCLUSIVE")
    results["gates"]["checks"][0] |= {
        "interval": [0.02, 0.11], "needs": 40,
        "reason": "perplexity +7.9 %, limit +3.0 %: too close to call; about 40 windows would settle it",
    }  # fmt: skip
    run = write_run(tmp_path / "run", fake_manifest(), results)
    text = page(write_report(run)).text.replace("\u00a0", " ")
    assert "? too close to call about 40 windows would settle it≤ +3.0 %+7.9 % +2.0 to +11.0 %" in text
    assert "too close to call |" in (run / "report" / "summary.md").read_text(encoding="utf-8")
