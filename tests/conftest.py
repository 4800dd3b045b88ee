"""Fixtures that every test may use: real servers, started when the first test asks for one."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.redis_cluster import RedisCluster
from tests.support.servers import KafkaServer, MissingServerError, RabbitServer, RedisServer

# No test asserts a time, so no example has a deadline either: hypothesis gives each 200 ms unless it is told.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

TopicFactory = Callable[..., str]


@contextmanager
def _servers_or_skip() -> Iterator[None]:
    """Where a server cannot be had, skip on a laptop and fail where servers are required."""
    try:
        yield
    except MissingServerError as error:
        if os.environ.get("CI") == "true" or os.environ.get("INFERFLEET_TEST_REQUIRE_SERVERS") == "1":
            pytest.fail(f"a required server is missing: {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """Apply the rule to servers that fixtures start."""
    with _servers_or_skip():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Apply the rule to servers that tests start by themselves."""
    with _servers_or_skip():
        return (yield)


_IDLE_THREADS = ("pytest_timeout", "asyncio-portal", "AnyIO worker")
"""Of pytest's timer, and of schemathesis, which keeps its loop until the process ends."""


@pytest.fixture(scope="module", autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """What a module's tests start ends with them: threads that live on disturb whoever comes next."""
    before = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.name.startswith(_IDLE_THREADS)
    ]
    for thread in left:
        thread.join(10.0)
    names = [thread.name for thread in left if thread.is_alive()]
    assert not names, f"threads that these tests have left: {names}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have measured, by ``record_property``."""
    figures = [
        (name, value)
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("figures")
        for name, value in sorted(figures):
            terminalreporter.write_line(f"{name:<24} {value}")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A Kafka broker shared by the whole run; use ``topic`` for names of your own."""
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    with server:
        yield server


@pytest.fixture(scope="session")
def secure_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A Kafka broker with SASL_SSL that denies what no rule allows; its users are alice, bob and worker."""
    users = {"alice": "alice-secret", "bob": "bob-secret", "worker": "worker-secret"}
    server = KafkaServer(tmp_path_factory.mktemp("secure-kafka"), sasl_ssl=True, users=users)
    with server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis shared by the whole run; use keys of your own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    with server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A Redis cluster of three masters shared by the whole run; use keys of your own."""
    with RedisCluster(tmp_path_factory.mktemp("redis-cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ node shared by the whole run; use queue names of your own."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    with server:
        yield server


@pytest.fixture
def topic(kafka: KafkaServer) -> TopicFactory:
    """Create topics with names that no other test has: ``topic("requests", partitions=6) -> name``."""
    run = secrets.token_hex(4)
    numbers = itertools.count(1)

    def create(stem: str = "topic", *, partitions: int = 1, **config: str) -> str:
        name = f"{stem}.{run}.{next(numbers)}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        kafka.create_topics({name: partitions}, config=settings)
        return name

    return create


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """An empty folder for a server that one test starts, stops or breaks by itself."""
    return tmp_path / "server"
