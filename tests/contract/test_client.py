"""Both clients against real brokers and a real Redis: the same rules, asked through one face."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest

from inferfleet import AsyncClient, Client, Request, Result, ResultTimeout, SubmitError
from inferfleet.client import DuplicateIdError
from inferfleet.errors import ConfigError
from inferfleet.wire.stored import reply_key, result_key
from tests.contract.answering import Answerer, QueueSource, Source, TopicSource
from tests.support.rabbitmq_server import RabbitServer
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


class Face(Protocol):
    """What both clients do, without await."""

    def submit(self, route: str, inputs: Any, **options: Any) -> str: ...
    def result(self, request_id: str, timeout: float = ..., *, route: str | None = ...) -> Result: ...
    def map(self, route: str, items: Any, **options: Any) -> list[Result]: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Threaded:
    """The threaded client."""

    def __init__(self, **options: Any) -> None:
        self.client = Client(**options)
        self.submit, self.result, self.flush = self.client.submit, self.client.result, self.client.flush
        self.close = self.client.close

    def map(self, route: str, items: Any, **options: Any) -> list[Result]:
        return list(self.client.map(route, items, **options))


class Awaited:
    """The asyncio client on a loop of its own thread."""

    def __init__(self, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.client = AsyncClient(**options)
        self._closed = False

    def _wait(self, awaitable: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(60)

    def submit(self, route: str, inputs: Any, **options: Any) -> str:
        return self._wait(self.client.submit(route, inputs, **options))

    def result(self, request_id: str, timeout: float = 30, *, route: str | None = None) -> Result:
        return self._wait(self.client.result(request_id, timeout, route=route))

    def map(self, route: str, items: Any, **options: Any) -> list[Result]:
        async def collect() -> list[Result]:
            return [result async for result in self.client.map(route, items, **options)]

        return self._wait(collect())

    def flush(self) -> None:
        self._wait(self.client.flush())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._wait(self.client.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


class Fleet(NamedTuple):
    """Servers, an answering stand-in, and a way to make clients that are closed in the end."""

    make: Callable[..., Any]
    answerer: Answerer
    name: str
    missing: str
    redis: RedisServer


@pytest.fixture(params=["kafka", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    """Where requests go."""
    return str(request.param)


@pytest.fixture(params=[Threaded, Awaited], ids=["sync", "async"])
def fleet(
    request: pytest.FixtureRequest, broker: str, redis_server: RedisServer, topic: Any
) -> Iterator[Fleet]:
    name = f"test-{secrets.token_hex(4)}"
    made: list[Face] = []
    options: dict[str, Any] = {"redis_url": redis_server.url, "fleet": name}
    source: Source
    if broker == "kafka":
        bootstrap = request.getfixturevalue("kafka").bootstrap_servers
        requests = topic("requests", partitions=2)
        source = TopicSource(bootstrap, requests, f"{name}.{requests}")
        options |= {"bootstrap_servers": bootstrap, "routes": {"sums": requests}}
        missing = "no.such.topic"
    else:
        rabbitmq: RabbitServer = request.getfixturevalue("rabbitmq")
        rabbitmq.declare(f"{name}.requests")
        source = QueueSource(rabbitmq.url, f"{name}.requests")
        options |= {"rabbitmq_url": rabbitmq.url, "routes": {"sums": f"rabbitmq:{name}.requests"}}
        missing = "rabbitmq:no.such.queue"

    def make(**changes: Any) -> Face:
        made.append(request.param(**(options | changes)))
        return made[-1]

    with Answerer(source, redis_server.url, name, "sums") as answerer:
        yield Fleet(make, answerer, name, missing, redis_server)
        for client in made:
            client.close()


def rows(*values: float) -> dict[str, Any]:
    """One row, as FP32."""
    return {"x": np.array([values], np.float32)}


def test_a_submitted_request_is_answered(fleet: Fleet) -> None:
    """Inputs go out as V2 JSON, the result comes back with outputs as arrays."""
    client = fleet.make()
    request_id = client.submit("sums", rows(1, 2, 3), key="k")
    result = client.result(request_id, 30)
    assert (result.id, result.route, result.ok, result.status) == (request_id, "sums", True, "ok")
    assert result.model_version == "1"
    np.testing.assert_array_equal(result.outputs["sum"], np.array([[6]], np.float32))
    assert len(request_id) == 32


def test_lists_bytes_documents_and_binary_tensors_are_all_requests(fleet: Fleet) -> None:
    """Every form of a body reaches the topic and is answered alike."""
    client = fleet.make()
    document = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}
    ids = [
        client.submit("sums", {"x": [[1.0, 2.0]]}),
        client.submit("sums", document),
        client.submit("sums", b'{"x": [1, 2]}'),
        client.submit("sums", rows(1, 2), binary=True),
    ]
    assert [client.result(each).outputs["sum"].item() for each in ids] == [3.0] * 4


def test_what_is_said_beside_the_inputs_becomes_headers(fleet: Fleet) -> None:
    """Id, deadline, priority and own headers travel under the contract's names."""
    client = fleet.make()
    options = {"deadline_ms": 4_102_444_800_000, "priority": 2, "headers": {"X-Tenant": "a"}}
    client.result(client.submit("sums", rows(1), id="order-1", **options))
    (headers,) = fleet.answerer.seen
    assert headers["inferfleet-id"] == b"order-1"
    assert headers["inferfleet-deadline-ms"] == b"4102444800000"
    assert headers["inferfleet-priority"] == b"2"
    assert headers["x-tenant"] == b"a"
    assert headers["inferfleet-reply"].startswith(b"c-")


def test_an_error_outcome_is_a_result(fleet: Fleet) -> None:
    """The caller reads the code; ``checked`` turns it into an exception for those who prefer that."""
    client = fleet.make()
    result = client.result(client.submit("sums", rows(-1), id="bad"))
    assert (result.ok, result.status, result.code, result.error) == (
        False,
        "error",
        "E_MODEL",
        "a row holds -1",
    )
    assert result.outputs == {}
    with pytest.raises(Exception, match="request bad: E_MODEL: a row holds -1"):
        result.checked()


def test_map_keeps_the_order_of_its_items(fleet: Fleet) -> None:
    """Results come in the order of the items, each the right one for its own input."""
    client = fleet.make()
    results = client.map("sums", [rows(n, 1) for n in range(300)], max_in_flight=32)
    assert [result.outputs["sum"].item() for result in results] == [n + 1 for n in range(300)]


def test_map_in_order_of_arrival_yields_each_once(fleet: Fleet) -> None:
    """Nothing is lost or doubled; ready requests keep their own ids."""
    client = fleet.make()
    items = [Request(rows(n), id=f"m-{n}") for n in range(200)]
    results = client.map("sums", items, max_in_flight=16, ordered=False)
    assert {result.id: result.outputs["sum"].item() for result in results} == {
        f"m-{n}": float(n) for n in range(200)
    }
    assert len(results) == 200


def test_a_result_that_does_not_come_names_its_id(fleet: Fleet) -> None:
    """Waiting ends with the time that was given, and asking again later succeeds."""
    client = fleet.make()
    fleet.answerer.held.set()
    request_id = client.submit("sums", rows(1), id="slow-1")
    with pytest.raises(ResultTimeout, match="slow-1") as raised:
        client.result(request_id, 0.3)
    assert raised.value.id == "slow-1"
    with pytest.raises(ResultTimeout):
        client.map("sums", [rows(2)], timeout=0.3)
    fleet.answerer.held.clear()
    assert client.result(request_id, 30).ok


def test_an_answer_from_before_is_found_by_anybody(fleet: Fleet) -> None:
    """Another client reads a result by route and id, while it comes and long after."""
    first, second = fleet.make(), fleet.make()
    first.submit("sums", rows(4, 5), id="shared")
    assert second.result("shared", 30, route="sums").outputs["sum"].item() == 9
    assert second.result("shared", 5).outputs["sum"].item() == 9
    assert first.result("shared", 30).outputs["sum"].item() == 9


def test_the_same_payload_again_gets_the_first_answer(fleet: Fleet) -> None:
    """Sending twice is harmless; nobody needs to answer the second for its sender to be served."""
    first, second = fleet.make(), fleet.make()
    first.result(first.submit("sums", rows(7), id="twice"))
    fleet.answerer.held.set()
    assert second.result(second.submit("sums", rows(7), id="twice"), 30).outputs["sum"].item() == 7
    fleet.answerer.held.clear()


def test_another_payload_under_an_answered_id_is_told_so(fleet: Fleet) -> None:
    """Its client hears E_DUP_ID, never the answer to somebody else's payload."""
    first, second = fleet.make(), fleet.make()
    first.result(first.submit("sums", rows(7), id="taken"))
    result = second.result(second.submit("sums", rows(8), id="taken"), 30)
    assert (result.status, result.code) == ("error", "E_DUP_ID")
    assert first.result("taken").outputs["sum"].item() == 7


def test_another_payload_is_told_so_even_if_no_reply_comes(fleet: Fleet) -> None:
    """When the time is up, a foreign answer that stands is E_DUP_ID and not a timeout."""
    first, second = fleet.make(), fleet.make()
    first.result(first.submit("sums", rows(7), id="taken"))
    fleet.answerer.held.set()
    result = second.result(second.submit("sums", rows(8), id="taken"), 0.5)
    assert (result.status, result.code) == ("error", "E_DUP_ID")
    fleet.answerer.held.clear()


def test_another_payload_in_flight_is_refused_at_once(fleet: Fleet) -> None:
    """One client cannot wait for two payloads under one id."""
    client = fleet.make()
    fleet.answerer.held.set()
    client.submit("sums", rows(1), id="one")
    assert client.submit("sums", rows(1), id="one") == "one"
    with pytest.raises(DuplicateIdError, match="E_DUP_ID: id one"):
        client.submit("sums", rows(2), id="one")
    fleet.answerer.held.clear()
    assert client.result("one", 30).outputs["sum"].item() == 1


def test_a_fixed_payload_is_answered_after_an_error(fleet: Fleet) -> None:
    """An error under the id is not taken for the answer of the next attempt."""
    client = fleet.make()
    assert client.result(client.submit("sums", rows(-1), id="fix"), 30).code == "E_MODEL"
    assert client.result(client.submit("sums", rows(3), id="fix"), 30).outputs["sum"].item() == 3


def test_a_missing_source_is_an_exception_that_names_it(fleet: Fleet) -> None:
    """What was not delivered is told to who waits, and to the next flush."""
    client = fleet.make(routes={"sums": fleet.missing})
    request_id = client.submit("sums", rows(1), id="lost")
    with pytest.raises(SubmitError, match=r"request lost: (topic|queue) no\.such\."):
        client.result(request_id, 30)
    with pytest.raises(SubmitError, match=r"no\.such\."):
        client.flush()


def test_wrong_use_is_named(fleet: Fleet) -> None:
    """An unknown route, an id nobody may use, a relative deadline, a priority out of range."""
    client = fleet.make()
    with pytest.raises(ConfigError, match='no route is named "sum"; did you mean "sums"'):
        client.submit("sum", rows(1))
    with pytest.raises(ValueError, match="brace"):
        client.submit("sums", rows(1), id="{x}")
    with pytest.raises(ValueError, match="epoch milliseconds"):
        client.submit("sums", rows(1), deadline_ms=500)
    with pytest.raises(ValueError, match="priority"):
        client.submit("sums", rows(1), priority=0)
    with pytest.raises(ValueError, match="input x"):
        client.submit("sums", {"x": np.array([1j])})


def test_close_ends_every_thread_and_removes_the_reply_stream(fleet: Fleet) -> None:
    """After close nothing of the client is left, in the process or in Redis."""
    before = set(threading.enumerate())
    client = fleet.make()
    client.result(client.submit("sums", rows(1)))
    reply = fleet.answerer.seen[-1]["inferfleet-reply"].decode()
    client.close()
    wait_until(lambda: set(threading.enumerate()) <= before, 10, "the client's threads have ended")
    with fleet.redis.client() as redis:
        assert redis.exists(reply_key(fleet.name, reply)) == 0
        assert redis.exists(result_key(fleet.name, "sums", "x")) == 0


def test_a_trimmed_reply_is_found_where_it_stands(fleet: Fleet) -> None:
    """A reply that was lost from the stream costs time, not the result."""
    client = fleet.make()
    fleet.answerer.held.set()
    request_id = client.submit("sums", rows(5))
    client.flush()
    with fleet.redis.client() as redis:
        body = redis.get(result_key(fleet.name, "sums", request_id))
        assert body is None
        fleet.answerer.held.clear()
        wait_until(lambda: redis.get(result_key(fleet.name, "sums", request_id)), 30, "the result stands")
        redis.delete(*redis.keys(f"{fleet.name}:reply:*") or ["none"])
    assert client.result(request_id, 30).outputs["sum"].item() == 5


def test_without_a_reply_stream_results_are_looked_for(fleet: Fleet) -> None:
    """``reply=False`` asks for no replies; ids are then waited for at their keys."""
    client = fleet.make(reply=False)
    request_id = client.submit("sums", rows(1, 1))
    assert client.result(request_id, 30).outputs["sum"].item() == 2
    assert "inferfleet-reply" not in fleet.answerer.seen[-1]
