"""Clients and ``inferfleet result`` where Redis is a cluster, or is found through sentinels."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from inferfleet import AsyncClient, Client, Result
from inferfleet.cli import cli
from inferfleet.config import load
from inferfleet.redis_access import place_of
from tests.contract.answering import Answerer, TopicSource
from tests.support.kafka_server import KafkaServer
from tests.support.redis_cluster import RedisCluster, RedisSentinel

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSentinel]:
    """A watched pair that these tests leave whole."""
    with RedisSentinel(tmp_path_factory.mktemp("sentinel")) as started:
        yield started


class Place(NamedTuple):
    """A configured folder with an answering stand-in behind it."""

    config: Path
    answerer: Answerer

    def run(self, *words: str) -> Any:
        return CliRunner().invoke(cli, ["--config", str(self.config), *words])


@pytest.fixture(params=["cluster-url", "cluster-nodes", "sentinel"])
def place(request: pytest.FixtureRequest, tmp_path: Path, kafka: KafkaServer, topic: Any) -> Iterator[Place]:
    if request.param == "sentinel":
        pair: RedisSentinel = request.getfixturevalue("redis_sentinel")
        said = f'mode = "sentinel"\nnodes = {json.dumps(pair.addresses)}\nsentinel_master = "{pair.NAME}"\n'
    else:
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        # A first node that nobody answers at is one of several.
        nodes = json.dumps(["127.0.0.1:1", *cluster.addresses])
        where = f'url = "{cluster.url}"\n' if request.param == "cluster-url" else f"nodes = {nodes}\n"
        said = f'mode = "cluster"\n{where}'
    fleet, source = f"test-{secrets.token_hex(4)}", topic("requests")
    config = tmp_path / "fleet.toml"
    kafka_said = f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
    config.write_text(f'[fleet]\nname = "{fleet}"\n{kafka_said}[redis]\n{said}')
    (tmp_path / "routes.toml").write_text(
        f'[[route]]\nname = "sums"\nsource = "kafka:{source}"\nresults = ["redis"]\n'
        'model = "sum"\nversion = "1"\n'
    )
    taking = TopicSource(kafka.bootstrap_servers, source, f"{fleet}.{source}")
    with Answerer(taking, place_of(load(config, {})), fleet, "sums") as answerer:
        yield Place(config, answerer)


def sums(results: list[Result]) -> list[float]:
    return [result.outputs["sum"].item() for result in results]


def test_both_clients_and_the_command_find_their_results(place: Place) -> None:
    """Replies come by the stream, values are read from their keys, and the command reads them too."""
    with Client(str(place.config)) as client:
        assert sums(list(client.map("sums", [{"x": [[float(n), 1.0]]} for n in range(50)]))) == [
            n + 1.0 for n in range(50)
        ]
        assert client.result(client.submit("sums", {"x": [[3.0]]}, id="first"), 30).ok

    async def ask() -> list[float]:
        async with AsyncClient(str(place.config)) as client:
            found = [await client.result("first", 10, route="sums")]
            found += [each async for each in client.map("sums", [{"x": [[float(n)]]} for n in range(50)])]
            return sums(found)

    assert asyncio.run(ask()) == [3.0, *map(float, range(50))]

    with Client(str(place.config), reply=False) as client:
        client.submit("sums", {"x": [[4.0]]}, id="second")
    done = place.run("result", "sums", "first", "second", "--follow", "--timeout", "20", "--json")
    assert done.exit_code == 0, done.output
    bodies = {line["id"]: line["body"] for line in map(json.loads, done.stdout.splitlines())}
    assert [bodies[name]["outputs"][0]["data"] for name in ("first", "second")] == [[3.0], [4.0]]


def test_a_redis_that_is_away_is_named_in_every_mode(place: Place) -> None:
    """One line that names the nodes, and no traceback."""
    text = place.config.read_text()
    where = 'nodes = ["127.0.0.1:1"]\n' if "nodes" in text else 'url = "redis://127.0.0.1:1"\n'
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(("nodes", "url"))]
    place.config.write_text("".join(kept) + where)
    done = place.run("result", "sums", "a")
    assert done.exit_code == 1
    assert "127.0.0.1:1 does not answer" in done.stderr
    assert len(done.stderr.splitlines()) == 1
