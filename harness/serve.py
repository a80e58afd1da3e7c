"""Serve the dashboard and the reports on loopback, so that a page can show a sweep while it runs."""

from __future__ import annotations

import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.dashboard import PAGE, dashboard_page, news
from harness.records import UsageError

_SERVED = (".html", ".svg", ".md", ".json", ".csv")


class Handler(SimpleHTTPRequestHandler):
    """The dashboard at `/`, its news at `/news`, and the files of the reports; nothing else, and nothing hidden."""

    def __init__(self, *args: Any, results: Path, **more: Any) -> None:
        self.results = results
        super().__init__(*args, directory=str(results), **more)

    def do_GET(self) -> None:
        """Answer one request."""
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)  # another name that leads here is somebody else's page
        elif self.path in ("/", f"/{PAGE}"):
            self._send(dashboard_page(self.results, live=True), "text/html; charset=utf-8")
        elif self.path == "/news":
            self._send(news(self.results), "application/json")
        elif self._may_read():
            super().do_GET()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _may_read(self) -> bool:
        path = Path(self.translate_path(self.path))
        hidden = any(part.startswith(".") for part in path.relative_to(self.results).parts)
        return path.suffix in _SERVED and not hidden and path.is_file() and path.resolve().is_relative_to(self.results)

    def _send(self, text: str, kind: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Stay silent: a line for each request tells nobody anything."""


def make_server(results: Path, port: int) -> ThreadingHTTPServer:
    """Return a server on loopback.

    Raises:
        UsageError: for a folder that is not there, or a port that is taken.
    """
    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; give the folder that holds the studies")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, results=results.resolve()))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error


def serve(results: Path, port: int) -> int:
    """Serve until interrupted."""
    with make_server(results, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("", file=sys.stderr)
    return 0
