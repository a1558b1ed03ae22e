"""Folders that others have made: links out of them, pipes and devices are refused, and nothing that is honest."""

import json
import os
from pathlib import Path

import pytest

from quantpress.core.errors import BadInput
from quantpress.core.untrusted import check_files, read_json


def test_links_that_stay_inside_and_the_hubs_cache_are_fine(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--name/blobs", tmp_path / "models--org--name/snapshots/0123"
    for folder in (blobs, snapshot, mine := tmp_path / "mine", mine / "sub"):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    check_files(snapshot)
    (tmp_path / "link").symlink_to(snapshot)  # the folder itself may be reached by a link
    check_files(tmp_path / "link")
    (mine / "config.json").symlink_to(snapshot / "config.json")
    (mine / "sub" / "a.json").write_text("{}")
    (mine / "b.json").symlink_to("sub/a.json")
    (mine / ".hidden").symlink_to("nowhere")
    (mine / "elsewhere").symlink_to(tmp_path)  # a folder of something else, which is not read
    check_files(mine)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "a link out of the folder, to /etc/hostname"),
        (lambda path: path.symlink_to("../secret"), "a link out of the folder"),
        (lambda path: path.symlink_to("inner"), "a link out of the folder"),  # by way of another
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
        (lambda path: path.symlink_to(path.name), "a link to nothing"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file but a pipe"),
        (os.mkfifo, "not a file but a pipe"),
        (Path.mkdir, "a folder, where a file belongs"),
    ],
)
def test_what_leads_out_or_is_no_file_is_refused(make: object, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("key")
    (folder / "inner").symlink_to(tmp_path / "secret")
    make(folder / "a.json")  # type: ignore[operator]
    with pytest.raises(BadInput, match=words):
        check_files(folder, [folder / "a.json"])


def test_a_linked_folder_does_not_lead_out_either(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id.jinja").write_text("key")
    (folder / "templates").symlink_to("../keys")
    with pytest.raises(BadInput, match="a link out of the folder"):
        check_files(folder, sorted(folder.glob("templates/*")))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "9" * 5000, "\x00", '{"a":' * 50_000])
def test_json_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadInput) as caught:
        read_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 400


def test_a_file_too_large_for_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(BadInput, match="536870912 bytes, more than any file of this kind"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "b.json") == {"a": 1}


def test_a_message_is_one_printable_line(tmp_path: Path) -> None:
    said = str(BadInput("a\nb \x1b[2J \u202e \ud800 " + "x" * 10_000 + " end"))
    assert said.isprintable()
    assert said.startswith("a b \\x1b[2J \\u202e \\ud800 xxx")
    assert said.endswith("x end")
    assert len(said) < 2000
