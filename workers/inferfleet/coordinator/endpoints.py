"""The table of everything that may be asked: it feeds the gate, the handlers and the OpenAPI description.

What is not in the table does not exist. ``role`` ``None`` marks the few pages that hold no data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from inferfleet.coordinator import messages as m
from inferfleet.coordinator.handlers import Asked, Handlers, Reply
from inferfleet.coordinator.tokens import Role

Handler = Callable[[Handlers, Asked], Reply]


class Endpoint(NamedTuple):
    """One method of one path, who may use it, what it reads and writes.

    ``conditional`` endpoints need ``If-Match``. ``status`` is that of success. ``media`` other than JSON
    belongs to the dashboard's own files.
    """

    method: str
    path: str
    role: Role | None
    handler: Handler
    answer: type[msgspec.Struct] | None
    status: int = 200
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] = m.NoQuery
    conditional: bool = False
    tagged: bool = False
    media: str = "application/json"

    @property
    def name(self) -> str:
        """Its name in the OpenAPI description."""
        return self.handler.__name__

    @property
    def summary(self) -> str:
        """The first line of what the handler says of itself."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0].rstrip(".")


_ACTIONS: tuple[tuple[str, Role, Handler], ...] = (
    ("pause", Role.OPERATOR, Handlers.pause_rollout),
    ("resume", Role.OPERATOR, Handlers.resume_rollout),
    ("abort", Role.OPERATOR, Handlers.abort_rollout),
    ("promote", Role.DEPLOYER, Handlers.promote_rollout),
    ("approve", Role.DEPLOYER, Handlers.approve_rollout),
)
_SAID = {"approve": m.ApproveRequest}

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/v1/routes", Role.VIEWER, Handlers.list_routes, m.RoutesPage, query=m.PageQuery),
    *(
        Endpoint(
            method,
            "/v1/routes",
            Role.DEPLOYER,
            handler,
            m.Applied,
            202,
            body=m.ApplyRequest,
            query=m.ApplyQuery,
        )
        for method, handler in (("POST", Handlers.apply_routes), ("PUT", Handlers.replace_routes))
    ),
    Endpoint("GET", "/v1/routes/{name}", Role.VIEWER, Handlers.show_route, m.RouteView, tagged=True),
    Endpoint(
        "PUT",
        "/v1/routes/{name}",
        Role.DEPLOYER,
        Handlers.put_route,
        m.Applied,
        202,
        body=m.RouteRequest,
        conditional=True,
        tagged=True,
    ),
    Endpoint(
        "DELETE",
        "/v1/routes/{name}",
        Role.DEPLOYER,
        Handlers.delete_route,
        m.Applied,
        202,
        query=m.DeleteQuery,
        conditional=True,
        tagged=True,
    ),
    Endpoint(
        "GET",
        "/v1/routes/{name}/revisions",
        Role.VIEWER,
        Handlers.list_revisions,
        m.RevisionsPage,
        query=m.RevisionsQuery,
    ),
    Endpoint(
        "POST",
        "/v1/routes/{name}/revert",
        Role.DEPLOYER,
        Handlers.revert_route,
        m.Applied,
        202,
        body=m.RevertRequest,
    ),
    Endpoint("POST", "/v1/reset", Role.ADMIN, Handlers.reset_routes, m.Applied, 202, body=m.ResetRequest),
    Endpoint("GET", "/v1/rollouts", Role.VIEWER, Handlers.list_rollouts, m.RolloutsPage, query=m.PageQuery),
    Endpoint(
        "POST", "/v1/rollouts", Role.DEPLOYER, Handlers.start_rollout, m.RolloutView, 201, m.RolloutRequest
    ),
    Endpoint("GET", "/v1/rollouts/{id}", Role.VIEWER, Handlers.show_rollout, m.RolloutView),
    *(
        Endpoint(
            "POST",
            f"/v1/rollouts/{{id}}/{verb}",
            role,
            handler,
            m.RolloutView,
            body=_SAID.get(verb, m.ReasonRequest),
        )
        for verb, role, handler in _ACTIONS
    ),
    Endpoint("GET", "/v1/workers", Role.VIEWER, Handlers.list_workers, m.WorkersPage, query=m.PageQuery),
    Endpoint("GET", "/v1/models", Role.VIEWER, Handlers.list_models, m.ModelsPage, query=m.PageQuery),
    Endpoint("GET", "/v1/audit", Role.VIEWER, Handlers.list_audit, m.AuditPage, query=m.AuditQuery),
    Endpoint("GET", "/openapi.json", Role.VIEWER, Handlers.describe, None),
    Endpoint("GET", "/", None, Handlers.page, None, media="text/html; charset=utf-8"),
    Endpoint("GET", "/dashboard.css", None, Handlers.style, None, media="text/css; charset=utf-8"),
    Endpoint("GET", "/dashboard.js", None, Handlers.script, None, media="text/javascript; charset=utf-8"),
)


class Found(NamedTuple):
    """The endpoint that a request is for, and the parts of its path."""

    endpoint: Endpoint
    parts: Mapping[str, str]


class Matcher:
    """Finds the endpoint of a method and path."""

    def __init__(self, endpoints: tuple[Endpoint, ...] = ENDPOINTS) -> None:
        self._paths: dict[str, dict[str, Endpoint]] = {}
        for each in endpoints:
            self._paths.setdefault(each.path, {})[each.method] = each
        self._patterns = [(re.compile(_pattern(path)), found) for path, found in self._paths.items()]

    def find(self, method: str, path: str) -> Found | frozenset[str]:
        """Return the endpoint; else the methods that the path has, none where there is no such path.

        HEAD is GET without the body.
        """
        for pattern, by_method in self._patterns:
            match = pattern.fullmatch(path)
            if match is not None:
                endpoint = by_method.get("GET" if method == "HEAD" else method)
                if endpoint is None:
                    return frozenset(by_method) | ({"HEAD"} if "GET" in by_method else frozenset[str]())
                return Found(endpoint, match.groupdict())
        return frozenset()


def _pattern(path: str) -> str:
    parts: list[Any] = re.split(r"\{(\w+)\}", path)
    return "".join(f"(?P<{part}>[^/]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
