"""Signatures that the real minisign takes, and its own that are taken here; with anything changed they are not."""

import shutil
import subprocess
from pathlib import Path

import pytest

from quantpress.core.errors import BadInput
from quantpress.exports.signing import Signer, read_public_key, read_secret_key
from quantpress.exports.verifying.listing import SIGNATURE, SUMS

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
# Of minisign 0.11: `minisign -G -W` and a SHA256SUMS that it signed, so that the format is held without it.
SECRET = (
    "RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAzp1qEsp2BKqojddlG/7eSwR/58N2lDx2b0"
    "MUMEQPj9UhVBw8XZmkVQjohczBIEZhZlVzDboX48KmDkjNC+WQyCCffqtvMhlqAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)
PUBLIC = "RWTOnWoSynYEqgjohczBIEZhZlVzDboX48KmDkjNC+WQyCCffqtvMhlq"
CONTENT = f"{'0' * 64}  model/config.json\n".encode()
SIGNED = """untrusted comment: signature from minisign secret key
RUTOnWoSynYEqkjef9vSc2a2AhyjrueieMDasFO4n7c4GeoF1rL+HLSTwrv/uMTGGxAl/qltBYiu2hebnPQS/q9tpSb+I24qIAM=
trusted comment: signed by the project's tests
uDS8xzqOBGGEbp3lE1dcqQ/hPusxCdX014PaE8IJHwU31UuLROvgRbONMOzNP1JQOSdkds4zNlM5sul753/gBg==
"""
MINISIGN = shutil.which("minisign")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With what minisign has signed."""
    (tmp_path / SUMS).write_bytes(CONTENT)
    (tmp_path / SIGNATURE).write_text(SIGNED)
    (tmp_path / "it.key").write_text(f"untrusted comment: a key\n{SECRET}\n")
    return tmp_path


def signer(folder: Path, passphrase: str = "") -> Signer:
    return read_secret_key(folder / "it.key", lambda: passphrase)


def test_what_minisign_has_signed_is_taken(folder: Path) -> None:
    assert read_public_key(PUBLIC).problem(folder) is None
    (folder / "it.pub").write_text(f"untrusted comment: a key\n{PUBLIC}\n")
    assert read_public_key(str(folder / "it.pub")).problem(folder) is None


def test_what_is_signed_here_is_taken_here(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes(signer(folder).sign(CONTENT))
    assert (folder / SIGNATURE).read_text() != SIGNED
    assert read_public_key(PUBLIC).problem(folder) is None


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_signature_that_was_changed_is_told_of(line: int, folder: Path) -> None:
    lines = SIGNED.splitlines()
    lines[line] = lines[line][:-10] + ("A" if lines[line][-10] != "A" else "B") + lines[line][-9:]
    (folder / SIGNATURE).write_text("\n".join(lines) + "\n")
    assert "signed" in str(read_public_key(PUBLIC).problem(folder))


def test_what_is_not_signed_so_is_told_of(folder: Path) -> None:
    key = read_public_key(PUBLIC)
    (folder / SUMS).write_bytes(CONTENT.replace(b"0", b"1", 1))
    assert f"SHA256SUMS: not what key {key.name} has signed" in str(key.problem(folder))
    (folder / SIGNATURE).write_bytes(Signer(b"12345678", b"s" * 32).sign(CONTENT))
    assert f"signed by another key, 3837363534333231, not {key.name}" in str(key.problem(folder))
    (folder / SIGNATURE).write_bytes(Signer(key.number, b"s" * 32).sign(CONTENT))  # says that it is the key
    assert "not what key" in str(key.problem(folder))
    for rubbish in (b"", b"\xff", b"a\nb\nc\nd\n", SIGNED.encode()[:90]):
        (folder / SIGNATURE).write_bytes(rubbish)
        assert "not a signature of minisign's" in str(key.problem(folder))
    (folder / SIGNATURE).unlink()
    assert "it has no SHA256SUMS.minisig" in str(key.problem(folder))
    (folder / SUMS).unlink()
    assert "it has no SHA256SUMS;" in str(key.problem(folder))


def test_what_is_no_key_is_refused(folder: Path) -> None:
    for given in ("x", "", str(folder), str(folder / SUMS), str(folder / "it.key"), SECRET):
        with pytest.raises(BadInput, match="neither a file with a public key"):
            read_public_key(given)
    for name, said in ((SUMS, "not a secret key"), ("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(BadInput, match=said):
            read_secret_key(folder / name, lambda: "")
    (folder / "it.key").write_text(f"\n{SECRET[:100]}{'B' if SECRET[100] == 'A' else 'A'}{SECRET[101:]}\n")
    with pytest.raises(BadInput, match="the key is damaged"):
        signer(folder)


@pytest.mark.skipif(MINISIGN is None, reason="minisign is not installed")
def test_minisign_takes_what_is_signed_here(folder: Path) -> None:
    assert MINISIGN is not None
    (folder / SIGNATURE).write_bytes(signer(folder).sign(CONTENT))
    command = [MINISIGN, "-V", "-m", SUMS, "-P", PUBLIC]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "Signature and comment signature verified" in done.stdout
    (folder / SUMS).write_bytes(b"other")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(MINISIGN is None, reason="minisign is not installed")
def test_a_key_with_a_passphrase(folder: Path) -> None:
    """A gigabyte, as scrypt is meant to take."""
    assert MINISIGN is not None
    make = [MINISIGN, "-G", "-f", "-p", str(folder / "it.pub"), "-s", str(folder / "it.key")]
    subprocess.run(make, input="open sesame\nopen sesame\n", text=True, check=True, capture_output=True)
    (folder / SIGNATURE).write_bytes(signer(folder, "open sesame").sign(CONTENT))
    assert read_public_key(str(folder / "it.pub")).problem(folder) is None
    subprocess.run([MINISIGN, "-V", "-m", SUMS, "-p", "it.pub"], cwd=folder, check=True, capture_output=True)
    with pytest.raises(BadInput, match="wrong passphrase"):
        signer(folder, "open barley")
