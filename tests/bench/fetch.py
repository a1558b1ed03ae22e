"""The texts that docs/measured.md was measured on, fetched where they are not at hand, each held against its SHA-256.

    python tests/bench/fetch.py FOLDER

calib.*.txt lie in the wheel exllamav3 1.6.5 on PyPI, which is unpacked and not installed; wikitext2.*.txt are
Salesforce/wikitext on the hub, joined (needs the extra `datasets`). The benchmarks fetch what they are given by these
names.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TEXTS = {
    "calib.c4.txt": "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    "calib.code.txt": "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891",
    "calib.multilingual.txt": "68182e06506ead0d2676673fdee4bbe6564ccb06cee3b8373b7e4824297ea91e",
    "calib.wiki.txt": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    "wikitext2.test.txt": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "wikitext2.valid.txt": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
}
_WHEEL = "exllamav3==1.6.5"
_SPLITS = {"test": "test", "valid": "validation"}


def text(given: str | Path, folder: Path) -> Path:
    """A file that is there as it is; one of TEXTS otherwise from `folder`, fetched the first time."""
    name = Path(given).name
    if Path(given).is_file() or name not in TEXTS:
        return Path(given)
    file = folder / name
    if not file.is_file():
        found = _of_wheel(name) if name.startswith("calib.") else _of_hub(name)
        if hashlib.sha256(found).hexdigest() != TEXTS[name]:
            raise SystemExit(f"{name}: what was fetched is not the text that was measured on (SHA-256 differs)")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(found)
    return file


def _of_wheel(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _WHEEL]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(f"exllamav3/conversion/standard_cal_data/{name.split('.')[1]}.utf8")


def _of_hub(name: str) -> bytes:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise SystemExit(f"{name}: fetching it needs the package datasets: .venv/bin/pip install datasets") from None
    split = _SPLITS[name.split(".")[1]]
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
    except ConnectionError as error:
        raise SystemExit(f"{name}: {error}; put the file there yourself") from None
    return "".join(row or " \n" for row in rows).encode()  # lines of a space are empty rows there


def main() -> None:
    for name in TEXTS:
        sys.stdout.write(f"{text(name, Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    main()
