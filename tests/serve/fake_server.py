"""The real page at a server whose answers are a script: what a browser's test talks to, and what is photographed."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attnpack_serve.page import page

FIGURES = {"cache_bytes": 1_310_720, "dense_bytes": 10_485_760, "tokens_per_second": 31.46}
USAGE = {"prompt_tokens": 1061, "completion_tokens": 7, "total_tokens": 1068}


def streamed(*parts: str | threading.Event, finish: str = "stop") -> list[str | threading.Event]:
    """Server-sent events with these parts of an answer; where an event stands between, it is waited for."""
    events: list[str | threading.Event] = [_event(choices=[{"index": 0, "delta": {"role": "assistant"}}])]
    for part in parts:
        text = [{"index": 0, "delta": {"content": part}, "finish_reason": None}]
        events.append(part if isinstance(part, threading.Event) else _event(choices=text))
    events.append(_event(choices=[{"index": 0, "delta": {}, "finish_reason": finish}]))
    return [*events, _event(choices=[], usage=USAGE, attnpack=FIGURES), "data: [DONE]\n\n"]


def failing(message: str, *parts: str) -> list[str | threading.Event]:
    """An answer that fails after these parts."""
    return [*streamed(*parts)[: 1 + len(parts)], _event(error={"message": message, "type": "server_error"})]


def _event(**fields: Any) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **fields})}\n\n"


class FakeServer(ThreadingHTTPServer):
    """answers: of the next questions, each events or a status with a message. asked: (headers, body) of each question.

    broken_off: set where a browser went away during an answer. key: asked for, if any.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[list[str | threading.Event] | tuple[int, str]] = []
        self.asked: list[tuple[dict[str, str], Any]] = []
        self.paths: list[str] = []
        self.broken_off = threading.Event()
        self.key = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path == "/":
            html, headers = page()
            self._send(200, html.encode(), headers)
        elif self.path != "/v1/models":
            self._send(404, b"", {})
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._refuse(401, "Incorrect API key.")
        else:
            models = {"object": "list", "data": [{"id": "digits-llava", "object": "model"}]}
            self._send(200, json.dumps(models).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((dict(self.headers), json.loads(body)))
        answer = self.server.answers.pop(0)
        if isinstance(answer, tuple):
            self._refuse(*answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for part in answer:
                if isinstance(part, threading.Event):
                    self._wait(part)
                else:
                    self.wfile.write(part.encode())
        except OSError:
            self.server.broken_off.set()

    def _wait(self, event: threading.Event) -> None:
        """Until the event is set; a comment now and then finds out whether the browser is still there."""
        for _ in range(600):
            if event.wait(0.05):
                return
            self.wfile.write(b": still here\n\n")

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[FakeServer]:
    """A server at a free port of 127.0.0.1."""
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
