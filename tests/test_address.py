"""Where the repository is and which release is meant: pyproject.toml says it, and every other mention agrees."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "mkdocs.yml", ROOT / "Dockerfile",
         ROOT / "action.yml", ROOT / ".pre-commit-hooks.yaml",
         *(path for top in ("docs", "templates", ".github") for path in (ROOT / top).rglob("*")
           if path.suffix in (".md", ".yml", ".toml", ".sh", ".py"))]  # fmt: skip
OWNER = PROJECT["urls"]["Repository"].removeprefix("https://github.com/").removesuffix("/quantpress")
_ADDRESS = re.compile(r"(?:github\.com/|githubusercontent\.com/|uses: )([^/\s]+)/quantpress(?:@|/)?(v[\d.]*\d)?")


def mentions() -> list[tuple[str, str, str | None]]:
    """(file, owner, version where one is named) of each mention of the repository."""
    return [(str(path.relative_to(ROOT)), owner, version or None)
            for path in FILES for owner, version in _ADDRESS.findall(path.read_text(encoding="utf-8"))]  # fmt: skip


def test_every_mention_of_the_repository_is_that_of_the_project() -> None:
    found = mentions()
    assert len(found) >= 9
    assert {(file, owner) for file, owner, _ in found if owner != OWNER} == set(), "run `make address`"
    named = {version for _, _, version in found} - {None}
    assert named == {f"v{PROJECT['version']}"}


def test_the_placeholder_is_explained_while_there_is_one_and_gone_afterwards() -> None:
    rest = {str(path.relative_to(ROOT)) for path in FILES
            if "OWNER" in _ADDRESS.sub("", path.read_text(encoding="utf-8"))}  # fmt: skip
    explained = {"docs/install.md", "CONTRIBUTING.md", ".github/workflows/release.yml"}
    assert rest == (explained if OWNER == "OWNER" else rest & {".github/workflows/release.yml"})


def test_make_address_writes_it_everywhere(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", *{path.relative_to(ROOT) for path in FILES}):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace(f"github.com/{OWNER}/", "github.com/acme-labs/"))
    subprocess.run(["make", "--silent", "address"], cwd=tmp_path, check=True)
    for path in FILES:
        text = (tmp_path / path.relative_to(ROOT)).read_text(encoding="utf-8")
        assert {owner for owner, _ in _ADDRESS.findall(text)} <= {"acme-labs"}, path
        assert _ADDRESS.sub("", text) == _ADDRESS.sub("", path.read_text(encoding="utf-8"))
