"""A client's Redis goes away while results are waited for: the wait goes on, and ends in its own time."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferfleet import AsyncClient, Client, ResultTimeout
from tests.contract.answering import Answerer, TopicSource
from tests.support.kafka_server import KafkaServer
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
ROUTE = "sums"


def rows(value: float) -> dict[str, Any]:
    return {"x": np.array([[value]], np.float32)}


def taking(kafka: KafkaServer, topic: str, fleet: str) -> TopicSource:
    return TopicSource(kafka.bootstrap_servers, topic, f"{fleet}.{topic}")


def options(kafka: KafkaServer, redis: RedisServer, topic: str, fleet: str) -> dict[str, Any]:
    return {
        "bootstrap_servers": kafka.bootstrap_servers,
        "redis_url": redis.url,
        "fleet": fleet,
        "routes": {ROUTE: topic},
    }


def test_waiting_goes_on_after_redis_was_killed(kafka: KafkaServer, data_folder: Path, topic: Any) -> None:
    """Requests submitted before and during the outage are answered after it; a short wait names Redis."""
    source, fleet = topic("requests"), f"test-{secrets.token_hex(4)}"
    with RedisServer(data_folder) as redis:
        answering = Answerer(taking(kafka, source, fleet), redis.url, fleet, ROUTE)
        with answering, Client(**options(kafka, redis, source, fleet)) as client:
            assert client.result(client.submit(ROUTE, rows(0)), 30).ok
            redis.kill()
            ids = [client.submit(ROUTE, rows(n)) for n in range(100)]
            with pytest.raises(ResultTimeout, match=f"Redis at {redis.url} does not answer"):
                client.result(ids[0], 0.5)
            redis.start()
            answers = [client.result(each, 30).outputs["sum"].item() for each in ids]
            assert answers == list(range(100))


def test_the_asyncio_client_waits_through_an_outage_too(
    kafka: KafkaServer, data_folder: Path, topic: Any
) -> None:
    """The loop stays free while Redis is frozen, and results come after it."""
    source, fleet = topic("requests"), f"test-{secrets.token_hex(4)}"

    async def run(redis: RedisServer) -> list[float]:
        async with AsyncClient(**options(kafka, redis, source, fleet)) as client:
            assert (await client.result(await client.submit(ROUTE, rows(0)), 30)).ok
            redis.pause()
            ids = [await client.submit(ROUTE, rows(n)) for n in range(100)]
            waiting = [asyncio.create_task(client.result(each, 60)) for each in ids]
            with pytest.raises(ResultTimeout):
                await client.result(ids[0], 0.2)
            redis.resume()
            return [(await each).outputs["sum"].item() for each in waiting]

    with (
        RedisServer(data_folder) as redis,
        Answerer(taking(kafka, source, fleet), redis.url, fleet, ROUTE),
    ):
        assert asyncio.run(run(redis)) == list(range(100))


def test_close_ends_in_time_while_redis_is_frozen(kafka: KafkaServer, data_folder: Path, topic: Any) -> None:
    """A read that nobody answers ends with its own time limit, and so does the client's thread."""
    source, fleet = topic("requests"), f"test-{secrets.token_hex(4)}"
    with RedisServer(data_folder) as redis:
        client = Client(**options(kafka, redis, source, fleet))
        client.submit(ROUTE, rows(0))
        wait_until(lambda: client._reader is not None, 5, "the reader runs")
        redis.pause()
        client.close()
        assert client._reader is not None
        assert not client._reader.is_alive()
        redis.resume()
