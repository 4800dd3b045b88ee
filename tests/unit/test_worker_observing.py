"""The windows that tell what became of requests, and of keys that were seen first."""

from __future__ import annotations

import numpy as np
import pytest

from inferfleet.errors import Code
from inferfleet.records import Answer, Batch, BatchResult, Origin, Requests, RowFailure, Served
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.engine import Engine, Finished
from inferfleet.worker.observing import FirstSeen, Observing
from tests.support.builders import chunk
from tests.support.outlets import route_plan
from tests.unit.shaded import GOOD, NEXT, VARIANTS, Shaded, Told
from tests.unit.test_worker_loop import SIGNATURE


def test_a_window_counts_what_became_of_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001))
    bench.take(chunk([GOOD] * 8 + [b"{"]))
    engine, batch = bench.flying.pop(0)
    (part,) = batch.parts
    values = np.zeros((6, 2), np.float32)
    values[0] = np.inf
    answered = [Answer(part.slice(0, 6), {"y": values})]
    failed = [RowFailure(part.slice(i, i + 1), Code.MODEL, "no") for i in (6, 7)]
    bench.loop._news.put(Finished(engine, BatchResult(batch, answered, failed, seconds=0.8)))
    bench.turn()
    bench.close()
    window = bench.told.of("primary", "1")
    assert window.codes == {"ok": 5, "E_MODEL_OUTPUT": 1, "E_MODEL": 2}
    assert (window.requests, window.dead_letters, window.invalid) == (8, 3, 1)
    assert (window.batches, window.rows, window.compute_s) == (1, 8, pytest.approx(0.8))
    assert (window.failures.clusters, window.failures.trials, window.failures.events) == (1, 8, 3)
    assert len(window.compute) == len(window.latency) == 8
    assert window.compute.quantile(0.5) == pytest.approx(0.1, rel=0.05)
    assert window.bad_ms is not None
    assert (window.worker, window.route, window.variant, window.revision) == ("w", "digits", "stable", 17)
    unread = bench.told.of("primary", "")
    assert unread.codes == {"E_DECODE": 1}


def test_a_request_that_fails_again_and_again_has_failed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its delayed attempts would else be one more failure, and a few such requests a bad version."""
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    bench.take(chunk([GOOD] * 4))
    again = chunk([GOOD] * 4, first=200)
    again.origins = [Origin("digits.requests", 0, 100 + i, 0, 2) for i in range(4)]
    bench.take(again)
    while bench.flying:
        bench.finish(fails=True)
    bench.close()
    arms = [each for each in bench.told.windows if each.role == "primary"]
    assert sum(each.failures.trials for each in arms) == sum(each.failures.events for each in arms) == 4
    assert sum(bad for each in arms for _, bad in each.key_groups.values()) == 4
    assert sum(each.rows for each in arms) == 8


def test_windows_are_handed_on_when_their_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), every_s=5.0)
    bench.take(chunk([GOOD]))
    bench.finish()
    assert bench.told.windows == []
    bench.clock.advance(5.0)
    bench.loop.turn(0.0)
    assert [each.requests for each in bench.told.windows] == [1]
    first = bench.told.windows[0]
    assert first.start_ms < first.end_ms
    bench.clock.advance(5.0)
    bench.loop.turn(0.0)
    assert len(bench.told.windows) == 1


def test_after_a_crash_every_version_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, crashed=True, variants=VARIANTS)
    found = {(each.version, each.role, each.crash) for each in bench.told.windows}
    assert found == {("1", "primary", True), ("3", "primary", True), ("2", "shadow", True)}
    bench.take(chunk([GOOD] * 4))
    while bench.flying:
        bench.finish()
    bench.close()
    assert not any(each.crash for each in bench.told.windows[3:])


def test_keys_count_once_for_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    keys: list[bytes | None] = [b"k%d" % (i % 50) for i in range(200)]
    for first in (0, 1_000):
        bench.take(chunk([GOOD] * 200, keys=keys, first=first))
        while bench.flying:
            bench.finish()
    bench.close()
    seen = [each for each in bench.told.windows if each.role == "primary"]
    assert sum(each.first_seen for each in seen) == 50
    assert {each.variant for each in seen} == {"stable", "canary"}
    assert sum(each.requests for each in seen) == 400
    assert all(sum(n for n, _ in each.key_groups.values()) == each.requests for each in seen)
    assert {bad for each in seen for _, bad in each.key_groups.values()} == {0}


def test_keys_count_when_they_are_taken_and_not_when_they_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches are of one version each: half-way through a burst one arm would look larger than its share."""
    bench = Shaded(monkeypatch, NEXT._replace(sample=0.0001), variants=VARIANTS)
    keys: list[bytes | None] = [b"k%d" % i for i in range(200)]
    bench.take(chunk([GOOD] * 200, keys=keys))
    bench.close()
    early = list(bench.told.windows)
    assert sum(each.first_seen for each in early) == 200
    assert sum(each.requests for each in early) == 0
    while bench.flying:
        bench.finish()
    bench.close()
    assert sum(each.first_seen for each in bench.told.windows) == 200
    assert sum(each.requests for each in bench.told.windows if each.role == "primary") == 200


def test_late_records_of_old_revisions_make_no_new_keys_of_the_newest() -> None:
    """Else what is split as planned looks as if it were not: the same keys count again and again."""
    told = Told()
    observing = Observing("w", told, FakeClock(), 1e9)
    plan = route_plan(SIGNATURE, variants=VARIANTS)
    of = chunk([GOOD] * 20)
    tensors = {"x": np.zeros((1, 4), np.float32)}
    for _ in range(3):
        for revision in ("9", "5", "6", "7", "8"):
            served = plan.variants[0].served._replace(revision=revision)
            parts = [Requests(of, [row], [f"r{row}"], tensors, served=served) for row in range(20)]
            batch = Batch(plan.variants[0].lane(parts[0]), parts, 20)
            for part in parts:
                observing.came(plan, part)
            observing.batch(BatchResult(batch), (), lambda _part: (plan, plan.variants[0]))
    observing.close()
    assert {each.revision: each.first_seen for each in told.windows if each.revision > 6} == {
        7: 20,
        8: 20,
        9: 20,
    }
    assert all(sum(n for n, _ in each.key_groups.values()) == 60 for each in told.windows)


def test_all_arms_stop_counting_keys_at_once() -> None:
    """One that went on would look larger than its share."""
    seen = FirstSeen(bound=10)
    stable, canary = (Served("r", "m", version, "v", "1") for version in ("1", "2"))
    assert seen.met(stable, range(9)) == 9
    assert seen.met(canary, [1, 2, 1]) == 2
    assert seen.full
    assert seen.met(canary, [3]) == seen.met(stable, [99]) == 0


def test_engines_know_which_batches_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Shaded(monkeypatch)
    bench.take(chunk([GOOD]))
    bench.finish()
    bench.turn()
    engine: Engine = bench.flying[0][0]
    assert (engine.in_flight, engine.aside, bench.loop.engines.running) == (1, 1, False)
    bench.finish()
    assert (engine.in_flight, engine.aside) == (0, 0)
