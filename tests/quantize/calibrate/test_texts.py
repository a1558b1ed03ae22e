"""Texts: the embedded default, local files, hub datasets and their failures."""

import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from transformers import AutoTokenizer

from quantpress.calibrate import texts
from quantpress.calibrate.texts import load_documents
from quantpress.calibrate.tokens import encode, first_tokens
from quantpress.core.errors import BadInput
from quantpress.engine.sources import default_cache
from quantpress.recipe import Calibration, Evaluation

from ...tiny import build, text


def refused(words: str, cache: Path, **settings: Any) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        load_documents(Calibration(**settings), cache=cache, role="calibration")
    assert "\n" not in str(caught.value)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\r\ntwo é\n".encode())
    text = load_documents(Calibration(source=str(file)), cache=tmp_path, role="calibration")
    assert text.documents == ("one\n\ntwo é\n",)
    assert text.source == "a.txt"


def test_jsonl_takes_the_column(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "body": "1"}\n\n{"text": " ", "body": "2"}\n{"body": "3", "text": "two\\u2028"}\n')
    text = load_documents(Calibration(source=str(file)), cache=tmp_path, role="calibration")
    assert text.documents == ("one", "two\u2028")
    body = load_documents(Calibration(source=str(file), column="body"), cache=tmp_path, role="calibration")
    assert body.documents == ("1", "2", "3")
    assert body.sha256 != text.sha256


def test_the_hash_is_of_the_documents_and_their_ends(tmp_path: Path) -> None:
    hashes = set()
    for lines in (['{"text": "ab"}'], ['{"text": "a"}', '{"text": "b"}'], ['{"text": "b"}', '{"text": "a"}']):
        file = tmp_path / "a.jsonl"
        file.write_text("\n".join(lines))
        hashes.add(load_documents(Calibration(source=str(file)), cache=tmp_path, role="calibration").sha256)
    assert len(hashes) == 3


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("  \n")
    refused("text.txt: empty", tmp_path, source=str(tmp_path / "text.txt"))
    refused("no such file; did you mean .*text.txt", tmp_path, source=str(tmp_path / "texts.txt"))
    refused("no such file", tmp_path, source=str(tmp_path / "nowhere" / "a.jsonl"))
    refused("no such file", tmp_path, source="./nowhere")
    refused("a .txt or .jsonl file", tmp_path, source=str(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused("UTF-8", tmp_path, source=str(tmp_path / "latin.txt"))
    file = tmp_path / "a.jsonl"
    for content, words in {
        '{"text": "x"}\n{"body": "y", "title": "z"}': "line 2: no column 'text'; there are body, title",
        '{"text": "x"': "line 1: not JSON",
        '["x"]': "line 1: expected an object, found list",
        '{"text": 3}': "column 'text' holds int, not text",
        "": "empty",
    }.items():
        file.write_text(content)
        refused(words, tmp_path, source=str(file))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.whl"
    folder = "exllamav3/conversion/standard_cal_data"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/c4.utf8", "first page\nsecond page\n")
        page = '<doc id="{0}" url="u" title="T {0}">\nT {0}\n\nBody <b> of {0}.\n\n\n</doc>\n'
        archive.writestr(f"{folder}/wiki.utf8", page.format(1) + page.format(2))
    monkeypatch.setattr(texts, "fetch_wheel", lambda *_: path)


@pytest.mark.usefixtures("wheel")
def test_default_texts_differ_by_role(tmp_path: Path) -> None:
    calibration = load_documents(Calibration(), cache=tmp_path, role="calibration")
    assert calibration.documents == ("first page", "second page")
    evaluation = load_documents(Evaluation(), cache=tmp_path, role="evaluation")
    assert evaluation.documents == ("T 1\n\nBody <b> of 1.", "T 2\n\nBody <b> of 2.")
    assert evaluation.source == "wiki.utf8 of exllamav3 1.6.5"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub of two datasets whose main branch is at commit aaaa…; the loads asked of it."""
    asked: list[Any] = []

    class Info:
        sha = "a" * 40

    def info(_: Any, name: str, revision: str | None) -> Info:
        if revision == "down":
            raise ConnectionError("no\nroute")
        return Info()

    def load(name: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        if split == "tset":
            raise ValueError("Unknown split 'tset'.\nShould be one of train, test")
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", "body\n"], "n": [1, 2, 3]})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_hub_dataset_at_its_commit(tmp_path: Path, hub: list[Any]) -> None:
    wikitext = Evaluation(source="Salesforce/wikitext", config="wikitext-2-raw-v1")
    text = load_documents(wikitext, cache=tmp_path, role="evaluation")
    assert text.documents == ("\n\n = Title = \n\n\nbody\n",)
    assert text.source == f"Salesforce/wikitext wikitext-2-raw-v1 test@{'a' * 40}"
    rows = load_documents(Calibration(source="org/c4", revision="b" * 40), cache=tmp_path, role="calibration")
    assert rows.documents == (" = Title = \n", "body\n")
    assert hub == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "a" * 40),
        ("org/c4", None, "train", "b" * 40),
    ]


def test_hub_failures_never_change_the_data(tmp_path: Path, hub: list[Any]) -> None:
    refused("dataset org/c4@down: the hub cannot be reached .no route", tmp_path, source="org/c4", revision="down")
    assert not hub  # nothing is loaded, from a cache or elsewhere, once the lookup has failed
    refused("Unknown split 'tset'. Should be", tmp_path, source="org/c4", split="tset")
    refused("no column 'body'; there are text, n", tmp_path, source="org/c4", column="body")
    refused("column 'n' holds int", tmp_path, source="org/c4", column="n")


def test_a_dataset_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"datasets of the hub need `pip install 'quantpress\[datasets\]'`", tmp_path, source="org/c4")


@pytest.mark.slow
def test_the_embedded_default_text() -> None:
    calibration = load_documents(Calibration(), cache=default_cache(), role="calibration")
    evaluation = load_documents(Evaluation(), cache=default_cache(), role="evaluation")
    assert (len(calibration.documents), len(evaluation.documents)) == (584, 2349)
    assert not any("<doc " in d or "</doc>" in d for d in evaluation.documents)
    assert not set(calibration.documents) & set(evaluation.documents)


@pytest.mark.parametrize("count", [1, 100, 900, 5000, 10**6])
def test_the_first_tokens_are_those_of_the_whole_text(count: int, tmp_path: Path) -> None:
    build("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = text() * 3
    whole = encode(tokenizer, words)
    first = first_tokens(tokenizer, words, count)
    assert first == whole[: len(first)]
    assert len(first) >= min(count, len(whole))
