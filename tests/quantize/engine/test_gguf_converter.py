"""A model without a row: the unquantized file comes from the converter of a llama.cpp checkout, the rest from us."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantpress.artifact.artifact import open_artifact
from quantpress.artifact.gguf_floats import write_floats
from quantpress.core.errors import BadInput
from quantpress.engine import gguf_converter
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.gguf.writer import FileTensor, write
from quantpress.models.families import FAMILIES
from quantpress.recipe.loading import parse

from ..gguf.models import IDS, build, logits

# Does as llama.cpp's: writes a file of the model, here one that was made before.
SCRIPT = """
import shutil, sys
from pathlib import Path
out = sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "bf16"
shutil.copy(Path(__file__).parent / "made.gguf", out)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converter that knows llama, beside a model in tmp_path/m of a family that we then have no row for."""
    monkeypatch.setattr(gguf_converter, "default_cache", lambda: tmp_path / "cache")
    build("llama", tmp_path / "m", dtype=torch.bfloat16)
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(SCRIPT)
    write_floats(tmp_path / "m", folder / "made.gguf", "BF16")
    return folder


def run(model: Path, out: Path, method: str = "rtn", evaluation: Any = None, **section: Any) -> dict[str, Any]:
    """The tensors of the file that a run makes: {name: (type, bytes)}."""
    document = {"method": {"name": method}, "formats": ["gguf"], "evaluation": evaluation, "model": str(model)}
    job = prepare(parse(document | {"gguf": {"type": "Q4_0"} | section}), resolve(str(model), cache=out / "c"))
    quantize(job, Settings(out, out.parent / "cache"))
    tensors = gguf.GGUFReader(out / "quantized" / "model.gguf").tensors
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in tensors}


def without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], gguf=None))


@pytest.mark.parametrize("method", ["rtn", "llama.cpp"])
def test_the_same_file_as_by_our_own_row(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pytest.importorskip("llama_cpp")
    want = run(tmp_path / "m", tmp_path / "ours", method)
    without_a_row(monkeypatch)
    with pytest.raises(BadInput, match=r"'llama' cannot be written as GGUF; .* set gguf.converter to a checkout"):
        run(tmp_path / "m", tmp_path / "none", method)
    assert run(tmp_path / "m", tmp_path / "theirs", method, converter=str(checkout)) == want
    layout = json.loads((tmp_path / "theirs" / "quantized" / "gguf_layout.json").read_text())
    assert layout["blk.0.attn_q.weight"] == [["model.layers.0.self_attn.q_proj.weight"], ["query"]]
    _, skeleton = open_artifact(tmp_path / "theirs" / "quantized", torch.device("cpu"), torch.float32)
    from quantpress.gguf.llama_cpp_library import Loaded

    with Loaded(tmp_path / "theirs" / "quantized" / "model.gguf", 64, threads=1) as llama:
        got = torch.from_numpy(llama.logits(IDS.tolist()))
    expected = logits(skeleton.whole(), IDS)
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_tensors_that_are_no_parameters_are_rounded_all_the_same(checkout: Path, tmp_path: Path) -> None:
    """As the converter's negative exponentials, or latent attention's halves."""
    reader = gguf.GGUFReader(checkout / "made.gguf")
    tensors = []
    for t in reader.tensors:
        values = np.array(gguf.quants.dequantize(t.data, t.tensor_type)).reshape(tuple(map(int, reversed(t.shape))))
        values = values * 2 if t.name == "blk.0.ffn_up.weight" else values
        tensors.append(FileTensor(t.name, gguf.GGMLQuantizationType.F32, values.shape, lambda values=values: values))
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    write(checkout / "made.gguf", said, tensors)
    with pytest.raises(BadInput, match=r"1 parameters \(model.layers.0.mlp.up_proj.weight\) .*set evaluation: null"):
        run(tmp_path / "m", tmp_path / "out", evaluation={}, converter=str(checkout))
    made = run(tmp_path / "m", tmp_path / "out", converter=str(checkout))
    plain = run(tmp_path / "m", tmp_path / "plain")
    assert made["blk.0.ffn_up.weight"][0] == "Q4_0"
    assert {name for name in made if made[name] != plain[name]} == {"blk.0.ffn_up.weight"}
    with pytest.raises(BadInput, match=r"is not read back: llama.cpp runs such a file"):
        open_artifact(tmp_path / "out" / "quantized", torch.device("cpu"))


def test_what_the_converter_refuses_is_one_line(checkout: Path, tmp_path: Path) -> None:
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text("import sys; print('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr); sys.exit(1)")
    with pytest.raises(BadInput, match=r"does not convert .*: ERROR:hf-to-gguf:Model X is not supported$") as caught:
        run(tmp_path / "m", tmp_path / "out", converter=str(checkout))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"no convert_hf_to_gguf\.py there; give the folder of a checkout"):
        run(tmp_path / "m", tmp_path / "out", converter=str(tmp_path))
    assert not (tmp_path / "out").exists()
