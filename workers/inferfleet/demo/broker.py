"""What the demo needs to know of the broker that it runs on; all the rest of it is the same on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Request


class Wires(Protocol):
    """A plain client of the broker: sends and collects on one thread, and writes both into a tally."""

    def send(self, requests: Iterable[Request]) -> None:
        """Send requests and return when the broker has them all."""

    def collect(self, seconds: float) -> int:
        """Take the answers that arrive within ``seconds``; returns how many came."""

    def unsettled(self) -> list[str]:
        """Return where workers have requests to settle yet; if nowhere, nothing comes any more, nor again."""

    def unread(self) -> list[str]:
        """Return where outcomes wait that were not collected yet."""

    def close(self) -> None:
        """Give the connections back."""


class Broker(Protocol):
    """A broker that is up and answers."""

    @property
    def title(self) -> str:
        """Which broker it is and where it listens."""

    @property
    def settings(self) -> str:
        """Its part of ``fleet.toml``."""

    def source(self, route: str) -> str:
        """Return where a route's requests are taken from, as ``routes.toml`` says it."""

    def results(self, route: str) -> str:
        """Return where a route's outcomes go, as ``routes.toml`` says it."""

    def declare(self, fleet_toml: Path, also: Sequence[str] = ()) -> None:
        """Make everything that the routes need, as ``inferfleet topics plan`` names it; workers never do.

        ``also`` names topics of the demo's own, which only Kafka has.
        """

    def wires(self, routes: Sequence[str], tally: Tally) -> Wires:
        """Connect the demo's own client for these routes."""

    def takeover(self, victim: str) -> str:
        """Say how the others come to what a killed worker held."""

    def looks(self) -> list[str]:
        """Return command lines that show outcomes of the route ``digits``."""

    def asks(self, body: str) -> list[str]:
        """Return command lines that send ``body``, JSON without a single quote, to the route ``digits``."""
