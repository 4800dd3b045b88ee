"""A version that a worker has stopped is taken back, and its route goes on when nobody steers by it."""

from __future__ import annotations

from msgspec.structs import replace

from inferfleet.coordinator.braking import to_resume
from inferfleet.core.revisions import appended
from inferfleet.plane import WorkerReport, braked, braked_version
from inferfleet.revisions import EMPTY_LOG, Revision, RouteLog, sealed
from inferfleet.routes import Route, route_of

REASON = braked("2", "20 requests in a row failed, most often with E_MODEL")


def route(*versions: str) -> Route:
    variants = [{"name": f"v{each}", "version": each, "weight": 1} for each in versions]
    plain = {"name": "a", "source": "kafka:in", "results": ["kafka:out"], "model": "m", "variants": variants}
    return route_of(plain, "f", "here")


def log_of(*changes: tuple[Route, int | None]) -> RouteLog:
    log = EMPTY_LOG
    for number, (what, since_ms) in enumerate(changes, 1):
        revision = sealed(
            Revision(
                number=number,
                epoch=1,
                name="a",
                route=what,
                effective_from_ms=since_ms,
                at_ms=1_000,
                author="me",
                action="test",
                previous=log.head.hash,
            )
        )
        log = appended(log, [revision])
    return log


def worker(adopted: int, reason: str = REASON) -> WorkerReport:
    return WorkerReport(
        worker="w-1", pool="default", adopted={"a": adopted}, paused={"a": reason} if reason else {}
    )


TAKEN_BACK = log_of((route("1"), 0), (route("1", "2"), 500), (route("1"), 500))


def test_a_route_goes_on_when_every_worker_has_left_the_version_that_was_stopped() -> None:
    """Not before: what was held back would be run by that version again."""
    assert to_resume(TAKEN_BACK, [worker(3)], 1_000) == {"a": REASON}
    assert to_resume(TAKEN_BACK, [worker(3), replace(worker(2), worker="w-2")], 1_000) == {}
    assert to_resume(TAKEN_BACK, [worker(3), replace(worker(0), pool="other")], 1_000) == {"a": REASON}


def test_a_route_stays_paused_while_its_version_answers_or_a_person_has_paused_it() -> None:
    """Only a brake on a version that is gone has no reason left."""
    assert to_resume(log_of((route("1"), 0), (route("1", "2"), 500)), [worker(2)], 1_000) == {}
    assert to_resume(TAKEN_BACK, [worker(3, "by hand")], 1_000) == {}
    assert to_resume(TAKEN_BACK, [worker(3, "")], 1_000) == {}
    assert to_resume(log_of((route("1", "2"), 0), (route("1"), 5_000)), [worker(2)], 1_000) == {}


def test_what_waits_for_the_version_that_failed_keeps_its_route_paused() -> None:
    """A change from now on leaves what was held back to the old version: it would be emptied run by run."""
    replaced = log_of((route("2"), 0), (route("1"), 800))

    assert to_resume(replaced, [worker(2)], 1_000) == {}
    assert to_resume(log_of((route("2"), 0), (route("1"), 0)), [worker(2)], 1_000) == {"a": REASON}


def test_the_version_is_read_from_a_brakes_reason_alone() -> None:
    """What a person writes is no version's brake."""
    assert braked_version(REASON) == "2"
    assert braked("", "20 requests failed") == "20 requests failed"
    assert [braked_version(each) for each in ("", "version", "version two: no", "model 7 is wrong")] == [
        ""
    ] * 4
