"""What ``schemas/`` says of the route log: the schema of a revision, and test vectors of routing in time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from inferfleet import revisions as log
from inferfleet import routes, variants
from inferfleet.core.revisions import in_force
from inferfleet.core.routing import BUCKETS, bucket, sampled
from inferfleet.revisions import NO_HASH, Revision, sealed
from inferfleet.routes import route_of

Document = dict[str, Any]
CASES = 10_000
NOON_MS = 1_800_000_000_000
_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def revision_schema() -> Document:
    """Return the schema of a revision as it is stored."""
    (found,), parts = msgspec.json.schema_components([log._Document], ref_template="#/$defs/{name}")
    top = parts.pop(found["$ref"].rpartition("/")[2])
    top["properties"]["route"] = {"anyOf": [{"$ref": "#/$defs/Route"}, {"type": "null"}]}
    top["properties"]["previous"] = _HASH
    top["properties"]["number"] = {"type": "integer", "minimum": 1}
    top["properties"]["epoch"] = {"type": "integer", "minimum": 0}
    text = (
        "A change of one route in the control plane's log. Its hash is the SHA-256 of its bytes as they are "
        "stored, and `previous` is the hash of the revision before. Without a route it takes the route away; "
        "with `effective_from_ms` null it announces what is to be loaded and routes nothing. Unknown members "
        "belong to a newer release and are left alone."
    )
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:inferfleet:schema:revision:1",
        "title": "Route revision",
    }
    return head | top | {"title": "Route revision", "description": text, "$defs": _route_parts()}


def _route_parts() -> Document:
    """Return the schema of a route in a revision: without the short form, with each variant's ranges."""
    kinds = [routes._RouteTable, variants._VariantTable, variants._ShadowTable]
    _, parts = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    found = {name.strip("_").removesuffix("Table"): part for name, part in parts.items()}
    for name, part in found.items():
        part["title"] = name
        part.pop("description", None)
    route = found["Route"]
    del route["properties"]["version"]
    for name, least in (("variants", 1), ("shadows", 0)):
        kind = name.removesuffix("s").capitalize()
        route["properties"][name] = {
            "type": "array",
            "items": {"$ref": f"#/$defs/{kind}"},
            "minItems": least,
            "maxItems": variants.MAX_VARIANTS,
        }
    route["required"] = sorted({*route["required"], "salt", "variants", "results"})
    bound = {"type": "integer", "minimum": 0, "maximum": BUCKETS}
    pair = {"type": "array", "prefixItems": [bound, bound], "items": False, "minItems": 2}
    found["Variant"]["properties"]["ranges"] = {
        "type": "array",
        "items": pair,
        "minItems": 1,
        "description": "Ascending; each from its first bucket to its last, exclusive.",
    }
    found["Variant"]["required"] = sorted({*found["Variant"]["required"], "ranges"})
    plain: Document = json.loads(json.dumps(found).replace("\\\\Z", "$"))
    return plain


def timed_vectors() -> str:
    """Return routing in event time as a document: a log, and what answers which key at which time."""
    revisions = _log()
    head = {
        "title": "Test vectors of routing in event time",
        "description": (
            "A case is [route, key in hex, head, routing time in ms, bucket, revision, variant, shadows]. "
            "Known are the route's revisions with numbers up to head. In force is the highest-numbered one "
            "whose effective_from_ms is not after the routing time; announcements (null) never are; a time "
            "before all of them means the earliest time that there is. The variant is the one whose ranges "
            "hold the bucket (see routing-vectors.json). A shadow sees the key if its bucket under the salt "
            "'<salt>/shadow/<shadow>' is below sample * 10000."
        ),
        "revisions": [json.loads(each.body) for each in revisions],
    }
    text = json.dumps(head, indent=2, ensure_ascii=False)
    cases = ",\n".join(f"    {json.dumps(case)}" for case in _cases(revisions))
    return f'{text.removesuffix("}").rstrip()},\n  "cases": [\n{cases}\n  ]\n}}\n'


def _cases(revisions: Sequence[Revision]) -> Iterator[list[Any]]:
    starts = sorted({each.effective_from_ms for each in revisions if each.effective_from_ms is not None})
    times = [0, starts[0] - 86_400_000, *(start + near for start in starts for near in (-1, 0, 1, 30_000))]
    for index in range(CASES):
        seed = hashlib.shake_128(b"inferfleet %d" % index).digest(16)
        name = "digits" if seed[0] % 4 else "short"
        mine = [each for each in revisions if each.name == name]
        heads = [each.number for each in mine if each.number >= mine[0].number]
        head = heads[seed[1] % len(heads)]
        time_ms = times[seed[2] % len(times)]
        key = _key(index, seed)
        found = in_force([each for each in mine if each.number <= head], time_ms)
        if found is None or found.route is None:
            raise LookupError(f"case {index} has no revision")
        at = bucket(found.route.salt, key)
        shadows = [
            shadow.name
            for shadow in found.route.shadows
            if sampled(found.route.shadow_salt(shadow), shadow.sample, [key])
        ]
        yield [name, key.hex(), head, time_ms, at, found.number, found.route.variant_at(at).name, shadows]


def _key(index: int, seed: bytes) -> bytes:
    """Return a key: mostly what people use, some of every length at which xxh3 changes its ways."""
    if index % 50 == 0:
        longest = (3, 9, 17, 129, 241, 1_300)[index // 50 % 6]
        return hashlib.shake_128(seed).digest(int.from_bytes(seed[3:5]) % longest)
    if index % 50 == 1:
        return f"Zoë-{index}".encode()
    return b"user-%d" % int.from_bytes(seed[3:6])


def _log() -> list[Revision]:
    """Return two routes' log: ranges in pieces, announcements, an abort that takes effect backwards."""
    minute = 60_000
    steps: list[tuple[str, Mapping[str, Any] | None, int | None, str]] = [
        ("digits", _digits([("stable", "1", [[0, BUCKETS]])]), NOON_MS, "apply"),
        ("short", _short([("stable", "1", [[0, 5_000]]), ("b", "2", [[5_000, BUCKETS]])]), 0, "apply"),
        ("digits", _digits(_CANARY), None, "announce"),
        ("digits", _digits(_CANARY), NOON_MS + 10 * minute, "activate"),
        ("digits", _digits(_QUARTER), NOON_MS + 20 * minute, "activate"),
        ("digits", _digits([("stable", "1", [[0, BUCKETS]])]), NOON_MS + 10 * minute, "abort"),
        ("short", _short([("b", "2", [[0, 1], [5_000, BUCKETS]]), ("stable", "1", [[1, 5_000]])], "other"),
         NOON_MS, "apply"),
        ("digits", _digits([("stable", "3", [[0, BUCKETS]])], _SHADOWS), None, "announce"),
        ("digits", _digits([("stable", "3", [[0, BUCKETS]])], _SHADOWS), NOON_MS + 30 * minute, "activate"),
    ]  # fmt: skip
    found: list[Revision] = []
    for number, (name, route, time_ms, action) in enumerate(steps, 1):
        revision = Revision(
            number=number,
            epoch=0,
            name=name,
            route=None if route is None else route_of(route, "inferfleet", "vectors"),
            effective_from_ms=time_ms,
            at_ms=NOON_MS + number,
            author="eva@example",
            action=action,
            previous=found[-1].hash if found else NO_HASH,
        )
        found.append(sealed(revision))
    return found


Pieces = Sequence[tuple[str, str, list[list[int]]]]
_CANARY: Pieces = [("stable", "1", [[0, 9_500]]), ("canary", "2", [[9_500, BUCKETS]])]
_QUARTER: Pieces = [
    ("stable", "1", [[0, 4_000], [4_500, 8_000]]),
    ("canary", "2", [[4_000, 4_500], [8_000, BUCKETS]]),
]
_SHADOWS = [{"name": "next", "version": "4", "sample": 0.25}, {"name": "all", "version": "5"}]


def _digits(pieces: Pieces, shadows: Sequence[Mapping[str, Any]] = ()) -> Document:
    plain = {"name": "digits", "source": "kafka:digits.requests", "results": ["redis"], "model": "digits"}
    return plain | _variants(pieces) | ({"shadows": list(shadows)} if shadows else {})


def _short(pieces: Pieces, salt: str = "") -> Document:
    """A salt without a character, so that short keys stay short when they are hashed."""
    plain = {"name": "short", "source": "rabbitmq:short", "results": ["reply"], "model": "m", "salt": salt}
    return plain | _variants(pieces)


def _variants(pieces: Pieces) -> Document:
    return {
        "variants": [
            {
                "name": name,
                "version": version,
                "weight": sum(high - low for low, high in held),
                "ranges": held,
            }
            for name, version, held in pieces
        ]
    }
