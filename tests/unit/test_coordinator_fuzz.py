"""The API asked as its own description says, and as it does not: no fault, no answer out of its shape."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from inferfleet.coordinator.openapi import description
from tests.support.coordinator_bench import BASE, PLAIN, Bench

load_all_checks()
WANTED = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
}
CHECKED = [check for check in CHECKS.get_all() if check.__name__ in WANTED]
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))

BENCH = Bench(real_rollouts=True)
config = schemathesis.Config.from_dict({"generation": {"mode": "all"}})
schema = schemathesis.openapi.from_dict(description(), config=config)
schema.app = BENCH.application


@pytest.fixture(autouse=True)
def _ready() -> None:
    standing = {route.name for route in BENCH.store.load().table().routes}
    for name in ("digits", "words"):
        if name not in standing:
            BENCH.seed(name)


def test_the_checks_are_there() -> None:
    """One that was renamed would check nothing."""
    assert {check.__name__ for check in CHECKED} == WANTED


@schema.parametrize()
@QUICK
def test_what_the_description_says_is_answered_as_it_says(case: Any) -> None:
    """Sound and unsound parameters and bodies alike."""
    BENCH.clock.advance(10)
    case.validate_response(case.call(base_url=BASE), checks=CHECKED)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    ["name", "source", "results", "model", "version", "variants", "shadows", "shadow_of", "salt", "pool",
     "split_by", "deadline_ms", "order", "time", "ranges", "weight"]
)  # fmt: skip


@given(changed=st.dictionaries(_KEYS, _JSON, min_size=1, max_size=3), gone=st.sets(_KEYS, max_size=1))
@settings(max_examples=100, deadline=None)
def test_a_route_that_is_nearly_right_is_taken_or_refused(changed: dict[str, Any], gone: set[str]) -> None:
    """Never a fault, and a refusal changes nothing."""
    BENCH.clock.advance(10)
    route = {key: value for key, value in (PLAIN | changed).items() if key not in gone}
    body = json.dumps({"route": route})
    headers = {"content-type": "application/json", "if-match": "*"}
    head = BENCH.store.head()
    response = BENCH.client.put("/v1/routes/digits", content=body, headers=headers)
    assert response.status_code in (202, 400), response.text
    assert response.status_code == 202 or BENCH.store.head() == head


@given(body=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_no_body_and_no_fault(body: bytes) -> None:
    """Broken UTF-8, lone surrogates, numbers without end, arrays where objects belong."""
    BENCH.clock.advance(10)
    headers = {"content-type": "application/json", "if-match": "*"}
    for method, path in [("POST", "/v1/routes"), ("PUT", "/v1/routes/digits"), ("POST", "/v1/rollouts")]:
        response = BENCH.client.request(method, path, content=body, headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["code"] == "E_INVALID"


@given(path=st.text(max_size=20), method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]))
@settings(max_examples=100, deadline=None)
def test_any_name_in_a_path_is_a_name_and_nothing_else(path: str, method: str) -> None:
    """It is looked up, and never a part of a file's name."""
    BENCH.clock.advance(10)
    for place in (f"/v1/routes/{quote(path, safe='')}", f"/v1/rollouts/{quote(path, safe='')}"):
        headers = {"content-type": "application/json", "if-match": '"0"'}
        response = BENCH.client.request(method, place, headers=headers)
        assert response.status_code in (200, 307, 400, 404, 405, 412), (place, response.text)


@given(
    verb=st.sampled_from(["pause", "resume", "promote", "abort", "approve"]),
    body=st.fixed_dictionaries({}, optional={"reason": _JSON, "digest": _JSON, "policy": _JSON}),
    started=st.fixed_dictionaries(
        {"version": st.sampled_from(["1", "2", "3", "0", "99"])},
        optional={
            "kind": st.sampled_from(["canary", "blue-green", "ab", "shadow", "none"]),
            "policy": st.dictionaries(st.sampled_from(["kind", "steps", "shadow", "ab", "bake_s"]), _JSON),
        },
    ),
)
@settings(max_examples=100, deadline=None)
def test_rollouts_are_started_and_steered_or_refused(
    verb: str, body: dict[str, Any], started: dict[str, Any]
) -> None:
    """Whatever is asked of them, in whatever state they are."""
    BENCH.clock.advance(10)
    made = BENCH.ask("POST", "/v1/rollouts", {"route": "words", **started})
    assert made.status_code in (201, 400, 409), made.text
    for each in BENCH.ask("GET", "/v1/rollouts?limit=3").json()["rollouts"]:
        steered = BENCH.ask("POST", f"/v1/rollouts/{each['id']}/{verb}", body)
        assert steered.status_code in (200, 400, 409), steered.text
