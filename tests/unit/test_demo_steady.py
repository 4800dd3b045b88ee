"""The traffic of the compose file: which requests it sends, at which rate, and how it judges what comes."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from inferfleet.client import Request, Result, SubmitError
from inferfleet.demo import steady
from inferfleet.errors import ConfigError


def line(name: str, data: list[Any], **labels: Any) -> str:
    tensor = {"name": name, "datatype": "BYTES", "shape": [1, 1], "data": data}
    return json.dumps({"body": {"inputs": [tensor]}, "label": labels}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(line("x", ["a0"], **{"1": 0}) + line("x", ["a1"], **{"1": 1}))
    (tmp_path / "b.jsonl").write_text(line("x", ["b0"], **{"1": "zero"}))
    return tmp_path


def answer(label: Any, version: str = "1") -> Result:
    datatype = "BYTES" if isinstance(label, str) else "INT64"
    output = {"name": "label", "datatype": datatype, "shape": [1, 1], "data": [label]}
    body = {"model_name": "m", "model_version": version, "id": "i", "outputs": [output]}
    return Result("i", "a", json.dumps(body).encode())


def test_routes_take_turns_and_each_goes_round(folder: Path) -> None:
    """Every sample goes to the route whose file it stands in."""
    found = list(islice(steady.read_samples(folder, ["a", "b"]), 5))

    assert [each.route for each in found] == ["a", "b", "a", "b", "a"]
    assert [json.loads(each.body)["inputs"][0]["data"][0] for each in found] == ["a0", "b0", "a1", "b0", "a0"]


def test_a_route_without_samples_is_named(folder: Path) -> None:
    """One line says which file is missing."""
    with pytest.raises(ConfigError, match=r"samples of route c: .*c\.jsonl: No such file"):
        next(steady.read_samples(folder, ["a", "c"]))


def test_answers_are_judged_by_the_version_that_gave_them(folder: Path) -> None:
    """Right, wrong, an error, a version that nobody knows, and what never arrived."""
    number, text = islice(steady.read_samples(folder, ["a", "b"]), 2)
    error = Result("i", "a", b'{"error": "no", "code": "E_SHAPE", "id": "i", "retryable": false}')
    tally = steady.Tally()
    came = [(number, answer(0)), (text, answer("zero")), (number, answer(5)), (number, answer(0, "9"))]
    for sample, outcome in [*came, (number, error), (number, SubmitError("gone", "i"))]:
        tally.sent()
        tally.came(sample, outcome)
    tally.sent()

    counts = {"right": 2, "wrong": 1, "unjudged": 1, "errors": 1, "undelivered": 1}
    assert tally.counts() == {"sent": 7, **counts, "in_flight": 1}


class Client:
    """Answers everything at once, but refuses the second request."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, route: str, request: Request, done: Any) -> str:
        self.sent.append((route, request.key))
        if len(self.sent) == 2:
            raise SubmitError("the queue stays full", "i")
        done(answer(0))
        return "i"


def test_a_request_that_is_not_taken_does_not_end_the_traffic(folder: Path) -> None:
    """It is logged and not counted; the next one is sent, with a key of its own."""
    client, tally = Client(), steady.Tally()
    samples = islice(steady.read_samples(folder, ["a"]), 3)

    steady.play(client, samples, 1000.0, tally, threading.Event())  # type: ignore[arg-type]

    assert client.sent == [("a", "key-0"), ("a", "key-1"), ("a", "key-2")]
    assert tally.counts() == {"sent": 2, "right": 2, "in_flight": 0}


def test_it_stops_when_it_is_told_to(folder: Path) -> None:
    """Nothing is sent after that."""
    stop = threading.Event()
    stop.set()
    client = Client()

    steady.play(client, steady.read_samples(folder, ["a"]), 0.001, steady.Tally(), stop)  # type: ignore[arg-type]

    assert client.sent == []
