"""The ready barrier: an announcement gets its time when every live worker has all of it, and not before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.core.barrier import Verdict, ahead, barrier, barriers, clock_fault, unacknowledged
from inferfleet.core.revisions import appended
from inferfleet.plane import WorkerReport
from inferfleet.revisions import EMPTY_LOG, Head, Revision, sealed
from inferfleet.routes import route_of

ROUTE = route_of(
    {
        "name": "r",
        "source": "kafka:in",
        "results": ["kafka:out"],
        "model": "m",
        "variants": [
            {"name": "stable", "version": "1", "weight": 9},
            {"name": "canary", "version": "2", "weight": 1},
        ],
        "shadows": [{"name": "next", "version": "3"}],
    },
    "f",
    "x",
)
ANNOUNCED = sealed(
    Revision(
        number=7,
        epoch=1,
        name="r",
        route=ROUTE,
        effective_from_ms=None,
        at_ms=1_000,
        author="a",
        action="apply",
    )
)
VERSIONS = ("m:1", "m:2", "m:3")

reports = st.builds(
    WorkerReport,
    worker=st.sampled_from(["w-1", "w-2", "w-3"]),
    pool=st.sampled_from(["default", "other"]),
    head=st.builds(Head, st.integers(0, 2), st.integers(5, 9), st.just("x" * 64)),
    adopted=st.dictionaries(st.sampled_from(["r", "s"]), st.integers(5, 9)),
    ready=st.lists(st.sampled_from([*VERSIONS, "m:4"]), unique=True),
    loading=st.lists(st.sampled_from(VERSIONS), unique=True),
    refused=st.dictionaries(st.sampled_from([*VERSIONS, "m:4"]), st.just("no")),
    draining=st.booleans(),
)


@settings(deadline=None)
@given(st.lists(reports, max_size=4))
def test_ready_means_all_of_it_everywhere(workers: list[WorkerReport]) -> None:
    """Ready if and only if every live worker of the pool has each version and has acknowledged."""
    found = barrier(ANNOUNCED, workers, "default")
    mine = [each for each in workers if each.pool == "default" and not each.draining]
    complete = all(set(VERSIONS) <= set(each.ready) and each.adopted.get("r", 0) >= 7 for each in mine)

    assert (found.verdict(1_000, 60_000) is Verdict.READY) == complete
    assert found.workers == len(mine)


@settings(deadline=None)
@given(st.lists(reports, max_size=4), reports)
def test_one_more_worker_never_opens_the_barrier(workers: list[WorkerReport], more: WorkerReport) -> None:
    """What is not ready with some is not ready with more of them."""
    if barrier(ANNOUNCED, workers, "default").verdict(0, 1) is not Verdict.READY:
        assert barrier(ANNOUNCED, [*workers, more], "default").verdict(0, 1) is not Verdict.READY


@settings(deadline=None)
@given(st.lists(reports, max_size=4))
def test_a_refusal_counts_only_of_what_is_needed_and_known(workers: list[WorkerReport]) -> None:
    """What an earlier try refused, what is being loaded again, and other versions do not stop it."""
    found = barrier(ANNOUNCED, workers, "default")
    for each in found.refused:
        assert each.version in VERSIONS
        assert any(
            each.version in w.refused
            and each.version not in w.loading
            and each.version not in w.ready
            and (w.head.epoch, w.head.number) >= (1, 7)
            for w in workers
            if w.worker == each.worker
        )
    if found.refused:
        assert found.verdict(10**9, 1) is Verdict.REFUSED


def test_it_says_who_is_waited_for_and_for_what() -> None:
    """A person reads which worker lacks which version."""
    late = WorkerReport(worker="w-1", pool="default", adopted={"r": 7}, ready=["m:1", "m:2"])
    silent = WorkerReport(worker="w-2", pool="default", ready=list(VERSIONS))
    found = barrier(ANNOUNCED, [late, silent], "default")

    assert str(found) == "w-1 has not loaded m:3; w-2 has not acknowledged the revision"
    assert found.verdict(1_000 + 59_999, 60_000) is Verdict.WAITING
    assert found.verdict(1_000 + 60_000, 60_000) is Verdict.EXPIRED
    assert unacknowledged(ANNOUNCED, [late, silent], "default") == ["w-2"]


def test_a_pool_without_workers_waits_for_nobody() -> None:
    """There is nobody to be ready."""
    assert barrier(ANNOUNCED, [], "default").verdict(0, 1) is Verdict.READY


def test_each_announcement_of_a_log_is_looked_at() -> None:
    """By its own route's pool."""
    log = appended(EMPTY_LOG, [ANNOUNCED])
    (found,) = barriers(log, [WorkerReport(worker="w", pool="default"), WorkerReport(worker="x", pool="o")])

    assert (found.name, found.workers, len(found.waiting)) == ("r", 1, 1)


@pytest.mark.parametrize(
    ("stamps", "said"),
    [
        ([], None),
        ([0, 0], None),
        ([1_000_000, 940_000], None),
        ([1_004_000], None),
        ([3_600_000 + 1_000_000, 1_000_000], "3,600 s behind that of worker w-0"),
        ([900_000, 100_000], "100 s ahead of that of worker w-0"),
    ],
)
def test_a_clock_that_is_not_the_workers_is_told(stamps: list[int], said: str | None) -> None:
    """By the newest report: an old one is of a worker that has gone silent."""
    workers = [WorkerReport(worker=f"w-{i}", pool="p", at_ms=each) for i, each in enumerate(stamps)]

    assert clock_fault(1_000_000, workers) == said


def test_a_worker_whose_log_is_no_beginning_of_the_stores_is_named() -> None:
    """Higher, of a later epoch, or with another hash at a number that the store holds."""
    head = Head(1, 7, "a")
    logs = {
        "same": Head(1, 7, "a"),
        "behind": Head(1, 5, "five"),
        "new": Head(),
        "higher": Head(1, 8, "b"),
        "epoch": Head(2, 3, "c"),
        "forked": Head(1, 7, "z"),
        "forked-before": Head(1, 6, "six"),
    }
    workers = [WorkerReport(worker=name, pool="p", head=each) for name, each in logs.items()]
    found = ahead(head, workers, lambda theirs: "other" if theirs.number == 6 else None)

    assert [each.worker for each in found] == ["higher", "epoch", "forked", "forked-before"]
    assert ahead(head, workers[:3]) == []
