"""A stand-in for Elasticsearch: a bulk endpoint that keeps documents, and answers that all is well."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class Bulk:
    """Listens on loopback; ``actions`` and ``documents`` are what bulk requests held, in order."""

    def __init__(self) -> None:
        self.actions: list[dict[str, Any]] = []
        self.documents: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _took(self, body: bytes) -> bytes:
        """Keep what a bulk request holds: an action and a document in turn, one a line."""
        lines = [json.loads(line) for line in body.splitlines() if line]
        actions, documents = lines[::2], lines[1::2]
        if len(actions) != len(documents):
            raise ValueError("an action stands without its document")
        self.actions += actions
        self.documents += documents
        items = [{"create": {"status": 201}} for _ in documents]
        return json.dumps({"took": 1, "errors": False, "items": items}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        took = self._took

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(b"")

            def do_GET(self) -> None:
                self._answer(b"green")

            def do_POST(self) -> None:
                self._answer(took(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler
