"""An outlet that confirms and refuses when a test says so, and route plans without running engines."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from inferfleet.config import Config, Worker
from inferfleet.control.pauses import LocalPauses
from inferfleet.core.retry import RetryPolicy
from inferfleet.models.description import Batching
from inferfleet.ports import Clock, LoadedModel, Outlet, Receipt, Refusal, RefusalKind, ResultOutlet
from inferfleet.records import Envelopes, Header, Signature
from inferfleet.routes import Destination, Route, Variant
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.engine import Engine
from inferfleet.worker.plan import RoutePlan


class Published(NamedTuple):
    """One envelope as it was handed over."""

    destination: str
    key: bytes | None
    value: bytes | None
    headers: list[Header]

    def header(self, name: str) -> bytes | None:
        """Return the last header of this name; a dead letter's own stand behind the original ones."""
        return dict(self.headers).get(name)


def delivery(
    outlet: Outlet,
    results: ResultOutlet | None,
    metrics: PrometheusMetrics,
    clock: Clock,
    *,
    max_result_bytes: int = 10_000,
    brakes: Brakes | None = None,
    delays_ms: Sequence[int] = (),
    **options: Any,
) -> Delivery:
    """Return a delivery that retries nothing and never brakes, unless a test says so."""
    return Delivery(
        outlet,
        results,
        metrics,
        clock,
        max_result_bytes=max_result_bytes,
        brakes=brakes or Brakes(LocalPauses(), 1_000_000, 1.0),
        retry=RetryPolicy(delays_ms),
        **options,
    )


class ScriptedOutlet:
    """Implements :class:`~inferfleet.ports.Outlet`; what was handed over waits for the test's word.

    With ``at_once`` every envelope is confirmed inside ``publish``. A destination in ``refusing`` refuses,
    in ``confirm_all`` or at once.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.refusing: dict[str, RefusalKind] = {}
        self.sent: list[Published] = []
        self.kept: list[Published] = []
        self._waiting: list[tuple[Envelopes, Receipt]] = []

    def publish(self, envelopes: Envelopes, receipt: Receipt) -> None:
        """Hand over without waiting."""
        self.sent += _each(envelopes)
        if self.at_once:
            self._answer(envelopes, receipt)
        else:
            self._waiting.append((envelopes, receipt))

    def poll(self, max_wait_s: float = 0.0) -> None:
        """Nothing arrives by itself."""

    def confirm_all(self) -> None:
        """Confirm or refuse what is waiting, and what that leads to."""
        while self._waiting:
            self.confirm_some()

    def confirm_some(self, destination: str | None = None) -> None:
        """Confirm or refuse what is waiting now, for one destination or for all."""
        chosen = [w for w in self._waiting if destination in (None, w[0].destination)]
        self._waiting = [w for w in self._waiting if w not in chosen]
        for envelopes, receipt in chosen:
            self._answer(envelopes, receipt)

    def _answer(self, envelopes: Envelopes, receipt: Receipt) -> None:
        kind = self.refusing.get(envelopes.destination)
        if kind is not None:
            for index in range(len(envelopes)):
                receipt.refused(index, Refusal(kind, "told to refuse"))
            return
        self.kept += _each(envelopes)
        receipt.confirmed(len(envelopes))

    def pending(self) -> int:
        """Envelopes without an answer."""
        return sum(len(envelopes) for envelopes, _ in self._waiting)

    def close(self, timeout_s: float) -> int:
        """Return what stays unconfirmed."""
        return self.pending()

    def to(self, destination: str) -> list[Published]:
        """Return what a destination has kept."""
        return [each for each in self.kept if each.destination == destination]


def _each(envelopes: Envelopes) -> list[Published]:
    columns = zip(envelopes.keys, envelopes.values, envelopes.headers, strict=True)
    return [Published(envelopes.destination, key, value, headers) for key, value, headers in columns]


def _never_loaded() -> LoadedModel:
    raise AssertionError("this engine is not started")


def route_plan(
    signature: Signature,
    *,
    results: Sequence[str] = ("kafka:out",),
    variants: Sequence[Variant] = (Variant("stable", "1", 1.0, ((0, 10_000),)),),
    config: Config | None = None,
    signatures: dict[str, Signature] | None = None,
    batching: Batching | None = None,
    source: Destination = Destination("kafka", "digits.requests"),  # noqa: B008 - a value, never changed
    **route: Any,
) -> RoutePlan:
    """Return the plan of route ``digits`` from ``digits.requests`` to ``results``, with idle engines."""
    destinations = []
    for text in results:
        kind, _, name = text.partition(":")
        destinations.append(Destination(kind, name))  # type: ignore[arg-type]
    table = Route(
        name="digits",
        source=source,
        results=tuple(destinations),
        model="m",
        variants=tuple(variants),
        salt="inferfleet/digits",
        **route,
    )
    engines: dict[tuple[str, str], Engine] = {}
    for version in sorted(table.versions):
        engine = Engine("m", version, _never_loaded, SimpleQueue(), FakeClock())
        engine.signature = (signatures or {}).get(version, signature)
        engines["m", version] = engine
    wishes = Batching() if batching is None else batching
    return RoutePlan(
        table,
        "17",
        engines,
        lambda _model, _version: wishes,
        Config(worker=Worker(id="w-3")) if config is None else config,
    )
