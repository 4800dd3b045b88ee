"""What workers tell of a version's answers: windows of counts and sketches that can be added up.

A window is one worker's view of one variant (or shadow) of a route, under one revision, for some seconds.
Adding windows in any order and grouping gives the same sums, so the coordinator needs no metrics system.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from inferfleet.records import Array

SCALE = 16
"""Buckets for each doubling: bounds are 2^(i/16), 4.4 % apart (an exponential histogram of scale 4 in
OpenTelemetry's and Prometheus' terms)."""


class Histogram(msgspec.Struct):
    """Counts of positive values in exponential buckets; ``zero`` counts those that are 0 or below.

    Bucket ``i`` holds values above 2^((i-1)/16) up to 2^(i/16).
    """

    zero: int = 0
    buckets: dict[int, int] = {}
    total: float = 0.0

    def __len__(self) -> int:
        """Return how many values were added."""
        return self.zero + sum(self.buckets.values())

    def add(self, values: Array) -> None:
        """Add finite values."""
        values = np.asarray(values, dtype=np.float64).ravel()
        positive = values[values > 0]
        self.zero += len(values) - len(positive)
        self.total += float(positive.sum())
        if len(positive):
            found, counts = np.unique(
                np.ceil(np.log2(positive) * SCALE - 1e-9).astype(np.int64), return_counts=True
            )
            for bucket, count in zip(found.tolist(), counts.tolist(), strict=True):
                self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def add_same(self, value: float, count: int) -> None:
        """Add one finite value ``count`` times."""
        if value <= 0:
            self.zero += count
            return
        bucket = math.ceil(math.log2(value) * SCALE - 1e-9)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.total += value * count

    def merge(self, other: Histogram) -> None:
        """Add what another one holds."""
        self.zero += other.zero
        self.total += other.total
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def quantile(self, share: float) -> float:
        """Return the upper bound of the bucket that holds the quantile; 0 where nothing was added."""
        wanted = share * len(self)
        seen = self.zero
        if wanted <= seen:
            return 0.0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted - 1e-9:
                return float(2.0 ** (bucket / SCALE))
        return 0.0

    def above(self, value: float) -> int:
        """Return how many values lie in buckets that start at or above ``value``."""
        if value <= 0:
            return sum(self.buckets.values())
        first = math.ceil(math.log2(value) * SCALE - 1e-9)
        return sum(count for bucket, count in self.buckets.items() if bucket > first)


class Clustered(msgspec.Struct):
    """Events among trials that come in clusters (batches, keys), with what their true variance needs.

    Members of a cluster share their fate, so a proportion's variance is that between clusters: the ratio
    estimator's, from sums over clusters of trials, events, their squares and their products (Cochran,
    Sampling Techniques, section 6.3 and 9A).
    """

    clusters: int = 0
    trials: float = 0
    events: float = 0
    trials_2: float = 0
    events_2: float = 0
    product: float = 0

    def add(self, trials: float, events: float) -> None:
        """Add one cluster."""
        self.clusters += 1
        self.trials += trials
        self.events += events
        self.trials_2 += trials * trials
        self.events_2 += events * events
        self.product += trials * events

    def merge(self, other: Clustered) -> None:
        """Add what another one holds."""
        self.clusters += other.clusters
        self.trials += other.trials
        self.events += other.events
        self.trials_2 += other.trials_2
        self.events_2 += other.events_2
        self.product += other.product

    @property
    def share(self) -> float:
        """Events for each trial; 0 without trials."""
        return self.events / self.trials if self.trials else 0.0


class Example(msgspec.Struct):
    """One pair whose answers differ much: the request's id, how far apart, and both answers in short."""

    id: str
    distance: float
    primary: str
    shadow: str


class Verdicts(NamedTuple):
    """How many pairs were found to be how far apart."""

    identical: int
    close: int
    different: int

    def since(self, before: Verdicts) -> Verdicts:
        """Return what came after ``before``."""
        return Verdicts(*(now - then for now, then in zip(self, before, strict=True)))


class Comparison(msgspec.Struct):
    """How a shadow's answers compare with the answering version's, over pairs of one kind of output.

    A pair is one row of a request that both have answered. ``kind`` is ``labels``, ``probabilities``,
    ``embeddings``, ``regression`` or ``text``. ``identical``, ``close`` and ``different`` sum to ``pairs``;
    ``nonfinite`` counts pairs in which just one is not finite. ``flips`` counts changes from one label to
    another, written ``a>b``, ``agreed`` the labels that both gave; ``hard_flips`` are changes with a margin
    above 0.1. ``signed`` is the sum of signed differences and ``signed_2`` of their squares; ``reference``
    and ``reference_2`` are the same of the primary's values, ``above`` and ``below`` hold the sizes of those
    that are positive (or 0) and negative. ``distances`` holds the kind's own distance: 0 or 1, total
    variation, 1 - cosine, absolute difference, 1 - token F1. ``ratios`` holds the shadow's norm or length
    over the primary's. ``spoiled`` counts texts that were not empty (or were JSON) and are not so from the
    shadow, ``mended`` the reverse. With labels known, ``right_wrong`` and ``wrong_right`` count the
    discordant pairs of McNemar's test; without, the answering version's repetition stands for the label.
    """

    kind: str = ""
    pairs: int = 0
    identical: int = 0
    close: int = 0
    different: int = 0
    nonfinite: int = 0
    label_changes: int = 0
    hard_flips: int = 0
    right_wrong: int = 0
    wrong_right: int = 0
    spoiled: int = 0
    mended: int = 0
    signed: float = 0.0
    signed_2: float = 0.0
    reference: float = 0.0
    reference_2: float = 0.0
    flips: dict[str, int] = {}
    agreed: dict[str, int] = {}
    distances: Histogram = msgspec.field(default_factory=Histogram)
    ratios: Histogram = msgspec.field(default_factory=Histogram)
    above: Histogram = msgspec.field(default_factory=Histogram)
    below: Histogram = msgspec.field(default_factory=Histogram)
    examples: list[Example] = []

    @property
    def verdicts(self) -> Verdicts:
        """How far apart the pairs so far were."""
        return Verdicts(self.identical, self.close, self.different)


class Window(msgspec.Struct, kw_only=True):
    """One worker's counts for one variant or shadow of a route, from ``start_ms`` to ``end_ms`` (epoch ms).

    ``role`` is ``primary`` or ``shadow``. ``first_seen`` counts keys that this worker took for the first time
    under the revision, answered or not yet, for the sample-ratio check; ``first_seen_full`` says that it has
    met more keys than it can tell apart, and counts no more of them in any arm. ``failures`` are first
    attempts that failed by the model's or our fault, by batch; ``codes`` counts every outcome. ``compute``
    holds seconds of model time for each request, ``latency`` seconds from the request's timestamp to its
    confirmed outcome. Shadows add ``seen`` (requests wished for), ``shed`` (dropped, for the primary goes
    first), ``comparison`` and ``secondary`` (the primary against its own repetition); detached ones
    ``unmatched`` (no outcome of the primary was found in time) and ``primary_errors`` (it was an error).
    ``crash`` says that the worker's last life ended without being asked to; ``fallbacks`` counts records
    answered by the stable version because theirs was gone. ``bad_ms`` is the time of the first and last
    failed outcome. ``key_groups`` holds, where a route has several variants, for each group of keys
    (:func:`inferfleet.core.routing.key_group`) its first attempts and the ``failures`` among them.
    """

    worker: str
    route: str
    model: str
    version: str
    variant: str
    role: str = "primary"
    revision: int = 0
    start_ms: int = 0
    end_ms: int = 0
    requests: int = 0
    codes: dict[str, int] = {}
    dead_letters: int = 0
    invalid: int = 0
    fallbacks: int = 0
    first_seen: int = 0
    first_seen_full: bool = False
    batches: int = 0
    rows: int = 0
    compute_s: float = 0.0
    failures: Clustered = msgspec.field(default_factory=Clustered)
    key_groups: dict[int, tuple[int, int]] = {}
    compute: Histogram = msgspec.field(default_factory=Histogram)
    latency: Histogram = msgspec.field(default_factory=Histogram)
    seen: int = 0
    shed: int = 0
    unmatched: int = 0
    primary_errors: int = 0
    comparison: Comparison | None = None
    secondary: Comparison | None = None
    crash: bool = False
    bad_ms: tuple[int, int] | None = None


def encode_window(window: Window) -> bytes:
    """Return a window as it is stored."""
    return msgspec.msgpack.encode(window)


def decode_window(body: bytes) -> Window:
    """Return a stored window; raises msgspec.MsgspecError where it is none."""
    return msgspec.msgpack.decode(body, type=Window)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return the sum of histograms."""
    total = Histogram()
    for each in histograms:
        total.merge(each)
    return total
