"""What workers report to the control plane, while its Redis is away, refuses, freezes or loses an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from inferfleet.control.memory import MemoryControlStore, MemoryReporter
from inferfleet.control.reporter import RedisReporter, ReporterOptions
from inferfleet.plane import WorkerReport
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import Head
from inferfleet.testing.clock import FakeClock
from tests.contract.control_bench import PATIENCE_S, FeedBench
from tests.support.control import window
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@pytest.fixture
def redis_bench(redis_server: RedisServer, tmp_path: Path) -> Iterator[FeedBench]:
    """A fleet in one Redis."""
    made = FeedBench(Place(redis_server.url), tmp_path)
    yield made
    made.close()


class _Lossy:
    """A client that does what it is told and loses the answer to each first script."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.lose = 0

    def execute_command(self, *words: Any) -> Any:
        answer = self._client.execute_command(*words)
        if words[0] == "EVALSHA" and self.lose > 0:
            self.lose -= 1
            raise ConnectionError("the answer is lost")
        return answer

    def close(self) -> None:
        """The next one uses it again."""


SOON = ReporterOptions(backoff_first_s=0.02, backoff_max_s=0.05)


@pytest.mark.service
def test_a_lost_answer_makes_no_summary_come_twice(redis_bench: FeedBench, redis_server: RedisServer) -> None:
    """The group is sent again under its id, and the server knows that it has it."""
    with redis_server.client() as client:
        lossy = _Lossy(client)
        reporter = RedisReporter(lambda: lossy, redis_bench.fleet, "default", "w-1", options=SOON)
        reporter.append([window(requests=1)])
        wait_until(lambda: redis_bench.store.windows("digits")[0], PATIENCE_S, "the first has arrived")
        lossy.lose = 3
        reporter.append([window(requests=2)])
        wait_until(lambda: lossy.lose == 0, PATIENCE_S, "answers were lost")
        reporter.append([window(requests=3)])
        reporter.close()
    found, _ = redis_bench.store.windows("digits")
    assert [each.requests for each in found] == [1, 2, 3]


@pytest.mark.service
def test_while_redis_is_away_summaries_wait_and_the_oldest_are_dropped(
    data_folder: Path, tmp_path: Path
) -> None:
    """Memory is bounded, what was dropped is counted, the rest arrives in order; each end is told once."""
    with RedisServer(data_folder) as server, capture_logs() as logs:
        bench = FeedBench(Place(server.url, timeout_s=0.5), tmp_path)
        where = Place(server.url, timeout_s=0.5)
        options = replace(SOON, bound=10, at_once=3)
        reporter = RedisReporter(lambda: open_redis(where), bench.fleet, "default", "w-1", options=options)
        reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
        wait_until(bench.store.workers, PATIENCE_S, "it is known")
        server.kill()
        reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
        wait_until(lambda: logs, PATIENCE_S, "it is noticed")
        for count in range(25):
            reporter.append([window(requests=count)])
        assert reporter.dropped == 15
        server.start()
        wait_until(lambda: len(bench.store.windows("digits")[0]) == 10, PATIENCE_S, "they have arrived")
        assert [each.requests for each in bench.store.windows("digits")[0]] == list(range(15, 25))
        reporter.close()
        bench.close()
    assert [line["event"] for line in logs] == ["reports_away", "reports_back"]


def test_in_memory_too_summaries_wait_and_the_oldest_are_dropped() -> None:
    """The twin keeps to the same bound."""
    store = MemoryControlStore(FakeClock())
    reporter = MemoryReporter(store, bound=2)
    store.away = True
    reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
    reporter.append([window(requests=count) for count in (1, 2, 3)])
    assert reporter.dropped == 1
    store.away = False
    reporter.append([window(requests=4)])
    assert [each.requests for each in store.windows("digits")[0]] == [2, 3, 4]


@pytest.mark.service
def test_summaries_that_are_refused_hold_up_no_heartbeat(
    redis_bench: FeedBench, redis_server: RedisServer
) -> None:
    """Somebody's key stands where a route's summaries go: the worker is listed all the same."""
    with redis_server.client() as client:
        client.set(f"{{{redis_bench.fleet}}}:reports:digits", "in the way")
        where = Place(redis_server.url)
        reporter = RedisReporter(lambda: open_redis(where), redis_bench.fleet, "default", "w-1", options=SOON)
        reporter.append([window()])
        for count in (1, 2):
            reporter.heartbeat(WorkerReport(worker="w-1", pool="default", head=Head(0, count)))
            wait_until(
                lambda n=count: [each.head.number for each in redis_bench.store.workers()] == [n],
                PATIENCE_S,
                "the report has arrived",
            )
        client.delete(f"{{{redis_bench.fleet}}}:reports:digits")
        wait_until(lambda: redis_bench.store.windows("digits")[0], PATIENCE_S, "they have arrived")
        client.set(f"{{{redis_bench.fleet}}}:reports:odd", "in the way")
        reporter.append([window(name="odd"), window(name="odd"), window(name="other")])
        wait_until(lambda: reporter.dropped == 2, PATIENCE_S, "what one route refuses is dropped")
        assert len(redis_bench.store.windows("other")[0]) == 1
        reporter.close()


@pytest.mark.service
def test_a_frozen_redis_does_not_hold_up_the_end_of_a_reporter(data_folder: Path, tmp_path: Path) -> None:
    """Closing ends within its bound; the registration expires by itself."""
    with RedisServer(data_folder) as server:
        bench = FeedBench(Place(server.url), tmp_path)
        where = Place(server.url, timeout_s=60.0)
        options = replace(SOON, close_s=0.2)
        reporter = RedisReporter(lambda: open_redis(where), bench.fleet, "default", "w-1", options=options)
        reporter.heartbeat(WorkerReport(worker="w-1", pool="default"))
        wait_until(bench.store.workers, PATIENCE_S, "it is known")
        server.pause()
        reporter.append([window()])
        reporter.close()
        server.resume()
        bench.close()
