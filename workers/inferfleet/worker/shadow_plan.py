"""One shadow of a route made ready to run: its engine, which keys it sees, how long its batches may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import structlog

from inferfleet.config import Config
from inferfleet.core.routing import sampled
from inferfleet.core.shadow_comparing import Comparer
from inferfleet.ports import BatchingWishes
from inferfleet.records import Lane, Served, Signature, Tensors
from inferfleet.routes import Route, Shadow
from inferfleet.worker.engine import Engine

log = structlog.get_logger(__name__)

SHARE_OF_GOAL = 0.1
"""How much of the route's latency goal a shadow's batch is expected to take at most."""
USUAL_GOAL_MS = 100.0
"""The goal that is assumed where the route names none: a shadow's batch takes 10 ms."""


class ShadowPlan:
    """One shadow. ``cap_s`` is what one of its batches is expected to take at most.

    A request that costs more than that alone still runs, alone.
    """

    def __init__(
        self,
        route: Route,
        shadow: Shadow,
        revision: str,
        engine: Engine,
        wishes: BatchingWishes,
        config: Config,
    ) -> None:
        if engine.signature is None:
            raise ValueError(f"{engine} is not loaded")
        self.shadow = shadow
        self.engine = engine
        self.served = Served(route.name, route.model, shadow.version, shadow.name, revision)
        self.comparer = Comparer(engine.signature.outputs)
        self.cap_s = (route.goal_p99_ms or USUAL_GOAL_MS) / 1000 * SHARE_OF_GOAL
        size = route.max_batch_size or wishes.max_batch_size or config.batching.max_batch_size
        self.max_batch_size = min(size, config.limits.in_flight_rows)
        self._salt = route.shadow_salt(shadow)

    def __repr__(self) -> str:
        return f"ShadowPlan({self.served.route}, {self.shadow.name}, version={self.shadow.version})"

    @property
    def sees_all(self) -> bool:
        """Whether every key is in its sample."""
        return self.shadow.sample >= 1.0

    def sample(self, keys: Sequence[bytes]) -> list[int]:
        """Return the ascending indices of the keys that it sees."""
        return sampled(self._salt, self.shadow.sample, keys)

    def lane(self, engine: Engine, role: str, tensors: Tensors) -> Lane:
        """Return the lane of one of its batches, on its own engine or that of the version that answered."""
        shapes = tuple([array.shape[1:] for array in tensors.values()])
        return Lane(engine.model, engine.version, role, shapes, self.max_batch_size, 0.0)


def shadow_plans(
    route: Route,
    revision: str,
    engines: Mapping[tuple[str, str], Engine],
    limits: Callable[[str, str], BatchingWishes],
    config: Config,
    signature: Signature,
) -> list[ShadowPlan]:
    """Return the shadows of a route that can run: loaded, and taking what its variants take.

    The others are left out, and said to be: a shadow never keeps its route from being served.
    """
    found: list[ShadowPlan] = []
    for shadow in route.shadows:
        engine = engines.get((route.model, shadow.version))
        own = None if engine is None else engine.signature
        if engine is None or own is None:
            why = "its version is not loaded"
        elif own.inputs != signature.inputs:
            why = "its inputs differ from those of the route's variants"
        else:
            wishes = limits(route.model, shadow.version)
            found.append(ShadowPlan(route, shadow, revision, engine, wishes, config))
            continue
        log.warning(
            "shadow_left_out", route=route.name, shadow=shadow.name, version=shadow.version, reason=why
        )
    return found
