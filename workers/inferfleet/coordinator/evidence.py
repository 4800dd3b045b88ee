"""What a rollout is judged by, gathered from the workers' windows, their reports, and labels.

Sums are kept here, and their last state is stored beside the rollout in the same commit as its steps. So
whoever takes over goes on from sums and a place in the stream that belong together, however short the stream
is kept. Labels are read again from the rollout's start: their topics keep them, and a join that is half done
is not stored.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from inferfleet.control_ports import ControlStore, LabelFeed
from inferfleet.core.evidence import Evidence, evidence_bytes, evidence_of
from inferfleet.core.labels import LabelJoin
from inferfleet.core.routing import key_group
from inferfleet.errors import ConfigError
from inferfleet.feedback import ACCURACY, FIRST, Label, Measured, Sought
from inferfleet.plane import WorkerReport, version_name
from inferfleet.rollouts import Rollout
from inferfleet.routes import Destination, Route

log = structlog.get_logger(__name__)

Feeds = Callable[[Sought], LabelFeed]

PAGE = 200
READ_S = 0.5
"""How long a stream is read in one turn, so that one route's backlog does not cost the leader its lease."""
SUFFIX = ":evidence"
"""Behind a rollout's id: the document that holds its sums."""


class _Kept(msgspec.Struct, frozen=True):
    """Sums as they are stored, and the place in the stream up to which they go."""

    place: str
    evidence: bytes
    format: int = 1


def evidence_name(rollout: str) -> str:
    """Return the name of the document that holds a rollout's sums."""
    return rollout + SUFFIX


def is_evidence(name: str) -> bool:
    """Say whether a document is the sums of a rollout, and no rollout itself."""
    return name.endswith(SUFFIX)


class Gathering:
    """The sums of one rollout as they grow; ``body`` is their last stored state, ``feeds`` opens labels.

    Without ``feeds`` labels that are stored are shown, and none is read.
    """

    def __init__(
        self,
        rollout: Rollout,
        store: ControlStore,
        body: bytes | None = None,
        feeds: Feeds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._place, self.evidence = _restored(body, rollout.id)
        self._behind = True
        self._labels = None
        if feeds is not None and rollout.policy.feedback_topic:
            self.evidence.labels = {}
            self._labels = Labels(rollout, feeds)

    def __repr__(self) -> str:
        return f"Gathering(place={self._place!r}, behind={self.behind})"

    @property
    def behind(self) -> bool:
        """Whether something waits that was not read yet: what is judged now may be less than there is."""
        return self._behind or (self._labels is not None and self._labels.behind)

    @property
    def trouble(self) -> str:
        """Why labels cannot be read now; empty while they can."""
        return self._labels.trouble if self._labels is not None else ""

    def gather(self, rollout: Rollout, workers: Iterable[WorkerReport], now_ms: int) -> Evidence:
        """Read what has come, and return the sums; raises ControlError while the store does not answer."""
        heard = self._windows(rollout) if rollout.first_revision else 0
        mine = [each for each in workers if each.pool == rollout.before.pool]
        name = version_name(rollout.model, rollout.to_version)
        if mine and (heard or not rollout.first_revision):
            digests = {each.digests[name] for each in mine if name in each.digests}
            lag = sum(each.lag.get(rollout.route, 0) for each in mine)
            self.evidence.observe(now_ms, lag, digests)
        if self._labels is not None and rollout.first_ms is not None:
            for found in self._labels.read(rollout, now_ms):
                arm = arm_of_label(rollout, found)
                self.evidence.label(arm, found.metric, found.value, key_group(found.unit))
            self.evidence.unheard = self._labels.trouble
        return self.evidence

    def _windows(self, rollout: Rollout) -> int:
        """Add the windows that have come; return how many are about the rollout."""
        heard, until = 0, self._clock() + READ_S
        while True:
            found, self._place = self._store.windows(rollout.route, self._place, limit=PAGE)
            heard += sum(self.evidence.add(window, rollout) for window in found)
            self._behind = len(found) >= PAGE
            if not self._behind or self._clock() >= until:
                return heard

    def body(self) -> bytes:
        """Return the sums as they are to be stored."""
        return msgspec.msgpack.encode(_Kept(self._place, zlib.compress(evidence_bytes(self.evidence), 1)))

    def close(self) -> None:
        """Stop reading labels."""
        if self._labels is not None:
            self._labels.close()


def _restored(body: bytes | None, rollout: str) -> tuple[str, Evidence]:
    """Return the place and the sums of a stored state; what cannot be read is gathered again."""
    if body is None:
        return "", Evidence()
    try:
        kept = msgspec.msgpack.decode(body, type=_Kept)
        return kept.place, evidence_of(zlib.decompress(kept.evidence))
    except (msgspec.MsgspecError, zlib.error) as error:
        log.warning("evidence_unreadable", rollout=rollout, error=str(error))
        return "", Evidence()


def arm_of_label(rollout: Rollout, found: Measured) -> str:
    """Return the arm that a labelled answer belongs to: what the variant that gave it says."""
    if found.version == rollout.to_version:
        # What the new version answered alone stands apart, for then nothing was answered beside it.
        return "canary" if rollout.kind == "ab" or found.variant == "canary" else "baked"
    return "control" if found.variant == "control" else "stable"


class Labels:
    """The labels of one rollout, joined with its answers; the feed is opened when it is first read."""

    def __init__(self, rollout: Rollout, feeds: Feeds) -> None:
        self._kinds = {metric.name: metric.kind for metric in rollout.policy.metrics}
        horizon_ms = int(rollout.policy.label_horizon_s * 1000)
        self._join = LabelJoin(horizon_ms, accuracy=ACCURACY in self._kinds)
        self._feeds = feeds
        self._feed: LabelFeed | None = None
        self.behind = True
        self.trouble = ""

    def read(self, rollout: Rollout, now_ms: int) -> Sequence[Measured]:
        """Return the values that have become known."""
        if self._feed is None:
            try:
                self._feed = self._feeds(sought(rollout))
            except ConfigError as error:
                # A hold that says why; it is not time that nobody has watched.
                self.trouble, self.behind = str(error), False
                return ()
        found = self._feed.poll()
        self.trouble = self._feed.stale
        self.behind = not found.caught_up and not self.trouble
        labels = [kept for each in found.labels if (kept := self._asked_for(each)) is not None]
        return self._join.add(found._replace(labels=labels), now_ms)

    def _asked_for(self, label: Label) -> Label | None:
        """Return what a label says of the policy's metrics; a topic may hold much else, without an end.

        A proportion's value outside of 0 to 1 is nobody's: one of them would outweigh all others.
        """
        values = {
            name: value
            for name, value in label.values.items()
            if (kind := self._kinds.get(name)) == "mean" or (kind is not None and 0 <= value <= 1)
        }
        classes = label.classes if ACCURACY in self._kinds else None
        return Label(label.id, label.at_ms, values, classes) if values or classes is not None else None

    def close(self) -> None:
        """Stop reading."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def sought(rollout: Rollout) -> Sought:
    """Return what a rollout wants to hear; raises ConfigError where its route's answers cannot be read."""
    wants = any(metric.name == ACCURACY for metric in rollout.policy.metrics)
    return Sought(
        source=feedback_source(rollout.policy.feedback_topic),
        answers=answers_of(rollout.before),
        route=rollout.route,
        versions=frozenset({rollout.from_version, rollout.to_version}),
        since_revision=rollout.first_revision,
        since_ms=rollout.first_ms or rollout.begun_ms,
        output=(rollout.policy.label_output or FIRST) if wants else "",
        reader=rollout.id,
    )


def feedback_source(feedback: str) -> Destination:
    """Return where labels come from; raises ConfigError for anything but a Kafka topic."""
    kind, _, name = feedback.partition(":")
    if kind != "kafka" or not name:
        raise ConfigError(
            f'policy feedback "{feedback}" must be "kafka:TOPIC"; labels come from nowhere else'
        )
    return Destination("kafka", name)


def answers_of(route: Route) -> Destination:
    """Return the topic that says which version answered a request; raises ConfigError where there is none."""
    found = next((each for each in route.results if each.kind == "kafka"), None)
    if found is None:
        raise ConfigError(
            f"route {route.name} answers to no Kafka topic, so labels cannot be joined with the version that "
            'answered; add "kafka:TOPIC" to its results'
        )
    return found
