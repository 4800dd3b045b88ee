"""The contracts between the record path and the world; adapters implement them, the worker joins them.

One thread (the *worker loop*) owns the intake, every outlet's ``publish`` and ``poll``, and all state of
the record path. Adapters that need a thread of their own hand their news over in ``poll``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from inferfleet.records import Chunk, Envelopes, Results, Signature, Stream, Tensors


class RefusalKind(Enum):
    """Whether trying again can help, and what to do if not."""

    LATER = "later"
    """The destination is away or full; the same envelope may pass later."""
    TOO_LARGE = "too_large"
    """This envelope can never pass: it is over the destination's size limit."""
    DENIED = "denied"
    """The destination is missing or forbidden; a person must mend it, then it may pass."""
    DUPLICATE_ID = "duplicate_id"
    """The result store holds an answer to another payload under this id."""


class Refusal(NamedTuple):
    """Why one envelope was not accepted."""

    kind: RefusalKind
    text: str


class Receipt(Protocol):
    """What an outlet tells about one published group; called on the worker loop's thread only."""

    def confirmed(self, count: int) -> None:
        """``count`` more envelopes of the group are durable."""

    def refused(self, index: int, refusal: Refusal) -> None:
        """Envelope ``index`` of the group is not durable and will not be retried by the outlet."""


class IntakeListener(Protocol):
    """Rebalance news, delivered inside :meth:`Intake.take` on the same thread."""

    def assigned(self, streams: Collection[Stream]) -> None:
        """These streams now belong to this worker."""

    def revoked(self, streams: Collection[Stream], grace_s: float) -> Mapping[Stream, int]:
        """These streams are about to go: finish what ends within ``grace_s``.

        Returns the positions to settle before giving them up.
        """

    def lost(self, streams: Collection[Stream]) -> None:
        """These streams are gone already; nothing of theirs may be settled."""

    def settle_refused(self, streams: Collection[Stream]) -> None:
        """The broker refused to commit these streams' positions; settle them again."""


class Intake(Protocol):
    """Takes chunks from a broker and settles them. Owned by one thread for life."""

    def subscribe(self, sources: Collection[str], listener: IntakeListener) -> None:
        """Take from exactly these sources (topics or queues) from now on."""

    def take(self, max_records: int, max_bytes: int, max_wait_s: float) -> list[Chunk]:
        """Return what has arrived, at most ``max_records``; wait up to ``max_wait_s`` for the first."""

    def settle(self, positions: Mapping[Stream, int]) -> None:
        """Commit: everything below each position is finished. Returns before the broker confirms."""

    def pause(self, sources: Collection[str]) -> None:
        """Stop taking from these sources (topics or queues), and stay a member."""

    def resume(self, sources: Collection[str]) -> None:
        """Take from these sources again."""

    def defer(self, stream: Stream, position: int, until_s: float) -> None:
        """Take nothing more of this stream until the monotonic time ``until_s``, then from ``position``.

        ``position`` lies in what the last take brought of the stream: what was taken below it stays taken.
        A stream that changes hands starts anew; one that is not owned here is left alone.
        """

    def lag(self) -> dict[Stream, int]:
        """Records not yet taken, per stream, as far as the client knows without asking."""

    def drained(self, timeout_s: float) -> bool:
        """Whether nothing is left of its sources, also of streams that nobody or somebody else holds.

        Asks the broker: what is assigned here was taken to its end, all else is settled to its end.
        """

    @property
    def joined(self) -> bool:
        """Whether the worker is a member of its group; the assignment may be empty."""

    @property
    def denied(self) -> str | None:
        """Why the broker will not let this worker join or take, where a person must mend it."""

    def close(self) -> None:
        """Commit what was settled, leave the group and close, within a bound."""


class Heard(NamedTuple):
    """Outcomes of another route, as columns; a ``json_length`` is that of a binary body, else ``None``."""

    ids: list[str]
    bodies: list[bytes]
    json_lengths: list[int | None]


class OutcomeFeed(Protocol):
    """What the workers of another route answer. Nothing here waits for a server, and nothing is promised:

    an outcome may come before it is asked for, twice, or never.
    """

    def ask(self, ids: Sequence[str]) -> None:
        """Say whose outcomes are wanted, where the source cannot bring them by itself."""

    def poll(self) -> list[Heard]:
        """Return what has come."""

    def close(self, *, wait: bool = True) -> None:
        """Stop, and wait for it within a bound, or not at all."""


class Outlet(Protocol):
    """Publishes envelopes to topics or queues; every confirmation or refusal reaches the receipt."""

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand over without waiting."""

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Deliver confirmations and refusals that have arrived."""

    def pending(self) -> int:
        """Envelopes handed over and not yet confirmed or refused."""

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for what is pending; return how many stay unconfirmed."""


class ResultOutlet(Protocol):
    """Writes results once: an ``ok`` never changes, any ``ok`` replaces an error.

    The store's being away is not a refusal: the outlet keeps what it holds, backs off and tries again,
    and :attr:`away_since` says so.
    """

    def publish(self, results: Results, receipt: Receipt) -> None:
        """Hand over without waiting."""

    def poll(self) -> None:
        """Deliver confirmations and refusals that have arrived."""

    def pending(self) -> int:
        """Results handed over and not yet confirmed or refused."""

    @property
    def away_since(self) -> float | None:
        """Monotonic time since when the store does not answer; ``None`` while it does."""

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for what is pending; return how many stay unconfirmed."""


class PauseBoard(Protocol):
    """Which routes are paused, and why; where it is shared, the whole pool sees the same.

    Nothing here waits for a server or raises: what a board cannot share now it keeps, and shares it later.
    """

    def watch(self, routes: Collection[str]) -> None:
        """Follow exactly these routes from now on."""

    def current(self) -> Mapping[str, str]:
        """Return the paused routes with their reasons, as far as is known."""

    def pause(self, route: str, reason: str) -> None:
        """Pause a route; one that is paused keeps its reason."""

    def resume(self, route: str) -> None:
        """Take the pause away, whoever set it."""

    def close(self) -> None:
        """Share what is not shared yet, within a bound, and stop following."""


class CrashMarks(Protocol):
    """What outlives this process: that it runs, and the mark of its quarantine (`core.quarantine`).

    Every call waits within a bound and none raises: a mark that cannot be written costs another crash, the
    worker's stopping would cost more.
    """

    def load(self) -> dict[str, int] | None:
        """Return the mark that the last process left; ``None`` if it ended cleanly or there was none."""

    def running(self) -> None:
        """Note that a process runs; a mark that stands, stays."""

    def save(self, mark: Mapping[str, int]) -> None:
        """Put ``mark`` in the place of the one before."""

    def ended(self) -> None:
        """Note that the process ends cleanly."""


class LoadedModel(Protocol):
    """A model version on a device. Every method blocks and is called from its device thread only."""

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Run ``rows`` rows; every output's first dimension must be ``rows``.

        Raises :class:`~inferfleet.errors.DeviceOutOfMemoryError` when a smaller batch may fit, and
        anything else when the batch failed.
        """

    def close(self) -> None:
        """Give its memory back."""


class BatchingWishes(Protocol):
    """What a version's ``[batching]`` asks for; ``None`` leaves it to the route and to ``fleet.toml``."""

    @property
    def max_batch_size(self) -> int | None:
        """The most rows in one call."""

    @property
    def max_queue_delay_ms(self) -> float | None:
        """The longest that a row may wait for company."""

    @property
    def max_rows(self) -> int | None:
        """The most rows that one request may carry."""

    @property
    def sort_by_length(self) -> bool | None:
        """Whether rows of similar length should share a batch."""


class ModelVersion(Protocol):
    """A verified folder of the model repository."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def version(self) -> str:
        """A positive integer without leading zeros."""

    @property
    def path(self) -> Path:
        """The folder; every byte in it matches the manifest."""

    @property
    def runtime(self) -> str:
        """``onnx``, ``torch`` or ``python``."""

    @property
    def file(self) -> str:
        """The main file, relative to the folder."""

    @property
    def signature(self) -> Signature | None:
        """What ``model.toml`` declares; ``None`` where the file itself says it."""

    @property
    def trusted(self) -> bool:
        """Whether code of this version may run."""

    @property
    def options(self) -> Mapping[str, object]:
        """Further keys of ``model.toml`` that belong to the runtime (``entry_point``, ``parameters``)."""

    @property
    def batching(self) -> BatchingWishes:
        """What suits this version."""

    @property
    def digest(self) -> str:
        """The sha256 of ``manifest.json``, which stands for every byte of the version."""

    @property
    def files(self) -> Collection[str]:
        """The files of the version, relative to the folder."""

    def read(self, file: str) -> bytes:
        """Return a file's bytes, verified once more; a runtime loads these bytes, never the file again.

        Raises :class:`~inferfleet.errors.ChecksumMismatchError`.
        """


class Runtime(Protocol):
    """Loads model versions of one format."""

    def load(self, version: ModelVersion, device: str, threads: int) -> LoadedModel:
        """Load, check against the declared signature, and warm up.

        ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``threads`` 0 means what the cgroup grants.
        Raises :class:`~inferfleet.errors.ModelLoadError`, :class:`~inferfleet.errors.DeviceError`,
        :class:`~inferfleet.errors.UntrustedModelError`.
        """


class Clock(Protocol):
    """Two clocks with unrelated origins."""

    def monotonic(self) -> float:
        """Seconds, for spans and timers."""

    def utc_ms(self) -> int:
        """Epoch milliseconds, for deadlines and records."""
