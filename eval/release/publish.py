"""Upload of an artifact to the Hugging Face hub: first a list of what would be uploaded, then exactly that."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from quantpress.artifact.artifact import verify
from quantpress.core.errors import BadInput
from quantpress.core.files import alone_in, file_sha256
from quantpress.core.untrusted import check_files
from quantpress.exports.signing import Signer
from quantpress.exports.verifying.listing import SIGNATURE, SUMS, check_unlisted, sums

from ..measure.baselines import doubt
from ..report.card import write_card
from ..report.measured_run import open_run
from ..report.standing import standing
from .redaction import redacted

_TOKEN = "HF_TOKEN"
# The HTTP library's own error, whichever library this huggingface_hub is built on.
_NOT_REACHED: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError)
_FAILURES: tuple[type[Exception], ...] = (*_NOT_REACHED, OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Upload:
    """What is uploaded where. files: (path, bytes) inside `folder`, in the order they are shown.

    redacted: files that are uploaded without the paths of this machine that they name. sums: SHA256SUMS and its
    signature, where it is signed, which are uploaded alone. card: how a card that was edited by hand differs from what
    would be written; it is uploaded as it is.
    """

    folder: Path
    repo: str
    private: bool
    message: str
    files: tuple[tuple[str, int], ...]
    redacted: Mapping[str, bytes] = field(default_factory=dict)
    sums: Mapping[str, bytes] = field(default_factory=dict)
    card: str | None = None

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def prepare_upload(
    run: Path, repo: str, *, private: bool, message: str | None = None, base_model: str | None = None,
    license: str | None = None, although_missed: bool = False, overwrite_card: bool = False,
    allow: Collection[str] = (), signer: Signer | None = None,
) -> Upload:  # fmt: skip
    """Check the run, write its card, and list what would be uploaded. Nothing leaves this machine.

    overwrite_card: replace a card that was edited by hand. allow: files that may go with it though the manifest does
    not list them. signer: signs a list of the checksums of all that is uploaded. Raises BadInput for an invalid
    repository id, files that differ from the manifest or are not in it, an original that predicts no text, and, unless
    `although_missed`, a run that is broken, missed its gates or whose gates are too close to call.
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
    if (stands := standing(measured)).level == "broken" and not although_missed:
        raise BadInput(f"{run} is broken ({stands.reason}); --although-missed publishes it all the same")
    with alone_in(run):  # and without what a killed command has left
        verify(run)
        check_unlisted(run, run / "quantized", allow)
        edited = write_card(run, base_model, license, repo, overwrite=overwrite_card).edited
    folder = run / "quantized"
    check_files(folder, sorted(folder.rglob("*")))
    changed = redacted(folder, measured.manifest.recipe)
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in found]
    signed = {} if signer is None else _signed(folder, names, changed, measured.manifest.artifact.files, signer)
    files = tuple((name, len(changed.get(name, b"")) or (folder / name).stat().st_size) for name in names)
    files += tuple((name, len(content)) for name, content in signed.items())
    said = message or f"{measured.manifest.model.id} quantized with quantpress, recipe {measured.manifest.name}"
    return Upload(folder, repo, private, said, files, changed, signed, edited)


def _signed(
    folder: Path, names: Collection[str], changed: Mapping[str, bytes], known: Mapping[str, str], signer: Signer
) -> dict[str, bytes]:
    """SHA256SUMS of the files as they are uploaded, and its signature. known: by the manifest."""
    hashes = {name: known.get(name) or file_sha256(folder / name) for name in names if name not in changed}
    hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in changed.items()}
    listed = sums(hashes)
    return {SUMS: listed, SIGNATURE: signer.sign(listed)}


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
        made = {**what.redacted, **what.sums}
        added = [CommitOperationAdd(name, made.get(name, what.folder / name)) for name, _ in what.files]
        commit = api.create_commit(what.repo, added, commit_message=what.message)
    except _FAILURES as error:
        # a proxy may echo the headers it was sent
        reason = " ".join(str(error).replace(token, "***").split())[:300] or type(error).__name__
        answered = isinstance(error, HfHubHTTPError) or not isinstance(error, _NOT_REACHED)
        happened = "the hub refused the upload" if answered else "the hub cannot be reached"
        raise BadInput(f"{what.repo}: {happened}: {reason}") from None
    return commit.commit_url
