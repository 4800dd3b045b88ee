"""The keys of log lines: each with the type that it has in every line, and its place in Elastic's schema.

One name means one thing and has one type, or an index that holds the lines would refuse some of them. A unit
test holds all calls of loggers to this table; the reference prints it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Type: TypeAlias = Literal["keyword", "text", "long", "double", "boolean"]
"""Types as Elasticsearch calls them; a ``keyword`` may be a list of them."""

ECS_VERSION = "8.11.0"
NAMESPACE = "inferfleet"
"""The object that holds what Elastic's schema has no name for."""


class Key(NamedTuple):
    """A key of a log line: its type, and its dotted name in Elastic's schema, ``""`` if it has none there."""

    type: Type
    ecs: str = ""

    def name(self, key: str) -> str:
        """Return the dotted name of ``key`` in an ECS line."""
        return self.ecs or f"{NAMESPACE}.{key}"


_KEYWORD, _TEXT, _LONG, _DOUBLE = Key("keyword"), Key("text"), Key("long"), Key("double")

# Which process, and in what: in every line.
CONTEXT: dict[str, Key] = {
    "fleet": _KEYWORD,
    "service": Key("keyword", "service.name"),
    "node": Key("keyword", "service.node.name"),
    "release": Key("keyword", "service.version"),
    "pid": Key("long", "process.pid"),
}

# What an event is about.
SUBJECT: dict[str, Key] = {
    "route": _KEYWORD,
    "routes": _KEYWORD,
    "revision": _KEYWORD,
    "model": _KEYWORD,
    "version": _KEYWORD,
    "versions": _KEYWORD,
    "shadow": _KEYWORD,
    "batch": _LONG,
    "trace_id": Key("keyword", "trace.id"),
    "span_id": Key("keyword", "span.id"),
    "rollout": _KEYWORD,
    "phase": _KEYWORD,
    "pool": _KEYWORD,
    "group": _KEYWORD,
    "holder": _KEYWORD,
    "document": _KEYWORD,
    "ids": _KEYWORD,
}

# What went wrong, and how much of it.
TROUBLE: dict[str, Key] = {
    "error": Key("text", "error.message"),
    "kind": Key("keyword", "error.type"),
    "code": Key("keyword", "error.code"),
    "exception": Key("text", "error.stack_trace"),
    "reason": Key("keyword", "event.reason"),
    "fault": _KEYWORD,
    "fatal": Key("boolean"),
    "mend": _TEXT,
    "kept": _KEYWORD,
    "of": _KEYWORD,
    "suppressed": _LONG,
    "suppressed_requests": _LONG,
    "requests": _LONG,
    "suspects": _LONG,
}

# Where, and with whom.
PLACE: dict[str, Key] = {
    "topic": _KEYWORD,
    "partitions": _KEYWORD,
    "partition_count": _LONG,
    "owned": _LONG,
    "queue": _KEYWORD,
    "exchange": _KEYWORD,
    "destination": _KEYWORD,
    "channel": _LONG,
    "broker": _KEYWORD,
    "bootstrap_servers": _KEYWORD,
    "redis": _KEYWORD,
    "use": _KEYWORD,
    "reader": _KEYWORD,
    "address": _KEYWORD,
    "admin": _KEYWORD,
    "access": _KEYWORD,
    "by": _KEYWORD,
    "peer": _KEYWORD,
    "method": Key("keyword", "http.request.method"),
    "path": Key("keyword", "url.path"),
    "status": Key("long", "http.response.status_code"),
    "operation": _KEYWORD,
    "file": Key("keyword", "file.path"),
    "thread": Key("keyword", "process.thread.name"),
    "signal": _KEYWORD,
    "logger": Key("keyword", "log.logger"),
}

# How many, how much, how long.
AMOUNT: dict[str, Key] = {
    "records": _LONG,
    "streams": _LONG,
    "messages": _LONG,
    "envelopes": _LONG,
    "out": _LONG,
    "open": _LONG,
    "still_running": _LONG,
    "given_back": _LONG,
    "unconfirmed": _LONG,
    "lost": _LONG,
    "lost_by_route": _KEYWORD,
    "checked": _LONG,
    "tries": _LONG,
    "term": _LONG,
    "callers": _LONG,
    "limit": _LONG,
    "needed": _LONG,
    "bound": _LONG,
    "max_bytes": _LONG,
    "percent": _DOUBLE,
    "rate": _DOUBLE,
    "seconds": _DOUBLE,
    "after_s": _DOUBLE,
    "away_s": _DOUBLE,
    "pause_s": _DOUBLE,
    "next_try_s": _DOUBLE,
    "seconds_left": _DOUBLE,
    "drain_timeout_s": _DOUBLE,
}

KEYS: dict[str, Key] = {**CONTEXT, **SUBJECT, **TROUBLE, **PLACE, **AMOUNT}
"""Every key but ``timestamp``, ``level`` and ``event``, which each line has."""
