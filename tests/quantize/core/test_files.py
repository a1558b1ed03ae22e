"""Folders worked in by one process at a time, and what is said when the disk is full or cannot be written."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantpress import cli
from quantpress.cli import app
from quantpress.core import files
from quantpress.core.errors import BadInput
from quantpress.core.files import alone_in, move_whole, whole_file, whole_folder

_HOLD = """
import sys
from pathlib import Path
from quantpress.core.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("there", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", _HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        with pytest.raises(BadInput, match="another quantpress is at work there"), alone_in(out):
            pass
        other.kill()  # leaves no lock behind
    with alone_in(out):
        (out / "made").touch()
    assert (out / "made").exists()


def test_a_folder_left_empty_is_removed_with_what_was_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="no"), alone_in(tmp_path / "there" / "a" / "b"):
        raise BadInput("no")
    assert list((tmp_path / "there").iterdir()) == []
    with alone_in(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()  # not ours to remove


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file is a file; --out names a folder"), alone_in(tmp_path / "file"):
        pass
    with pytest.raises(BadInput, match="cannot be written: Not a directory"), alone_in(tmp_path / "file" / "run"):
        pass

    def full(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(BadInput, match="run: cannot be written: Read-only file system"), alone_in(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_made_whole_is_readable_as_usual_and_leaves_hard_links_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(0o600)
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "made") as new:
            (new / "own").touch(0o600)
            (new / "run.sh").touch(0o700)
            os.link(tmp_path / "secret", new / "linked")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    assert modes == {"own": 0o644, "run.sh": 0o755, "linked": 0o600}
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write fails")
def test_a_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f".out.json.{os.getpid()}.tmp").symlink_to("/dev/full")

    def write(**_: Any) -> None:
        with whole_file(tmp_path / "out.json") as file:
            file.write(b"{}")

    monkeypatch.setattr(app, "app", write)
    monkeypatch.setattr(sys, "argv", ["quantpress", "quantize", "--overwrite"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        f"quantpress: {tmp_path / 'out.json'}: No space left on device; once that is fixed, "
        "the same command without --overwrite continues from what is finished\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_so_is_what_a_library_in_rust_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(**_: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_file({"a": torch.zeros(1 << 12)}, tmp_path / "a.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(app, "app", write)
    monkeypatch.setattr(sys, "argv", ["quantpress", "run"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("quantpress: File too large; once that is fixed, the same command")


def test_a_path_that_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(app, "app", lambda **_: (tmp_path / "notes.txt" / "x").mkdir())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == f"quantpress: {tmp_path / 'notes.txt' / 'x'}: Not a directory; give another path\n"


def test_a_folder_takes_its_name_once_all_in_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target, synced = tmp_path / "partial", tmp_path / "final", []
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(files, "fsync", lambda path: synced.append((path.name, target.exists())))
    move_whole(folder, target)
    assert (target / "inner" / "tokenizer.json").read_text() == "{}"
    before = [(name, False) for name in ("inner", "tokenizer.json", "partial")]
    assert synced == [*before, (tmp_path.name, True)]


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def slip(**_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr(app, "app", slip)
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_ctrl_c_that_a_library_made_an_error_of_is_still_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_something(**_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'AutoModel'") from error

    monkeypatch.setattr(app, "app", import_something)
    monkeypatch.setattr(sys, "argv", ["quantpress", "run", "w4a16-gptq"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said == "quantpress: stopped; the same command continues from what is finished\n"


_KILLED = """
import os, signal, sys
from pathlib import Path
from quantpress.core.files import whole_folder
with whole_folder(Path(sys.argv[1])) as new:
    (new / "half").write_text("x")
    print(new, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BEING_MADE", 0.0)
    target = tmp_path / "run" / "export" / "vllm"
    command = [sys.executable, "-c", _KILLED, str(target)]
    killed = subprocess.run([*command, "kill"], check=False, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert (left / "half").exists()
    os.utime(left, (1, 1))
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        owned = Path(living.stdout.readline().strip())
        assert not left.exists()  # making its own swept it
        (tmp_path / "run" / "report").mkdir()
        half = tmp_path / "run" / "report" / ".index.html.4711.tmp"
        half.touch()
        with alone_in(tmp_path / "run"):
            assert (owned / "half").exists()
            assert not half.exists()
        living.communicate("\n")
    assert [path.name for path in target.parent.iterdir()] == ["vllm"]


def test_a_folder_that_is_just_being_made_is_left_alone(tmp_path: Path) -> None:
    new = tmp_path / ".quantpress-new"
    new.mkdir()
    files.sweep_ownerless(tmp_path)
    assert new.exists()
    os.utime(new, (1, 1))
    files.sweep_ownerless(tmp_path)
    assert not new.exists()


@pytest.mark.parametrize("damage", ["a bit", "cut", "missing", "the seal", "no seal"])
def test_what_is_kept_is_not_used_when_damaged(damage: str, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    with whole_folder(place) as new:
        (new / "a.bin").write_bytes(b"abc")
        files.seal(new)
    assert files.intact(place)
    assert not files.intact(tmp_path / "none")
    file, seal = place / "a.bin", place / "digests.json"
    if damage == "a bit":
        file.write_bytes(b"abb")
    elif damage == "cut":
        file.write_bytes(b"ab")
    elif damage == "missing":
        file.unlink()
    elif damage == "the seal":
        seal.write_text("[]")
    else:
        seal.unlink()
    with pytest.warns(UserWarning, match="kept is damaged: what it held is made again"):
        assert not files.intact(place)
    assert not place.exists()
