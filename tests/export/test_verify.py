"""Damaged artifacts, one for each kind of damage and format: each is told of in one line that names the place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpress.artifact.convert import convert
from quantpress.artifact.gguf_floats import write_floats
from quantpress.core.errors import BadInput
from quantpress.core.files import file_sha256
from quantpress.exports.package import export
from quantpress.exports.servers.llama_cpp import LlamaCpp
from quantpress.exports.servers.vllm import Vllm
from quantpress.exports.verify import structure, verify
from quantpress.formats import FORMATS as PACKERS
from quantpress.models.checkpoint import Checkpoint
from quantpress.numbers.types import Activations, Grid

from ..quantize.formats.artifacts import make, uniform
from ..quantize.gguf.models import build
from .test_servers import write_gguf

FP8 = Activations(type="fp8")
FORMATS: dict[str, tuple[Grid, Activations | None]] = {
    "compressed-tensors": (Grid(group_size=32, symmetric=False), None),
    "gptq": (Grid(group_size=32), None),
    "awq": (Grid(group_size=32, symmetric=False), None),
    "modelopt": (Grid(type="fp8"), FP8),
}
CODES = {"compressed-tensors": "weight_packed", "gptq": "qweight", "awq": "qweight", "modelopt": "weight"}
SCALES = {"compressed-tensors": "weight_scale", "gptq": "scales", "awq": "scales", "modelopt": "weight_scale"}
Q = "model.layers.1.self_attn.q_proj"
DENSE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact in each format: an untied head, `down_proj` left in 16 bit, and a manifest that lists its files."""
    made = {}
    for format, (grid, spec) in FORMATS.items():
        folder = tmp_path_factory.mktemp("whole") / format
        make(folder, format, uniform(grid, dense=("mlp.down_proj",)), family="mistral", spec=spec)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        files = Checkpoint(folder).file_hashes()
        companions = {n: d for n, d in files.items() if "tokenizer" in n or "template" in n}
        model = {"id": "it", "files": companions}
        document = {"quantpress": "1", "name": "it", "model": model, "artifact": {"files": files}}
        (folder / "manifest.json").write_text(json.dumps(document))
        made[format] = folder
    return made


@pytest.fixture(params=FORMATS)
def artifact(request: pytest.FixtureRequest, whole: dict[str, Path], tmp_path: Path) -> tuple[str, Path]:
    """A copy of one to damage, without its manifest."""
    folder = tmp_path / "artifact"
    shutil.copytree(whole[request.param], folder, ignore=shutil.ignore_patterns("manifest.json"))
    return request.param, folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The tensors changed, in one file of their own."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def edit_config(folder: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = change(document["quantization_config"])
    (folder / "config.json").write_text(json.dumps(document))


def seen(where: Path) -> tuple[int, list[str]]:
    """How many files were compared with a list, and the problems."""
    done = verify(where)
    return done.files, list(done.problems)


def told(folder: Path) -> str:
    """The one line that is said."""
    found = verify(folder).problems
    assert len(found) == 1, found
    assert "\n" not in found[0]
    return found[0]


def everywhere(value: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """A JSON value with each plain value in it changed, given the key it stands under."""
    if isinstance(value, dict):
        return {change("", k): everywhere(v, change, k) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, change, key) for v in value]
    return change(key, value)


def test_a_whole_one_passes(artifact: tuple[str, Path], whole: dict[str, Path]) -> None:
    format, folder = artifact
    assert seen(folder) == (0, [])
    files, found = seen(whole[format])
    assert found == []
    assert files == len(Checkpoint(folder).file_hashes())


def test_a_flipped_byte(artifact: tuple[str, Path], whole: dict[str, Path]) -> None:
    format, folder = artifact
    shutil.copy(whole[format] / "manifest.json", folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    _, found = seen(folder)  # where the byte makes no sense either, a second line says so
    assert f"{shard.name}, which is listed, has changed: its sha256 differs" in found[0]


def test_a_missing_shard(artifact: tuple[str, Path], whole: dict[str, Path]) -> None:
    format, folder = artifact
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInput, match=f"shard {shard.name} is listed in .* but missing"):
        structure(folder)
    assert shard.name in told(folder)
    shutil.copy(whole[format] / "manifest.json", folder)
    assert f"{shard.name}, which is listed, is absent" in told(folder)


def test_a_wrong_shape(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    name = f"{Q}.{CODES[format]}"
    edit(folder, lambda t: t.update({name: t[name][:-1].clone()}))
    assert Q in told(folder)


def test_a_wrong_shape_of_what_is_not_quantized(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, lambda t: t.update({f"{DENSE}.weight": t[f"{DENSE}.weight"][:, :-8].clone()}))
    assert f"{DENSE}.weight: shape [64, 88] where the model has [64, 96]" in told(folder)


def test_a_missing_head(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, without("lm_head.weight"))
    assert told(folder).startswith("lm_head.weight is missing: the head is not tied to the embedding")


def test_a_missing_part_of_a_block(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, without("model.layers.1.input_layernorm.weight"))
    assert "lacks 1 tensors, the first model.layers.1.input_layernorm.weight" in told(folder)


def test_an_exclude_list_off_by_a_prefix(artifact: tuple[str, Path]) -> None:
    _, folder = artifact

    def prefixed(key: str, value: Any) -> Any:
        if not isinstance(value, str) or "down_proj" not in value:
            return value
        return value.replace("model", "language_model.model", 1)

    edit_config(folder, lambda config: everywhere(config, prefixed))
    found = verify(folder).problems
    assert len(found) == 2  # down_proj of both blocks
    assert found[0].startswith(f"{DENSE} is in 16 bit, and config.json does not leave it out; the nearest entry is '")
    assert "language_model" in found[0]


def test_scales_for_an_ignored_layer(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    edit(folder, lambda t: t.update({f"{DENSE}.{SCALES[format]}": torch.ones(64, 3)}))
    line = told(folder)
    assert DENSE in line
    assert "on disk, and" in line or "on disk and not in config.json" in line


def test_a_tensor_of_no_layer(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, lambda t: t.update({"model.mtp.weight": torch.ones(4)}))
    assert told(folder) == "model.mtp.weight is on disk, and the model has no such parameter"


def test_a_lost_tokenizer(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in told(folder)


def test_a_lost_or_changed_chat_template(artifact: tuple[str, Path], whole: dict[str, Path]) -> None:
    format, folder = artifact
    manifest = json.loads((whole[format] / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"artifact": {}}))
    (folder / "chat_template.jinja").unlink()
    assert "chat_template.jinja, which the original has, is absent" in told(folder)
    (folder / "chat_template.jinja").write_text("{{ other }}")
    assert "chat_template.jinja, which the original has, has changed" in told(folder)


def test_another_group_size_in_the_config(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    if format == "modelopt":
        edit_config(folder, lambda config: config | {"quant_algo": "FP8"})
    else:
        change = lambda key, value: 16 if key == "group_size" and value == 32 else value  # noqa: E731
        edit_config(folder, lambda config: everywhere(config, change))
    found = verify(folder).problems
    assert len(found) == 12  # every quantized linear
    assert any(line.startswith(Q) for line in found)


def test_other_bits_in_the_config(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    if format == "modelopt":
        edit_config(folder, lambda config: config | {"quant_algo": "NVFP4"})
    else:
        change = lambda key, value: 8 if key in ("bits", "num_bits") else value  # noqa: E731
        edit_config(folder, lambda config: everywhere(config, change))
    found = verify(folder).problems
    assert found
    assert all("\n" not in line for line in found)


def test_a_wrong_dtype(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    name = f"{Q}.{CODES[format]}"
    wider = {torch.int32: torch.int64, torch.float8_e4m3fn: torch.float32}
    edit(folder, lambda t: t.update({name: t[name].to(wider[t[name].dtype])}))
    line = told(folder)
    assert name in line
    assert "where" in line


def test_integers_for_a_weight(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, lambda t: t.update({f"{DENSE}.weight": t[f"{DENSE}.weight"].to(torch.int8)}))
    assert told(folder) == f"{DENSE}.weight: int8 where a weight of the model is a float"


def test_scales_that_are_no_numbers(artifact: tuple[str, Path]) -> None:
    format, folder = artifact
    edit(folder, lambda t: t[f"{Q}.{SCALES[format]}"].view(-1)[0].fill_(torch.nan) and None)
    assert told(folder) == f"{Q}: its scales hold NaN or inf"


STATIC = Activations(type="fp8", dynamic=False)
NVFP4 = Activations(type="nvfp4")
SCALARS = [  # where one number scales a whole tensor
    ("compressed-tensors", Grid(type="nvfp4"), NVFP4, "weight_global_scale"),
    ("modelopt", Grid(type="nvfp4"), NVFP4, "weight_scale_2"),
    ("compressed-tensors", Grid(type="nvfp4"), NVFP4, "input_global_scale"),
    ("modelopt", Grid(type="nvfp4"), NVFP4, "input_scale"),
    ("compressed-tensors", Grid(type="fp8"), STATIC, "input_scale"),
    ("modelopt", Grid(type="fp8", group_size=0), STATIC, "input_scale"),
]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize(("format", "grid", "spec", "suffix"), SCALARS)
def test_a_single_scale_that_is_no_number(
    format: str, grid: Grid, spec: Activations, suffix: str, number: float, tmp_path: Path
) -> None:
    make(tmp_path / "it", format, uniform(grid), spec=spec)
    assert verify(tmp_path / "it").problems == ()
    edit(tmp_path / "it", lambda t: t[f"{Q}.{suffix}"].fill_(number) and None)
    assert told(tmp_path / "it") == f"{Q}.{suffix}: one positive, finite number is needed"


@pytest.mark.parametrize(("side", "number"), [(0, torch.nan), (1, torch.nan), (1, torch.inf), (0, 0.0)])
@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_a_cache_scale_that_is_no_number(format: str, side: int, number: float, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    make(folder, format, uniform(Grid(type="fp8")), spec=FP8)
    scheme = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}
    edit_config(folder, lambda config: config | {"kv_cache_scheme": scheme})
    suffixes = PACKERS[format].cache_suffixes
    attentions = [f"model.layers.{k}.self_attn" for k in range(2)]
    edit(folder, lambda t: t.update({f"{a}.{suffix}": torch.ones(1) for a in attentions for suffix in suffixes}))
    assert verify(folder).problems == ()
    edit(folder, lambda t: t[f"{attentions[1]}.{suffixes[side]}"].fill_(number) and None)
    assert told(folder) == f"{attentions[1]}: the scales of its key-value cache are not positive numbers"


@pytest.mark.parametrize(
    ("format", "grid", "spec"),
    [
        *((format, *kinds) for format, kinds in FORMATS.items()),
        ("compressed-tensors", Grid(bits=8, group_size=-1), Activations(type="int8", dynamic=False, symmetric=False)),
        ("compressed-tensors", Grid(type="nvfp4"), NVFP4),
        ("modelopt", Grid(type="nvfp4"), NVFP4),
        ("modelopt", Grid(bits=8, group_size=-1), None),
    ],
)
def test_each_tensor_of_a_linear_in_another_shape(
    format: str, grid: Grid, spec: Activations | None, tmp_path: Path
) -> None:
    """With one more row, and with one more dimension: readers go by both."""
    folder = tmp_path / "it"
    make(folder, format, uniform(grid), spec=spec)
    stored = {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items() if n.startswith(Q)}
    assert len(stored) > 1
    for name, tensor in stored.items():
        if tensor.numel() == 1:  # [] and [1] are one number to every reader
            changed = [torch.ones(2, dtype=tensor.dtype)]
        else:
            changed = [torch.cat([tensor, tensor[:1]]), tensor[None]]
        for other in changed:
            edit(folder, lambda t, name=name, other=other: t.update({name: other.clone()}))  # type: ignore[misc]
            line = told(folder)
            assert line.startswith((f"{name}: ", f"{Q}: ")), (name, other.shape, line)
        edit(folder, lambda t, name=name, tensor=tensor: t.update({name: tensor.clone()}))  # type: ignore[misc]
    assert verify(folder).problems == ()


def test_weights_that_are_no_numbers(artifact: tuple[str, Path]) -> None:
    _, folder = artifact
    edit(folder, lambda t: t["model.norm.weight"].view(-1)[0].fill_(torch.inf) and None)
    assert told(folder) == "model.norm.weight holds NaN or inf"


@pytest.mark.parametrize("format", ["gptq", "modelopt"])
def test_a_twin_of_the_config_that_says_something_else(format: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(whole[format], folder)
    twin = folder / {"gptq": "quantize_config.json", "modelopt": "hf_quant_config.json"}[format]
    manifest = json.loads((folder / "manifest.json").read_text()) | {"artifact": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder).problems == ()
    twin.write_text(json.dumps(json.loads(twin.read_text()) | {"bits": 5}))
    assert f"{twin.name} and config.json disagree about the quantization" in told(folder)
    twin.unlink()
    assert f"{twin.name} is missing" in told(folder)


def test_an_exported_folder_by_its_checksums(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = export(whole["compressed-tensors"], Vllm(), tmp_path / "out").folder
    files, found = seen(folder)
    assert (found, files > 10) == ([], True)
    with (folder / "serve.sh").open("a") as script:
        script.write("rm -rf /\n")
    assert "serve.sh, which is listed, has changed" in told(folder)


def test_a_converted_folder_lists_its_own_files(whole: dict[str, Path], tmp_path: Path) -> None:
    convert(whole["awq"], tmp_path / "as-ct", "compressed-tensors")
    files, found = seen(tmp_path / "as-ct")
    assert (found, files > 3) == ([], True)


def test_what_is_no_artifact_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no artifact"):
        verify(tmp_path)


@pytest.fixture(scope="module")
def with_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny Llama with the config.json of its model."""
    folder = tmp_path_factory.mktemp("gguf")
    build("llama", folder / "m")
    (folder / "quantized").mkdir()
    write_floats(folder / "m", folder / "quantized" / "model.gguf", "F16")
    shutil.copy(folder / "m" / "config.json", folder / "quantized")
    return folder / "quantized"


def test_a_gguf_file_is_compared_with_its_config(with_config: Path, tmp_path: Path) -> None:
    assert seen(with_config) == (0, [])
    (tmp_path / "quantized").mkdir()
    shutil.copy(with_config / "model.gguf", tmp_path / "quantized")
    assert seen(tmp_path) == (0, [])
    assert "needs the config.json of its model" in verify(tmp_path).not_reached[-1]
    shutil.copy(with_config / "config.json", tmp_path / "quantized")
    write_gguf(tmp_path / "quantized" / "model.gguf")
    assert "tensor token_embd.weight is [8, 64] and config.json wants [352, 64]" in told(tmp_path)


def test_a_gguf_file_that_is_cut_off(with_config: Path, tmp_path: Path) -> None:
    """Wherever it is cut: in its metadata, in its list of tensors, in a tensor."""
    content = (with_config / "model.gguf").read_bytes()
    cut = tmp_path / "quantized" / "model.gguf"
    cut.parent.mkdir()
    for size in (0, 3, 10, 30, 400, 401, len(content) // 3, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        assert "model.gguf: not a whole GGUF file" in told(tmp_path)
    manifest = {"quantpress": "1", "artifact": {"files": {"model.gguf": file_sha256(with_config / "model.gguf")}}}
    (cut.parent / "manifest.json").write_text(json.dumps(manifest))
    cut.write_bytes(content[:400])
    assert "model.gguf, which is listed, has changed" in told(tmp_path)


def test_a_later_part_of_a_split_gguf_file_that_is_cut_off(with_config: Path, tmp_path: Path) -> None:
    write_floats(with_config.parent / "m", tmp_path / "quantized" / "model.gguf", "F16", 100_000)
    second = sorted((tmp_path / "quantized").glob("*.gguf"))[-1]
    assert seen(tmp_path) == (0, [])
    second.write_bytes(second.read_bytes()[:-8])
    assert f"{second.name}: not a whole GGUF file" in told(tmp_path)
    with pytest.raises(BadInput, match=f"{second.name}: not a whole GGUF file"):
        export(tmp_path, LlamaCpp())
