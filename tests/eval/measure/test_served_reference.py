"""What a served model's reference takes kernels to do."""

from pathlib import Path

from quantpress.artifact.artifact import Artifact
from quantpress.engine.job import prepare
from quantpress.engine.pipeline import quantize
from quantpress.engine.settings import Settings
from quantpress.engine.sources import resolve
from quantpress.eval.measure.served_reference import _sharing_a_scale
from quantpress.recipe.loading import parse

from ...quantize.gguf.models import build


def test_inputs_share_a_scale_in_the_blocks_of_the_weights_type(tmp_path: Path) -> None:
    """llama.cpp's kernels round to 256 at a time beside K types; taken for 32 a good file FAILED."""
    build("llama", tmp_path / "m", hidden_size=256, intermediate_size=512)
    types = {"*.attn_q.weight": "Q8_0", "*.attn_k.weight": "F16"}
    recipe = {"method": "rtn", "formats": ["gguf"], "gguf": {"type": "Q4_K_M", "tensor_types": types}}
    job = prepare(
        parse(recipe | {"model": str(tmp_path / "m")}), resolve(str(tmp_path / "m"), cache=tmp_path / "cache")
    )
    quantize(job, Settings(tmp_path / "run", tmp_path / "cache"))
    artifact = Artifact(tmp_path / "run" / "quantized")
    columns = {
        module: _sharing_a_scale(artifact, f"model.layers.1.{module}")
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    assert list(columns.values()) == [32, None, 256, 256]
