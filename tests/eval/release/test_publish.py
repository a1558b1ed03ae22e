"""The model card as the hub reads it, and an upload to a stand-in for the hub."""

import hashlib
import http.server
import json
import random
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from quantpress import api
from quantpress.core.errors import BadInput
from quantpress.core.files import write_json
from quantpress.engine.pipeline import Settings, prepare, quantize
from quantpress.engine.sources import resolve
from quantpress.eval.release.publish import Upload, prepare_upload, upload
from quantpress.eval.release.redaction import redacted
from quantpress.eval.report.card import metadata, servers, write_card
from quantpress.eval.report.measured_run import open_run
from quantpress.exports.signing import PublicKey, Signer
from quantpress.exports.verify import verify
from quantpress.recipe.loading import parse

from ... import tiny
from ..report.test_report import fake_results
from .test_recommend import task

TOKEN = "hf_" + "secret" * 6
CARD = "---\nlicense: llama3.2\nlanguage:\n- en\n- de\n---\n# The original\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model whose original has a card and a licence."""
    folder = tmp_path_factory.mktemp("made")
    tiny.build("llama", folder / "original")
    (folder / "original" / "README.md").write_text(CARD)
    (folder / "original" / "LICENSE").write_text("Do as you like.")
    weights = {"bits": 4, "group_size": 32, "symmetric": False}
    document = {"name": "w4", "method": {"name": "rtn"}, "weights": weights, "formats": ["gptq"]}
    recipe = parse(document | {"model": str(folder / "original")})
    job = prepare(recipe, resolve(recipe.model, cache=folder / "cache"))
    quantize(job, Settings(folder / "run", folder / "cache", ignore_limits=True))
    results = fake_results(18.4, "ACCEPT") | {"tasks": [task("arc_easy", 0.6, 0.57, "acc_norm")]}
    (folder / "run" / "eval").mkdir()
    write_json(folder / "run" / "eval" / "results.json", results)
    return folder / "run"


def test_the_hub_reads_the_card(made: Path) -> None:
    path = write_card(made, base_model="org/base").path
    data = metadata_load(path)
    assert data is not None
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "llama3.2"  # the original's
    assert data["language"] == ["en", "de"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"quantpress", "gptq", "4-bit"} <= set(data["tags"])
    card = ModelCard.load(path)
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results or []}
    assert found[("text", "perplexity")] == 18.4
    assert found[("arc_easy", "acc_norm")] == 0.57
    assert "model-index" in data
    assert "![Size against quality](quality.png)" in card.text
    assert (path.parent / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert "Perplexity | 17.05 ± 0.36 | 18.40 ± 0.40 | +7.9\u00a0%" in card.text
    assert "recovers 95.0" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}


def test_only_servers_that_load_the_files_are_named(made: Path) -> None:
    by_title = {server.title: server for server in servers(open_run(made), "me/it")}
    assert set(by_title) == {"vLLM", "SGLang", "TGI", "transformers"}
    assert by_title["vLLM"].refused  # gptq, which vLLM takes symmetric only
    assert not by_title["transformers"].refused
    text = write_card(made, repo="me/it").path.read_text()
    assert "vllm serve" not in text
    assert f"Not with vLLM: {by_title['vLLM'].refused[0][:12]}" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/it"' in text
    assert ": set " not in text  # its reader cannot change the recipe
    assert "**transformers** (checked for version" in text


def test_a_base_model_that_is_no_hub_id_is_refused(made: Path) -> None:
    run = open_run(made)
    assert metadata(run).base_model is None  # a folder has no id: none is made up
    with pytest.raises(BadInput, match="not a hub id"):
        metadata(run, base_model="/home/me/model")
    assert metadata(run, license="mit").license == "mit"


class Hub(http.server.BaseHTTPRequestHandler):
    """What HfApi asks for: create, preupload, LFS batch, the file itself, commit. Keeps what it is sent."""

    log: list[tuple[str, str]]
    tokens: set[str | None]
    stored: dict[str, bytes]
    commit: list[dict[str, Any]]
    refuse = False

    def _answer(self, document: Any, status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        here = f"http://{self.headers['Host']}"
        body = self._body()
        type(self).log.append(("POST", self.path))
        type(self).tokens.add(self.headers.get("Authorization"))
        if self.refuse:
            self._answer({"error": f"no rights; you sent {self.headers.get('Authorization')}"}, 403)
        elif self.path == "/api/repos/create":
            type(self).commit.append(json.loads(body))
            self._answer({"url": f"{here}/org/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "shouldIgnore": False, "uploadMode":
                      "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular"} for f in files]  # fmt: skip
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{here}/lfs/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]  # fmt: skip
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            type(self).commit.extend(json.loads(line) for line in body.splitlines())
            self._answer({"commitUrl": f"{here}/org/name/commit/abc", "commitOid": "abc", "pullRequestUrl": None})
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        type(self).log.append(("PUT", self.path))
        type(self).stored[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not asked for in an upload"}, 404)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def served(kind: type[Hub], **more: Any) -> Iterator[tuple[str, Any]]:
    """The address of a stand-in, and what it sees."""
    state: dict[str, Any] = {"log": [], "tokens": set(), "stored": {}, "commit": []}
    handler = type("Seen", (kind,), state | more)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Hub]]]:
    """A stand-in for the hub, to which large files go by LFS, as without hf-xet."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with served(Hub) as address_and_seen:
        yield address_and_seen


def test_exactly_what_was_shown_is_what_arrives(made: Path, hub: tuple[str, type[Hub]], capfd: Any) -> None:
    address, seen = hub
    what = prepare_upload(made, "org/name", private=True, base_model="org/base")
    assert seen.log == []  # a dry run sends nothing
    there = {name: (made / "quantized" / name).read_bytes() for name, _ in what.files} | dict(what.redacted)
    assert what.bytes == sum(map(len, there.values()))
    assert {"README.md", "LICENSE", "config.json", "model.safetensors", "quality.png"} <= {n for n, _ in what.files}
    assert upload(what, address).endswith("/org/name/commit/abc")
    create, header, *operations = seen.commit
    assert create.get("private") is True or create.get("visibility") == "private"
    assert header["value"]["summary"] == what.message
    arrived = {}
    for one in operations:
        value = one["value"]
        content = b64decode(value["content"]) if one["key"] == "file" else seen.stored[value["oid"]]
        assert one["key"] == "file" or hashlib.sha256(content).hexdigest() == value["oid"]
        arrived[value["path"]] = content
    assert arrived == there
    assert f"Bearer {TOKEN}" in seen.tokens
    said = capfd.readouterr()
    everything = (
        said.out
        + said.err
        + "".join(file.read_bytes().decode("utf-8", "replace") for file in made.rglob("*") if file.is_file())
    )
    assert TOKEN not in everything


def test_a_refusal_does_not_show_the_token(made: Path, hub: tuple[str, type[Hub]]) -> None:
    address, seen = hub
    seen.refuse = True
    with pytest.raises(BadInput) as caught:
        upload(prepare_upload(made, "org/name", private=True), address)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_it_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.eval.release.publish.get_token", lambda: TOKEN)
    with pytest.raises(BadInput, match="org/name: the hub cannot be reached"):
        upload(prepare_upload(made, "org/name", private=True), "http://127.0.0.1:9")


def test_what_should_not_be_published_is_not(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong in ("name", "org/name/more", "org/na me"):
        with pytest.raises(BadInput, match="--to"):
            prepare_upload(made, wrong, private=True)
    stray = made / "quantized" / "secrets.env"
    stray.write_text("TOKEN=1")
    try:
        with pytest.raises(BadInput, match=r"secrets.env: a file that manifest.json does not list"):
            prepare_upload(made, "org/name", private=True)
        assert ("secrets.env", 7) in prepare_upload(made, "org/name", private=True, allow=["secrets.env"]).files
    finally:
        stray.unlink()
    (tmp_path / "key").write_text("secret")
    (made / "quantized" / "NOTICE").symlink_to(tmp_path / "key")
    try:
        with pytest.raises(BadInput, match="NOTICE: a link out of the folder"):
            prepare_upload(made, "org/name", private=True, allow=["NOTICE"])
    finally:
        (made / "quantized" / "NOTICE").unlink()
    (made / "quantized" / ".README.md.4711.tmp").touch()  # left by a kill while the card was written
    assert ".README.md.4711.tmp" not in dict(prepare_upload(made, "org/name", private=True).files)
    results = made / "eval" / "results.json"
    before = results.read_text()
    write_json(results, fake_results(18.4, "REGRESSION"))
    try:
        with pytest.raises(BadInput, match="did not pass its gates"):
            prepare_upload(made, "org/name", private=True)
        assert prepare_upload(made, "org/name", private=True, although_missed=True).files
        write_json(results, fake_results(180.4, "NONE"))
        with pytest.raises(BadInput, match=r"is broken \(KL 3.07: its predictions .*\); --although-missed "):
            prepare_upload(made, "org/name", private=True)
        assert prepare_upload(made, "org/name", private=True, although_missed=True).files
        guessing = fake_results(18.4, "ACCEPT")
        guessing["text"] |= {"vocabulary": 10, "bos": False}
        write_json(results, guessing)
        with pytest.raises(BadInput, match="the original itself predicts the text worse than a uniform guess"):
            prepare_upload(made, "org/name", private=True, although_missed=True)
    finally:
        results.write_text(before)
    what = prepare_upload(made, "org/name", private=True)
    assert list(what.redacted) == ["manifest.json"]  # the recipe's model; not the card
    said = json.loads(what.redacted["manifest.json"])
    assert said["recipe"]["model"] == "original"
    assert str(made.parent).encode() not in what.redacted["manifest.json"]
    assert dict(what.files)["manifest.json"] == len(what.redacted["manifest.json"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("quantpress.eval.release.publish.get_token", lambda: None)
    with pytest.raises(BadInput, match="needs a hub login"):
        upload(what, "http://127.0.0.1:9")
    tokenizer = made / "quantized" / "tokenizer_config.json"
    kept = tokenizer.read_bytes()
    tokenizer.write_bytes(kept + b" ")
    try:
        with pytest.raises(BadInput, match="sha256 differs"):
            prepare_upload(made, "org/name", private=True)
    finally:
        tokenizer.write_bytes(kept)


def test_a_signed_upload_is_verified_where_it_is_downloaded(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
    signer = Signer(b"numbered", b"s" * 32)
    key = PublicKey(signer.number, _public(signer))
    what = prepare_upload(made, "org/name", private=True, signer=signer)
    assert [name for name, _ in what.files][-2:] == ["SHA256SUMS", "SHA256SUMS.minisig"]
    content = {**what.redacted, **what.sums}
    there = tmp_path / "download"
    for name, _ in what.files:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content.get(name) or (made / "quantized" / name).read_bytes())
    (there / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # the hub's own
    note = there / ".cache" / "huggingface" / "download" / "config.json.metadata"  # and its client's
    note.parent.mkdir(parents=True)
    note.touch()
    found = verify(there, key=key)
    assert found.problems == ()
    assert found.reached[0] == f"SHA256SUMS is signed by key {key.name}"
    (note.parent / "model.safetensors").touch()
    assert "weights that SHA256SUMS does not list" in verify(there, key=key).problems[0]
    (note.parent / "model.safetensors").unlink()
    sums = there / "SHA256SUMS"
    (there / "quality.png").write_bytes(b"better")
    digest = hashlib.sha256(b"better").hexdigest()
    sums.write_text(re.sub(r"\w+  quality.png", f"{digest}  quality.png", sums.read_text()))
    assert verify(there).problems == ()
    (line,) = verify(there, key=key).problems
    assert line == f"{sums}: not what key {key.name} has signed"
    (there / "SHA256SUMS.minisig").unlink()
    assert "not signed" in verify(there, key=key).problems[0]
    assert "it has no SHA256SUMS" in verify(made, key=key).problems[0]


def _public(signer: Signer) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(signer.seed).public_key().public_bytes_raw()


def test_paths_become_names_and_checksums_follow(tmp_path: Path) -> None:
    folder = tmp_path / "release" / "quantized"
    folder.mkdir(parents=True)
    config = json.dumps(
        {"_name_or_path": "/data/secret project/base", "of": f"{tmp_path}/release/x.txt", "n": "/data/secret"}
    )
    (folder / "config.json").write_text(config)
    before = hashlib.sha256(config.encode()).hexdigest()
    manifest = {"recipe": {"model": "/data/secret project/base"}, "artifact": {"files": {"config.json": before}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model.safetensors").write_bytes(b"/data/secret project/base")
    found = redacted(folder, manifest["recipe"])
    assert set(found) == {"config.json", "manifest.json"}
    assert json.loads(found["config.json"]) == {"_name_or_path": "base", "of": "x.txt", "n": "/data/secret"}
    after = json.loads(found["manifest.json"])
    assert after["artifact"]["files"]["config.json"] == hashlib.sha256(found["config.json"]).hexdigest()
    assert after["recipe"]["model"] == "base"


def test_a_card_that_was_edited_by_hand_is_never_overwritten(made: Path) -> None:
    path = write_card(made).path
    written = path.read_text()
    edited = written.replace("## Limits", "## Limits\n\n- Speaks no Welsh.")
    path.write_text(edited)
    try:
        what = prepare_upload(made, "org/name", private=True)
        assert path.read_text() == edited
        assert what.card is not None
        assert "-- Speaks no Welsh." in what.card
        card = write_card(made)
        assert card.edited is not None
        assert path.read_text() == edited
        with pytest.raises(BadInput, match="was edited by hand and is left as it is; --overwrite-card"):
            api.card(made)
        assert prepare_upload(made, "org/name", private=True, overwrite_card=True).card is None
        assert "Welsh" not in path.read_text()
    finally:
        path.write_text(written)
    assert write_card(made, license="mit").edited is None  # ours, so it may be written anew


class XetHub(Hub):
    """Large files go by Xet, the way huggingface_hub takes today: in chunks to a store of its own.

    The store is one without upload grants and shard progress, for which its client goes on to the first version of its
    interface. stored: the chunks of each xorb, by its hash.
    """

    protocol_version = "HTTP/1.1"
    store_tokens: set[str | None]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return super()._body()
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        type(self).log.append(("GET", self.path))
        if self.path.startswith("/api/models/org/name/xet-write-token/"):
            here = f"http://{self.headers['Host']}"
            self._answer({"accessToken": "of the store", "exp": int(time.time()) + 3600, "casUrl": here})
        else:
            super().do_GET()

    def do_POST(self) -> None:
        if not self.path.startswith(("/v1/", "/v2/")):
            super().do_POST()
            return
        body = self._body()
        type(self).log.append(("POST", self.path))
        type(self).store_tokens.add(self.headers.get("Authorization"))
        if self.path.startswith("/v1/xorbs/"):
            type(self).stored[self.path.rsplit("/", 1)[1]] = b"".join(chunks(body))
            self._answer({"was_inserted": True})
        elif self.path == "/v1/shards":
            self._answer({"result": 1})
        else:
            self._answer({}, 404)


def chunks(xorb: bytes) -> Iterator[bytes]:
    """The chunks of a xorb: each behind version, stored size, compression and size (1, 3, 1, 3 bytes)."""
    at = 0
    while at < len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        version, scheme = xorb[at], xorb[at + 4]
        stored, size = (int.from_bytes(xorb[i : i + 3], "little") for i in (at + 1, at + 5))
        assert (version, scheme, stored) == (0, 0, size), "random bytes are stored as they are"
        yield xorb[at + 8 : at + 8 + size]
        at += 8 + size


def test_a_large_file_goes_by_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet", reason="hf-xet, which huggingface_hub installs where it can, is not here")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    folder = tmp_path / "quantized"
    folder.mkdir()
    weights = random.Random(0).randbytes(3_000_000)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    what = Upload(folder, "org/name", True, "weights", (("config.json", 2), ("model.safetensors", len(weights))))
    with served(XetHub, store_tokens=set()) as (address, seen):
        assert upload(what, address).endswith("/org/name/commit/abc")
    assert b"".join(seen.stored.values()) == weights
    (large,) = [one["value"] for one in seen.commit if one.get("key") == "lfsFile"]
    assert (large["path"], large["oid"]) == ("model.safetensors", hashlib.sha256(weights).hexdigest())
    paths = [path for _, path in seen.log]
    assert paths.index("/v1/shards") < next(i for i, path in enumerate(paths) if "/commit/" in path)
    assert not [path for path in paths if "/info/lfs/" in path]
    assert seen.store_tokens == {"Bearer of the store"}  # the login stays with the hub
