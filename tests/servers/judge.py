"""An OpenAI-compatible endpoint on loopback whose replies, refusals and silences a test chooses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, dict[str, str], Any]


@dataclass
class JudgeServer:
    """A running endpoint.

    Attributes:
        url: for score.judge.base_url.
        requests: the JSON of every request, in order.
        keys: what every request was authorised with.
    """

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def texts(request: dict[str, Any]) -> tuple[str, str, str]:
    """Return instruction, first and second answer of a request made with the template `alpacaeval`."""
    lines = request["messages"][1]["content"].split("\n")
    parts, current = [], None
    for line in lines:
        if line.startswith("BEGIN "):
            current = []
        elif line.startswith("END "):
            parts.append("\n".join(current or []))
            current = None
        elif current is not None:
            current.append(line)
    return parts[0], parts[1], parts[2]


def prefers(better: Callable[[str, str], float]) -> Callable[[dict[str, Any]], str]:
    """Return a judge that says m where `better(first, second)` is positive, and M where it is not."""

    def reply(request: dict[str, Any]) -> str:
        _, first, second = texts(request)
        return "m" if better(first, second) > 0 else "M"

    return reply


@contextmanager
def judge_server(
    reply: Callable[[dict[str, Any]], Reply], *, delay: float = 0.0, port: int = 0
) -> Iterator[JudgeServer]:
    """Serve replies: a text, or (status, headers, body) where a body that is text is sent as it is."""
    server: JudgeServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # one connection for many requests

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            server.keys.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
            time.sleep(delay)
            said = reply(request)
            if isinstance(said, str):
                usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake-1", "choices": [choice]}
                said = (200, {}, body | {"usage": usage})
            status, headers, content = said
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            try:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server = JudgeServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
