"""Which adapters a worker has: routes that are added later may take from any broker that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from inferfleet.cli.adapters import Joined, Joining
from inferfleet.config import parse
from inferfleet.models.description import Batching
from inferfleet.routes import RouteTable, parse_routes
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.sources import Sources

CONFIG = parse(
    '[fleet]\nname = "f"\n[kafka]\nbootstrap_servers = "127.0.0.1:1"\n[rabbitmq]\nurl = "amqp://127.0.0.1:1/"\n'
    "[worker]\nid = 'w-1'\n[retry]\ndelays_ms = [1000, 2000]"
)


class Models:
    """Every version leaves its batching to the configuration."""

    def load(self, model: str, version: str) -> Any:
        raise AssertionError((model, version))

    def wishes(self, model: str, version: str) -> Batching:
        del model, version
        return Batching()


def table(source: str, *results: str) -> RouteTable:
    listed = ", ".join(f'"{each}"' for each in results)
    text = f'[[route]]\nname = "r"\nsource = "{source}"\nresults = [{listed}]\nmodel = "m"\nversion = "1"'
    return parse_routes(text, "f", "routes.toml")


@contextmanager
def joined(source: str, *results: str) -> Iterator[tuple[Joining, Joined, Sources]]:
    routes = table(source, *results).of_pool("default")
    joining = Joining(CONFIG, routes, Models(), SimpleQueue(), PrometheusMetrics(), FakeClock())
    made = joining.join()
    assert isinstance(made.intake, Sources)
    try:
        yield joining, made, made.intake
    finally:
        made.intake.close()
        made.outlet.close(0)
        made.close()


@pytest.mark.parametrize(
    ("source", "result", "later"),
    [
        ("kafka:in", "rabbitmq:x/y", "rabbitmq:queue"),
        ("rabbitmq:queue", "kafka:out", "in"),
        ("rabbitmq:queue", "kafka:out", "in.f.default.retry.1000"),
    ],
)
def test_a_broker_that_is_known_may_become_a_source(source: str, result: str, later: str) -> None:
    """Whatever a route that is added later takes from, there is an intake for it, the right one."""
    with joined(source, result) as (_, made, intake):
        assert made.brokers == {"kafka", "rabbitmq"}
        chosen = intake._of(later)
        expected = (
            intake._rabbitmq if ":" in later else intake._retries if "retry" in later else intake._kafka
        )
        assert chosen is expected is not None


def test_a_broker_that_no_route_names_has_no_adapter() -> None:
    """A worker connects to nothing that it does not need."""
    with joined("kafka:in", "kafka:out") as (_, made, intake):
        assert made.brokers == {"kafka"}
        assert intake._rabbitmq is None


def test_prefetch_follows_the_routes() -> None:
    """A batch more than the engines hold, by the routes as they were read last, for retries too."""
    with joined("rabbitmq:queue", "rabbitmq:/out") as (joining, made, intake):
        assert made.brokers == {"rabbitmq"}
        assert intake._kafka is None
        assert joining._prefetch("rabbitmq:queue") == 64 * 3
        assert joining._prefetch("rabbitmq:queue.f.default.retry.ready") == 64 * 3
        assert joining._delays == {
            "rabbitmq:queue": ["queue.f.default.retry.1000", "queue.f.default.retry.2000"]
        }
        joining.follow(table("rabbitmq:other", "rabbitmq:/out").of_pool("default"))
        assert joining._prefetch("rabbitmq:other") == 64 * 3
        assert list(joining._delays) == ["rabbitmq:other"]


FLEET = parse(
    '[fleet]\nname = "f"\n[kafka]\nbootstrap_servers = "127.0.0.1:1"\n[rabbitmq]\nurl = "amqp://127.0.0.1:1/"\n'
    "[redis]\nurl = 'redis://127.0.0.1:1/0'\n[worker]\nid = 'w-1'\n[routes]\nsource = 'fleet'"
)


def test_a_worker_of_the_control_plane_opens_a_broker_when_a_route_names_it() -> None:
    """It may start without any route; the first one works without a restart, whatever it names."""
    joining = Joining(FLEET, (), Models(), SimpleQueue(), PrometheusMetrics(), FakeClock())
    made = joining.join()
    assert isinstance(made.intake, Sources)
    assert made.brokers == frozenset()
    assert made.results is not None
    try:
        assert joining.open("kafka")
        assert made.intake._of("in") is made.intake._kafka is not None
        assert made.intake._of("in.f.default.retry.5000") is made.intake._retries is not None
        assert joining.open("rabbitmq")
        assert made.intake._of("rabbitmq:q") is made.intake._rabbitmq is not None
        assert made.outlet.pending() == 0
    finally:
        made.intake.close()
        made.outlet.close(0)
        made.results.close(0)
        if made.reporter is not None:
            made.reporter.close()
        made.pauses.close()
        made.close()


def test_a_worker_whose_routes_stand_in_a_file_is_joined_once() -> None:
    """What its routes named when it started; a restart is asked for then."""
    with joined("kafka:in", "kafka:out") as (joining, _, intake):
        assert not joining.open("rabbitmq")
        assert intake._rabbitmq is None
