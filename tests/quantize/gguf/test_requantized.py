"""A GGUF file of floats, of an architecture that nobody knows, rounded as the same model is by a recipe."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quantpress.artifact.gguf_floats import write_floats
from quantpress.cli.app import app
from quantpress.core.errors import BadInput
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.gguf.converted import metadata_of
from quantpress.gguf.imatrix import Importance, save
from quantpress.gguf.reader import GgufTensors
from quantpress.gguf.requantized import requantize
from quantpress.gguf.writer import FileTensor, write
from quantpress.recipe.loading import parse

from .models import build


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    found = gguf.GGUFReader(file)
    said = {key: (f.contents(), f.types) for key, f in found.fields.items() if not key.startswith("GGUF.")}
    return said, {t.name: (t.tensor_type.name, t.data.tobytes()) for t in found.tensors}


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    """The file of a tiny mixture of experts; the model is in tmp_path/m."""
    build("qwen3_moe", tmp_path / "m", dtype=torch.bfloat16)
    write_floats(tmp_path / "m", tmp_path / "floats.gguf", "BF16")
    return tmp_path / "floats.gguf"


def test_as_a_recipe_rounds_the_model(floats: Path, tmp_path: Path) -> None:
    document = {
        "method": {"name": "rtn"},
        "formats": ["gguf"],
        "gguf": {"type": "Q4_K_M"},
        "model": str(tmp_path / "m"),
    }
    quantize(prepare(parse(document), resolve(str(tmp_path / "m"), cache=tmp_path)), Settings(tmp_path / "r", tmp_path))
    want = read(tmp_path / "r" / "quantized" / "model.gguf")
    main = CliRunner().invoke(
        app, ["gguf", str(floats), str(tmp_path / "q.gguf"), "--type", "Q4_K_M"], catch_exceptions=False
    )
    assert main.output.split()[-2:] == ["written:", str(tmp_path / "q.gguf")]
    said, tensors = read(tmp_path / "q.gguf")
    assert {name for name in tensors if tensors[name] != want[1][name]} == set()
    assert said == want[0] | {"general.name": said["general.name"]}


def test_an_architecture_that_nobody_knows(floats: Path, tmp_path: Path) -> None:
    said = {key: value for key, value in metadata_of(floats).items() if not key.startswith("qwen3moe.")}
    held = GgufTensors([floats])
    tensors = []
    for name in held.names():
        stored = held.stored(name)
        tensors.append(FileTensor(name, stored.tensor_type, held.shape(name), lambda stored=stored: stored.data))
    write(tmp_path / "new.gguf", said | {"general.architecture": "never-seen"}, tensors)
    with pytest.raises(BadInput, match=r"'never-seen' is not supported .* quantpress gguf .*new.gguf .* --type Q4_K_M"):
        resolve(str(tmp_path / "new.gguf"), cache=tmp_path / "cache")
    requantize(tmp_path / "new.gguf", tmp_path / "a.gguf", "Q4_0")
    requantize(floats, tmp_path / "b.gguf", "Q4_0")
    assert read(tmp_path / "a.gguf")[1] == read(tmp_path / "b.gguf")[1]
    assert read(tmp_path / "a.gguf")[0]["general.architecture"][0] == "never-seen"


def test_importance_counts_expert_by_expert(floats: Path, tmp_path: Path) -> None:
    name, columns = "blk.0.ffn_up_exps.weight", np.ones((4, 64), np.float32)
    columns[2, :8] = 1000
    save(tmp_path / "i.gguf", {name: Importance(columns, np.ones(4, np.float32))}, "text", 8)
    requantize(floats, tmp_path / "a.gguf", "Q4_K_S", tmp_path / "i.gguf")
    requantize(floats, tmp_path / "b.gguf", "Q4_K_S")
    weight = GgufTensors([floats]).dequantized(name)
    errors = [
        (GgufTensors([tmp_path / f"{n}.gguf"]).dequantized(name) - weight).square()[:, :, :8].mean((1, 2)) for n in "ab"
    ]
    assert errors[0][2] < 0.8 * errors[1][2]
    other = {name: Importance(np.ones((4, 60), np.float32), np.ones(4, np.float32))}
    save(tmp_path / "o.gguf", other, "text", 8)
    with pytest.raises(BadInput, match="has 240 values and the model 256: another model's"):
        requantize(floats, tmp_path / "c.gguf", "Q4_K_S", tmp_path / "o.gguf")


def test_what_is_quantized_already_or_needs_importance_is_refused(floats: Path, tmp_path: Path) -> None:
    requantize(floats, tmp_path / "a.gguf", "Q4_0")
    with pytest.raises(BadInput, match=r"is Q\d_\w already; give the 16- or 32-bit file"):
        requantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")
    with pytest.raises(BadInput, match="type IQ2_XS needs an importance matrix"):
        requantize(floats, tmp_path / "b.gguf", "IQ2_XS")
    assert not (tmp_path / "b.gguf").exists()
