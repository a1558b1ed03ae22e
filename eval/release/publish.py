"""Upload of an artifact to the Hugging Face hub: first a list of what would be uploaded, then exactly that."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from quantpress.artifact.artifact import verify
from quantpress.core.errors import BadInput
from quantpress.core.untrusted import check_files
from quantpress.exports.verifying.listing import check_unlisted

from ..measure.baselines import doubt
from ..report.card import write_card
from ..report.measured_run import MeasuredRun, open_run

_LARGE = ("tokenizer.json", "vocab.json")  # a vocabulary, which is not searched for local paths
_TOKEN = "HF_TOKEN"
# The HTTP library's own error, whichever library this huggingface_hub is built on.
_NOT_REACHED: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError)
_FAILURES: tuple[type[Exception], ...] = (*_NOT_REACHED, OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Upload:
    """What is uploaded where. files: (path, bytes) inside `folder`, in the order they are shown."""

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
    license: str | None = None, although_missed: bool = False, allow: Collection[str] = (),
) -> Upload:  # fmt: skip
    """Check the run, write its card, and list what would be uploaded. Nothing leaves this machine.

    allow: files that may go with it though the manifest does not list them. Raises BadInput for an invalid repository
    id, files that differ from the manifest or are not in it, an original that predicts no text, and, unless
    `although_missed`, a run that missed its gates or whose gates are too close to call.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"--to {repo!r}: {error}") from None
    if repo.count("/") != 1:
        raise BadInput(f"--to {repo!r}: a repository is written org/name")
    measured = open_run(run)
    if (wrong := doubt(measured.results)) is not None:
        raise BadInput(f"{run}: {wrong}")
    if (gates := measured.results.gates).missed and not although_missed:
        raise BadInput(f"{run} did not pass its gates ({gates.reason}); --although-missed publishes it all the same")
    verify(run)
    check_unlisted(run, run / "quantized", allow)
    write_card(run, base_model, license, repo)
    folder = run / "quantized"
    check_files(folder, sorted(folder.rglob("*")))
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in found)
    said = message or f"{measured.manifest.model.id} quantized with quantpress, recipe {measured.manifest.name}"
    return Upload(folder, repo, private, said, files, tuple(_warnings(measured, folder)))


def upload(what: Upload, endpoint: str | None = None) -> str:
    """Create the repository if it does not exist and commit the files to it; returns the commit's address.

    The token is that of the hub's login (`hf auth login`, HF_TOKEN); it is never shown or written. Raises BadInput
    without a login, and for whatever the hub refuses.
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
    except _FAILURES as error:
        # a proxy may echo the headers it was sent
        reason = " ".join(str(error).replace(token, "***").split())[:300] or type(error).__name__
        answered = isinstance(error, HfHubHTTPError) or not isinstance(error, _NOT_REACHED)
        happened = "the hub refused the upload" if answered else "the hub cannot be reached"
        raise BadInput(f"{what.repo}: {happened}: {reason}") from None
    return commit.commit_url


def _warnings(run: MeasuredRun, folder: Path) -> list[str]:
    """A line for each file that would show readers of the repository paths of this machine."""
    recipe, home = run.manifest.recipe, os.path.expanduser("~")
    named = [recipe.get("model"), *((recipe.get(key) or {}).get("source") for key in ("calibration", "evaluation"))]
    places = {str(run.folder.resolve().parent), *(str(place) for place in named if os.path.isabs(str(place)))}
    places |= {home} if home != "/" else set()
    small = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".md") and file.name not in _LARGE]
    local = [file.name for file in small if any(place in file.read_text("utf-8", "replace") for place in places)]
    return [f"{name} contains a path of this machine" for name in local]
