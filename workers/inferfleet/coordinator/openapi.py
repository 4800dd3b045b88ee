"""The OpenAPI 3.1 description of the API, made from the table of endpoints and the message types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from inferfleet.coordinator.endpoints import ENDPOINTS, Endpoint
from inferfleet.coordinator.gate import MAX_BODY_BYTES
from inferfleet.coordinator.messages import ErrorBody
from inferfleet.coordinator.refusals import CODES
from inferfleet.coordinator.tokens import Role

Document = dict[str, Any]
_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_ALWAYS = (400, 404, 421, 429, 500, 503)
_PARTS = {
    "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$", "description": "A route's name."},
    "id": {"type": "string", "minLength": 1, "description": "A rollout's id."},
}
_TAG = {"type": "string", "description": "The number of the route's last revision, in quotes."}


def description(endpoints: Sequence[Endpoint] = ENDPOINTS) -> Document:
    """Return the description."""
    schemas, parts = _components(endpoints)
    paths: Document = {}
    for each in endpoints:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "inferfleet coordinator",
            "version": "1",
            "description": "Routes, rollouts, workers and the audit log of a fleet.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": parts,
            "responses": {str(status): _error(text, schemas[ErrorBody]) for status, text in CODES.items()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _components(endpoints: Sequence[Endpoint]) -> tuple[dict[Any, Document], Document]:
    kinds: list[Any] = [ErrorBody]
    for each in endpoints:
        kinds += [kind for kind in (each.answer, each.body) if kind is not None]
    kinds = list(dict.fromkeys(kinds))
    found, parts = msgspec.json.schema_components(kinds, ref_template=_REF)
    return dict(zip(kinds, found, strict=True)), dict(sorted(parts.items()))


def _operation(each: Endpoint, schemas: dict[Any, Document]) -> Document:
    operation: Document = {
        "operationId": each.name,
        "summary": each.summary,
        "description": _who(each.role),
        "security": [] if each.role is None else [{"token": []}],
        "parameters": _parameters(each),
        "responses": _responses(each, schemas),
    }
    if each.body is not None:
        needed = any(field.required for field in msgspec.structs.fields(each.body))
        operation["requestBody"] = {
            "required": needed,
            "description": f"At most {MAX_BODY_BYTES} bytes.",
            "content": {_JSON: {"schema": schemas[each.body]}},
        }
    return {key: value for key, value in operation.items() if value or key == "security"}


def _who(role: Role | None) -> str:
    return "For everybody." if role is None else f"For the role {role.word} and those above."


def _parameters(each: Endpoint) -> list[Document]:
    found: list[Document] = [
        {"name": part, "in": "path", "required": True, "schema": schema}
        for part, schema in _PARTS.items()
        if f"{{{part}}}" in each.path
    ]
    if each.conditional:
        found.append({"name": "If-Match", "in": "header", "required": True, "schema": _TAG})
    (top,), parts = msgspec.json.schema_components([each.query], ref_template=_REF)
    schema = parts[top["$ref"].rpartition("/")[2]]
    found += [
        {"name": name, "in": "query", "required": False, "schema": kind}
        for name, kind in schema.get("properties", {}).items()
    ]
    return found


def _responses(each: Endpoint, schemas: dict[Any, Document]) -> Document:
    done: Document = {"description": each.summary + ".", "content": {}}
    if each.answer is not None:
        done["content"] = {_JSON: {"schema": schemas[each.answer]}}
    elif each.media == _JSON:
        done["content"] = {_JSON: {"schema": {"type": "object"}}}
    else:
        done["content"] = {each.media: {"schema": {"type": "string"}}}
    if each.tagged:
        done["headers"] = {"ETag": {"required": True, "schema": _TAG}}
    found: Document = {str(each.status): done}
    if "dry_run" in each.query.__struct_fields__:
        found["200"] = done | {"description": "What would be changed."}
    for status in sorted({*_ALWAYS, *_refusals(each)}):
        found[str(status)] = {"$ref": f"#/components/responses/{status}"}
    return found


def _refusals(each: Endpoint) -> set[int]:
    found: set[int] = set()
    if each.role is not None:
        found |= {401, 403}
    if each.method != "GET":
        found |= {403, 409}
    if each.body is not None:
        found |= {408, 413, 415}
    if each.conditional:
        found |= {412, 428}
    return found


def _error(text: str, schema: Document) -> Document:
    return {"description": text, "content": {_JSON: {"schema": schema}}}
