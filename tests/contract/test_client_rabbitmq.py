"""What clients do on RabbitMQ that they do not on Kafka; the common rules are in ``test_client``."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result

from inferfleet import AsyncClient, Client, ResultTimeout, SubmitError
from inferfleet.cli import cli
from tests.contract.answering import Answerer, QueueSource
from tests.support.rabbitmq_server import RabbitServer
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.service
AWAY = "redis://127.0.0.1:1/0"


def rows(*values: float) -> dict[str, Any]:
    return {"x": np.array([values], np.float32)}


class Place(NamedTuple):
    """A configured folder with two routes, one of which answers to ``reply`` alone, each with a queue."""

    folder: Path
    rabbitmq: RabbitServer
    fleet: str

    @property
    def config(self) -> Path:
        return self.folder / "fleet.toml"

    def queue(self, route: str) -> str:
        return f"{self.fleet}.{route}.requests"

    def write(self, redis: str, **rabbitmq: object) -> None:
        """Write the settings; ``rabbitmq`` are keys of its section."""
        keys = {"url": self.rabbitmq.url} | rabbitmq
        self.config.write_text(
            f'[fleet]\nname = "{self.fleet}"\n[redis]\nurl = "{redis}"\n[rabbitmq]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        )

    def answering(self, redis: str, route: str) -> Answerer:
        return Answerer(QueueSource(self.rabbitmq.url, self.queue(route)), redis, self.fleet, route)

    def run(self, *words: str, text: str = "") -> Result:
        return CliRunner().invoke(cli, ["--config", str(self.config), *words], input=text)


@pytest.fixture
def place(tmp_path: Path, rabbitmq: RabbitServer) -> Iterator[Place]:
    found = Place(tmp_path, rabbitmq, f"test-{secrets.token_hex(4)}")
    (tmp_path / "routes.toml").write_text(
        "".join(
            f'[[route]]\nname = "{name}"\nsource = "rabbitmq:{found.queue(name)}"\nresults = ["{result}"]\n'
            'model = "sum"\nversion = "1"\n'
            for name, result in (("stored", "redis"), ("called", "reply"))
        )
    )
    found.write(AWAY)
    rabbitmq.declare(found.queue("stored"), found.queue("called"))
    yield found
    rabbitmq.delete_queue(found.queue("stored"), found.queue("called"))


def test_a_message_is_persistent_and_carries_what_a_record_does(place: Place) -> None:
    """Id, key, headers and content type stand where the contract says; the message outlives a restart."""
    with Client(place.config, reply=False) as client:
        client.submit("stored", rows(1, 2), id="order-1", key=b"k\xff", priority=2, headers={"X-Tenant": "a"})
        client.submit("stored", rows(3), id="order-2", key="bob", binary=True)
    plain, binary = place.rabbitmq.take(place.queue("stored"), 2)

    assert plain.headers == {
        "inferfleet-id": "order-1",
        "inferfleet-key": bytearray(b"k\xff"),
        "inferfleet-priority": "2",
        "x-tenant": "a",
    }
    assert (plain.properties.delivery_mode, plain.properties.message_id) == (2, "order-1")
    assert plain.properties.content_type == "application/json"
    assert plain.properties.reply_to is None
    assert json.loads(plain.body)["inputs"][0]["data"] == [1.0, 2.0]
    assert binary.properties.content_type == binary.headers["content-type"] == "application/octet-stream"
    assert binary.headers["inferfleet-key"] == "bob"


def test_both_clients_are_answered_on_a_queue_of_their_own(place: Place, redis_server: RedisServer) -> None:
    """A route that answers to ``reply`` needs no Redis, and its requests name no reply stream."""

    async def ask() -> list[float]:
        async with AsyncClient(place.config) as client:
            found = [each async for each in client.map("called", [rows(n, 1) for n in range(50)])]
            return [each.outputs["sum"].item() for each in found]

    with place.answering(redis_server.url, "called") as answerer:
        with Client(place.config) as client:
            ids = [client.submit("called", rows(n, 1)) for n in range(50)]
            assert [client.result(each, 20).outputs["sum"].item() for each in ids] == [
                n + 1 for n in range(50)
            ]
            assert client.result(client.submit("called", rows(-1))).code == "E_MODEL"
            answerer.held.set()
            with pytest.raises(ResultTimeout):
                client.result(client.submit("called", rows(1)), 0.2)
            answerer.held.clear()
            with pytest.raises(ValueError, match="answers to the client that submitted"):
                client.result("somebody-else", 1, route="called")
        assert asyncio.run(ask()) == [n + 1 for n in range(50)]
    assert all("inferfleet-reply" not in headers for headers in answerer.seen)
    assert answerer.taken[0].properties.correlation_id == ids[0]
    assert answerer.taken[0].properties.reply_to.startswith("amq.gen-")


def test_a_connection_that_breaks_costs_no_request(place: Place, redis_server: RedisServer) -> None:
    """What was not confirmed is sent again over a new connection, perhaps twice, and answered once."""
    place.write(redis_server.url)
    with Client(place.config, reply=False) as client:
        breaking = threading.Thread(target=place.rabbitmq.close_connections)
        breaking.start()
        ids: list[str] = []
        while breaking.is_alive():
            ids += [client.submit("stored", rows(len(ids) + n)) for n in range(50)]
            client.flush()
    with place.answering(redis_server.url, "stored"), Client(place.config, reply=False) as client:
        found = [client.result(each, 30, route="stored").outputs["sum"].item() for each in ids]
    assert found == list(range(len(ids)))


def test_a_broker_that_is_away_is_named_within_the_time(place: Place) -> None:
    """The request's failure says where it was looked for, in one line and without the password."""
    place.write(AWAY, url="amqp://u:secret@127.0.0.1:1/", publish_timeout_s=0.5)
    client = Client(place.config, reply=False)
    client.submit("stored", rows(1), id="lost")
    with pytest.raises(SubmitError, match=r"request lost: .*127\.0\.0\.1:1/ does not answer") as raised:
        client.flush()
    client.close()
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_refused_login_is_told_at_once(place: Place) -> None:
    """Nobody waits for what only a person can mend."""
    place.write(AWAY, username="nobody", password="wrong", publish_timeout_s=60)
    started_at = time.monotonic()
    with Client(place.config, reply=False) as client:
        client.submit("stored", rows(1), id="lost")
        with pytest.raises(SubmitError, match="refused the login; check username and password"):
            client.flush()
    assert time.monotonic() - started_at < 20


def test_a_full_queue_refuses(place: Place) -> None:
    """What the queue's own bound refuses is an exception, not a loss."""
    full = f"{place.fleet}.full"
    place.rabbitmq.declare(full, x_max_length=1, x_overflow="reject-publish")

    def fill(client: Client) -> None:
        # The queue tells publishers that it is full a little after it is.
        for number in range(200):
            client.submit("stored", rows(number), topic=f"rabbitmq:{full}")
            client.flush()

    refused = pytest.raises(SubmitError, match=f"queue {full} did not take it; it is full")
    with Client(place.config, reply=False) as client, refused:
        fill(client)
    place.rabbitmq.delete_queue(full)


def test_submit_speaks_to_queues(place: Place, redis_server: RedisServer) -> None:
    """The verb waits for results by Redis or by reply, and names a queue that does not exist."""
    place.write(redis_server.url)
    text = json.dumps({"id": "a", "body": {"x": [1, 2]}}) + "\n"
    for route in ("stored", "called"):
        with place.answering(redis_server.url, route):
            done = place.run("submit", route, "-", "--wait", text=text)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["body"]["outputs"][0]["data"] == [3.0]
        assert "sent 1, answered 1 (1 ok, 0 error)" in done.stderr

    place.rabbitmq.delete_queue(place.queue("stored"))
    missing = place.run("submit", "stored", "-", text=text)
    assert missing.exit_code == 1
    assert f"request a: queue {place.queue('stored')} does not exist" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
