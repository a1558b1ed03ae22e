"""A checkpoint on the hub: its files at one commit, or, for a plan, the headers of its shards alone."""

from pathlib import Path

from ..artifact.config_only import HeadersOnly
from ..core.errors import BadInput
from ..core.untrusted import read_json
from ..formats.packed_weights import TensorType
from ..models.checkpoint import INDEX, SAFETENSORS_DTYPES
from ..models.hub import commit, hub_errors

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Of the folders only 1_Pooling/ and additional_chat_templates/, which hold no weights.
_IGNORED = ["[!1a]*/*", "[1a]*/*.safetensors", "[1a]*/*.bin", "consolidated*", "original*"]


def commit_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """The commit that a revision of a hub model is at, and a caveat where that is the cache's word and not the hub's.

    Raises BadInput where neither knows.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        with hub_errors(f"model {name}", revision):
            at = commit(HfApi().model_info, name, revision)
            if at != revision:  # the cache remembers where the branch was, for when there is no network
                snapshot_download(name, revision=revision, allow_patterns=["config.json"])
            return at, None
    except BadInput as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the hub's own answer
            raise
        try:
            folder = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
        except Exception:
            raise error from None
        at = Path(folder).name
        if constants.HF_HUB_OFFLINE:
            return at, None
        return at, f"the hub could not be reached: {revision or 'main'} is taken to be at {at[:12]}, as in the cache"


def download(name: str, at: str, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The folder of a hub model at commit `at`. Raises BadInput where it has no weights that may be read."""
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *_SMALL] + (["*.py"] if trust_remote_code else [])
    with hub_errors(f"model {name}", at):
        folder = Path(snapshot_download(name, revision=at, allow_patterns=wanted, ignore_patterns=_IGNORED))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            wanted += ["*.bin", "*.pt", "*.pth"]
            folder = Path(snapshot_download(name, revision=at, allow_patterns=wanted, ignore_patterns=_IGNORED))
    if (folder / "config.json").is_file() and not allow_pickle and not any(folder.glob("*.safetensors")):
        raise BadInput(f"{name}: no safetensors weights on the hub; if they are pickles, pass --allow-pickle")
    return folder


def headers(name: str, at: str, trust_remote_code: bool) -> tuple[Path, HeadersOnly] | None:
    """The small files of a hub model and the headers of its shards, by range requests; weights stay on the hub.

    None where the weights are in the cache already, or are no safetensors: then `download` is the way. Raises BadInput
    for what cannot be reached or read.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    small = [*_SMALL] + (["*.py"] if trust_remote_code else [])
    with hub_errors(f"model {name}", at):
        folder = Path(snapshot_download(name, revision=at, allow_patterns=small, ignore_patterns=_IGNORED))
        config = folder / "config.json"
        if not config.is_file() or _has_weights(folder):
            return None
        try:
            found = HfApi().get_safetensors_metadata(name, revision=at)
        except NotASafetensorsRepoError:
            return None
        except SafetensorsParsingError as error:
            raise BadInput(f"model {name}: no safetensors: {' '.join(str(error).split())[:200]}") from None
    tensors: dict[str, TensorType] = {}
    for file, header in found.files_metadata.items():
        for tensor, info in header.tensors.items():
            if str(info.dtype) not in SAFETENSORS_DTYPES:
                raise BadInput(f"model {name}: {file}: tensor {tensor} has the unknown type {info.dtype}")
            tensors[tensor] = TensorType(tuple(info.shape), SAFETENSORS_DTYPES[str(info.dtype)])
    lacking = found.weight_map.keys() - tensors.keys()
    if lacking:
        raise BadInput(f"model {name}: {INDEX} names {min(lacking)}, which no shard has")
    told = "from config.json and the headers of the shards on the hub: no weight was read, so none was checked for NaN"
    return folder, HeadersOnly(config, read_json(config), tensors, (told,))


def _has_weights(folder: Path) -> bool:
    """Whether every shard of a snapshot is in the cache."""
    index = folder / INDEX
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json(index).get("weight_map", {})
    return all((folder / str(shard)).is_file() for shard in set(shards.values()))
