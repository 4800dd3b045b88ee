"""Which versions a log wants loaded, and what a route is served by where some of it cannot be."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import msgspec
import pytest

from inferfleet.config import Config, Worker
from inferfleet.errors import ConfigError
from inferfleet.models.description import Batching
from inferfleet.ports import LoadedModel
from inferfleet.records import Signature, TensorSpec
from inferfleet.revisions import Head, Revision, RouteLog
from inferfleet.routes import Destination, Route
from inferfleet.testing.clock import FakeClock
from inferfleet.variants import Shadow, Variant
from inferfleet.worker.adopting import Adopting
from inferfleet.worker.engine import Engine
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.versions import Version

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
OTHER = Signature((TensorSpec("z", "FP32", (4,)),), SIGNATURE.outputs)


def route(*versions: str, **other: Any) -> Route:
    """Return a route of pool ``default`` whose variants, of equal size, are of these versions."""
    bounds = [10_000 * i // len(versions) for i in range(len(versions) + 1)]
    variants = tuple(
        Variant(f"v{version}", version, 1.0, ((bounds[i], bounds[i + 1]),))
        for i, version in enumerate(versions)
    )
    values: dict[str, Any] = {"results": (Destination("kafka", "out"),), "variants": variants} | other
    return Route(name="r", source=Destination("kafka", "in"), model="m", salt="s", **values)


def log(*steps: tuple[int | None, Route | None]) -> RouteLog:
    """Return the log of revisions 1, 2, ... with these times."""
    revisions = tuple(
        Revision(
            number=i + 1,
            epoch=0,
            name="r",
            route=each,
            effective_from_ms=start,
            at_ms=0,
            author="a",
            action="apply",
        )
        for i, (start, each) in enumerate(steps)
    )
    return RouteLog(Head(0, len(revisions), "h"), {"r": revisions}, str(len(revisions)))


def never_loaded() -> LoadedModel:
    raise AssertionError("nothing loads here")


def engines(*versions: str, odd: str = "") -> dict[Version, Engine]:
    """Return loaded versions; the ``odd`` one takes other inputs than the rest."""
    found: dict[Version, Engine] = {}
    for version in versions:
        engine = Engine("m", version, never_loaded, SimpleQueue(), FakeClock())
        engine.signature = OTHER if version == odd else SIGNATURE
        found["m", version] = engine
    return found


def adopting(found: RouteLog, refuses: str = "") -> Adopting:
    """Return one that has heard of a log; plans that publish to ``refuses`` cannot be served."""

    def check(plan: RoutePlan) -> None:
        if refuses in plan.destinations:
            raise ConfigError(f"nothing publishes to {refuses}")

    made = Adopting(Config(worker=Worker(id="w")), lambda *_: Batching(), check)
    made.found(found)
    return made


def test_versions_to_go_back_to_are_loaded_as_what_answers() -> None:
    """A rollback waits for no barrier: what it goes back to has to be there, beyond any horizon."""
    shadow = Shadow("s", "3", 1.0, 0.0)
    made = adopting(log((0, route("1")), (10, route("2", shadows=(shadow,), warm=("1",)))))
    late = 10 + 100 * 3_600_000
    assert made.wanted(late).live == [("m", "2"), ("m", "3"), ("m", "1")]
    assert made.wanted(late).past == []


def test_a_version_to_go_back_to_keeps_no_route_from_being_served() -> None:
    made = adopting(log((0, route("2", warm=("1",)))))
    (schedule,) = made.schedules(engines("2"), 5)
    assert schedule.plan.variants[0].served.version == "2"


def test_an_announcement_is_ready_when_what_it_keeps_warm_is() -> None:
    """As the barrier counts it; otherwise nobody would ever be ready, or a rollback not be prepared."""
    made = adopting(log((0, route("1")), (None, route("1", warm=("8",)))))
    assert made.wanted(5).announced == [("m", "1"), ("m", "8")]
    made.schedules(engines("1"), 5)
    assert made.adopted == {"r": 1}
    made.schedules(engines("1", "8"), 5)
    assert made.adopted == {"r": 2}


def test_a_revision_that_is_over_and_cannot_be_served_holds_up_none_that_follows() -> None:
    """Its late records have the stable version, and the outcome says so."""
    found = log((0, route("1")), (10, route("1", "2")), (20, route("1")))
    made = adopting(found)
    loaded = engines("1", "2", odd="2")
    made.schedules(loaded, 15)
    assert (set(made.refused), made.adopted) == ({"r"}, {})
    (schedule,) = made.schedules(loaded, 25)
    assert made.adopted == {"r": 3}
    assert [schedule.at(time_ms).variants[0].served.fallback for time_ms in (5, 15, 25)] == [
        False,
        True,
        False,
    ]


def test_what_is_left_of_an_old_revision_goes_nowhere_that_is_closed() -> None:
    """Its other version is gone, and so is the broker that it published to: the revision of now answers."""
    old = route("1", "2", results=(Destination("kafka", "gone"),))
    made = adopting(log((0, old), (10, route("1"))), refuses="gone")
    (schedule,) = made.schedules(engines("1"), 20)
    late = schedule.at(5)
    assert (late.destinations, late.variants[0].served.fallback) == (["out"], True)


@pytest.mark.parametrize("pool", ["default", "other"])
def test_only_versions_of_the_own_pool_are_wanted(pool: str) -> None:
    given = msgspec.structs.replace(route("1", warm=("2",)), pool=pool)
    wanted = adopting(log((0, given))).wanted(5)
    assert len(wanted.live) == (2 if pool == "default" else 0)
