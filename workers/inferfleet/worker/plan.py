"""Routes made ready to run: what each record of a source meets on its way, compiled once per revision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, cast
from weakref import WeakValueDictionary

from inferfleet.addresses import REPLY, on_rabbitmq
from inferfleet.config import Config
from inferfleet.core.routing import Steering
from inferfleet.errors import ConfigError
from inferfleet.naming import dead_letter_address, retry_addresses, retry_sources, source_address
from inferfleet.ports import BatchingWishes
from inferfleet.records import Amqp, Header, Lane, Requests, Served, Signature
from inferfleet.routes import Route, Variant
from inferfleet.wire.decode import Decoder
from inferfleet.wire.encode import AnswerWriter, served_header
from inferfleet.wire.request import Limits
from inferfleet.worker.engine import Engine
from inferfleet.worker.shadow_plan import shadow_plans


class Reads(NamedTuple):
    """All that a decoder depends on: equal ones read alike."""

    model: str
    versions: frozenset[str]
    signature: Signature
    limits: Limits
    columns: bool
    deadline_ms: int | None
    needs_id: bool


class Decoders:
    """The decoders in use, one for each way of reading: what several plans read alike is read once."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[Reads, Decoder] = WeakValueDictionary()

    def of(self, reads: Reads) -> Decoder:
        """Return the decoder that reads this way."""
        found = self._known.get(reads)
        if found is None:
            found = self._known[reads] = Decoder(
                reads.model,
                reads.versions,
                reads.signature,
                reads.limits,
                columns=reads.columns,
                deadline_ms=reads.deadline_ms,
                needs_id=reads.needs_id,
            )
        return found


class VariantPlan:
    """One variant of a route: its engine, its lanes, and how its answers are written.

    ``role`` names its lanes; ``fallback`` says that it answers for a version that is loaded no longer.
    """

    def __init__(
        self,
        route: Route,
        variant: Variant,
        revision: str,
        engine: Engine,
        limits: BatchingWishes,
        config: Config,
        *,
        role: str = "primary",
        fallback: bool = False,
    ) -> None:
        if engine.signature is None:
            raise ValueError(f"{engine} is not loaded")
        self.variant = variant
        self.engine = engine
        self.role = role
        self.served = Served(route.name, route.model, variant.version, variant.name, revision, fallback)
        self.max_rows = limits.max_rows
        self.header: Header = served_header(self.served, config.worker_id)
        self.writer = AnswerWriter(route.model, variant.version, engine.signature)
        self._max_batch_size = max_batch_size(route, limits, config)
        self._delay_s = (
            _first(route.max_queue_delay_ms, limits.max_queue_delay_ms, config.batching.max_queue_delay_ms)
            / 1000
        )
        self._sorted = limits.sort_by_length is not False
        self._lanes: dict[tuple[tuple[int, ...], ...], Lane] = {}

    def lane(self, part: Requests) -> Lane:
        """Return the lane that ``part`` waits in; requests of equal row shapes share one."""
        shapes = tuple([array.shape[1:] for array in part.tensors.values()])
        lane = self._lanes.get(shapes)
        if lane is None:
            if len(self._lanes) > 256:
                self._lanes.clear()
            lane = self._lanes[shapes] = Lane(
                self.served.model,
                self.served.version,
                self.role,
                shapes,
                self._max_batch_size,
                self._delay_s,
            )
        if not self._sorted:
            part.costs = None
        return lane


class RoutePlan:
    """Everything the loop needs for the records of one source.

    ``sources`` are the source itself and those of its delayed attempts, ``retries`` where these are
    published, one for each delay. ``destinations`` are the topics and exchanges that every outcome goes to;
    ``reply`` says that it also goes to the queue that the request names. ``number`` is that of the route's
    revision, 0 for one from a file. In place of a variant whose version is not among ``engines`` the stable
    one of ``instead`` answers.
    """

    def __init__(
        self,
        route: Route,
        revision: str,
        engines: Mapping[tuple[str, str], Engine],
        limits: Callable[[str, str], BatchingWishes],
        config: Config,
        *,
        number: int = 0,
        decoders: Decoders | None = None,
        instead: RoutePlan | None = None,
    ) -> None:
        self.route = route
        self.revision = revision
        self.number = number
        self.name = route.name
        self.source = source_address(route)
        self.retries = retry_addresses(config, route)
        self.retry_sources = retry_sources(config, route)
        self.sources = (self.source, *self.retry_sources)
        self.destinations = [
            f"rabbitmq:{each.name}" if each.kind == "rabbitmq" else each.name
            for each in route.results
            if each.kind in ("kafka", "rabbitmq")
        ]
        self.reply = any(destination.kind == "reply" for destination in route.results)
        self.redis = any(destination.kind == "redis" for destination in route.results)
        self._reply_to = config.rabbitmq.reply_to
        self.published = frozenset((*self.destinations, REPLY))
        self.dead_letters = dead_letter_address(config, route)
        self.ttl_s = route.ttl_s if route.ttl_s is not None else config.results.ttl_s
        self.nan_allowed = route.nan == "allow"
        self._engines, self._limits, self._config = engines, limits, config
        self.variants = self._variants(instead)
        self.failed_header: Header = served_header(
            Served(route.name, route.model, "", "", revision), config.worker_id
        )
        wishes = [variant.max_rows for variant in self.variants]
        max_rows = min(
            config.limits.max_request_rows,
            config.limits.in_flight_rows,
            *[rows for rows in wishes if rows is not None],
        )
        self._steering = Steering.over(route.salt, [variant.ranges for variant in route.variants])
        self._split_by = route.split_by
        signature = self._signature()
        self.shadows = shadow_plans(route, revision, engines, limits, config, signature)
        self.decoder = (decoders or Decoders()).of(
            Reads(
                route.model,
                frozenset(variant.version for variant in route.variants),
                signature,
                Limits(config.limits.max_request_bytes, max_rows, self.nan_allowed),
                route.input == "columns",
                route.deadline_ms,
                on_rabbitmq(self.source) and not self.destinations and not self.reply,
            )
        )

    def __repr__(self) -> str:
        return f"RoutePlan({self.name}, revision={self.revision})"

    def _variants(self, instead: RoutePlan | None) -> list[VariantPlan]:
        route = self.route
        found: list[VariantPlan] = []
        versions: set[str] = set()
        for variant in route.variants:
            engine = self._engines.get((route.model, variant.version))
            if engine is not None or instead is None:
                # A version that answers for two variants, as beside a canary, is measured for each apart.
                role = variant.name if variant.version in versions else "primary"
                versions.add(variant.version)
                engine = self._engines[route.model, variant.version] if engine is None else engine
                found.append(self._variant(route, variant, engine, role=role))
            else:
                stable = instead.variants[0]
                found.append(self._variant(instead.route, stable.variant, stable.engine, fallback=True))
        return found

    def _variant(
        self, route: Route, variant: Variant, engine: Engine, *, role: str = "primary", fallback: bool = False
    ) -> VariantPlan:
        wishes = self._limits(route.model, variant.version)
        return VariantPlan(
            route, variant, self.revision, engine, wishes, self._config, role=role, fallback=fallback
        )

    def _signature(self) -> Signature:
        """Return the signature that all variants share."""
        first = self.variants[0].engine.signature
        if first is None:
            raise ValueError(f"{self.variants[0].engine} is not loaded")
        for plan in self.variants[1:]:
            other = plan.engine.signature
            if other is None or other.inputs != first.inputs or _names(other) != _names(first):
                raise ConfigError(
                    f"route {self.name}: versions {self.variants[0].variant.version} and "
                    f"{plan.variant.version} of model {self.route.model} differ in their inputs or in the "
                    "names of their outputs; a route's variants must take the same requests"
                )
        return first

    def steer(self, part: Requests) -> list[tuple[VariantPlan, Requests]]:
        """Return the requests of ``part`` by the variant that answers them."""
        if len(self.variants) == 1:
            plan = self.variants[0]
            part.served = plan.served
            return [(plan, part)]
        steered: list[tuple[VariantPlan, Requests]] = []
        for plan, indices in zip(self.variants, self._steering.split(self.keys(part)), strict=True):
            if indices:
                piece = part.pick(indices)
                piece.served = plan.served
                steered.append((plan, piece))
        return steered

    def keys(self, part: Requests) -> Sequence[bytes]:
        """Return what decides each request's variant: its key, else its id."""
        if self._split_by == "id":
            return [request_id.encode() for request_id in part.ids]
        if self._split_by == "key":
            keys = part.chunk.keys
            found = [keys[row] for row in part.rows]
        else:
            name = self._split_by.removeprefix("header:").lower()
            headers = part.chunk.headers
            found = [
                next((value for key, value in headers[row] or () if key.lower() == name), None)
                for row in part.rows
            ]
        if None not in found:
            return cast("list[bytes]", found)
        return [
            request_id.encode() if key is None else key
            for key, request_id in zip(found, part.ids, strict=True)
        ]

    def may_reply(self, amqp: Amqp) -> bool:
        """Return whether a request names a queue, and one that a caller may call its own.

        Any other would be a way to write, with the worker's rights, where the caller must not.
        """
        queue = amqp.reply_to
        return bool(queue) and any(fnmatchcase(queue or "", pattern) for pattern in self._reply_to)

    def variant_of(self, served: Served | None) -> VariantPlan | None:
        """Return the variant that ``served`` names."""
        return next((plan for plan in self.variants if plan.served == served), None)


def max_batch_size(route: Route, wishes: BatchingWishes, config: Config) -> int:
    """Return the most rows of one batch: the route's word before the model's before the configuration's."""
    size = _first(route.max_batch_size, wishes.max_batch_size, config.batching.max_batch_size)
    return min(size, config.limits.in_flight_rows)


def _first(*values: float | int | None) -> int:
    for value in values:
        if value is not None:
            return value  # type: ignore[return-value]
    raise ValueError("no value is set")


def _names(signature: Signature) -> set[str]:
    return {spec.name for spec in signature.outputs}
