"""A stand-in for the hub's HTTP API: repositories that are folders here, one commit each, and ways to fail."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    """root/<org>/<name> is a repository whose branch `main` and tag `v1` are at COMMIT.

    `org/gated` asks for terms to be accepted; the connection breaks in the middle of every file of `org/cut`.
    """

    root: Path
    asked: list[str]  # method and path of each request, and the range of bytes that it wants

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        self._answer(body=True, paths=wanted.get("paths"))

    def _answer(self, body: bool, paths: list[str] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        part = self.headers.get("Range")
        type(self).asked.append(f"{self.command} {path}" + (f" {part}" if part else ""))
        if found := _API.fullmatch(path):
            _, name, what, revision, _ = found.groups()
            if self._is_there(name, revision):
                self._json(self._tree(name, paths) if what in ("tree", "paths-info") else self._info(name), body)
        elif found := _FILE.fullmatch(path):
            _, name, revision, file = found.groups()
            if self._is_there(name, revision):
                self._file(name, file, body)
        else:
            self._json({"error": path}, body, 404)

    def _is_there(self, name: str, revision: str | None) -> bool:
        """Whether the repository and the revision are; answers what the hub does when they are not."""
        if name == "org/gated":
            self._refuse(403, "GatedRepo")
        elif not (self.root / name).is_dir():
            self._refuse(401, "RepoNotFound")
        elif revision not in (None, "main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _info(self, name: str) -> dict[str, Any]:
        files = [{"rfilename": entry["path"]} for entry in self._tree(name)]
        return {"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}

    def _tree(self, name: str, paths: list[str] | None = None) -> list[dict[str, Any]]:
        files = sorted(p for p in (self.root / name).rglob("*") if p.is_file())
        entries = [{"type": "file", "path": str(p.relative_to(self.root / name)), "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest()} for p in files]  # fmt: skip
        return [entry for entry in entries if paths is None or entry["path"] in paths]

    def _file(self, name: str, file: str, body: bool) -> None:
        path = self.root / name / file
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            content = content[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and name == "org/cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content)

    def _json(self, document: Any, body: bool, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"the hub says {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub of the repositories in `root`, on the loopback, and what it has been asked so far."""
    asked: list[str] = []
    handler: type[Hub] = type("Handler", (Hub,), {"root": root, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
