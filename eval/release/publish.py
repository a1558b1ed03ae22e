"""An artifact uploaded to the Hugging Face hub: what would go, and then exactly that."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from quantpress.artifact.artifact import verify
from quantpress.core.errors import BadInput

from ..report.card import write_card
from ..report.measured_run import MeasuredRun, open_run

_NEVER = (".partial", ".log", ".env")  # suffixes of what has no business in an artifact
_LARGE = ("tokenizer.json", "vocab.json")  # a model's words, not ours
_TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """What goes where: files (path, bytes) of `folder`, in the order they are shown."""

    folder: Path
    repo: str
    private: bool
    message: str
    files: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def prepare_upload(
    run: Path, repo: str, *, private: bool, message: str | None = None, base_model: str | None = None,
    license: str | None = None, although_missed: bool = False,
) -> Upload:  # fmt: skip
    """Check the run, write its card, and list what would be uploaded. Nothing leaves this machine.

    Raises BadInput for an id that is none, files that differ from the manifest, and a run that missed its gates unless
    `although_missed`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"--to {repo!r}: {error}") from None
    if repo.count("/") != 1:
        raise BadInput(f"--to {repo!r}: a repository reads org/name")
    measured = open_run(run)
    if measured.results.gates.missed and not although_missed:
        raise BadInput(
            f"{run} missed its gates ({measured.results.gates.reason}); --although-missed publishes it all the same"
        )
    verify(run)
    write_card(run, base_model, license, repo)
    folder = run / "quantized"
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    odd = [str(file.relative_to(folder)) for file in found if file.suffix in _NEVER or file.name.startswith(".")]
    if odd:
        raise BadInput(f"{folder} holds {', '.join(odd)}, which is no part of an artifact; move it away")
    files = tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in found)
    said = message or f"{measured.manifest.model.id} quantized with quantpress, recipe {measured.manifest.name}"
    return Upload(folder, repo, private, said, files, tuple(_warnings(measured, folder)))


def upload(what: Upload, endpoint: str | None = None) -> str:
    """Create the repository where there is none and commit the files to it; the address of the commit.

    The token is the hub's own login (`hf auth login`, HF_TOKEN); it is never shown or written.
    Raises BadInput when there is none, and for what the hub refuses.
    """
    token = get_token()
    if not token:
        raise BadInput(f"publishing needs a hub login: run `hf auth login`, or set {_TOKEN}")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(what.repo, private=what.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=what.repo,
            folder_path=what.folder,
            commit_message=what.message,
            allow_patterns=[name for name, _ in what.files],
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        # A proxy may answer with the headers it was sent.
        reason = " ".join(str(error).replace(token, "***").split())[:300]
        raise BadInput(f"{what.repo}: the hub did not take it: {reason}") from None
    return commit.commit_url


def _warnings(run: MeasuredRun, folder: Path) -> list[str]:
    """Files in which a reader of the repository would see where things lie on this machine."""
    recipe, home = run.manifest.recipe, os.path.expanduser("~")
    named = [recipe.get("model"), *((recipe.get(key) or {}).get("source") for key in ("calibration", "evaluation"))]
    places = {str(run.folder.resolve().parent), *(str(place) for place in named if os.path.isabs(str(place)))}
    places |= {home} if home != "/" else set()
    small = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".md") and file.name not in _LARGE]
    local = [file.name for file in small if any(place in file.read_text("utf-8", "replace") for place in places)]
    return [f"{name} names a folder of this machine" for name in local]
