"""``inferfleet submit`` and ``result`` as a shell uses them, against a real Kafka and a real Redis."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from inferfleet.cli import cli
from inferfleet.models.repository import Repository
from tests.contract.answering import Answerer, TopicSource
from tests.support.kafka_server import KafkaServer
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.service

MODEL = """
runtime = "python"
file = "model.py"
entry_point = "model:Model"
[[input]]
name = "x"
datatype = "FP32"
shape = [-1]
[[output]]
name = "sum"
datatype = "FP32"
shape = [1]
"""


class Place(NamedTuple):
    """A configured folder with an answering stand-in behind it."""

    folder: Path
    answerer: Answerer

    def run(self, *words: str, text: str = "") -> Result:
        return CliRunner().invoke(cli, ["--config", str(self.folder / "fleet.toml"), *words], input=text)


@pytest.fixture
def place(tmp_path: Path, kafka: KafkaServer, redis_server: RedisServer, topic: Any) -> Iterator[Place]:
    fleet, source = f"test-{secrets.token_hex(4)}", topic("requests")
    (tmp_path / "fleet.toml").write_text(
        f'[fleet]\nname = "{fleet}"\n[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
        f'[redis]\nurl = "{redis_server.url}"\n'
    )
    (tmp_path / "routes.toml").write_text(
        f'[[route]]\nname = "sums"\nsource = "kafka:{source}"\nresults = ["redis"]\n'
        'model = "sum"\nversion = "1"\n'
        f'[[route]]\nname = "topic-only"\nsource = "kafka:{source}.2"\nresults = ["kafka:{source}.out"]\n'
        'model = "sum"\nversion = "1"\n'
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "model.py").write_text("class Model: ...\n")
    Repository(tmp_path / "models").add("sum", "1", [tmp_path / "model.py"], settings=MODEL)
    taking = TopicSource(kafka.bootstrap_servers, source, f"{fleet}.{source}")
    with Answerer(taking, redis_server.url, fleet, "sums") as answerer:
        yield Place(tmp_path, answerer)


def line(id_: str | None, body: object, **more: object) -> str:
    named = {} if id_ is None else {"id": id_}
    return json.dumps({**named, "body": body, **more}) + "\n"


def test_lines_are_sent_and_their_results_printed(place: Place) -> None:
    """One JSON line a result on standard output, and a summary beside it; later they can be read again."""
    text = line("a", {"x": [1, 2]}, key="k", headers={"x-tenant": "t"}) + "\n" + line("b", {"x": [-1]})
    text += line("c", '{"x": [5]}')
    done = place.run("submit", "sums", "-", "--wait", text=text)
    assert done.exit_code == 0, done.output
    results = {found["id"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert {id_: found["status"] for id_, found in results.items()} == {"a": "ok", "b": "error", "c": "ok"}
    assert results["a"]["body"]["outputs"][0]["data"] == [3.0]
    assert "sent 3, answered 3 (2 ok, 1 error)" in done.stderr
    assert place.answerer.seen[0]["x-tenant"] == b"t"

    read = place.run("result", "sums", "a", "b", "--json")
    assert [json.loads(found)["id"] for found in read.stdout.splitlines()] == ["a", "b"]
    assert place.run("result", "sums", "c").stdout.startswith("c  ok  {")


def test_a_file_is_sent_without_waiting(place: Place) -> None:
    """Without --wait no reply is asked for; --json lists the ids, and result --follow waits for them."""
    raw = base64.b64encode(b'{"x": [4]}').decode()
    (place.folder / "requests.jsonl").write_text(
        line(None, {"x": [1]}) + json.dumps({"id": "raw", "body_base64": raw})
    )
    done = place.run("submit", "sums", str(place.folder / "requests.jsonl"), "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["sent"] == 2
    assert said["ids"][1] == "raw"
    followed = place.run("result", "sums", *said["ids"], "--follow", "--timeout", "30", "--json")
    assert followed.exit_code == 0, followed.output
    assert {json.loads(found)["status"] for found in followed.stdout.splitlines()} == {"ok"}
    assert all("inferfleet-reply" not in headers for headers in place.answerer.seen)


def test_samples_fit_the_models_signature(place: Place) -> None:
    """--sample makes requests that the model accepts, the same ones for the same seed."""
    first = place.run("submit", "sums", "--sample", "20", "--seed", "1", "--wait")
    assert first.exit_code == 0, first.output
    again = place.run("submit", "sums", "--sample", "20", "--seed", "1", "--wait")
    answers = [
        sorted(json.loads(found)["body"]["outputs"][0]["data"][0] for found in run.stdout.splitlines())
        for run in (first, again)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("not json", "standard input, line 2: "),
        ('{"id": "x"}', 'line 2: a request needs "body"'),
        ('{"body": {}, "ID": "x"}', "line 2: Object contains unknown field `ID`"),
        ('{"body": {}, "id": "a b"}', "line 2: the request id holds a control character, a space or a brace"),
        ('{"body_base64": "*"}', "line 2: body_base64"),
    ],
)
def test_a_bad_line_is_named(place: Place, bad: str, said: str) -> None:
    """The error says where, and how many were sent before."""
    done = place.run("submit", "sums", "-", text=line("a", {"x": [1]}) + bad + "\n")
    assert done.exit_code == 1
    assert said in done.stderr
    assert "(sent before that: 1)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wrong_use_is_told(place: Place) -> None:
    """Exit code 2 for what cannot be meant, 1 for what does not exist; one line that names it."""
    assert place.run("submit", "sums").exit_code == 2
    assert place.run("submit", "sums", "-", "--sample", "3").exit_code == 2
    unknown = place.run("submit", "sum", "--sample", "1")
    assert unknown.exit_code == 1
    assert 'no route is named "sum"' in unknown.stderr
    without = place.run("submit", "topic-only", "--sample", "1", "--wait")
    assert without.exit_code == 1
    assert 'route "topic-only" keeps no results in Redis' in without.stderr


def test_what_does_not_come_is_named(place: Place) -> None:
    """A missing result is exit code 1 and its id, for both verbs."""
    place.answerer.held.set()
    waited = place.run("submit", "sums", "-", "--wait", "--timeout", "0.3", text=line("late", {"x": [1]}))
    assert waited.exit_code == 1
    assert "1 of 1 results did not come within 0.3 s, the first is late;" in waited.stderr
    read = place.run("result", "sums", "late", "--timeout", "0.1")
    assert read.exit_code == 1
    assert "no result of late on route sums" in read.stderr
    place.answerer.held.clear()


def test_a_redis_that_is_away_is_named(place: Place) -> None:
    """One line with the address, without its password."""
    text = (place.folder / "fleet.toml").read_text()
    (place.folder / "fleet.toml").write_text(
        text.split("url = ")[0] + 'url = "redis://u:secret@127.0.0.1:1/0"\n'
    )
    done = place.run("result", "sums", "a")
    assert done.exit_code == 1
    assert "Redis at redis://127.0.0.1:1/0 does not answer" in done.stderr
    assert "secret" not in done.stderr
