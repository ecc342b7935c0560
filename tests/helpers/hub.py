"""A stand-in of the Hugging Face Hub on loopback, with what a model's download and upload use of its interface."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


@dataclass
class Repo:
    """A model: the files of each commit, the newest last, and whether they may be read."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def push(self, files: Mapping[str, bytes]) -> str:
        """Adds a commit, which `main` then stands for; returns its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit


@dataclass
class Hub:
    """What the stand-in serves, and what was asked of it.

    Attributes:
      uploads: the files of each repository that was uploaded to, and whether it was created as a private one.
      downloads: the files whose content was sent, in order, as repository/file.
      tokens: the values of all Authorization headers.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    uploads: dict[str, tuple[bool, dict[str, bytes]]] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str) -> tuple[str, dict[str, str], bytes]:
        """Returns the code of an error or "", headers and the body for a path of a request."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        parts = [*parts[2:], "revision", "main"] if is_api else parts  # the newest commit, if none is named
        owner, name, what, revision, *rest = parts
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return "RepoNotFound", {}, b""
        commit = list(repo.commits)[-1] if revision == "main" else revision
        if commit not in repo.commits:
            return "RevisionNotFound", {}, b""
        files = repo.commits[commit]
        if what == "revision":
            return "", {}, json.dumps({"id": f"{owner}/{name}", "sha": commit}).encode()
        if what == "tree":
            entries = [{"type": "file", "path": f, "size": len(b), "oid": _digest(b)} for f, b in files.items()]
            return "", {}, json.dumps(entries).encode()
        assert what == "resolve", path
        if repo.gated:
            return "GatedRepo", {}, b""
        body = files["/".join(rest)]
        return "", {"X-Repo-Commit": commit, "ETag": f'"{_digest(body)}"'}, body

    def receive(self, path: str, body: bytes) -> tuple[int, Any]:
        """Returns the status and the JSON of the answer to a POST; nothing may be uploaded to the owner `others`."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                return 403, {"error": "You may not create it."}
            self.uploads[name] = (asked.get("visibility") == "private", {})
            return 200, {"url": f"{constants.ENDPOINT}/{name}"}
        owner, name, what, _ = path.removeprefix("/api/models/").split("/")
        if what == "preupload":
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": f["path"]} | regular for f in json.loads(body)["files"]]}
        assert what == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.uploads[f"{owner}/{name}"][1][line["value"]["path"]] = content
        address = f"{constants.ENDPOINT}/{owner}/{name}/commit/1"
        return 200, {"commitUrl": address, "commitOid": "1", "pullRequestUrl": None}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serves a stand-in that huggingface_hub uses in this process, with `cache` as the folder of its cache."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/api/agent-harnesses":
                error, headers, body = "EntryNotFound", {}, b""
            else:
                hub.tokens.add(self.headers.get("Authorization"))
                error, headers, body = hub.answer(path)
            if self.command == "GET" and not error and "/resolve/" in path:
                owner, name, _, _, *rest = path.strip("/").split("/")
                hub.downloads.append("/".join([owner, name, *rest]))
            self.send_response(ERRORS[error] if error else 200)
            for key, value in headers.items() | ({"X-Error-Code": error}.items() if error else set()):
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            length = self.headers.get("Content-Length")
            sent = self.rfile.read(int(length)) if length else self._chunks()
            status, answer = hub.receive(urlsplit(self.path).path, sent)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _chunks(self) -> bytes:
            """Reads a body of unknown length."""
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()
