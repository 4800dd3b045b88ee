"""The dashboard's script against what the API really answers: what it draws, asks for, and leaves as text."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from inferfleet.coordinator.tokens import Role
from inferfleet.plane import WorkerReport
from inferfleet.rollouts import Decision
from tests.support.coordinator_bench import PLAIN, Bench, view

PAGE = Path(__file__).resolve().parents[1] / "support" / "page.mjs"
SCRIPT = resources.files("inferfleet.coordinator") / "dashboard" / "dashboard.js"
HOSTILE = "<img src=x onerror=alert(1)>"
PLACES = (
    "/v1/routes?limit=500",
    "/v1/rollouts?limit=50",
    "/v1/workers?limit=500",
    "/v1/audit?newest=true&limit=25",
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two variants, a change that waits, a worker that lags, refuses and has a route paused, a rollout."""
    bench = Bench(tmp_path)
    variants = [
        {"name": "stable", "version": "1", "weight": 95},
        {"name": "canary", "version": "2", "weight": 5},
    ]
    split = {key: value for key, value in PLAIN.items() if key != "version"} | {"variants": variants}
    bench.ask(
        "PUT", "/v1/routes/digits", {"route": split, "reason": HOSTILE}, role=Role.ADMIN, if_match='"0"'
    )
    bench.store.report(
        WorkerReport(
            worker="w-1",
            pool="default",
            at_ms=bench.clock.utc_ms() - 30_000,
            adopted={"digits": 1},
            ready=["digits:1", "digits:2"],
            refused={"digits:3": HOSTILE},
            lag={"digits.requests": 40, "other": 2},
            rows_per_s={"digits": 12.4},
            paused={"digits": "the brake"},
            stale="redis does not answer",
        ),
        60_000,
    )
    three = PLAIN | {"version": "3"}
    bench.ask("PUT", "/v1/routes/digits", {"route": three}, role=Role.ADMIN, if_match='"1"')
    decision = Decision(at_ms=1, action="hold", phase="step", percent=5, reason=HOSTILE)
    running = replace(
        view("digits-2", "digits", "3", "canary", "alice"),
        waits_for=["lag: rising"],
        history=[decision],
        evidence={"arms": {"canary": {"requests": 77}}},
    )
    bench.rollouts.found = {running.id: running}
    return bench


def drawn(bench: Bench, *, token: str | None, role: Role | None = Role.VIEWER) -> dict[str, Any]:
    """Run the script against the bench's answers and return what the page shows and asks for."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    answers = {}
    for place in (*PLACES, "/v1/rollouts/digits-2"):
        response = bench.ask("GET", place, role=role)
        answers[place] = [response.status_code, response.json()]
    with resources.as_file(SCRIPT) as script:
        done = subprocess.run(
            [node, str(PAGE), str(script)],
            input=json.dumps({"answers": answers, "token": token}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def elements(tree: Any) -> Iterator[dict[str, Any]]:
    """Every element below a place."""
    if isinstance(tree, dict):
        yield tree
        for child in tree["children"]:
            yield from elements(child)


def test_it_shows_the_fleet(bench: Bench) -> None:
    """Versions with their shares, what waits and for whom, marks of workers, evidence, changes."""
    found = drawn(bench, token="t")
    texts = {name: each["text"] for name, each in found["shown"].items()}

    for said in ("stable: version 1, 95 %", "canary: version 2, 5 %", "revision 2 waits for 1 of 1 worker",
                 "stable: version 3, 100 %", "paused on 1 of 1 worker", "the brake"):  # fmt: skip
        assert said in texts["routes"], said
    for said in ("digits-2 (canary)", "1 → 3", "step 1", "lag: rising", '"requests": 77'):
        assert said in texts["rollouts"], said
    for said in ("w-1", "redis does not answer", "refuses digits:3", "30 s ago", "2 behind", "42", "12"):
        assert said in texts["workers"], said
    assert "apply route digits" in texts["audit"]
    assert "Revision 2, 1 worker," in texts["state"]
    assert not found["shown"]["board"]["hidden"]
    assert found["shown"]["login"]["hidden"]


def test_what_comes_from_outside_stays_text(bench: Bench) -> None:
    """It is shown as it was written, and makes no element."""
    found = drawn(bench, token="t")["shown"]
    for place in ("workers", "rollouts", "audit"):
        assert HOSTILE in found[place]["text"], place
    names = {each["name"] for part in found.values() for each in elements(part["tree"])}
    assert names & {"img", "script", "a", "iframe"} == set()


def test_it_sends_its_token_and_asks_for_evidence_of_what_runs(bench: Bench) -> None:
    """In the header, with every question."""
    found = drawn(bench, token="secret")
    assert {place for place, _ in found["asked"]} == {*PLACES, "/v1/rollouts/digits-2"}
    assert {given for _, given in found["asked"]} == {"Bearer secret"}


def test_it_asks_for_a_token_once_it_is_told_to(bench: Bench) -> None:
    """One that is not taken is forgotten."""
    found = drawn(bench, token="old", role=None)
    assert found["kept"] == {}
    assert not found["shown"]["login"]["hidden"]
    assert found["shown"]["board"]["hidden"]
    assert len(found["asked"]) == 1
    assert "token" in found["shown"]["state"]["text"]
