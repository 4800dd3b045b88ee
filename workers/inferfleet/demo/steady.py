"""``python -m inferfleet.demo.steady``: a steady stream of requests to a fleet, each answer compared.

Plays the files that ``inferfleet.demo.seed`` wrote, one line after the other and the routes in turn, at a
rate of its own whatever comes back, and says every ten seconds what came. It ends on SIGTERM, or after
``--count``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import click
import structlog

from inferfleet.client import Client, ClientError, Request, Result
from inferfleet.client.outcome import Outcome
from inferfleet.config import load
from inferfleet.errors import ConfigError, InferfleetError
from inferfleet.patience import Patience
from inferfleet.route_reader import read_routes
from inferfleet.telemetry.logs import configure

log = structlog.get_logger(__name__)

MOST_IN_FLIGHT = 5_000
"""Above it nothing is sent: a fleet that is away gets no mountain of requests from a demonstration."""
SAY_EVERY_S = 10.0
KEYS = 1_000


class Sample(NamedTuple):
    """A V2 body and the label that each version gives it outside of a fleet."""

    route: str
    body: bytes
    labels: dict[str, object]


class Tally:
    """Counts what came of the requests; the client's threads add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def sent(self) -> None:
        """One more was sent."""
        self._add("sent")

    def came(self, sample: Sample, outcome: Outcome) -> None:
        """Judge what came back: right, wrong, an error outcome, or none in time."""
        if not isinstance(outcome, Result):
            self._add("undelivered")
        elif not outcome.ok:
            self._add("errors")
        elif str(outcome.model_version) not in sample.labels:
            self._add("unjudged")
        else:
            said = outcome.outputs["label"].reshape(-1)[0]
            said = said.decode() if isinstance(said, bytes) else said
            self._add("right" if said == sample.labels[str(outcome.model_version)] else "wrong")

    def counts(self) -> dict[str, int]:
        """Return what has been counted, and how many have not come back yet."""
        with self._lock:
            found = dict(self._counts)
        back = sum(count for name, count in found.items() if name != "sent")
        return found | {"in_flight": found.get("sent", 0) - back}

    def _add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def read_samples(folder: Path, routes: Sequence[str]) -> Iterator[Sample]:
    """Yield the routes' samples in turn, for ever; raises ConfigError for a route without a file."""
    turns = []
    for route in routes:
        try:
            lines = (folder / f"{route}.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"samples of route {route}: {error.filename}: {error.strerror}") from None
        told = [json.loads(line) for line in lines]
        samples = [Sample(route, json.dumps(each["body"]).encode(), each["label"]) for each in told]
        turns.append(cycle(samples))
    for turn in cycle(turns):
        yield next(turn)


def play(client: Client, samples: Iterator[Sample], rate: float, tally: Tally, stop: threading.Event) -> None:
    """Send the samples at ``rate`` a second until they end or ``stop`` is set; late ones follow at once."""
    began = said = time.monotonic()
    for number, sample in enumerate(samples):
        due = began + number / rate
        while not stop.is_set() and tally.counts()["in_flight"] >= MOST_IN_FLIGHT:
            stop.wait(0.1)
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            log.info("traffic", **tally.counts())
        try:
            client.send(
                sample.route,
                Request(sample.body, key=f"key-{number % KEYS}"),
                lambda outcome, sample=sample: tally.came(sample, outcome),  # type: ignore[misc]
            )
            tally.sent()
        except ClientError as error:
            log.warning("not_sent", route=sample.route, error=str(error))
            stop.wait(1.0)


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="As for `inferfleet`.")
@click.option("--samples", "folder", type=click.Path(path_type=Path), required=True, help="Files of samples.")
@click.option("--routes", default="digits,text", show_default=True, help="Names with commas between them.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=20.0, show_default=True)
@click.option("--count", type=click.IntRange(min=1), help="End after so many; else on SIGTERM.")
@click.option("--wait", "wait_s", type=float, default=0.0, help="Seconds that the routes may take to appear.")
def main(
    config: Path | None, folder: Path, routes: str, rate: float, count: int | None, wait_s: float
) -> None:
    """Send samples to a fleet at a steady rate, and compare every answer."""
    settings = load(config, os.environ)
    configure(settings.log.format, settings.log.level, secrets=settings.secrets)
    names = routes.split(",")
    try:
        Patience(wait_s).until(
            "waiting_for_routes", lambda: [read_routes(settings).named(name) for name in names]
        )
        samples = read_samples(folder, names)
        samples = islice(samples, count) if count else samples
        stop, tally = threading.Event(), Tally()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with Client(settings) as client:
            log.info("traffic_begins", routes=names, rate=rate)
            play(client, samples, rate, tally, stop)
            _finish(tally)
    except InferfleetError as error:
        raise click.ClickException(" ".join(str(error).split())) from error


def _finish(tally: Tally) -> None:
    """Give what is in flight five seconds, and say how it all ended."""
    ends_at = time.monotonic() + 5.0
    while tally.counts()["in_flight"] and time.monotonic() < ends_at:
        time.sleep(0.05)
    log.info("traffic_ended", **tally.counts())


if __name__ == "__main__":
    main()
