"""What is looked at before a change of the routes is announced, so that no worker has to refuse it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from inferfleet.catalogue import Catalogue, VersionFacts
from inferfleet.coordinator.evidence import is_evidence
from inferfleet.core.planning import RouteChange
from inferfleet.errors import ConfigError, ConflictError
from inferfleet.plane import Stored, WorkerReport, version_name
from inferfleet.revisions import RouteLog
from inferfleet.rollouts import ENDED
from inferfleet.routes import Destination, Route, refuse_unsupported

if TYPE_CHECKING:
    from inferfleet.records import Signature

LATEST = "latest"


def resolve_latest(
    tree: Mapping[str, Any], latest: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a parsed routes document with each ``version = "latest"`` as the number that it means now.

    The second value says for each model what it was resolved to. What is no routes document is returned as
    it is: whoever parses it says what is wrong.
    """
    found: dict[str, str] = {}

    def number(model: str) -> str:
        if model not in found:
            found[model] = latest(model)
        return found[model]

    def resolved(entry: Any, model: Any) -> Any:
        if not isinstance(entry, Mapping) or not isinstance(model, str):
            return entry
        plain = dict(entry)
        if plain.get("version") == LATEST:
            plain["version"] = number(model)
        for key in ("variants", "shadows"):
            if isinstance(plain.get(key), list):
                plain[key] = [resolved(each, model) for each in plain[key]]
        return plain

    entries = tree.get("route")
    if not isinstance(entries, list):
        return dict(tree), {}
    made = [resolved(each, each.get("model") if isinstance(each, Mapping) else None) for each in entries]
    return {**tree, "route": made}, found


def standing_after(log: RouteLog, changes: Iterable[RouteChange]) -> list[Route]:
    """Return the routes that stand once the changes are made, announcements of other routes among them."""
    after = {each.name: each.after for each in changes if each.kind != "left"}
    for name in log.kept:
        if name not in after:
            found = log.announced(name) or log.newest(name)
            after[name] = None if found is None else found.route
    return [each for _, each in sorted(after.items()) if each is not None]


def check_together(routes: Sequence[Route]) -> None:
    """Raise ConfigError where two routes cannot stand side by side."""
    by_name = {each.name: each for each in routes}
    sources: dict[tuple[str, Destination], str] = {}
    for each in routes:
        other = sources.setdefault((each.pool, each.source), each.name)
        if other != each.name:
            raise ConfigError(
                f'routes "{other}" and "{each.name}" would share the source {each.source} in pool '
                f'"{each.pool}"; give one of them another pool, or delete one (--prune)'
            )
        if each.shadow_of is not None:
            _check_detached(each, by_name.get(each.shadow_of))


def _check_detached(shadow: Route, primary: Route | None) -> None:
    """A detached shadow sees what another route answers, with workers and a queue of its own."""
    place = f'route "{shadow.name}": shadow_of = "{shadow.shadow_of}"'
    if primary is None:
        raise ConfigError(f"{place} names no route")
    if primary.shadow_of is not None:
        raise ConfigError(f'{place} is a shadow itself; name "{primary.shadow_of}"')
    if primary.pool == shadow.pool:
        raise ConfigError(f'{place} is in the same pool "{shadow.pool}"; a shadow needs workers of its own')
    if primary.input != shadow.input:
        raise ConfigError(f'{place} has input = "{primary.input}", the shadow "{shadow.input}"')
    if primary.source.kind != shadow.source.kind:
        raise ConfigError(f"{place} takes from {primary.source}, the shadow from {shadow.source}")
    if primary.source.kind == "kafka" and primary.source != shadow.source:
        raise ConfigError(f"{place} takes from {primary.source}; source must be the same topic")
    if primary.source.kind == "rabbitmq" and primary.source == shadow.source:
        raise ConfigError(
            f"{place} takes from the same queue, so each would get a part of the requests; name a queue of "
            f'its own that is bound to the exchange of "{primary.source.name}" '
            f"(`inferfleet topics plan {shadow.name}` prints it)"
        )


class _Rollout(msgspec.Struct):
    """What matters here of a stored rollout, whatever release wrote it."""

    route: str = ""
    phase: str = ""


def check_rollouts(changes: Iterable[RouteChange], documents: Mapping[str, Stored]) -> None:
    """Raise ConflictError where a rollout steps a route that is to change: they would undo each other."""
    names = {each.name for each in changes if each.changes}
    for name, stored in sorted(documents.items()):
        if is_evidence(name):
            continue
        try:
            found = msgspec.json.decode(stored.body, type=_Rollout)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # nobody steps what nobody understands
        if found.route in names and found.phase not in ENDED:
            raise ConflictError(
                f"route {found.route} is in rollout {name} ({found.phase}); "
                f"`inferfleet rollout abort {name}` ends it"
            )


def check_moves(changes: Iterable[RouteChange], workers: Iterable[WorkerReport]) -> None:
    """Raise ConflictError for a route that leaves its source or pool while requests wait for it there.

    Its workers stop taking from there at the change, and nobody would answer them. Who takes a route away
    has been asked whether it may go.
    """
    lag: dict[tuple[str, str], int] = {}
    for worker in workers:
        for name, count in worker.lag.items():
            lag[worker.pool, name] = lag.get((worker.pool, name), 0) + count
    for each in changes:
        if not each.changes or each.before is None or each.after is None:
            continue
        waiting = lag.get((each.before.pool, each.name), 0)
        moves = (each.after.source, each.after.pool) != (each.before.source, each.before.pool)
        if moves and waiting:
            raise ConflictError(
                f'route "{each.name}" would leave {each.before.source} in pool "{each.before.pool}", where '
                f"{waiting} requests wait that nobody would answer; let it run empty first"
            )


def check_served(route: Route, catalogue: Catalogue) -> dict[str, str]:
    """Return the digest of each version of a route by ``model:version``; each exists and takes the same.

    Raises ModelRepositoryError for a version that does not, ConfigError for variants whose signatures differ.
    """
    refuse_unsupported(route)
    digests: dict[str, str] = {}
    first: tuple[str, Signature] | None = None
    for version in sorted(route.versions, key=int):
        facts: VersionFacts = catalogue.version(route.model, version)
        digests[version_name(route.model, version)] = facts.digest
        if facts.signature is None:
            continue
        if first is not None and facts.signature.inputs != first[1].inputs:
            raise ConfigError(
                f'route "{route.name}": versions {first[0]} and {version} of model {route.model} differ in '
                "their inputs; variants and shadows must take the same requests"
            )
        first = first or (version, facts.signature)
    return digests
