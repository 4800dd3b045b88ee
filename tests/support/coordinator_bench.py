"""The coordinator's API over a control plane in memory, asked through ASGI without a socket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.testclient import TestClient

from inferfleet.control.memory import MemoryControlStore
from inferfleet.coordinator.app import Application
from inferfleet.coordinator.gate import LOOPBACK, Gate
from inferfleet.coordinator.handlers import Handlers
from inferfleet.coordinator.messages import ModelView, RolloutRequest, RolloutView, VersionView
from inferfleet.coordinator.pages import pages
from inferfleet.coordinator.rollouts import RolloutControl, Seen
from inferfleet.coordinator.routes import RouteControl
from inferfleet.coordinator.tokens import Caller, Role, TokenBook, new_token, token_line
from inferfleet.errors import ConfigError, ConflictError
from inferfleet.policies import Policy
from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.testing.clock import FakeClock
from tests.support.control_plane import FakeCatalogue

BASE = "http://127.0.0.1:8470"
PLAIN = {
    "name": "digits",
    "source": "kafka:digits.requests",
    "results": ["kafka:digits.results"],
    "model": "digits",
    "version": "1",
}


class ScriptedRollouts:
    """Rollouts that do nothing but remember what was asked of them."""

    def __init__(self) -> None:
        self.found: dict[str, RolloutView] = {}
        self.asked: list[tuple[str, str, str, str]] = []

    def list(self) -> Sequence[RolloutView]:
        """Return all rollouts, newest first."""
        return list(reversed(self.found.values()))

    def get(self, rollout: str) -> RolloutView:
        """Return one; raises LookupError."""
        return self.found[rollout]

    def start(self, request: RolloutRequest, *, author: str) -> RolloutView:
        """Begin one; a route has one at a time."""
        if any(each.route == request.route and not each.ended for each in self.found.values()):
            raise ConflictError(f"route {request.route} has a rollout already")
        if request.policy:
            raise ConfigError("policy: nothing of it is known here")
        made = view(f"r{len(self.found) + 1}", request.route, request.version, request.kind, author)
        self.found[made.id] = made
        return made

    def act(
        self, rollout: str, verb: str, *, author: str, reason: str, seen: Seen | None = None
    ) -> RolloutView:
        """Remember what is to be done."""
        self.asked.append((rollout, verb, author, reason))
        return self.found[rollout]


def view(name: str, route: str, version: str, kind: Any, actor: str) -> RolloutView:
    """Return a rollout in its first step."""
    return RolloutView(
        id=name, version=1, route=route, kind=kind, model="digits", from_version="1", to_version=version,
        digest="ab", policy_hash="cd", phase="step", step=0, percent=1.0, next_percent=1.0, begun_ms=1,
        since_ms=1, actor=actor, reason="", ended=False, waits_for=[], outcome="", approvals=[], history=[],
        policy=msgspec.to_builtins(Policy()), evidence={},
    )  # fmt: skip


class TwoModels:
    """A repository with two models."""

    def models(self) -> Sequence[ModelView]:
        """Return them."""
        return [
            ModelView(name=name, versions=[VersionView(version="1", runtime="onnx", digest="ab")])
            for name in ("digits", "words")
        ]


class Bench:
    """One replica in memory; with a ``folder`` it has a token file with a token for each role, named like it.

    ``real_rollouts`` lets rollouts be the real ones, which nobody steps.
    """

    def __init__(self, folder: Path | None = None, *, real_rollouts: bool = False) -> None:
        self.clock = FakeClock()
        self.store = MemoryControlStore(self.clock)
        self.catalogue = FakeCatalogue()
        self.routes = RouteControl(self.store, self.clock, self.catalogue, "f")
        self.rollouts = ScriptedRollouts()
        rollouts = RolloutControl(self.store, self.catalogue, self.clock) if real_rollouts else self.rollouts
        self.metrics = CoordinatorMetrics("test")
        self.tokens = {role: new_token() for role in Role} if folder is not None else {}
        book: TokenBook | None = None
        if folder is not None:
            self.file = folder / "tokens"
            lines = [token_line(token, Caller(role.word, role)) for role, token in self.tokens.items()]
            self.file.write_text("\n".join(lines))
            book = TokenBook(self.file, lambda: self.clock.utc_ms() / 1000)
        handlers = Handlers(self.routes, rollouts, self.store, TwoModels(), pages(), self.clock.utc_ms)
        self.gate = Gate(book, LOOPBACK, self.clock.monotonic)
        self.application = Application(self.gate, handlers, self.metrics)
        self.client = TestClient(self.application, BASE, client=("127.0.0.1", 5))

    def ask(
        self, method: str, path: str, body: object = None, *, role: Role | None = None, **headers: str
    ) -> Any:
        """Return the response; header names are written with ``_`` for ``-``."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        if role is not None:
            named["authorization"] = f"Bearer {self.tokens[role]}"
        content = None if body is None else msgspec.json.encode(body)
        if body is not None:
            named.setdefault("content-type", "application/json")
        return self.client.request(method, path, content=content, headers=named)

    def seed(self, name: str = "digits") -> int:
        """Let a route stand (no worker lives, so it needs no barrier); return its revision."""
        entry = PLAIN | {"name": name, "source": f"kafka:{name}.requests"}
        (revision,) = self.routes.announce(self.routes.planned([entry]), author="seed", reason="")
        return revision.number
