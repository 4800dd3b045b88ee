"""A fleet on RabbitMQ for tests: routes over queues, requests sent by a plain client, answers read by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import Row, row_of, v2_body
from tests.support.rabbitmq_queues import Received
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

RETRY = """
import os, pathlib, time
import numpy as np

PRIME, START = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)

def checksums(rows):
    words = np.ascontiguousarray(rows, "<f4").view("<u4").astype(np.uint64)
    sums = np.full(len(rows), START, np.uint64)
    for column in range(words.shape[1]):
        sums = (sums ^ words[:, column]) * PRIME
    return (sums >> np.uint64(11)).astype(np.int64)

class Model:
    '''Rows that start with -999 fail for good, with -777 until the file `mended` stands, with -666 retryably
    until the file `there` stands; -555 ends the process; `broken` fails all.'''

    def load(self, folder, device, parameters):
        self.flags = pathlib.Path(parameters["flags"])
        self.sleep_s = parameters.get("sleep_s", 0)
        self.log = self.flags / "runs.log"

    def predict(self, tensors):
        x = tensors["x"]
        first = x[:, 0]
        with self.log.open("a") as file:
            file.write(" ".join(str(int(v)) for v in first) + "\\n")
        if (first == -555).any():
            os.abort()
        if (first == -999).any() or (first.any() and (self.flags / "broken").exists()):
            raise ValueError("poison")
        if (first == -777).any() and not (self.flags / "mended").exists():
            raise ValueError("not yet")
        if (first == -666).any() and not (self.flags / "there").exists():
            raise TimeoutError("what the model asks is away")
        if self.sleep_s and first.any():
            time.sleep(self.sleep_s)
        return {"check": np.stack([np.ones(len(x), np.int64), checksums(x)], axis=1)}
"""
"""A handler whose failures a test turns on and off by files in the folder ``flags``."""


def moody(fleet: Fleet, model: str = "moody", **parameters: object) -> None:
    """Add the handler above; its flags are files of the fleet's folder."""
    fleet.handler(RETRY, model, "1", flags=str(fleet.folder), **parameters)


class Queues:
    """The queues of one route, seen by a plain client."""

    def __init__(self, fleet: Fleet, server: RabbitServer, route: str) -> None:
        self.fleet = fleet
        self.server = server
        self.route = route
        self.source = f"{fleet.name}.{route}.requests"
        self.exchange = f"{fleet.name}.{route}"
        self.key = f"{fleet.name}.{route}.results"
        group = f"{fleet.name}.default"
        self.dead_letters = f"{self.source}.{group}.dlt"
        self.ready = f"{self.source}.{group}.retry.ready"

    @property
    def route_keys(self) -> dict[str, object]:
        """What the route's table says of them."""
        return {"source": f"rabbitmq:{self.source}", "results": [f"rabbitmq:{self.exchange}/{self.key}"]}

    def send(self, rows: Mapping[str, Row], **properties: Any) -> None:
        """Publish one request a row, named by ``message_id``; return once all are confirmed."""
        with self.server.channel() as channel:
            import pika

            for name, row in rows.items():
                given = pika.BasicProperties(delivery_mode=2, message_id=name, **properties)
                channel.basic_publish("", self.source, v2_body([row]), given, mandatory=True)

    def answers(self, count: int, timeout_s: float = 60.0) -> list[Received]:
        """Take ``count`` outcomes."""
        return self.server.take(self.key, count, timeout_s)

    def letters(self, count: int, timeout_s: float = 60.0) -> list[Received]:
        """Take ``count`` dead letters."""
        return self.server.take(self.dead_letters, count, timeout_s)

    def messages(self) -> int:
        """Return how many messages the source holds, taken ones too, as of some seconds ago."""
        found = {each["name"]: each["messages"] for each in self.server.list_queues("name", "messages")}
        return int(found.get(self.source, 0))

    def wait_empty(self, timeout_s: float = 30.0) -> None:
        """Return once nothing is ready or unacknowledged in the source."""

        def empty() -> bool:
            return self.messages() == 0

        wait_until(empty, timeout_s, f"{self.source} is empty", every_s=0.3)


def check_of(message: Received) -> tuple[int, ...]:
    """Return the checksum model's answer to one row."""
    return tuple(json.loads(message.body)["outputs"][0]["data"])


def id_of(message: Received) -> str:
    """Return the request id that an outcome carries."""
    return str(message.headers["inferfleet-id"])


def assert_right(rows: Mapping[str, Row], outcomes: Iterable[Received]) -> int:
    """Every request is answered, each by the answer to its own row; return how many copies there are."""
    seen: dict[str, list[Received]] = {}
    for message in outcomes:
        seen.setdefault(id_of(message), []).append(message)
    assert seen.keys() == rows.keys(), (len(seen), len(rows), sorted(rows.keys() - seen.keys())[:5])
    for name, copies in seen.items():
        assert {check_of(each) for each in copies} == {expected_checksum("1", rows[name])}, name
        assert len({each.body for each in copies}) == 1, name
    return sum(map(len, seen.values())) - len(seen)


def rows(stem: str, count: int, start: int = 1) -> dict[str, Row]:
    """Return ``count`` requests by id."""
    return {f"{stem}-{n}": row_of(n) for n in range(start, start + count)}


def special(value: float) -> Row:
    """Return a row that the handler above treats specially."""
    return (value, 1.0, 2.0, 3.0)


def codes(outcomes: Sequence[Received]) -> dict[str, str]:
    """Return the error code of each outcome by id, empty for answers."""
    return {id_of(each): str(each.headers.get("inferfleet-code", "")) for each in outcomes}
