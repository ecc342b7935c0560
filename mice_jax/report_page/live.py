"""Serves the report on this machine alone, and reads the runs again each time that an open page asks.

The page asks for its content every few seconds and draws what has changed, so a run can be watched while it trains.
"""

import hashlib
import http.server
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mice_jax.errors import UserError
from mice_jax.report_page import page

ADDRESS = "127.0.0.1"  # No other machine can connect: the page shows samples of the data, and asks for no password.
CONTENT = "/content"  # what the page fetches


class LiveReport(http.server.ThreadingHTTPServer):
    """The server of one report. `serve_forever` answers until the process is interrupted."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int):
        """Takes the port.

        Args:
            folders: The folder of one sweep, or those of one or more runs.
            port: The port on this machine; 0 takes one that is free.

        Raises:
            UserError: The port cannot be used.
        """
        self.folders = folders
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(
                f"--port={port} cannot be used on this machine: {os.strerror(error.errno or 0)}. Another report may be "
                "served there. Give another port, or --port=0 for any that is free."
            ) from None

    def server_bind(self) -> None:
        """Binds the socket without the look-up of this machine's name, which may take seconds without a network."""
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    @property
    def address(self) -> str:
        """The address of the page, for a browser."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the page, or with its content."""

    server: LiveReport

    def do_GET(self) -> None:
        """Answers a request. Every answer is made from the files of the runs as they are now."""
        port = self.server.server_port
        # A page of another site could have its own name lead here, and read the answer.
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            self._send(403, "text/plain", "this report is served on this machine alone")
        elif self.path == "/":
            html = page.render(page.collect(self.server.folders), live=True)
            self._send(200, "text/html", html)
        elif self.path == CONTENT:
            self._send_content(page.collect(self.server.folders))
        else:
            self._send(404, "text/plain", "there is only the report, at /")

    def _send_content(self, data: dict[str, Any]) -> None:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        known = json.dumps({k: v for k, v in data.items() if k != "made"})
        tag = f'"{hashlib.sha256(known.encode()).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(304, "application/json", "", tag)
        else:
            self._send(200, "application/json", text, tag)

    def _send(self, status: int, kind: str, text: str, tag: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: a page asks every few seconds."""
