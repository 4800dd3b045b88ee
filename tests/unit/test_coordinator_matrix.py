"""Every path of the API, with every method and every role: what is let through, and nothing else is.

The expectation is written down by hand, so that a wrong role in the coordinator's own table is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferfleet.coordinator.endpoints import ENDPOINTS, Found, Matcher
from inferfleet.coordinator.tokens import Caller, Role, token_line
from tests.support.coordinator_bench import PLAIN, Bench, view

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")
V, O, D, A = Role.VIEWER, Role.OPERATOR, Role.DEPLOYER, Role.ADMIN  # noqa: E741

EXPECTED: dict[str, dict[str, Role | None]] = {
    "/v1/routes": {"GET": V, "POST": D, "PUT": D},
    "/v1/routes/{name}": {"GET": V, "PUT": D, "DELETE": D},
    "/v1/routes/{name}/revisions": {"GET": V},
    "/v1/routes/{name}/revert": {"POST": D},
    "/v1/reset": {"POST": A},
    "/v1/rollouts": {"GET": V, "POST": D},
    "/v1/rollouts/{id}": {"GET": V},
    "/v1/rollouts/{id}/pause": {"POST": O},
    "/v1/rollouts/{id}/resume": {"POST": O},
    "/v1/rollouts/{id}/abort": {"POST": O},
    "/v1/rollouts/{id}/promote": {"POST": D},
    "/v1/rollouts/{id}/approve": {"POST": D},
    "/v1/workers": {"GET": V},
    "/v1/models": {"GET": V},
    "/v1/audit": {"GET": V},
    "/openapi.json": {"GET": V},
    "/": {"GET": None},
    "/dashboard.css": {"GET": None},
    "/dashboard.js": {"GET": None},
}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/routes"): {"routes": [PLAIN]},
    ("PUT", "/v1/routes"): {"routes": [PLAIN]},
    ("PUT", "/v1/routes/{name}"): {"route": PLAIN},
    ("POST", "/v1/routes/{name}/revert"): {"revision": 1},
    ("POST", "/v1/reset"): {"routes": [PLAIN]},
    ("POST", "/v1/rollouts"): {"route": "other", "version": "2"},
}


def cases() -> Iterator[tuple[str, str, Role | None]]:
    """Every path with every method and role; ``None`` is nobody."""
    for path in EXPECTED:
        for method in METHODS:
            for role in (None, *Role):
                yield method, path, role


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("tokens"))


def ready(bench: Bench) -> None:
    """Let the route and the rollout that the paths name be there."""
    if not bench.store.load().table().routes:
        bench.seed()
    bench.rollouts.found = {"r1": view("r1", "digits", "2", "canary", "somebody")}


def test_the_table_is_the_expected_one() -> None:
    """No path, method or role more or less, and every body is known to the matrix."""
    found: dict[str, dict[str, Role | None]] = {}
    for each in ENDPOINTS:
        assert each.method not in found.setdefault(each.path, {}), "one method of a path has one endpoint"
        found[each.path][each.method] = each.role
    assert found == EXPECTED
    needed = {(e.method, e.path) for e in ENDPOINTS if e.body and "{id}/" not in e.path}
    assert needed == set(BODIES)


@pytest.mark.parametrize(("method", "path", "role"), list(cases()))
def test_only_what_the_matrix_says_is_let_through(
    bench: Bench, method: str, path: str, role: Role | None
) -> None:
    """Unknown methods before all else, then nobody, then a role that does not suffice."""
    ready(bench)
    bench.clock.advance(10)
    body = BODIES.get((method, path), {} if method in ("POST", "PUT", "PATCH") else None)
    place = path.replace("{name}", "digits").replace("{id}", "r1")
    before = (bench.store.head(), bench.rollouts.asked[:])
    response = bench.ask(method, place, body, role=role, if_match="*")

    allowed = EXPECTED[path].get("GET" if method == "HEAD" else method, "unknown")
    if allowed == "unknown":
        wanted = {405}
        assert set(response.headers["allow"].split(", ")) - {"HEAD"} == set(EXPECTED[path])
    elif allowed is None:
        wanted = {200}
    elif role is None:
        wanted = {401}
        assert response.headers["www-authenticate"] == "Bearer"
    elif role < allowed:
        wanted = {403}
    else:
        wanted = {200, 201, 202}
    assert response.status_code in wanted, response.text
    if response.status_code >= 400:
        assert (bench.store.head(), bench.rollouts.asked) == before
        if method != "HEAD":
            assert set(response.json()) == {"error", "code", "retryable"}


@pytest.mark.parametrize("token", ["", "x", "ifl_", "Bearer", "ifl_ÿ"])
@pytest.mark.parametrize("scheme", ["Bearer", "Basic", "bearer", ""])
def test_no_other_word_opens_anything(bench: Bench, scheme: str, token: str) -> None:
    """Neither another scheme, nor a header of another name, nor a token in the address."""
    headers = [(b"authorization", f"{scheme} {token}".strip().encode("latin-1"))]
    assert bench.client.get("/v1/routes", headers=headers).status_code == 401


def test_a_token_counts_in_its_header_alone(bench: Bench) -> None:
    """Addresses end up in logs, and cookies are sent by whoever makes a browser ask."""
    token = bench.tokens[Role.ADMIN]
    assert bench.ask("GET", "/v1/routes", authorization=f"bearer {token}").status_code == 200
    assert bench.ask("GET", "/v1/routes", authorization=f"Basic {token}").status_code == 401
    assert bench.ask("GET", f"/v1/routes?token={token}").status_code == 401
    assert bench.ask("GET", "/v1/routes", cookie=f"token={token}").status_code == 401
    both = [("authorization", f"Bearer {token}"), ("authorization", "Bearer x")]
    assert bench.client.get("/v1/routes", headers=both).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/routes/", "//v1/routes", "/v1/routes/digits/", "/V1/routes",
     "/v1/routes/a/b", "/v1/routes/%2e%2e/revisions/x", "/dashboard", "/dashboard.js/", "/etc/passwd",
     "/metrics", "/v1/rollouts/r1/delete", "/v1/routes/digits/pause"],
)  # fmt: skip
def test_a_path_that_is_not_in_the_table_does_not_exist(bench: Bench, path: str) -> None:
    """For everybody alike, so that nothing is learnt from it."""
    for role in (None, Role.ADMIN):
        response = bench.ask("GET", path, role=role)
        assert response.status_code == 404
        assert response.json()["code"] == "E_NOT_FOUND"


@pytest.mark.parametrize("method", ["get", "Get", "GET ", "", "G\u0000"])
@pytest.mark.parametrize("path", ["/v1/routes", "/v1/../v1/routes", "/v1/routes\n", "v1/routes", "*", ""])
def test_methods_and_paths_are_taken_as_they_are(method: str, path: str) -> None:
    """Nothing is made alike before it is looked up."""
    assert not isinstance(Matcher().find(method, path), Found)
    assert path == "/v1/routes" or Matcher().find("GET", path) == frozenset()


def test_a_token_that_is_bound_to_routes_changes_no_other(tmp_path: Path) -> None:
    """It reads all; one route beyond its bounds refuses the whole change."""
    bench = Bench(tmp_path)
    bench.seed("digits")
    bench.seed("words")
    bench.rollouts.found = {"r1": view("r1", "words", "2", "canary", "somebody")}
    bench.file.write_text(bench.file.read_text() + "\n" + _bound_line("bound-token"))
    auth = {"authorization": "Bearer bound-token"}
    digits, words = (
        PLAIN | {"name": n, "source": f"kafka:{n}.requests", "version": "2"} for n in ("digits", "words")
    )

    assert bench.ask("GET", "/v1/routes/words", **auth).status_code == 200
    head = bench.store.head()
    for method, path, body in [
        ("PUT", "/v1/routes/words", {"route": words}),
        ("DELETE", "/v1/routes/words", None),
        ("POST", "/v1/routes/words/revert", {"revision": 1}),
        ("POST", "/v1/routes", {"routes": [digits, words]}),
        ("POST", "/v1/routes", {"routes": [digits], "prune": True}),
        ("POST", "/v1/reset", {"routes": [digits]}),
        ("POST", "/v1/rollouts", {"route": "words", "version": "2"}),
        ("POST", "/v1/rollouts/r1/abort", {}),
    ]:
        response = bench.ask(method, path, body, if_match="*", **auth)
        assert (response.status_code, response.json()["code"]) == (403, "E_FORBIDDEN"), (method, path)
    assert bench.store.head() == head
    assert bench.rollouts.asked == []
    assert bench.ask("POST", "/v1/routes", {"routes": [digits]}, **auth).status_code == 202


def test_a_token_that_is_bound_to_routes_starts_no_new_log(tmp_path: Path) -> None:
    """Whatever is left of the old one: what cannot be read any more may hold routes beyond its bounds."""
    bench = Bench(tmp_path)
    bench.seed("digits")
    bench.file.write_text(bench.file.read_text() + "\n" + _bound_line("bound-token"))
    body = {"routes": [PLAIN | {"name": "digits", "source": "kafka:digits.requests", "version": "2"}]}

    response = bench.ask("POST", "/v1/reset", body, authorization="Bearer bound-token")

    assert (response.status_code, response.json()["code"]) == (403, "E_FORBIDDEN")
    assert bench.store.head().epoch == 0


def _bound_line(token: str) -> str:
    return token_line(token, Caller("bound", Role.ADMIN, frozenset({"digits"})))
