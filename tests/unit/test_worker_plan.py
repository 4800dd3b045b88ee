"""Plans: which variant answers a request, under which limits, and in which lane it waits."""

from __future__ import annotations

import pytest

from inferfleet import config as settings
from inferfleet.config import Config
from inferfleet.core.routing import bucket
from inferfleet.errors import ConfigError
from inferfleet.models.description import Batching
from inferfleet.records import Headers, Requests, Signature, TensorSpec
from inferfleet.routes import Variant
from tests.support.builders import chunk, codes, requests, v2
from tests.support.outlets import route_plan

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))
SPLIT = (Variant("stable", "1", 70, ((0, 7_000),)), Variant("canary", "2", 30, ((7_000, 10_000),)))
SALT = "inferfleet/digits"


def _part(keys: list[bytes | None], headers: list[Headers] | None = None) -> Requests:
    return requests(chunk([b"{}"] * len(keys), headers, keys=keys), range(len(keys)))


def _variants(split_by: str, part: Requests) -> dict[int, str]:
    plan = route_plan(SIGNATURE, variants=SPLIT, split_by=split_by)
    found: dict[int, str] = {}
    for variant, piece in plan.steer(part):
        assert piece.served == variant.served
        assert plan.variant_of(piece.served) is variant
        found |= dict.fromkeys(piece.rows, variant.variant.name)
    assert sorted(found) == part.rows
    return found


def _expected(keys: list[bytes]) -> dict[int, str]:
    return {row: "stable" if bucket(SALT, key) < 7_000 else "canary" for row, key in enumerate(keys)}


def test_requests_are_steered_by_key_and_without_one_by_id() -> None:
    """The same key meets the same version on every worker and every delivery."""
    keys: list[bytes | None] = [b"k%d" % i if i % 3 else None for i in range(60)]
    ids = [f"id-{100 + i}".encode() for i in range(60)]
    wanted = [ids[i] if key is None else key for i, key in enumerate(keys)]
    assert _variants("key", _part(keys)) == _expected(wanted)
    assert _variants("id", _part(keys)) == _expected(ids)


def test_requests_are_steered_by_a_header_whatever_its_case() -> None:
    """Its first value; a record without it falls back to its id."""
    headers: list[Headers] = [
        [("Tenant", b"t%d" % i), ("tenant", b"later")] if i % 2 else None for i in range(40)
    ]
    wanted = [b"t%d" % i if i % 2 else f"id-{100 + i}".encode() for i in range(40)]
    assert _variants("header:tenant", _part([b"k"] * 40, headers)) == _expected(wanted)


def test_one_variant_takes_everything_as_it_is() -> None:
    """No hash, no copy."""
    plan, part = route_plan(SIGNATURE), _part([b"a", b"b"])
    assert plan.steer(part) == [(plan.variants[0], part)]
    assert part.served == plan.variants[0].served
    assert plan.variant_of(None) is None
    assert repr(plan) == "RoutePlan(digits, revision=17)"


def test_variants_must_take_the_same_requests() -> None:
    """A request is read once, before its variant is known."""
    inputs = Signature((TensorSpec("x", "FP32", (5,)),), SIGNATURE.outputs)
    outputs = Signature(SIGNATURE.inputs, (TensorSpec("z", "FP32", (2,)),))
    for other in (inputs, outputs):
        with pytest.raises(ConfigError, match="route digits: versions 1 and 2 of model m differ"):
            route_plan(SIGNATURE, variants=SPLIT, signatures={"2": other})
    wider = Signature(SIGNATURE.inputs, (TensorSpec("y", "FP64", (2,)),))
    route_plan(SIGNATURE, variants=SPLIT, signatures={"2": wider})


def test_batching_is_the_routes_then_the_models_then_the_fleets() -> None:
    """And is capped by what may be in flight."""
    part = _part([b"a"])

    def limits(model: int | None, route: int | None, in_flight: int = 20_000) -> int:
        config = Config(worker=settings.Worker(id="w"), limits=settings.Limits(in_flight_rows=in_flight))
        plan = route_plan(
            SIGNATURE, batching=Batching(max_batch_size=model), max_batch_size=route, config=config
        )
        return plan.variants[0].lane(part).max_batch_size

    assert [limits(None, None), limits(16, None), limits(16, 8), limits(None, 500, 100)] == [64, 16, 8, 100]


def test_a_version_may_bound_the_rows_of_a_request() -> None:
    """The smallest wish of all variants, since a request is read before its variant is known."""
    plan = route_plan(SIGNATURE, batching=Batching(max_rows=2))
    bodies: list[bytes | None] = [v2([0] * 4 * rows, [rows, 4]) for rows in (2, 3)]
    assert codes(plan.decoder.decode(chunk(bodies))) == {1: "E_TOO_LARGE"}


def test_requests_of_equal_shapes_share_a_lane() -> None:
    """Odd shapes get lanes of their own; a model may refuse sorting by length."""
    plan = route_plan(SIGNATURE, batching=Batching(sort_by_length=False))
    variant = plan.variants[0]
    one, two = _part([b"a"]), _part([b"b"])
    two.costs = [7]
    assert variant.lane(one) is variant.lane(two)
    assert two.costs is None
    two.tensors = {"x": two.tensors["x"][:, :3]}
    assert variant.lane(two).shapes == ((3,),)


def test_names_of_topics_come_from_the_route_and_the_pool() -> None:
    """Dead letters stand beside the source, one set a group."""
    plan = route_plan(SIGNATURE, results=["kafka:out", "redis", "kafka:copy"])
    assert (plan.destinations, plan.redis, plan.source) == (["out", "copy"], True, "digits.requests")
    assert plan.dead_letters == "digits.requests.inferfleet.default.dlt"
