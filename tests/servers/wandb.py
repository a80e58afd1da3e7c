"""A server on loopback that answers as W&B's does to what uploading runs and saving pages asks of it.

W&B's own server needs an account, so that it cannot be asked here; the requests are those of the real `wandb` and
`wandb-workspaces`, and the test reads what arrived.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "x" * 40


class WandbServer(ThreadingHTTPServer):
    """Holds runs, files and views as they arrive; from the `hangs_from`-th request on it listens and never answers."""

    def __init__(self, hangs_from: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._numbers = itertools.count(1)
        self._hangs_from = hangs_from
        self.closing = threading.Event()
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.refuse_views = False

    def handle_error(self, request, client_address) -> None:
        """W&B's client drops connections when it ends."""

    def may_answer(self) -> bool:
        """Count a request; keep one that gets no answer waiting until the server is closed."""
        if self._hangs_from is None or next(self._numbers) < self._hangs_from:
            return True
        self.closing.wait()
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p1", "internalId": "1", "name": "dpo-vs-simpo", "entityName": "team"}
        project |= {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        if "upsertView" in query:
            return {"upsertView": {"view": self.save(variables, project), "inserted": True}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], {})
            run |= {key: value for key, value in variables.items() if value is not None}
            entity = {"id": "e1", "name": "team"}
            bucket = {"id": variables["name"], "name": variables["name"], "displayName": run.get("displayName")}
            bucket |= {"config": "{}", "sweepName": None, "project": {**project, "entity": entity}}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if operation == "CreateRunFiles":
            url = f"{self.url}/upload/{variables['run']}"
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # the tables of a run; said to be there already
            sequence = {"id": "s1", "latestArtifact": {"id": "a1", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "a1", "state": "COMMITTED", "artifactSequence": sequence}}}
        viewer = {"id": "u1", "entity": "team", "username": "someone", "email": "a@b.c", "flags": "{}"}
        viewer["teams"] = {"edges": [{"node": {"name": "team"}}]}
        views = [{"node": view} for view in self.views.values() if view["name"] == variables.get("viewName")]
        project["allViews"] = {"edges": views}
        page = {"edges": [{"node": project, "cursor": "1"}], "pageInfo": {"endCursor": "1", "hasNextPage": False}}
        view = self.views.get(variables.get("reportId", ""))
        server = {"features": []}
        return {"viewer": viewer, "project": project, "models": page, "view": view, "serverInfo": server}

    def save(self, variables: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        if self.refuse_views:
            raise PermissionError("no permission to save views")
        key = variables.get("id") or base64.b64encode(f"View:{len(self.views)}".encode()).decode()
        view = {"id": key, "project": project, "updatedAt": "2026-01-01T00:00:00Z", "createdAt": "2026-01-01T00:00:00Z"}
        names = ("name", "displayName", "description", "type", "spec")
        self.views[key] = view | {name: variables.get(name) for name in names}
        return self.views[key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *about: Any) -> None:
        """Be quiet."""

    def parse_request(self) -> bool:
        return super().parse_request() and self.server.may_answer()

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.files[self.path] = self._body().decode("utf-8", "replace")
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if not self.path.endswith("/graphql"):
            self.server.files[self.path] = self.server.files.get(self.path, "") + body.decode("utf-8", "replace")
            self._reply({})
            return
        asked = json.loads(body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        try:
            data = self.server.answer(name.group(1) if name else "", asked["query"], asked.get("variables") or {})
        except PermissionError as error:
            self._reply({"errors": [{"message": str(error)}], "data": None}, 403)
            return
        self._reply({"data": data})


@contextlib.contextmanager
def wandb_server(hangs_from: int | None = None):
    """Serve until the block ends."""
    server = WandbServer(hangs_from)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
