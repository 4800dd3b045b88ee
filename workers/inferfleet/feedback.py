"""What is told of answers after they were given: which variant answered a request, and how good that was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from inferfleet.routes import Destination

ACCURACY = "accuracy"
"""The metric that is computed here: whether the label is the class that the answer gave most weight."""

FIRST = "*"
"""Asks for the classes of an answer's first output, whatever its name."""


class Answered(NamedTuple):
    """One request that a version has answered, as its outcome says.

    ``unit`` is the request's key: requests of one unit share their fate, so they count as a cluster.
    ``classes`` is the largest class of each row, empty for an error outcome, ``None`` where nobody asked.
    """

    id: str
    version: str
    variant: str
    unit: bytes
    at_ms: int
    classes: tuple[int, ...] | None = None


class Label(NamedTuple):
    """What was found out about one request: named numbers, and its true class (one for each row) if known."""

    id: str
    at_ms: int
    values: Mapping[str, float]
    classes: tuple[int, ...] | None = None


class Feedback(NamedTuple):
    """What a feed has brought since it was last asked.

    ``caught_up`` says that nothing waits any more of what had been there the last time. ``unread`` counts
    messages that are no labels.
    """

    answers: list[Answered]
    labels: list[Label]
    caught_up: bool
    unread: int = 0


class Sought(NamedTuple):
    """What a rollout wants to hear: labels from ``source``, about a route's answers from a time on.

    ``answers`` is the topic that the outcomes are read from. Only those of ``versions`` count, from revision
    ``since_revision`` on. ``output`` names the output whose largest entry is a row's class; empty:
    classes are not wanted. ``reader`` names whoever reads, such as the rollout.
    """

    source: Destination
    answers: Destination
    route: str
    versions: frozenset[str]
    since_revision: int
    since_ms: int
    output: str = ""
    reader: str = ""


class Measured(NamedTuple):
    """One value of a metric for one request of a version."""

    version: str
    variant: str
    metric: str
    unit: bytes
    value: float
