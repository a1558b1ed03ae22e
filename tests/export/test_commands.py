"""The commands export and verify: targets from the command line or the recipe, exit codes, a machine's answer."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from quantpress.cli import main
from quantpress.numbers.types import Activations, Grid

from ..quantize.formats.artifacts import make, uniform
from .test_servers import write_gguf


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "artifact"
    make(folder, "compressed-tensors", uniform(Grid(bits=8, group_size=-1)), spec=Activations(type="int8"))
    return folder


@pytest.fixture
def run(artifact: Path, tmp_path: Path) -> Path:
    """A run folder whose recipe names two targets."""
    folder = tmp_path / "run"
    shutil.copytree(artifact, folder / "quantized")
    recipe = {"targets": [{"name": "vllm", "port": 8123}, {"name": "tgi"}]}
    document = {"quantpress": "1", "name": "a recipe", "model": {"id": "Org/Some.Model", "files": {}}, "recipe": recipe}
    for place in (folder, folder / "quantized"):
        (place / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: exit code, output, errors."""

    def called(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()  # what making the model has said
        monkeypatch.setattr(sys, "argv", ["quantpress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return called


def test_export_makes_what_the_recipe_names(call: Any, run: Path) -> None:
    code, out, _ = call("export", run)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["vllm", "tgi"]
    facts = json.loads((run / "export" / "vllm" / "export.json").read_text())
    assert (facts["port"], facts["name"]) == (8123, "some-model-a-recipe")
    code, _, err = call("export", run)
    assert code == 2
    assert "exists; give --out another folder, or --overwrite" in err


def test_export_makes_what_is_asked_with_its_settings(call: Any, run: Path) -> None:
    code, out, _ = call(
        "export", run, "--target", "vllm,tgi", "--set", "vllm.max_num_seqs=3", "--host", "::1", "--json"
    )
    assert code == 0
    assert json.loads(out)["tgi"]["format"] == "compressed-tensors"
    facts = json.loads((run / "export" / "vllm" / "export.json").read_text())
    assert (facts["target"]["max_num_seqs"], facts["port"]) == (3, 8000)
    assert "${HOST:-::1}" in (run / "export" / "vllm" / "serve.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "vllm,llama.cpp"], "llama.cpp reads gguf files"),
        (["--target", "vlm"], "known: vllm, sglang, tgi"),
        (["--target", "vllm", "--set", "vllm.tensor_paralel=2"], "did you mean 'tensor_parallel'?"),
        (["--target", "vllm", "--set", "port=1"], "write target.key=value, with one of vllm"),
        (["--target", "vllm,tgi", "--out", "elsewhere"], "--out is the folder of one target"),
        (["--target", "vllm", "--set", "vllm.tensor_parallel=8"], "would cut 4 attention heads unevenly"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    call: Any, run: Path, arguments: list[str], said: str
) -> None:
    code, _, err = call("export", run, *arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (run / "export").exists()


def test_a_recipe_without_targets_needs_one(call: Any, run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({"recipe": {}}))
    code, _, err = call("export", run)
    assert code == 2
    assert "names no targets; give --target" in err


def test_verify_says_what_is_wrong_with_exit_code_1(call: Any, run: Path) -> None:
    code, out, _ = call("verify", run)
    assert (code, "every tensor fits" in out) == (0, True)
    (run / "quantized" / "tokenizer.json").unlink()
    manifest = json.loads((run / "quantized" / "manifest.json").read_text())
    manifest["model"]["files"] = {"tokenizer.json": "0"}
    (run / "quantized" / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = call("verify", run)
    assert (code, out) == (1, "")
    assert err.startswith("wrong: ")
    assert "tokenizer.json, which the original has, is absent" in err
    code, out, _ = call("verify", run, "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 1


def test_verify_vouches_for_no_tensor_of_a_gguf_file_without_a_config(call: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    code, out, _ = call("verify", tmp_path)
    assert (code, "a GGUF file needs the config.json of its model" in out, "every tensor fits" in out) == (
        0,
        True,
        False,
    )


def test_verify_says_whether_a_target_would_load_it(call: Any, run: Path) -> None:
    asked = ("--target", "tgi,tensorrt-llm", "--server-python", sys.executable)
    code, out, _ = call("verify", run, *asked)
    assert code == 1
    assert "tgi: loads, by the library that TGI parses such configs with" in out
    assert "tensorrt-llm: does not load, by quantpress's table of what TensorRT-LLM loads" in out
    code, out, _ = call("verify", run, "--target", "tgi", "--way", "contract", "--json")
    assert code == 0
    assert json.loads(out)["loads"]["tgi"]["way"] == "contract"
    code, _, err = call("verify", run, "--target", "tgi", "--way", "luck")
    assert code == 2
    assert "server, parser, contract" in err


@pytest.mark.parametrize(
    "options", [("--set", "vllm.tensor_parallel=2"), ("--way", "contract"), ("--server-python", sys.executable)]
)
def test_verify_takes_nothing_about_a_target_without_one(call: Any, run: Path, options: tuple[str, str]) -> None:
    code, out, err = call("verify", run, *options)
    assert (code, out) == (2, "")
    assert f"{options[0]}: of a target, and none is given; add --target" in err
    assert len(err.splitlines()) == 1


def test_verify_takes_an_exported_folder(call: Any, run: Path) -> None:
    assert call("export", run, "--target", "vllm")[0] == 0
    code, out, _ = call("verify", run / "export" / "vllm", "--target", "vllm", "--way", "contract")
    assert code == 0
    assert "vllm: loads" in out


def test_many_problems_are_counted_and_not_all_told(call: Any, run: Path) -> None:
    config = json.loads((run / "quantized" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 16}
    (run / "quantized" / "config.json").write_text(json.dumps(config))
    _, out, _ = call("verify", run, "--json")
    problems = json.loads(out)["problems"]
    assert len(problems) == 14  # the linears of two blocks
    code, _, err = call("verify", run)
    assert code == 1
    assert err.splitlines() == [*(f"wrong: {line}" for line in problems[:8]), "wrong: and 6 more, which --json lists"]
