"""What happens beside a rollout: other routes change, stores lose what they had, workers cannot be heard."""

from __future__ import annotations

from typing import Any

import pytest

from inferfleet.coordinator.routes import RouteControl
from inferfleet.errors import ConflictError
from inferfleet.plane import Change
from tests.support.rollout_fleet import FAST, ROUTE, RolloutFleet, Shelf

NO_SHADOW = {**FAST, "shadow": {"enabled": False}}


def plain(name: str, version: str = "1", **keys: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": f"kafka:{name}.requests",
        "results": [f"kafka:{name}.results"],
        "model": "digits",
        "version": version,
        **keys,
    }


def routes_of(fleet: RolloutFleet) -> RouteControl:
    return RouteControl(fleet.plane, fleet.clock, Shelf(), "fleet", pause=lambda _: fleet.second())


def test_other_routes_change_while_a_rollout_goes_on() -> None:
    """The sums that lie beside the rollout's document are no rollout; its own route is left to it."""
    fleet = RolloutFleet()
    rollout = fleet.start(policy=NO_SHADOW)
    fleet.run(20)
    assert f"{rollout}:evidence" in fleet.plane.documents()
    fleet.plane.commit(Change(actor="x", audit=(), documents={"other-1": (0, b"\x83nonsense")}))
    routes = routes_of(fleet)

    added = routes.plan({"route": [plain("letters", pool="idle")]}, "x").changes
    made = routes.announce([each for each in added if each.changes], author="eva", reason="")

    assert [each.name for each in made] == ["letters"]
    with pytest.raises(ConflictError, match=f"is in rollout {rollout}"):
        routes.plan({"route": [plain(ROUTE, "3")]}, "x")
