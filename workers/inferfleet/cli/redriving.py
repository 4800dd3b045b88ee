"""A redrive on either broker, and what is said of it."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import click

from inferfleet.cli.letters import Choice
from inferfleet.cli.pace import Pace
from inferfleet.config import Config
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.naming import READY, dead_letter_name, retry_addresses, retry_name
from inferfleet.routes import Route

_SHOWN = 20


class Broker(Protocol):
    """Where the letters of one route are, and the way back to its workers."""

    refused: dict[str, str]

    def choose(self, choice: Choice, now_ms: int) -> str:
        """Let ``choice`` count what it takes; return in words what was looked at."""

    def send(self, choice: Choice, now_ms: int, pace: Pace, told: Callable[[int], None]) -> int:
        """Send what ``choice`` takes and return how many went."""


class Run:
    """One redrive of a route: choose, then send. ``to`` is the topic or queue that the letters go to."""

    def __init__(self, route: Route, to: str, broker: Broker) -> None:
        self.to = to
        self._route = route
        self._broker = broker
        self._seen = ""

    @property
    def refused(self) -> dict[str, str]:
        """Why letters could not go, by place."""
        return self._broker.refused

    def choose(self, choice: Choice, now_ms: int) -> None:
        """Look at the letters; raises BrokerError where one that was named is not there."""
        self._seen = self._broker.choose(choice, now_ms)
        if choice.missing:
            raise BrokerError(f"there is no letter {', '.join(choice.missing[:5])} among {self._seen}")

    def send(self, choice: Choice, now_ms: int, pace: Pace) -> int:
        """Send what ``choice`` takes and return how many went; on a terminal it says how far it is."""
        shown = sys.stderr.isatty()

        def told(count: int) -> None:
            if shown:
                click.echo(f"\rsent {count} of {choice.limit}", nl=False, err=True)

        try:
            return self._broker.send(choice, now_ms, pace, told)
        finally:
            if shown:
                click.echo(err=True)

    def plan(self, choice: Choice) -> list[str]:
        """Return in lines what goes and what does not."""
        skipped = choice.skipped
        total = choice.chosen.total()
        lines = [f"{total} of {self._seen} go to {self.to}{_by_code(choice.chosen)}"]
        if skipped["redriven"]:
            lines.append(f"not sent: {skipped['redriven']} that were redriven before")
        if skipped["caller"]:
            lines.append(
                f"not sent: {skipped['caller']} whose caller is at fault{_by_code(choice.caller_codes)}; "
                "a --code or a PLACE sends them"
            )
        if skipped["late"]:
            lines.append(f"not sent: {skipped['late']} whose deadline has passed; a PLACE sends them")
        lines += [
            f"not sent: {place} was cut, its request is not there any more" for place in choice.cut[:_SHOWN]
        ]
        if len(choice.cut) > _SHOWN:
            lines.append(f"not sent: {len(choice.cut) - _SHOWN} more that were cut")
        if skipped["over"]:
            lines.append(f"not sent: {skipped['over']} over the limit of {choice.limit}")
        return lines

    def as_plain(self, choice: Choice, sent: int, *, dry_run: bool) -> dict[str, Any]:
        """Return what was done, or would be, as JSON has it."""
        names = ("redriven", "caller", "late", "over")
        return {
            "route": self._route.name,
            "to": self.to,
            "dry_run": dry_run,
            "sent": 0 if dry_run else sent,
            "chosen": choice.chosen.total(),
            "codes": dict(choice.chosen),
            "skipped": {name: choice.skipped[name] for name in names},
            "cut": choice.cut,
            "refused": self.refused,
        }


def _by_code(counts: Counter[str]) -> str:
    said = ", ".join(f"{code} {count}" for code, count in counts.most_common())
    return f" ({said})" if said else ""


@contextlib.contextmanager
def redriving(config: Config, route: Route) -> Iterator[Run]:
    """Yield a run for a route. Raises ConfigError where it has no retry topic or queue."""
    if not retry_addresses(config, route):
        raise ConfigError(_no_way(route))
    letters = dead_letter_name(config, route)
    if route.source.kind == "rabbitmq":
        # Straight to where delayed retries come out: there is nothing to wait for, and one message that
        # waits in a delay queue would hold up all behind it.
        ready = retry_name(config, route, READY)
        yield Run(route, ready, _Queues(config, letters, ready))
        return
    topics = _Topics(config, route, letters, retry_name(config, route, config.retry.delays_ms[0]))
    try:
        yield Run(route, topics.to, topics)
    finally:
        topics.close()


def _no_way(route: Route) -> str:
    if route.order == "key":
        return (
            f'route "{route.name}" keeps order = "key" and so has no retry topics; '
            f"`inferfleet dlt show {route.name} PLACE --raw` gives the bytes to send by hand"
        )
    return (
        "[retry] delays_ms is empty, so there is no retry topic to redrive through; give it one delay, "
        "then `inferfleet topics plan --apply`, and restart the workers"
    )


class _Queues:
    """The queues of a RabbitMQ route."""

    def __init__(self, config: Config, letters: str, ready: str) -> None:
        from inferfleet.cli.dead_queue import DeadQueue

        self._queue = DeadQueue(config, letters)
        self._ready = ready
        self.refused = self._queue.refused

    def choose(self, choice: Choice, now_ms: int) -> str:
        """Look at what may be held at a time."""
        self._queue.choose(choice, now_ms)
        return self._queue.seen

    def send(self, choice: Choice, now_ms: int, pace: Pace, told: Callable[[int], None]) -> int:
        """Move the letters."""
        return self._queue.redrive(choice, self._ready, now_ms, pace, told)


class _Topics:
    """The topics of a Kafka route."""

    def __init__(self, config: Config, route: Route, letters: str, retry: str) -> None:
        from inferfleet.cli.deadletters import DeadLetters, Found
        from inferfleet.cli.kafka import Cluster

        self.to = retry
        self.refused: dict[str, str] = {}
        self._config = config
        self._route = route
        self._cluster = Cluster(config)
        self._letters = DeadLetters(self._cluster, config.group_of(route.pool), letters)
        self._found = Found([], {})

    def choose(self, choice: Choice, now_ms: int) -> str:
        """Look at the whole topic."""
        if self.to not in self._cluster.topics():
            raise BrokerError(
                f"topic {self.to} does not exist or may not be seen by this user; "
                "`inferfleet topics plan` prints how to create it and who needs which right"
            )
        self._found = self._letters.choose(choice, now_ms)
        return f"{self._found.letters} letters in {self._letters.topic}"

    def send(self, choice: Choice, now_ms: int, pace: Pace, told: Callable[[int], None]) -> int:
        """Send what was chosen before: offsets stay where they are."""
        del choice, now_ms
        from inferfleet.cli.redrive import Redrive

        redrive = Redrive(self._config, self._route, self._letters, self.to)
        self.refused = redrive.refused
        try:
            return redrive.send(self._found, pace, told)
        finally:
            redrive.close()

    def close(self) -> None:
        """Close every connection."""
        self._cluster.close()
