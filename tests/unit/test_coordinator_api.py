"""What the API answers: preconditions, pages, what waits for workers, and how it says no."""

from __future__ import annotations

from typing import Any

import pytest

from inferfleet.coordinator.audit_tail import AuditTail
from tests.support.control_plane import FakeWorker
from tests.support.coordinator_bench import PLAIN, Bench, view

TWO = PLAIN | {"version": "2"}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# Routes and their preconditions


def test_a_route_is_added_only_where_there_is_none(bench: Bench) -> None:
    """If-Match "0" says that nothing is to be overwritten; a star says that something is."""
    assert code(bench.ask("PUT", "/v1/routes/digits", {"route": PLAIN}, if_match="*")) == (412, "E_STALE")
    made = bench.ask("PUT", "/v1/routes/digits", {"route": PLAIN}, if_match='"0"')
    assert (made.status_code, made.headers["etag"]) == (202, '"1"')
    assert code(bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match='"0"')) == (412, "E_STALE")


def test_a_change_names_the_revision_that_it_was_made_for(bench: Bench) -> None:
    """With an older tag, a weak one, or one without quotes nothing is changed; without any it is refused."""
    bench.seed()
    for stale in ('"0"', '"7"', 'W/"1"', "1", '"1', ""):
        response = bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match=stale)
        assert code(response) == (412, "E_STALE"), stale
    assert code(bench.ask("PUT", "/v1/routes/digits", {"route": TWO})) == (428, "E_PRECONDITION")
    assert code(bench.ask("DELETE", "/v1/routes/digits")) == (428, "E_PRECONDITION")
    assert bench.store.head().number == 1

    response = bench.ask(
        "PUT", "/v1/routes/digits", {"route": TWO, "reason": "a\nb\x1b[1m"}, if_match='"9", "1"'
    )
    assert (response.status_code, response.headers["etag"]) == (202, '"2"')
    assert response.json()["revisions"][0]["reason"] == "a b [1m"


def test_of_two_who_change_the_same_one_is_told(bench: Bench) -> None:
    """Both have read revision 1."""
    bench.seed()
    tag = bench.ask("GET", "/v1/routes/digits").headers["etag"]
    first = bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match=tag)
    second = bench.ask("DELETE", "/v1/routes/digits", if_match=tag)
    assert (first.status_code, second.status_code) == (202, 412)


def test_putting_what_stands_changes_nothing(bench: Bench) -> None:
    """And answers with the tag that stands."""
    bench.seed()
    response = bench.ask("PUT", "/v1/routes/digits", {"route": PLAIN}, if_match='"1"')
    assert (response.status_code, response.headers["etag"]) == (202, '"1"')
    assert response.json()["revisions"] == response.json()["changes"] == []


def test_a_change_waits_for_the_workers_and_says_so(bench: Bench) -> None:
    """It is announced, shown as pending, and answered before anybody has loaded anything."""
    bench.seed()
    FakeWorker(bench.store, "w").step()
    response = bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match='"1"')
    assert response.json()["revisions"][0]["effective_from_ms"] is None

    shown = bench.ask("GET", "/v1/routes/digits").json()
    assert (shown["standing"]["number"], shown["pending"]["number"], shown["revision"]) == (1, 2, 2)


def test_a_route_in_a_path_keeps_its_name(bench: Bench) -> None:
    """A body that names another one is refused, one that names none takes the path's."""
    response = bench.ask("PUT", "/v1/routes/words", {"route": PLAIN}, if_match='"0"')
    assert code(response) == (400, "E_INVALID")
    nameless = {key: value for key, value in PLAIN.items() if key != "name"}
    assert bench.ask("PUT", "/v1/routes/words", {"route": nameless}, if_match='"0"').status_code == 202


def test_putting_one_route_leaves_the_others_alone(bench: Bench) -> None:
    """A table is applied as a whole, a route by itself."""
    bench.seed("digits")
    bench.seed("words")
    assert bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match="*").status_code == 202
    assert [each["name"] for each in bench.ask("GET", "/v1/routes").json()["routes"]] == ["digits", "words"]


def test_a_dry_run_says_what_would_change_and_changes_nothing(bench: Bench) -> None:
    """The same plan as the one that is applied."""
    bench.seed("digits")
    bench.seed("words")
    body = {"routes": [TWO], "prune": True}
    dry = bench.ask("POST", "/v1/routes?dry_run=true", body)
    assert (dry.status_code, dry.json()["dry_run"], bench.store.head().number) == (200, True, 2)
    wet = bench.ask("POST", "/v1/routes", body)
    assert (wet.status_code, wet.json()["changes"]) == (202, dry.json()["changes"])
    assert [each["name"] for each in wet.json()["changes"]] == ["digits", "words"]
    assert bench.ask("GET", "/v1/routes/words").status_code == 404


def test_a_route_that_was_taken_away_can_be_reverted_and_added(bench: Bench) -> None:
    """Its history stays, and it counts as none that is there."""
    bench.seed()
    assert bench.ask("DELETE", "/v1/routes/digits?reason=over", if_match='"1"').headers["etag"] == '"2"'
    assert bench.ask("DELETE", "/v1/routes/digits", if_match="*").status_code == 404
    history = bench.ask("GET", "/v1/routes/digits/revisions").json()["revisions"]
    assert [(each["number"], each["reason"]) for each in history] == [(2, "over"), (1, "")]
    assert bench.ask("PUT", "/v1/routes/digits", {"route": TWO}, if_match='"0"').status_code == 202
    back = bench.ask("POST", "/v1/routes/digits/revert", {"revision": 1})
    assert back.json()["changes"][0]["after"]["variants"][0]["version"] == "1"
    assert code(bench.ask("POST", "/v1/routes/digits/revert", {"revision": 99})) == (400, "E_INVALID")


def test_a_version_that_does_not_exist_is_refused(bench: Bench) -> None:
    """Before any worker has to."""
    response = bench.ask("POST", "/v1/routes", {"routes": [PLAIN | {"version": "77"}]})
    assert code(response) == (400, "E_MODEL_UNKNOWN")


def test_a_reset_starts_a_new_epoch(bench: Bench) -> None:
    """With these routes alone."""
    bench.seed("digits")
    bench.seed("words")
    response = bench.ask("POST", "/v1/reset", {"routes": [TWO], "reason": "the store was restored"})
    assert response.status_code == 202
    assert response.json()["revisions"][0]["epoch"] == 1
    assert [each["name"] for each in bench.ask("GET", "/v1/routes").json()["routes"]] == ["digits"]


# Lists


def test_lists_are_cut_into_pages(bench: Bench) -> None:
    """Each page says where the next one begins; nothing is lost or doubled between them."""
    names = [f"r{number}" for number in range(7)]
    for name in names:
        bench.seed(name)
        FakeWorker(bench.store, f"w-{name}").report()
        bench.rollouts.found[name] = view(name, name, "2", "canary", "a")
    for path, key, field, wanted in [
        ("/v1/routes", "routes", "name", names),
        ("/v1/workers", "workers", "worker", [f"w-{name}" for name in names]),
        ("/v1/rollouts", "rollouts", "id", names[::-1]),
        ("/v1/models", "models", "name", ["digits", "words"]),
        ("/v1/audit", "entries", "number", list(range(1, 8))),
    ]:
        found: list[Any] = []
        after: Any = ""
        while True:
            query = "limit=3" + (f"&after={after}" if after else "")
            page = bench.ask("GET", f"{path}?{query}").json()
            assert len(page[key]) <= 3
            found += [each[field] for each in page[key]]
            after = page["next"]
            if not after:
                break
        assert found == wanted, path


def test_a_history_is_read_backwards_in_pages(bench: Bench) -> None:
    """Newest first, each page before the one before."""
    for version in "121212":
        bench.ask("POST", "/v1/routes", {"routes": [PLAIN | {"version": version}]})
    first = bench.ask("GET", "/v1/routes/digits/revisions?limit=4").json()
    rest = bench.ask("GET", f"/v1/routes/digits/revisions?limit=4&before={first['next']}").json()
    assert [each["number"] for each in first["revisions"] + rest["revisions"]] == [6, 5, 4, 3, 2, 1]
    assert rest["next"] == 0


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=501", "limit=x", "limit=1&limit=2", "page=2", "after=" + "a" * 201, "limit=1e9"],
)
def test_a_query_out_of_bounds_is_refused(bench: Bench, query: str) -> None:
    """Page sizes have a bound, and a parameter that is not known does not pass for one that did something."""
    assert code(bench.ask("GET", f"/v1/routes?{query}")) == (400, "E_INVALID")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 30])
def test_the_newest_audit_entries_are_found_with_few_looks(bench: Bench, count: int) -> None:
    """Also after more have come, and after a store has lost some."""
    tail = AuditTail(bench.store)
    for number in range(count):
        bench.seed(f"r{number}")
    assert tail.last() == count
    bench.seed("other")
    assert tail.last() == count + 1
    del bench.store._audit[count // 2 :]
    assert tail.last() == count // 2
    entries = bench.ask("GET", "/v1/audit?newest=true&limit=2").json()["entries"]
    assert [each["number"] for each in entries] == list(range(1, count // 2 + 1))[-2:]


# Rollouts


def test_rollouts_are_started_and_steered_by_whoever_asks(bench: Bench) -> None:
    """The service learns who it was, and the reason in one line."""
    started = bench.ask("POST", "/v1/rollouts", {"route": "digits", "version": "2"})
    assert (started.status_code, started.json()["actor"]) == (201, "local")
    assert code(bench.ask("POST", "/v1/rollouts", {"route": "digits", "version": "3"})) == (409, "E_CONFLICT")
    for verb in ("pause", "resume", "promote", "abort", "approve"):
        assert bench.ask("POST", f"/v1/rollouts/r1/{verb}", {"reason": "be\tcause"}).status_code == 200
    assert [asked[1:] for asked in bench.rollouts.asked] == [
        (verb, "local", "be cause") for verb in ("pause", "resume", "promote", "abort", "approve")
    ]
    assert code(bench.ask("POST", "/v1/rollouts/none/abort", {})) == (404, "E_NOT_FOUND")
