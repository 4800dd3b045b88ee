"""The log of what the routes were, are and will be: revisions, its head, and what is kept of it.

A revision is one JSON document about one route; its hash is taken over the document's bytes as they are
stored, and the document names the hash of the one before. So a reader of an older or newer release checks
the chain without understanding every key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from inferfleet.errors import ConfigError
from inferfleet.routes import Route, RouteTable, plain_route, route_of

NO_HASH = "0" * 64


class Head(NamedTuple):
    """The end of a log: its epoch, its number of revisions, and the hash of the last one.

    The epoch rises when a person resets the log, and only then may a number come twice.
    """

    epoch: int = 0
    number: int = 0
    hash: str = NO_HASH


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one route. ``route`` is ``None`` where the change takes the route away.

    ``effective_from_ms`` is the routing time (epoch milliseconds) from which it is in force; ``None``
    announces what is to be loaded and routes nothing. ``horizon_ms`` is how far back the log is kept.
    ``rollout`` is the rollout that made it, or empty. ``body`` is the document as it is stored.
    """

    number: int
    epoch: int
    name: str
    route: Route | None
    effective_from_ms: int | None
    at_ms: int
    author: str
    action: str
    reason: str = ""
    rollout: str = ""
    horizon_ms: int = 3_600_000
    previous: str = NO_HASH
    body: bytes = b""

    @property
    def hash(self) -> str:
        """The SHA-256 of the stored document, as hexadecimal digits."""
        return hashlib.sha256(self.body).hexdigest()

    @property
    def head(self) -> Head:
        """The head of a log that ends with this revision."""
        return Head(self.epoch, self.number, self.hash)


class _Document(msgspec.Struct, kw_only=True):
    """A revision as it is stored; unknown keys are left alone, they belong to a newer release."""

    number: int
    epoch: int
    name: str
    route: dict[str, Any] | None
    effective_from_ms: int | None
    at_ms: int
    author: str
    action: str
    previous: str
    reason: str = ""
    rollout: str = ""
    horizon_ms: int = 3_600_000


def sealed(revision: Revision) -> Revision:
    """Return the revision with its ``body`` written from the rest."""
    plain = {key: getattr(revision, key) for key in _Document.__struct_fields__ if key != "route"} | {
        "route": None if revision.route is None else plain_route(revision.route)
    }
    return msgspec.structs.replace(revision, body=msgspec.json.encode(plain, order="sorted"))


def parse_revision(body: bytes, fleet: str) -> Revision:
    """Return the revision that a stored document says; raises ConfigError where it cannot be understood."""
    try:
        document = msgspec.json.decode(body, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"a revision of the route log cannot be read: {error}") from None
    origin = f"revision {document.number}"
    values = {key: getattr(document, key) for key in _Document.__struct_fields__}
    values["route"] = None if document.route is None else route_of(document.route, fleet, origin)
    return Revision(**values, body=body)


class RouteLog(NamedTuple):
    """What is kept of the log: by route, its revisions in order of their numbers, and the head of all.

    ``label`` names the whole to people: the head's number, or the hash of a routes file.
    """

    head: Head
    kept: Mapping[str, tuple[Revision, ...]]
    label: str

    def latest(self, name: str) -> int:
        """Return the number of a route's last revision; 0 where there is none."""
        revisions = self.kept.get(name, ())
        return revisions[-1].number if revisions else 0

    def table(self) -> RouteTable:
        """Return the routes as their newest revision with a time says, whatever that time is."""
        found = [self.newest(name) for name in sorted(self.kept)]
        routes = tuple(each.route for each in found if each is not None and each.route is not None)
        return RouteTable(self.label, routes)

    def newest(self, name: str) -> Revision | None:
        """Return a route's newest revision that is not an announcement."""
        timed = [each for each in self.kept.get(name, ()) if each.effective_from_ms is not None]
        return timed[-1] if timed else None

    def announced(self, name: str) -> Revision | None:
        """Return the announcement that waits at the end of a route's revisions, if one does."""
        revisions = self.kept.get(name, ())
        return revisions[-1] if revisions and revisions[-1].effective_from_ms is None else None


EMPTY_LOG = RouteLog(Head(), {}, "0")


def log_of_table(table: RouteTable) -> RouteLog:
    """Return the log of a routes file: each route has one revision, in force at any time."""
    kept = {
        route.name: (
            Revision(
                number=0,
                epoch=0,
                name=route.name,
                route=route,
                effective_from_ms=0,
                at_ms=0,
                author="",
                action="file",
            ),
        )
        for route in table.routes
    }
    return RouteLog(Head(0, 0, table.revision), kept, table.revision)
