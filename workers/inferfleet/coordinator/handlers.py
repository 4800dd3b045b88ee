"""What the API answers. Each handler is called on a thread, after the gate has let the request pass."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from inferfleet.coordinator import messages as m
from inferfleet.coordinator.audit_tail import AuditTail
from inferfleet.coordinator.refusals import RefusedError, not_found
from inferfleet.coordinator.rollouts import Seen
from inferfleet.coordinator.services import FleetService, ModelService, RolloutService, RouteService
from inferfleet.coordinator.tokens import Caller
from inferfleet.core.planning import RouteChange
from inferfleet.errors import ConflictError
from inferfleet.revisions import Revision, RouteLog
from inferfleet.routes import Route, plain_route

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_TAG = re.compile(r'(W/)?"([^"]*)"')

Item = TypeVar("Item")


class Asked(NamedTuple):
    """A request that may be answered: who asks, and the path's parts, query, body and precondition."""

    caller: Caller
    parts: Mapping[str, str]
    query: Any
    body: Any
    if_match: str | None


class Reply(NamedTuple):
    """What is answered; bytes go out as they are, anything else as JSON."""

    body: Any
    status: int | None = None
    headers: Mapping[str, str] = {}


class Pages(NamedTuple):
    """The files that are served as they are: the description and the dashboard's three."""

    description: bytes
    html: bytes
    css: bytes
    script: bytes


class Handlers:
    """All handlers over the services. ``now_ms`` returns epoch milliseconds."""

    def __init__(
        self,
        routes: RouteService,
        rollouts: RolloutService,
        fleet: FleetService,
        models: ModelService,
        pages: Pages,
        now_ms: Callable[[], int],
    ) -> None:
        self._routes = routes
        self._rollouts = rollouts
        self._fleet = fleet
        self._models = models
        self._pages = pages
        self._now_ms = now_ms
        self._tail = AuditTail(fleet)

    # Routes

    def list_routes(self, asked: Asked) -> Reply:
        """List the routes with what stands and what waits."""
        log = self._routes.log()
        names = sorted(name for name in log.kept if _exists(log, name))
        shown, after = _page(names, asked.query, lambda name: name)
        routes = [_view(log, name) for name in shown]
        return Reply(m.RoutesPage(head=m.HeadView.of(log.head), routes=routes, next=after))

    def apply_routes(self, asked: Asked) -> Reply:
        """Apply a whole table of routes, or say what that would change."""
        changes = self._routes.planned(asked.body.routes, prune=asked.body.prune)
        _check_bounds(asked.caller, [each.name for each in changes if each.changes])
        if asked.query.dry_run:
            return Reply(_applied(changes, (), dry_run=True), 200)
        return self._announce(changes, asked.caller, asked.body.reason, "apply")

    def replace_routes(self, asked: Asked) -> Reply:
        """Apply a whole table of routes, as POST does."""
        return self.apply_routes(asked)

    def show_route(self, asked: Asked) -> Reply:
        """Show a route; its ETag is what a change names in If-Match."""
        name = asked.parts["name"]
        log = self._routes.log()
        if not _exists(log, name):
            raise not_found(f'no route is named "{name}"' if _NAME.fullmatch(name) else "no such route")
        return Reply(_view(log, name), headers={"etag": _tag(log.latest(name))})

    def put_route(self, asked: Asked) -> Reply:
        """Add or change one route; a new one is put with If-Match "0"."""
        name = _route_name(asked)
        entry = {"name": name, **asked.body.route}
        if entry["name"] != name:
            raise RefusedError(400, "E_INVALID", "the route's name is not that of the path")
        _check_bounds(asked.caller, [name])
        # A plan names the routes that it leaves alone, too.
        change = next(each for each in self._routes.planned([entry], prune=False) if each.name == name)
        return self._conditional(change, asked, asked.body.reason, "apply")

    def delete_route(self, asked: Asked) -> Reply:
        """Take a route away."""
        name = _route_name(asked)
        _check_bounds(asked.caller, [name])
        if not _exists(self._routes.log(), name):
            raise not_found(f'no route is named "{name}"')
        return self._conditional(self._routes.removal(name), asked, asked.query.reason, "delete")

    def list_revisions(self, asked: Asked) -> Reply:
        """List a route's revisions, newest first."""
        name, query = _route_name(asked), asked.query
        found = self._routes.history(name, before=query.before, limit=query.limit + 1)
        shown = found[: query.limit]
        if not shown and not query.before:
            raise not_found(f'no route was ever named "{name}"')
        after = shown[-1].number if len(found) > len(shown) else 0
        return Reply(m.RevisionsPage(revisions=[m.RevisionView.of(each) for each in shown], next=after))

    def revert_route(self, asked: Asked) -> Reply:
        """Let a route be again as an older revision says."""
        name = _route_name(asked)
        _check_bounds(asked.caller, [name])
        change = self._routes.reversal(name, asked.body.revision)
        return self._announce([change], asked.caller, asked.body.reason, "revert")

    def reset_routes(self, asked: Asked) -> Reply:
        """Start a new log that holds these routes alone, above everything that workers know."""
        if asked.caller.routes is not None:
            text = "a token that is bound to routes may not start a new log, which is for all of them"
            raise RefusedError(403, "E_FORBIDDEN", text)
        changes = self._routes.plan_reset({"route": asked.body.routes}, "routes").changes
        reason = _plain(asked.body.reason)
        done = self._routes.reset(changes, author=asked.caller.name, reason=reason)
        return Reply(_applied(changes, [each.revision for each in done if each.revision], dry_run=False))

    def _conditional(self, change: RouteChange, asked: Asked, reason: str, action: str) -> Reply:
        exists = change.before is not None or change.pending is not None
        if not _matches(asked.if_match or "", change.number if exists else 0):
            said = f"is at revision {change.number}" if exists else "does not exist"
            raise RefusedError(412, "E_STALE", f"route {change.name} {said}")
        try:
            reply = self._announce([change], asked.caller, reason, action)
        except ConflictError:
            raise RefusedError(412, "E_STALE", f"route {change.name} was changed meanwhile") from None
        number = reply.body.revisions[-1].number if reply.body.revisions else change.number
        return reply._replace(headers={"etag": _tag(number)})

    def _announce(self, changes: Sequence[RouteChange], caller: Caller, reason: str, action: str) -> Reply:
        written = [each for each in changes if each.changes and not each.same]
        revisions: Sequence[Revision] = ()
        if written:
            revisions = self._routes.announce(
                written, author=caller.name, reason=_plain(reason), action=action
            )
        return Reply(_applied(changes, revisions, dry_run=False))

    # Rollouts

    def list_rollouts(self, asked: Asked) -> Reply:
        """List rollouts, newest first."""
        found = list(self._rollouts.list())
        ids = [each.id for each in found]
        first = ids.index(asked.query.after) + 1 if asked.query.after in ids else 0
        shown = found[first : first + asked.query.limit]
        after = shown[-1].id if first + len(shown) < len(found) else ""
        return Reply(m.RolloutsPage(rollouts=shown, next=after))

    def start_rollout(self, asked: Asked) -> Reply:
        """Start a rollout of a version on a route."""
        request: m.RolloutRequest = asked.body
        _check_bounds(asked.caller, [request.route])
        request = msgspec.structs.replace(request, reason=_plain(request.reason))
        return Reply(self._rollouts.start(request, author=asked.caller.name))

    def show_rollout(self, asked: Asked) -> Reply:
        """Show a rollout."""
        return Reply(self._rollout(asked))

    def pause_rollout(self, asked: Asked) -> Reply:
        """Let a rollout stay where it is until it is resumed."""
        return self._act(asked, "pause")

    def resume_rollout(self, asked: Asked) -> Reply:
        """Let a paused rollout go on."""
        return self._act(asked, "resume")

    def abort_rollout(self, asked: Asked) -> Reply:
        """Take a rollout back, for records that wait too."""
        return self._act(asked, "abort")

    def promote_rollout(self, asked: Asked) -> Reply:
        """Let the new version answer everything, whatever the evidence says; gates stay gates."""
        return self._act(asked, "promote")

    def approve_rollout(self, asked: Asked) -> Reply:
        """Approve the step that a rollout waits for."""
        return self._act(asked, "approve", Seen(asked.body.digest, asked.body.policy))

    def _act(self, asked: Asked, verb: str, seen: Seen | None = None) -> Reply:
        found = self._rollout(asked)
        _check_bounds(asked.caller, [found.route])
        reason = _plain(asked.body.reason)
        return Reply(self._rollouts.act(found.id, verb, author=asked.caller.name, reason=reason, seen=seen))

    def _rollout(self, asked: Asked) -> m.RolloutView:
        try:
            return self._rollouts.get(asked.parts["id"])
        except LookupError:
            raise not_found("no such rollout") from None

    # What is only read

    def list_workers(self, asked: Asked) -> Reply:
        """List the workers that have reported lately."""
        workers = sorted(self._fleet.workers(), key=lambda each: f"{each.pool}/{each.worker}")
        shown, after = _page(workers, asked.query, lambda each: f"{each.pool}/{each.worker}")
        return Reply(m.WorkersPage(workers=shown, now_ms=self._now_ms(), next=after))

    def list_models(self, asked: Asked) -> Reply:
        """List the models of the repository."""
        shown, after = _page(self._models.models(), asked.query, lambda each: each.name)
        return Reply(m.ModelsPage(models=shown, next=after))

    def list_audit(self, asked: Asked) -> Reply:
        """List who changed what, in order."""
        query: m.AuditQuery = asked.query
        first = max(0, self._tail.last() - query.limit) if query.newest else query.after
        found = self._fleet.audit(after=first, limit=query.limit + 1)
        shown = [
            m.AuditView.of(entry, hashlib.sha256(body).hexdigest()) for entry, body in found[: query.limit]
        ]
        after = shown[-1].number if len(found) > len(shown) else 0
        return Reply(m.AuditPage(entries=shown, next=after))

    def describe(self, asked: Asked) -> Reply:  # noqa: ARG002
        """Describe this API in the words of OpenAPI 3.1."""
        return Reply(self._pages.description)

    def page(self, asked: Asked) -> Reply:  # noqa: ARG002
        """The dashboard's page."""
        return Reply(self._pages.html)

    def style(self, asked: Asked) -> Reply:  # noqa: ARG002
        """The dashboard's style."""
        return Reply(self._pages.css)

    def script(self, asked: Asked) -> Reply:  # noqa: ARG002
        """The dashboard's script."""
        return Reply(self._pages.script)


def _exists(log: RouteLog, name: str) -> bool:
    standing = log.newest(name)
    return log.announced(name) is not None or (standing is not None and standing.route is not None)


def _view(log: RouteLog, name: str) -> m.RouteView:
    standing, pending = log.newest(name), log.announced(name)
    return m.RouteView(
        name=name,
        revision=log.latest(name),
        standing=None if standing is None else m.RevisionView.of(standing),
        pending=None if pending is None else m.RevisionView.of(pending),
    )


def _applied(changes: Sequence[RouteChange], revisions: Sequence[Revision], *, dry_run: bool) -> m.Applied:
    return m.Applied(
        dry_run=dry_run,
        changes=[
            m.RouteChange(
                name=each.name, before=_plain_or_none(each.before), after=_plain_or_none(each.after)
            )
            for each in changes
            if each.changes
        ],
        revisions=[m.RevisionView.of(each) for each in revisions],
    )


def _plain_or_none(route: Route | None) -> dict[str, Any] | None:
    return None if route is None else plain_route(route)


def _route_name(asked: Asked) -> str:
    name = asked.parts["name"]
    if not _NAME.fullmatch(name):
        raise not_found("no such route")
    return name


def _check_bounds(caller: Caller, names: Sequence[str]) -> None:
    for name in names:
        if not caller.may_change(name):
            raise RefusedError(403, "E_FORBIDDEN", f"this token may not change route {name}")


def _tag(number: int) -> str:
    return f'"{number}"'


def _matches(if_match: str, number: int) -> bool:
    """Say whether a precondition holds for a route's last revision; 0: there is none yet.

    ``*`` asks only that there is one. Weak tags never match (RFC 9110, section 13.1.1).
    """
    if if_match.strip() == "*":
        return number > 0
    return any(not weak and tag == str(number) for weak, tag in _TAG.findall(if_match))


def _plain(reason: str) -> str:
    """Return the reason in one line without control characters: it is shown on terminals."""
    return " ".join("".join(each if each.isprintable() else " " for each in reason).split())


def _page(items: Sequence[Item], query: m.PageQuery, key: Callable[[Item], str]) -> tuple[list[Item], str]:
    """Return the items behind ``after``, which are in order of their keys, and where to go on."""
    left = [each for each in items if key(each) > query.after]
    shown = left[: query.limit]
    return shown, key(shown[-1]) if len(left) > len(shown) else ""
