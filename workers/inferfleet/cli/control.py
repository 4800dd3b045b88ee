"""Opens the control plane for the command line: its store, the model catalogue, and who is asking."""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from inferfleet.catalogue import VersionFacts
from inferfleet.config import Config
from inferfleet.coordinator.announcing import Timing
from inferfleet.coordinator.routes import RouteControl
from inferfleet.errors import ModelRepositoryError
from inferfleet.worker.clock import SystemClock

if TYPE_CHECKING:
    from inferfleet.control_ports import ControlStore
    from inferfleet.models.repository import Repository

ANSWER_S = 5.0


class RepositoryCatalogue:
    """Implements :class:`~inferfleet.catalogue.Catalogue` over the repository's folder."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def __repr__(self) -> str:
        return f"RepositoryCatalogue({self._repository!r})"

    def latest(self, model: str) -> str:
        """Return the highest version."""
        versions = self._repository.versions(model)
        if not versions:
            raise ModelRepositoryError(f'model {model} has no version, so "latest" means none')
        return versions[-1]

    def version(self, model: str, version: str) -> VersionFacts:
        """Return what a version is."""
        found = self._repository.look(model, version)
        return VersionFacts(model, version, found.digest, found.signature)


def open_store(config: Config, answer_s: float = ANSWER_S) -> ControlStore:
    """Return the control plane's store; it connects when it is first used. Close it."""
    from inferfleet.control.store import RedisControlStore
    from inferfleet.redis_access import control_place_of, open_redis

    place = replace(control_place_of(config), timeout_s=answer_s)
    return RedisControlStore(
        lambda: open_redis(place),
        config.fleet.name,
        address=place.shown,
        utc_ms=SystemClock().utc_ms,
        horizon_ms=config.routing.horizon_s * 1000,
    )


@contextlib.contextmanager
def opened(config: Config) -> Iterator[ControlStore]:
    """Yield the control plane's store, and close it."""
    with contextlib.closing(open_store(config)) as store:
        yield store


def route_control(config: Config, store: ControlStore) -> RouteControl:
    """Return what plans and makes changes of the routes in a store."""
    from inferfleet.models.repository import Repository

    catalogue = RepositoryCatalogue(Repository(config.models_path, config.models.trusted))
    timing = Timing(config.routing.lead_ms, config.routing.barrier_s)
    return RouteControl(store, SystemClock(), catalogue, config.fleet.name, timing)


def actor() -> str:
    """Return who runs this command, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
