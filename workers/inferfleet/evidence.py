"""What was measured since a rollout began, as sums that add up in any order and grouping. Pure.

A window of a worker is sorted into an *arm*: ``control`` (the old version on a slice as large as the
candidate's), ``canary`` (the new version), ``baked`` (the new version since it answers alone), ``stable``
(the old version otherwise) or ``shadow``. A coordinator that takes over reads the same windows and has the
same sums; times of its own clock stand apart, in ``heard_ms`` and ``lag``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from inferfleet.rollouts import Rollout
from inferfleet.summaries import Clustered, Comparison, Histogram, Window

ArmName: TypeAlias = Literal["stable", "control", "canary", "baked", "shadow"]

CONTROL = "control"
CANARY = "canary"
KEPT_MINUTES = 60
KEPT_REVISIONS = 2
KEPT_CRASHES = 100
KEPT_EXAMPLES = 20
KEPT_LABELS = 2_000
MINUTE_MS = 60_000

Groups: TypeAlias = dict[int, tuple[float, float]]
"""By group of keys (:func:`inferfleet.core.routing.key_group`): trials and events, or count and sum."""


class Arm(msgspec.Struct):
    """The sums of one arm.

    ``failures`` are by batch, ``key_groups`` by group of keys. ``letters`` (dead letters) and ``cost``
    (seconds of model time) are for each request, with a worker's window as the cluster.
    """

    requests: int = 0
    rows: int = 0
    dead_letters: int = 0
    invalid: int = 0
    fallbacks: int = 0
    compute_s: float = 0.0
    failures: Clustered = msgspec.field(default_factory=Clustered)
    key_groups: Groups = {}
    letters: Clustered = msgspec.field(default_factory=Clustered)
    cost: Clustered = msgspec.field(default_factory=Clustered)
    compute: Histogram = msgspec.field(default_factory=Histogram)
    latency: Histogram = msgspec.field(default_factory=Histogram)

    def add(self, window: Window) -> None:
        """Add what a window counts."""
        self.requests += window.requests
        self.rows += window.rows
        self.dead_letters += window.dead_letters
        self.invalid += window.invalid
        self.fallbacks += window.fallbacks
        self.compute_s += window.compute_s
        self.failures.merge(window.failures)
        _add_groups(self.key_groups, window.key_groups)
        self.compute.merge(window.compute)
        self.latency.merge(window.latency)
        if window.requests:
            self.letters.add(window.requests, window.dead_letters)
            self.cost.add(window.requests, window.compute_s)

    def merge(self, other: Arm) -> None:
        """Add what another one holds."""
        _add(self, other)


class Values(msgspec.Struct):
    """What the labels of one metric sum to in one arm; ``negative`` counts values below 0."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    negative: int = 0
    groups: Groups = {}
    values: Histogram = msgspec.field(default_factory=Histogram)

    def add(self, value: float, group: int) -> None:
        """Add the value of a request whose key is in ``group``."""
        self.count += 1
        self.total += value
        self.squares += value * value
        self.negative += value < 0
        _add_groups(self.groups, {group: (1, value)})
        self.values.add_same(value, 1)


class Minute(msgspec.Struct):
    """What an arm counted in one minute of the workers' time: for tables, and for how it goes lately."""

    requests: int = 0
    failures: float = 0.0
    invalid: int = 0
    compute_s: float = 0.0


class FirstSeen(msgspec.Struct):
    """Keys that one worker met first, for the sample-ratio check; ``full``: it stopped counting."""

    canary: int = 0
    control: int = 0
    full: bool = False


class Evidence(msgspec.Struct):
    """All that a rollout is judged by.

    ``minutes`` maps a minute of the workers' time (epoch ms // 60,000) to its arms; the last 60 are kept.
    ``first_seen`` maps a revision to its workers; the last two are kept. ``crashes`` maps ``worker@start`` to
    the time. ``labels`` maps arm and metric to values. ``lag`` maps a minute of the coordinator's time to the
    records that waited. ``heard_ms`` is when, by the coordinator's clock, a report last came. ``digests`` are
    those that workers report for the new version. ``drift`` says what drifted, and is empty if nothing did.
    ``unheard`` says why labels cannot be read now, and is empty while they can.
    """

    arms: dict[str, Arm] = {}
    minutes: dict[int, dict[str, Minute]] = {}
    comparison: Comparison | None = None
    secondary: Comparison | None = None
    seen: int = 0
    shed: int = 0
    first_seen: dict[int, dict[str, FirstSeen]] = {}
    crashes: dict[str, int] = {}
    labels: dict[str, dict[str, Values]] = {}
    lag: dict[int, int] = {}
    heard_ms: int = 0
    digests: list[str] = []
    drift: str = ""
    unheard: str = ""

    def arm(self, name: str) -> Arm:
        """Return an arm's sums; an empty one where nothing was measured."""
        return self.arms.get(name) or Arm()

    def add(self, window: Window, rollout: Rollout) -> bool:
        """Add a worker's window, and say whether it is about the rollout at all."""
        name = arm_of(window, rollout)
        if name is None:
            return False
        self.arms.setdefault(name, Arm()).add(window)
        minute = self.minutes.setdefault(window.end_ms // MINUTE_MS, {}).setdefault(name, Minute())
        minute.requests += window.requests
        minute.failures += window.failures.events
        minute.invalid += window.invalid
        minute.compute_s += window.compute_s
        if window.crash and name in (CANARY, "baked", "shadow"):
            self.crashes[f"{window.worker}@{window.start_ms}"] = window.start_ms
        if name == "shadow":
            self.seen += window.seen
            self.shed += window.shed
            self.comparison = _into(self.comparison, window.comparison)
            self.secondary = _into(self.secondary, window.secondary)
        elif name in (CANARY, CONTROL):
            counts = self.first_seen.setdefault(window.revision, {}).setdefault(window.worker, FirstSeen())
            _count_keys(counts, name, window)
        self._bound()
        return True

    def observe(self, now_ms: int, lag: int, digests: Iterable[str] = ()) -> None:
        """Say at ``now_ms`` that workers have reported, how many records wait, and which bytes they serve."""
        self.heard_ms = max(self.heard_ms, now_ms)
        minute = now_ms // MINUTE_MS
        self.lag[minute] = max(lag, self.lag.get(minute, 0))
        self.digests = sorted({*self.digests, *digests})
        self._bound()

    def label(self, arm: str, metric: str, value: float, group: int) -> None:
        """Add a value from the feedback topic."""
        self.labels.setdefault(arm, {}).setdefault(metric, Values()).add(value, group)

    def merge(self, other: Evidence) -> None:
        """Add what another one holds; any order and grouping gives the same."""
        _merge_maps(self.arms, other.arms)
        for minute, arms in other.minutes.items():
            _merge_maps(self.minutes.setdefault(minute, {}), arms)
        self.comparison = joined(self.comparison, other.comparison)
        self.secondary = joined(self.secondary, other.secondary)
        self.seen += other.seen
        self.shed += other.shed
        for revision, workers in other.first_seen.items():
            _merge_maps(self.first_seen.setdefault(revision, {}), workers)
        for place, at_ms in other.crashes.items():
            self.crashes[place] = max(at_ms, self.crashes.get(place, at_ms))
        for arm, metrics in other.labels.items():
            _merge_maps(self.labels.setdefault(arm, {}), metrics)
        for minute, lag in other.lag.items():
            self.lag[minute] = max(lag, self.lag.get(minute, 0))
        self.heard_ms = max(self.heard_ms, other.heard_ms)
        self.digests = sorted({*self.digests, *other.digests})
        self.drift = max(self.drift, other.drift)
        self.unheard = max(self.unheard, other.unheard)
        self._bound()

    def _bound(self) -> None:
        """Keep the newest of what grows with time."""
        _keep_newest(self.minutes, KEPT_MINUTES)
        _keep_newest(self.lag, KEPT_MINUTES)
        _keep_newest(self.first_seen, KEPT_REVISIONS)
        while len(self.crashes) > KEPT_CRASHES:
            del self.crashes[min(self.crashes, key=lambda place: (self.crashes[place], place))]


def arm_of(window: Window, rollout: Rollout) -> ArmName | None:
    """Return the arm that a window belongs to; ``None`` where it is not about the rollout."""
    first = rollout.first_revision
    if window.route != rollout.route or window.model != rollout.model or not first or window.revision < first:
        return None
    if window.role == "shadow":
        return "shadow" if window.version == rollout.to_version else None
    if window.version == rollout.to_version:
        promoted = rollout.promoted_revision
        return "baked" if promoted and window.revision >= promoted else "canary"
    if window.version == rollout.from_version:
        return "control" if window.variant == CONTROL else "stable"
    return None


def joined(first: Comparison | None, second: Comparison | None) -> Comparison | None:
    """Return the sum of two comparisons, either of which may be missing."""
    return _into(_copied(first), second)


def _into(total: Comparison | None, part: Comparison | None) -> Comparison | None:
    """Add ``part`` to ``total`` in its place, which a leader does for every window; return the sum."""
    if total is None or part is None:
        return _copied(part) if total is None else total
    examples = [*total.examples, *part.examples]
    _add(total, part)
    for name, others in (("flips", "*>*"), ("agreed", "*")):
        _bounded(getattr(total, name), others)
    examples.sort(key=lambda each: (-each.distance, each.id, each.primary, each.shadow))
    total.examples = examples[:KEPT_EXAMPLES]
    total.kind = max(total.kind, part.kind)
    return total


def _bounded(counts: dict[str, int], others: str) -> None:
    """Count rare labels as one where there are too many: a model may have no end of them."""
    if len(counts) <= KEPT_LABELS:
        return
    order = sorted(counts, key=lambda name: (name == others, -counts[name], name))
    for name in order[KEPT_LABELS // 2 :]:
        if name != others:
            counts[others] = counts.get(others, 0) + counts.pop(name)


def _copied(comparison: Comparison | None) -> Comparison | None:
    return msgspec.convert(msgspec.to_builtins(comparison), Comparison | None)


def evidence_bytes(evidence: Evidence) -> bytes:
    """Return evidence as it is stored."""
    return msgspec.msgpack.encode(evidence)


def evidence_of(body: bytes) -> Evidence:
    """Return stored evidence; raises msgspec.MsgspecError where it is none."""
    return msgspec.msgpack.decode(body, type=Evidence)


def _count_keys(counts: FirstSeen, name: str, window: Window) -> None:
    counts.full = counts.full or window.first_seen_full
    if name == CANARY:
        counts.canary += window.first_seen
    else:
        counts.control += window.first_seen


def _add_groups(own: Groups, other: Mapping[int, tuple[float, float]]) -> None:
    for group, (trials, events) in other.items():
        stood = own.get(group)
        own[group] = (trials, events) if stood is None else (stood[0] + trials, stood[1] + events)


def _add(own: Any, other: Any) -> None:
    """Add another struct's numbers and maps of numbers to one's own; texts and lists stay as they are."""
    for key in own.__struct_fields__:
        mine, theirs = getattr(own, key), getattr(other, key)
        if isinstance(mine, Clustered | Histogram):
            mine.merge(theirs)
        elif isinstance(mine, bool):
            setattr(own, key, mine or theirs)
        elif isinstance(mine, int | float):
            setattr(own, key, mine + theirs)
        elif key in ("key_groups", "groups"):
            _add_groups(mine, theirs)
        elif isinstance(mine, dict):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count


def _merge_maps(own: dict[Any, Any], other: dict[Any, Any]) -> None:
    for name, theirs in other.items():
        if name not in own:
            own[name] = type(theirs)()
        _add(own[name], theirs)


def _keep_newest(kept: dict[int, Any], most: int) -> None:
    while len(kept) > most:
        del kept[min(kept)]
