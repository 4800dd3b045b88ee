"""What the API refuses whoever asks: other hosts and origins, what is over a bound; how faults are told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from inferfleet.coordinator import gate
from inferfleet.coordinator.app import Threads
from inferfleet.coordinator.refusals import RefusedError, refusal_of
from inferfleet.coordinator.tokens import Role
from inferfleet.errors import (
    ConfigError,
    ConflictError,
    ControlError,
    FencedError,
    LogLostError,
    ModelRepositoryError,
)
from inferfleet.rollouts import RefusedError as NotNowError
from tests.support.coordinator_bench import PLAIN, Bench

TWO = PLAIN | {"version": "2"}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# Who may ask from where


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8470", "127.0.0.1.evil.example", "", "localhost:x"]
)
def test_another_host_name_is_refused(bench: Bench, host: str) -> None:
    """A page may let a name of its own point here (DNS rebinding)."""
    assert code(bench.ask("GET", "/v1/routes", host=host)) == (421, "E_HOST")
    assert bench.ask("GET", "/", host=host).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8470", "[::1]:8470", "[::1]"])
def test_its_own_names_are_served(bench: Bench, host: str) -> None:
    """With any port: a port may be forwarded."""
    assert bench.ask("GET", "/v1/routes", host=host).status_code == 200


def test_a_write_from_a_page_of_another_origin_is_refused(bench: Bench) -> None:
    """Every method that writes, whatever else it carries; its own page may."""
    bench.seed()
    for origin in ("https://evil.example", "null", "http://localhost:8470", "http://127.0.0.1:1", ""):
        for method, path in [
            ("POST", "/v1/routes"),
            ("PUT", "/v1/routes/digits"),
            ("DELETE", "/v1/routes/digits"),
        ]:
            response = bench.ask(method, path, {}, origin=origin, if_match="*")
            assert code(response) == (403, "E_ORIGIN"), (origin, method)
    own = bench.ask("DELETE", "/v1/routes/digits", origin="http://127.0.0.1:8470", if_match="*")
    assert own.status_code == 202


@pytest.mark.parametrize(
    "media", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_a_body_must_say_that_it_is_json(bench: Bench, media: str) -> None:
    """What a form can send without asking is no body."""
    response = bench.ask("POST", "/v1/rollouts", {"route": "a", "version": "1"}, content_type=media)
    assert code(response) == (415, "E_CONTENT_TYPE")


def test_every_answer_carries_the_headers_of_security(bench: Bench) -> None:
    """Answers, pages and refusals alike."""
    for response in (
        bench.ask("GET", "/"),
        bench.ask("GET", "/v1/routes"),
        bench.ask("GET", "/nothing"),
        bench.ask("PATCH", "/v1/routes"),
        bench.ask("GET", "/v1/routes", host="evil"),
    ):
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers


# Bounds


def test_a_body_over_the_bound_is_refused_before_it_is_read(bench: Bench) -> None:
    """By its length, and where that is not told, as soon as there is too much."""
    assert code(bench.ask("POST", "/v1/routes", {"routes": [], "reason": "x" * 1_000_000})) == (
        413,
        "E_TOO_LARGE",
    )
    taken: list[int] = []

    def parts() -> Any:
        for number in range(100):
            taken.append(number)
            yield b" " * 100_000

    headers = {"content-type": "application/json"}
    response = bench.client.post("/v1/routes", content=parts(), headers=headers)
    assert code(response) == (413, "E_TOO_LARGE")


def test_a_body_that_does_not_come_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who sends a byte a minute holds nothing for long."""
    monkeypatch.setattr(gate, "BODY_S", 0.01)

    async def ask() -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        await bench.application(_scope("POST", "/v1/routes"), receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(ask()) == 408


def _scope(method: str, path: str) -> dict[str, Any]:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    return {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8470), "scheme": "http"}  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"\xff", b'{"routes": 1}', b'{"routes": [], "prun": true}', b'{"routes": [1]}', b"null",
     b'{"reason": "\\ud800", "routes": []}', b"[" * 100_000, b'{"routes": [' + b'{"a":' * 50_000],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_a_body_of_another_shape_is_refused(bench: Bench, body: bytes) -> None:
    """In one line, whatever it is."""
    response = bench.client.post("/v1/routes", content=body, headers={"content-type": "application/json"})
    assert code(response) == (400, "E_INVALID")
    assert "\n" not in response.json()["error"]


def test_who_asks_too_often_waits(tmp_path: Path) -> None:
    """Each token for itself, and those without one by where they come from."""
    bench = Bench(tmp_path)
    statuses = [
        bench.ask("GET", "/v1/models", role=Role.VIEWER).status_code for _ in range(gate.REQUESTS_AT_ONCE + 5)
    ]
    assert statuses.count(200) == gate.REQUESTS_AT_ONCE
    limited = bench.ask("GET", "/v1/models", role=Role.VIEWER)
    assert code(limited) == (429, "E_RATE")
    assert int(limited.headers["retry-after"]) >= 1
    assert bench.ask("GET", "/v1/models", role=Role.ADMIN).status_code == 200
    strangers = [bench.ask("GET", "/v1/models").status_code for _ in range(gate.REQUESTS_AT_ONCE + 5)]
    assert set(strangers) == {401, 429}
    bench.clock.advance(5)
    assert bench.ask("GET", "/v1/models", role=Role.VIEWER).status_code == 200


def test_too_much_that_waits_is_refused_at_once() -> None:
    """A store that hangs must not let requests pile up without a bound."""

    async def flood() -> list[str]:
        threads = Threads(threads=1, waiting=2)
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang() -> str:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)
            return "done"

        tasks = []
        for _ in range(5):
            tasks.append(asyncio.create_task(threads.run(hang)))
            await asyncio.sleep(0)
        release.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return sorted(each if isinstance(each, str) else type(each).__name__ for each in found)

    assert asyncio.run(flood()) == ["RefusedError", "RefusedError", "done", "done", "done"]


# Errors


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (ConfigError("a\nb"), 400, False),
        (NotNowError("not now"), 409, False),
        (ConflictError("meanwhile"), 409, True),
        (LogLostError("redis at 10.0.0.1:6379 has lost"), 409, False),
        (ModelRepositoryError("model m is not in the repository /srv/secret/models"), 400, False),
        (ControlError("redis at 10.0.0.1:6379 does not answer"), 503, True),
        (FencedError("gone"), 503, True),
        (RuntimeError("/srv/secret/models 10.0.0.1"), 500, True),
        (RefusedError(404, "E_NOT_FOUND", "no"), 404, False),
    ],
)
def test_errors_are_told_without_what_is_inside(error: Exception, status: int, retryable: bool) -> None:
    """One line, no folder, no address, no traceback."""
    found = refusal_of(error)
    assert (found.status, found.retryable) == (status, retryable)
    for inside in ("/srv", "10.0.0.1", "\n", "Traceback"):
        assert inside not in found.text


def test_a_store_that_is_away_is_answered_503(bench: Bench) -> None:
    """In the shape of every error, on every path that needs it; the pages that hold no data are served."""
    bench.store.away = True
    for path in ("/v1/routes", "/v1/routes/digits", "/v1/workers", "/v1/audit"):
        response = bench.ask("GET", path)
        assert code(response) == (503, "E_CONTROL")
        assert response.json()["retryable"] is True
        assert response.headers["retry-after"] == "2"
    assert bench.ask("PUT", "/v1/routes/digits", {"route": PLAIN}, if_match='"0"').status_code == 503
    assert bench.ask("GET", "/").status_code == 200
    found = bench.metrics.registry.get_sample_value(
        "inferfleet_coordinator_requests_total", {"method": "GET", "path": "/v1/routes", "status": "503"}
    )
    assert found == 1


def test_a_fault_of_its_own_is_answered_500_and_says_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says more."""

    def fault() -> Any:
        raise ZeroDivisionError("/srv/secret")

    monkeypatch.setattr(bench.routes, "log", fault)
    response = bench.ask("GET", "/v1/routes")
    assert code(response) == (500, "E_INTERNAL")
    assert "secret" not in response.text


def test_nothing_but_http_is_spoken(bench: Bench) -> None:
    """A socket that wants to stay open is closed at once."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(bench.application({"type": "websocket", "path": "/v1/routes"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    with pytest.raises(RuntimeError, match="lifespan"):
        asyncio.run(bench.application({"type": "lifespan"}, receive, send))


def test_the_description_describes_itself_and_every_endpoint(bench: Bench) -> None:
    """What is served is what stands in schemas/."""
    served = bench.ask("GET", "/openapi.json").json()
    kept = Path(__file__).resolve().parents[2] / "schemas" / "openapi.v1.json"
    assert served == json.loads(kept.read_text(encoding="utf-8"))
    assert served["openapi"] == "3.1.0"
    assert served["paths"]["/v1/reset"]["post"]["description"] == "For the role admin and those above."
