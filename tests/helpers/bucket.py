"""An in-memory bucket on this machine, which serves the HTTP requests of gcsfs and tensorstore.

Objects have generations and are created, replaced or deleted under preconditions, as in the JSON API of Google Cloud
Storage (cloud.google.com/storage/docs/json_api/v1/objects). Credentials are not checked.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

NAME = "bucket"
OBJECTS = f"/storage/v1/b/{NAME}/o"


class Stored(NamedTuple):
    """An object of the bucket."""

    content: bytes
    generation: int


class Refused(Exception):
    """The bucket answers a request with an HTTP status that is not a success."""


class Bucket(ThreadingHTTPServer):
    """The server and its objects."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[dict[str, str], list[bytes]]] = {}  # parameters and pieces of resumable uploads
        self.one_at_a_time = threading.RLock()
        self.refusing = 0  # number of next requests that fail, to simulate an outage
        self.received: list[tuple[str, int]] = []  # name and bytes of each object that was received
        self._generations = itertools.count(1000)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that close their connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def put(self, content: bytes, params: dict[str, str]) -> dict[str, Any]:
        """Creates or replaces an object; returns its metadata."""
        self.check(params["name"], params)
        self.objects[params["name"]] = Stored(content, next(self._generations))
        self.received.append((params["name"], len(content)))
        return self.about(params["name"])

    def compose(self, name: str, parts: list[str], params: dict[str, str]) -> dict[str, Any]:
        """Creates or replaces an object with the contents of others; returns its metadata."""
        self.check(name, params)
        whole = b"".join(self.objects[part].content for part in parts if self.about(part))
        self.objects[name] = Stored(whole, next(self._generations))
        return self.about(name)

    def check(self, name: str, params: dict[str, str]) -> None:
        """Raises Refused if a precondition on the object's generation does not hold."""
        generation = str(self.objects[name].generation) if name in self.objects else "0"
        if params.get("ifGenerationMatch", generation) != generation:
            raise Refused(412)
        if params.get("ifGenerationNotMatch") == generation:
            raise Refused(304)

    def about(self, name: str) -> dict[str, Any]:
        """Returns the metadata of an object."""
        if name not in self.objects:
            raise Refused(404)
        content, generation = self.objects[name]
        crc = google_crc32c.value(content).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "generation": str(generation),
            "metageneration": "1",
            "etag": f"g{generation}",
            "size": str(len(content)),
            "crc32c": base64.b64encode(crc).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, params: dict[str, str]) -> dict[str, Any]:
        """Lists the objects and the prefixes of a folder."""
        prefix, delimiter = params.get("prefix", ""), params.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or not params.get("startOffset", "") <= name:
                continue
            if params.get("endOffset") and name >= params["endOffset"]:
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(self.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def delete(self, name: str, params: dict[str, str]) -> None:
        """Deletes an object."""
        self.check(name, params)
        self.about(name)
        del self.objects[name]


class Request(BaseHTTPRequestHandler):
    """A request to the bucket."""

    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""
        pass

    def _do(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            with self.server.one_at_a_time:
                if self.server.refusing:
                    self.server.refusing -= 1
                    raise Refused(403)
                answer = self._answer(content)
        except Refused as e:
            answer = (e.args[0], b"" if e.args[0] == 304 else b"{}", {})
        status, body, headers = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode(), {})
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _do

    def _answer(self, content: bytes) -> Any:
        bucket, url = self.server, urlsplit(self.path)
        path, params = url.path.removeprefix("/download"), dict(parse_qsl(url.query, keep_blank_values=True))
        if path == "/batch/storage/v1":
            return self._batch(content)
        if path == f"/upload{OBJECTS}":
            return self._upload(content, params)
        if path == f"/storage/v1/b/{NAME}":
            return {"kind": "storage#bucket", "name": NAME, "id": NAME, "location": "EU", "storageClass": "STANDARD"}
        if path == OBJECTS:
            return bucket.listing(params)
        if not path.startswith(f"{OBJECTS}/"):
            raise Refused(404)
        name, *target = [unquote(part) for part in path.removeprefix(f"{OBJECTS}/").split("/")]
        if self.command == "DELETE":
            bucket.delete(name, params)
            return 204, b"", {}
        if target == ["compose"]:
            return bucket.compose(name, [part["name"] for part in json.loads(content)["sourceObjects"]], params)
        if target:
            how = target[0]
            if how not in ("copyTo", "moveTo", "rewriteTo"):
                raise Refused(404)
            bucket.about(name)
            written = bucket.put(bucket.objects[name].content, params | {"name": target[-1]})
            if how == "moveTo":
                bucket.delete(name, {})
            return {"done": True, "resource": written} if how == "rewriteTo" else written
        about = bucket.about(name)
        bucket.check(name, params)
        return self._media(bucket.objects[name]) if params.get("alt") == "media" else about

    def _media(self, stored: Stored) -> tuple[int, bytes, dict[str, str]]:
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(stored.generation)}
        asked = self.headers.get("Range")
        if not asked:
            return 200, stored.content, headers
        first, _, last = asked.removeprefix("bytes=").partition("-")
        size = len(stored.content)
        begin = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if begin >= size:
            raise Refused(416)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        return 206, stored.content[begin:end], headers

    def _upload(self, content: bytes, params: dict[str, str]) -> Any:
        bucket = self.server
        if "upload_id" in params:
            begun, pieces = bucket.uploads[params["upload_id"]]
            pieces.append(content)
            if self.headers["Content-Range"].endswith("/*"):  # the size is still unknown, so more pieces follow
                return 308, b"", {"Range": f"bytes=0-{sum(map(len, pieces)) - 1}"}
            return bucket.put(b"".join(pieces), begun)
        if params["uploadType"] == "resumable":
            number = str(len(bucket.uploads))
            bucket.uploads[number] = (json.loads(content or b"{}") | params, [])
            return 200, b"", {"Location": f"{bucket.url}/upload{OBJECTS}?uploadType=resumable&upload_id={number}"}
        if params["uploadType"] == "multipart":
            about, content = self._parts(content)
            params = json.loads(about) | params
        return bucket.put(content, params)

    def _parts(self, content: bytes) -> list[bytes]:
        """Returns the bodies of a multipart message's parts."""
        found = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert found, self.headers
        parts = content.split(b"--" + found[1].encode())[1:-1]
        return [re.split(rb"\r?\n\r?\n", re.sub(rb"\r?\n\Z", b"", part), maxsplit=1)[1] for part in parts]

    def _batch(self, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        answers = []
        for part in self._parts(content):
            verb, url = part.split(b"\r\n")[0].split(b"\n")[0].decode().split()[:2]
            assert verb == "DELETE"
            name = unquote(urlsplit(url).path.removeprefix(f"{OBJECTS}/"))
            try:
                self.server.delete(name, {})
                status = "204 No Content"
            except Refused as e:
                status = f"{e.args[0]} Refused"
            answers.append(f"--x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        return 200, "".join([*answers, "--x--"]).encode(), {"Content-Type": "multipart/mixed; boundary=x"}


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """Serves a bucket named NAME while the context lasts."""
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            bucket.shutdown()
            thread.join()


def download(bucket: Bucket, key: str, folder: Path) -> Path:
    """Writes the objects of a folder of the bucket to a local folder, which is returned."""
    for name, stored in bucket.objects.items():
        if name.startswith(f"{key}/") and not name.endswith("/"):
            file = folder / name.removeprefix(f"{key}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stored.content)
    return folder


def environment(bucket: Bucket) -> dict[str, str]:
    """Returns the variables that make gcsfs and tensorstore use this bucket."""
    return {
        "STORAGE_EMULATOR_HOST": bucket.url,
        "TENSORSTORE_GCS_HTTP_URL": bucket.url,
        "FSSPEC_GS": json.dumps({"token": "anon"}),
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # otherwise gcsfs queries the kind of bucket over gRPC
    }


if __name__ == "__main__":
    with serve() as served:
        print(" ".join(f"export {k}={shlex.quote(v)};" for k, v in environment(served).items()), flush=True)
        threading.Event().wait()
