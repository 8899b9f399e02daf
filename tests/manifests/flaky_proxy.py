"""A proxy in front of a real object store that fails on purpose: what a bad network does to S3 requests."""

import http.client
import itertools
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

Plan = Callable[[int, str, str], str]
"""(number of the request from 0, method, path) to what happens to it: one of :data:`FAULTS`, "" for nothing."""

FAULTS = (
    "busy",  # 503 SlowDown, unseen by the store
    "drop",  # the connection closes unanswered, unseen by the store
    "cut",  # … after half of the request's body
    "lost",  # the store does it, its answer is lost
    "short",  # half of the answer arrives
    "slow",  # all is well, but late
)
SLOW_SECONDS = 0.3
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FlakyProxy:
    """Context manager: a server on loopback (``url``) that forwards to ``target`` and fails as ``plan`` says.

    ``happened`` lists the faults in order; ``plan`` may be replaced at any time.
    """

    def __init__(self, target: str, plan: Plan = lambda number, method, path: "") -> None:
        self.target, self.plan = urlsplit(target).netloc, plan
        self.happened: list[tuple[str, str, str]] = []  # (fault, method, path)
        self._numbers = itertools.count()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FlakyProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str) -> str:
        found = self.plan(next(self._numbers), method, path)
        if found:
            self.happened.append((found, method, path))
        return found


def every(nth: int, *faults: str) -> Plan:
    """Every ``nth`` request fails, in each of these ways in turn."""
    return lambda number, method, path: faults[number // nth % len(faults)] if number % nth == nth - 1 else ""


def _handler(proxy: FlakyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            fault = proxy.fault(self.command, self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size // 2 if fault == "cut" else size)
            if fault in ("drop", "cut"):
                self.close_connection = True
                return
            if fault == "busy":
                self.reply(503, [("Content-Type", "application/xml")], _BUSY)
                return
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            store = http.client.HTTPConnection(proxy.target, timeout=30)
            store.request(self.command, self.path, body, dict(self.headers))
            answer = store.getresponse()
            data = answer.read()
            store.close()
            if fault == "lost":
                self.close_connection = True
                return
            self.reply(answer.status, answer.getheaders(), data, half=fault == "short")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, half: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(data)))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if half else data)
            self.close_connection = self.close_connection or half

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
