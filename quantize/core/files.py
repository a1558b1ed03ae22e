"""Files and folders written whole or not at all, and what is in them. No torch here."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from .errors import BadInput

_TEMPORARY = ".quantpress-"  # how folders that are still being made are called in the cache
_MODEL_FILES = (".safetensors", ".json", ".gguf")
_HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp")  # a file: its name and the number of the process that was writing it
_SEAL = "digests.json"
_STALE_SECONDS = 24 * 3600
_BEING_MADE = 2.0  # seconds in which a new folder may not have its lock yet


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ or ~user written out; as it is where there is no such user, and so no such file."""
    return Path(os.path.expanduser(path))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str:
    """Of a model, a folder or a file: its files by path, size and time of change, which is quick for any size; at worst
    something that is known is computed again.
    """
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES)
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears only when it is whole and on disk; keys keep their order."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def remembered(folder: Path, what: Sequence[Any], make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON values; kept in `folder` for whoever asks with the same `what` again."""
    path = folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.json"
    if not path.is_file():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(made).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def changed(folder: Path, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The files of `folder` that are not what `hashes` {name: sha256} says, each with what is wrong with it."""
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            yield name, "is absent"
        elif file_sha256(folder / name) != digest:
            yield name, "has changed: its sha256 differs"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in `folder`, made when it is not there, while no other process does; one left empty is removed again.

    The lock is the kernel's, on the folder itself: nothing is left of it, however the process ends. Raises BadInput
    when another process is at work there, or the folder cannot be made or written.
    """
    made: list[Path] = []
    try:
        try:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileExistsError:
            raise BadInput(f"{folder} is a file; --out names a folder") from None
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written: {error.strerror or error}") from error
        with _locked(folder):
            _clear_debris(folder)
            yield
    finally:
        with contextlib.suppress(OSError):  # up to the first that is not empty
            for path in made:
                path.rmdir()


def _clear_debris(folder: Path) -> None:
    """Remove what killed processes have left half made in a run folder; whoever calls has it for himself."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
        sweep_ownerless(place)
        for path in place.glob(".*.tmp"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _lock(folder)
    if handle == "taken":
        raise BadInput(f"{folder}: another quantpress is at work there; wait for it, or give another --out")
    try:
        yield
    finally:
        if isinstance(handle, int):
            os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` once it is whole and, with `sync`, on disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # which `alone_in` clears away after a kill
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file
        raise
    if sync:
        fsync(path.parent)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well and vanishes when it does not.

    Two processes may do the same work at once: the first to finish wins and the other takes its result.
    """
    with temporary_folder(target.parent) as new:
        yield new
        mask = os.umask(0)
        os.umask(mask)
        for file in (*new.rglob("*"), new):
            state = file.stat()
            if file.is_dir() or state.st_nlink == 1:  # a hard link's mode is another file's too
                runs = file.is_dir() or state.st_mode & 0o100
                file.chmod((0o777 if runs else 0o666) & ~mask)  # mkdtemp and safetensors make them private
        _settle(new)
        try:
            new.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        fsync(target.parent)


def seal(folder: Path) -> None:
    """Write beside the files of a folder what `intact` compares them with."""
    write_json(folder / _SEAL, {file.name: file_sha256(file) for file in sorted(folder.iterdir())})


def intact(folder: Path) -> bool:
    """Whether a sealed folder is there and as it was made. One that is damaged is removed, with a warning."""
    if not folder.is_dir():
        return False
    try:
        whole = not list(changed(folder, json.loads((folder / _SEAL).read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        warnings.warn(f"{folder} is damaged: what it held is made again", stacklevel=2)
        shutil.rmtree(folder)
    return whole


def move_whole(folder: Path, target: Path) -> None:
    """Give `folder` the name `target` once all that is in it is on disk."""
    _settle(folder)
    folder.rename(target)
    fsync(target.parent)


def _settle(folder: Path) -> None:
    for file in (*folder.rglob("*"), folder):
        fsync(file)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed in the end if it is still there; those that killed processes left go before."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep_ownerless(parent)
        new = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    except OSError as error:
        raise BadInput(f"{parent}: cannot be written: {error.strerror or error}") from error
    owner = _lock(new)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(owner, int):
            os.close(owner)


def sweep_ownerless(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose process has ended, however it did.

    While it lives it holds the kernel's lock on its folder. On a file system without locks a day's age counts.
    """
    for folder in parent.glob(f"{_TEMPORARY}*"):
        if time.time() - folder.stat().st_mtime < _BEING_MADE:
            continue
        owner = _lock(folder)
        if isinstance(owner, int):
            shutil.rmtree(folder, ignore_errors=True)
            os.close(owner)
        elif owner == "no locks":
            _sweep_old(folder)


def _lock(folder: Path) -> int | Literal["taken", "no locks"]:
    """A handle that keeps a folder locked until it is closed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return "taken" if isinstance(error, BlockingIOError) else "no locks"
    return handle


def sweep(cache: Path) -> None:
    """Remove the temporary folders and files of processes that were killed: where nothing was written for a day.

    Age rather than a process id, which says nothing when machines or containers share a cache.
    """
    for folder in cache.glob(f"*/{_TEMPORARY}*"):
        _sweep_old(folder)
    for file in cache.glob("*/.*.tmp"):
        if _HALF_WRITTEN.fullmatch(file.name) and time.time() - file.stat().st_mtime > _STALE_SECONDS:
            file.unlink(missing_ok=True)


def _sweep_old(folder: Path) -> None:
    try:
        written = max(file.lstat().st_mtime for file in (folder, *folder.rglob("*")))
    except OSError:
        return  # somebody is at work there, or sweeps it too
    if time.time() - written > _STALE_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)


def fsync(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
