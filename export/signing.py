"""Signatures over SHA256SUMS in minisign's format, which `minisign -Vm SHA256SUMS -p KEY.pub` checks too.

https://jedisct1.github.io/minisign: Ed25519 over the file's BLAKE2b-512, then over that signature and its comment.
"""

import base64
import binascii
import hashlib
import importlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from quantpress.core.errors import BadInput

from .verifying.listing import SIGNATURE, SUMS

_HASHED, _PLAIN = b"ED", b"Ed"  # what was signed: the file's BLAKE2b-512, or the file itself, as older releases did
_SCRYPT, _OPEN, _BLAKE = b"Sc", b"\0\0", b"B2"
_KEY_BYTES, _SECRET_BYTES, _SIGNATURE_BYTES = 42, 158, 74
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_MOST_MEMORY = 1 << 31  # bytes for a passphrase; minisign itself takes 2^30


@dataclass(frozen=True)
class Signer:
    """A secret key, unlocked. number: by which signatures name it; seed: of Ed25519."""

    number: bytes
    seed: bytes = field(repr=False)

    def sign(self, content: bytes) -> bytes:
        """The text of SHA256SUMS.minisig for a SHA256SUMS of this content."""
        key = _ed25519().Ed25519PrivateKey.from_private_bytes(self.seed)
        signature = key.sign(hashlib.blake2b(content).digest())
        comment = f"timestamp:{int(time.time())}\tfile:{SUMS}\thashed"
        whole = key.sign(signature + comment.encode())
        lines = (f"{_UNTRUSTED}signature by quantpress", _text(_HASHED + self.number + signature),
                 f"{_TRUSTED}{comment}", _text(whole))  # fmt: skip
        return ("\n".join(lines) + "\n").encode()


@dataclass(frozen=True)
class PublicKey:
    """number: by which signatures name it; key: of Ed25519."""

    number: bytes
    key: bytes

    @property
    def name(self) -> str:
        """As minisign prints it."""
        return self.number[::-1].hex().upper()

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the signature of a folder's SHA256SUMS; None where this key has signed it."""
        if not (folder / SUMS).is_file():
            return f"{folder}: not signed: it has no {SUMS}; exports and published artifacts have one"
        if not (folder / SIGNATURE).is_file():
            return f"{folder}: not signed: it has no {SIGNATURE}"
        try:
            lines = (folder / SIGNATURE).read_text(encoding="utf-8").splitlines()
            held, whole = _decoded(lines[1], _SIGNATURE_BYTES), _decoded(lines[3], 64)
            comment = lines[2].removeprefix(_TRUSTED)
        except (OSError, ValueError, IndexError):
            return f"{folder / SIGNATURE}: not a signature of minisign's"
        kind, number, signature = held[:2], held[2:10], held[10:]
        if number != self.number:
            return f"{folder / SIGNATURE}: signed by another key, {PublicKey(number, b'').name}, not {self.name}"
        content = (folder / SUMS).read_bytes()
        signed = hashlib.blake2b(content).digest() if kind == _HASHED else content
        if kind not in (_HASHED, _PLAIN) or not self._made(signature, signed):
            return f"{folder / SUMS}: not what key {self.name} has signed"
        if not self._made(whole, signature + comment.encode()):
            return f"{folder / SIGNATURE}: its trusted comment is not what key {self.name} has signed"
        return None

    def _made(self, signature: bytes, content: bytes) -> bool:
        ed25519 = _ed25519()
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(self.key).verify(signature, content)
        except _invalid():
            return False
        return True


def read_public_key(given: str) -> PublicKey:
    """The key in a file of minisign's (minisign.pub), or written out (RW…). Raises BadInput where it is none."""
    try:
        lines = Path(given).read_text(encoding="utf-8").split("\n") if Path(given).is_file() else ["", given]
        held = _decoded(lines[1], _KEY_BYTES)
        if held[:2] != _PLAIN:
            raise ValueError
    except (OSError, ValueError, IndexError):
        raise BadInput(f"--key {given}: neither a file with a public key of minisign's nor such a key (RW…)") from None
    _ed25519()
    return PublicKey(held[2:10], held[10:])


def read_secret_key(file: Path, passphrase: Callable[[], str]) -> Signer:
    """The secret key in a file of minisign's. passphrase: asked where the key is encrypted.

    Raises BadInput for a file that is none, and for a wrong passphrase.
    """
    try:
        held = _decoded(file.read_text(encoding="utf-8").split("\n")[1], _SECRET_BYTES)
    except (OSError, ValueError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a secret key of minisign's (minisign -G makes one)"
        raise BadInput(f"--sign {file}: {why}") from None
    kind, lock, check, salt = held[:2], held[2:4], held[4:6], held[6:38]
    operations, memory = struct.unpack("<QQ", held[38:54])
    secret = held[54:]
    if kind != _PLAIN or check != _BLAKE or lock not in (_SCRYPT, _OPEN):
        raise BadInput(f"--sign {file}: a kind of key that is not known here; minisign -G makes one that is")
    if lock == _SCRYPT:
        pad = _stretched(passphrase().encode(), salt, operations, memory, file)
        secret = bytes(a ^ b for a, b in zip(secret, pad, strict=True))
    number, seed, public, digest = secret[:8], secret[8:40], secret[40:72], secret[72:]
    if lock == _SCRYPT and hashlib.blake2b(kind + secret[:72], digest_size=32).digest() != digest:
        raise BadInput(f"--sign {file}: wrong passphrase")
    if _ed25519().Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        raise BadInput(f"--sign {file}: the key is damaged")  # open ones have no digest
    return Signer(number, seed)


def _stretched(passphrase: bytes, salt: bytes, operations: int, memory: int, file: Path) -> bytes:
    """104 bytes by scrypt; its costs are found as libsodium's crypto_pwhash_scryptsalsa208sha256 finds them."""
    r, operations = 8, max(operations, 1 << 15)
    most = operations // (4 * r) if operations < memory // 32 else memory // (128 * r)
    n = 2
    while n <= most // 2:
        n *= 2
    p = 1 if operations < memory // 32 else min(operations // 4 // n, 0x3FFFFFFF) // r
    if 128 * n * r >= _MOST_MEMORY or not 1 <= p <= 64:
        raise BadInput(f"--sign {file}: its passphrase takes more memory than any that minisign makes")
    try:
        return hashlib.scrypt(passphrase, salt=salt, n=n, r=r, p=p, maxmem=_MOST_MEMORY - 1, dklen=104)
    except ValueError as error:
        raise BadInput(f"--sign {file}: {error}") from None


def _decoded(line: str, length: int) -> bytes:
    """Raises ValueError for what is not base64 of so many bytes."""
    try:
        content = base64.b64decode(line.strip(), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if len(content) != length:
        raise ValueError(f"{len(content)} bytes")
    return content


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _ed25519() -> ModuleType:
    try:
        return importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError:
        raise BadInput("signatures need cryptography: pip install 'quantpress[sign]'") from None


def _invalid() -> Any:
    return importlib.import_module("cryptography.exceptions").InvalidSignature
