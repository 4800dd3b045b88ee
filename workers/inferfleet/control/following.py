"""One turn of following the route log in Redis: what is new, and whether it may be adopted.

News come as entries of the stream and are appended to what is held. Only what does not continue it (a first
look, a trimmed stream, another epoch, a store that was restored) makes a whole log be read.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inferfleet.control.keys import Keys
from inferfleet.control.logbook import (
    Run,
    chain_entry,
    decode_head,
    parser,
    read_link,
    split_bodies,
)
from inferfleet.core.revisions import Adoption, adoption, appended
from inferfleet.errors import ConfigError, ControlError
from inferfleet.revisions import EMPTY_LOG, Head, Revision, RouteLog

READS = 20
MANY = 1_000
"""More than one change brings, so that what was written as a whole is adopted as a whole."""
GOOD = (Adoption.SAME, Adoption.NEWER)


class Follower:
    """Holds one worker's log and brings it up to date; ``log`` may be set before the first turn.

    ``offered`` is the head that the store showed last. ``troubles`` says for each route whose revisions
    cannot be understood what is wrong: such a route stays as it was, the others go on.
    """

    def __init__(self, run: Run, fleet: str) -> None:
        self._run = run
        self._keys = Keys(fleet)
        self.parse = parser(fleet)
        self.log = EMPTY_LOG
        self.offered = Head()
        self.troubles: dict[str, str] = {}
        self._verdict: Adoption | None = None

    def __repr__(self) -> str:
        return f"Follower(number={self.log.head.number}, verdict={self._verdict})"

    def turn(self, block_s: float) -> Adoption:
        """Wait up to ``block_s`` for news, take them, and return what the store's log is to ours.

        While the store's log is refused, nothing is waited for. Raises what redis-py raises, and
        ControlError for a log that is not whole.
        """
        entries: list[Any] = []
        if block_s > 0 and self._verdict in GOOD:
            entries = self._news(block_s)
        if not entries or not self._continued(entries):
            self._verdict = self._look()
        return self._verdict or Adoption.SAME

    def _news(self, block_s: float) -> list[Any]:
        words = ("XREAD", "COUNT", MANY, "BLOCK", max(1, round(block_s * 1000)), "STREAMS")
        found = self._run(*words, self._keys.revisions, f"{self.log.head.number}-0")
        return found[0][1] if found else []

    def _continued(self, entries: list[Any]) -> bool:
        """Append entries to the log if they continue it; else nothing of them is taken."""
        revisions: list[Revision] = []
        head = self.log.head
        for entry in entries:
            number, digest, body = chain_entry(*entry)
            try:
                revision = self.parse(body)
            except ConfigError:
                return False  # a whole look says which route it is
            if (
                revision.previous != head.hash
                or revision.epoch != head.epoch
                or revision.number != number
                or revision.hash != digest
                or revision.name in self.troubles
            ):
                return False
            revisions.append(revision)
            head = revision.head
        self.log = appended(self.log, revisions)
        self.offered, self._verdict = head, Adoption.SAME
        return True

    def _look(self) -> Adoption:
        """Compare the store's head with ours; read the whole log where it may be adopted and is newer."""
        own = self.log.head
        for _ in range(READS):
            document = self._run("GET", self._keys.head)
            found = self.offered = Head() if document is None else decode_head(document).head
            link = read_link(self._run, self._keys, own.number) if found.number > own.number else None
            verdict = adoption(own, found, link)
            if verdict is not Adoption.NEWER:
                return verdict
            fields = self._run("HGETALL", self._keys.routes)
            if self._run("GET", self._keys.head) == document:
                self._adopt(found, fields)
                return Adoption.NEWER
        raise ControlError("the route log changes faster than it can be read")

    def _adopt(self, head: Head, fields: dict[bytes, bytes]) -> None:
        kept: dict[str, tuple[Revision, ...]] = {}
        troubles: dict[str, str] = {}
        newest = 0
        for field, value in fields.items():
            name = field.decode()
            bodies = split_bodies(value)
            newest = max(newest, _number(bodies[-1]))
            try:
                kept[name] = tuple(self.parse(body) for body in bodies)
            except ConfigError as error:
                troubles[name] = f"route {name}: {error}; it stays as it was"
                if name in self.log.kept:
                    kept[name] = self.log.kept[name]
        if newest != head.number:
            raise ControlError(f"the routes end at revision {newest} and the log at {head.number}")
        self.log, self.troubles = RouteLog(head, kept, str(head.number)), troubles


def refusal(verdict: Adoption, own: Head, found: Head) -> str:
    """Return in one line why a log is not adopted; empty where it is."""
    epochs = own.epoch != found.epoch
    if verdict is Adoption.OLDER:
        return (
            f"the store offers the older {_said(found, epochs)} while {_said(own, epochs)} is held; "
            "only a reset goes back"
        )
    if verdict is Adoption.FORKED:
        return (
            f"the store's {_said(found, epochs)} does not continue {_said(own, epochs)} that is held; "
            "only a reset goes on from here"
        )
    return ""


def _said(head: Head, epochs: bool) -> str:
    return f"revision {head.number}" + (f" of epoch {head.epoch}" if epochs else "")


class _Number(msgspec.Struct):
    number: int = 0


def _number(body: bytes) -> int:
    try:
        return msgspec.json.decode(body, type=_Number).number
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
