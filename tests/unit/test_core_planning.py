"""From routes that are wanted to changes: ranges that move least, and a diff that says what moves."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.core.planning import change_of, moved, plan, replanned
from inferfleet.core.revisions import appended
from inferfleet.revisions import EMPTY_LOG, Revision, RouteLog, sealed
from inferfleet.routes import BUCKETS, Route, RouteTable, route_of

NAMES = ("stable", "canary", "c", "d")
variants = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from("1234"), st.integers(1, 40)),
    min_size=1,
    max_size=4,
    unique_by=lambda each: each[0],
)
Spec = list[tuple[str, str, int]]


def route(spec: Spec | None = None, name: str = "r", **keys: Any) -> Route:
    chosen = spec or [("stable", "1", 1)]
    plain = {
        "name": name,
        "source": f"kafka:{name}",
        "results": ["redis"],
        "model": "m",
        "variants": [{"name": n, "version": v, "weight": w} for n, v, w in chosen],
    }
    return route_of({**plain, **keys}, "f", "x")


def log_of(*steps: tuple[str, Route | None, int | None]) -> RouteLog:
    log = EMPTY_LOG
    for number, (name, each, time_ms) in enumerate(steps, 1):
        revision = Revision(
            number=number,
            epoch=0,
            name=name,
            route=each,
            effective_from_ms=time_ms,
            at_ms=number,
            author="a",
            action="apply",
            previous=log.head.hash,
        )
        log = appended(log, [sealed(revision)])
    return log


def table(*routes: Route) -> RouteTable:
    return RouteTable("x", routes)


def owners(found: Route) -> list[str]:
    made = [""] * BUCKETS
    for each in found.variants:
        for low, high in each.ranges:
            made[low:high] = [each.version] * (high - low)
    return made


@settings(deadline=None, max_examples=50)
@given(st.lists(variants, min_size=2, max_size=4))
def test_shares_are_as_asked_and_what_is_said_to_move_moves(history: list[Spec]) -> None:
    """Through any changes: every bucket has one owner, shares are the weights', the count is true."""
    stands = route(history[0])
    for spec in history[1:]:
        wanted = route(spec)
        made = replanned(stands, wanted)
        assert "" not in owners(made)
        assert [each.buckets for each in made.variants] == [each.buckets for each in wanted.variants]
        assert [each.version for each in made.variants] == [each.version for each in wanted.variants]
        changed = sum(a != b for a, b in zip(owners(stands), owners(made), strict=True))
        assert moved(stands, made) == changed
        # No plan moves fewer: what a version loses must go to others.
        before, after = Counter(owners(stands)), Counter(owners(made))
        assert changed == sum(max(0, before[each] - after[each]) for each in before)
        stands = made


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=6))
def test_two_versions_move_exactly_what_their_shares_move(steps: list[int]) -> None:
    """With two variants the moved buckets are the difference of the shares: no fewer can be."""
    stands = route([("stable", "1", 99), ("canary", "2", 1)])
    for share in steps:
        made = replanned(stands, route([("stable", "1", 100 - share), ("canary", "2", share)]))
        assert moved(stands, made) == abs(stands.variants[1].buckets - made.variants[1].buckets)
        stands = made


@settings(deadline=None, max_examples=50)
@given(variants)
def test_the_same_again_changes_nothing(spec: Spec) -> None:
    """Applying a file twice is one change, also where the weights are written in another scale."""
    stands = replanned(route([("stable", "1", 3), ("canary", "2", 1)]), route(spec))
    scaled = [(name, version, weight * 7) for name, version, weight in spec]

    assert replanned(stands, route(spec)) == stands
    assert replanned(stands, route(scaled)) == stands


def test_a_version_keeps_its_keys_under_another_name() -> None:
    """What a key meets is the version: a promoted canary that is now called stable moves only the rest."""
    stands = route([("stable", "1", 50), ("canary", "2", 50)])
    made = replanned(stands, route([("stable", "2", 75), ("old", "1", 25)]))

    assert moved(stands, made) == 2_500


def test_ranges_that_somebody_wrote_are_kept() -> None:
    """Where a file says which buckets, it means them."""
    written = [
        {"name": "stable", "version": "1", "weight": 1, "ranges": [[0, 100], [200, BUCKETS]]},
        {"name": "canary", "version": "2", "weight": 1, "ranges": [[100, 200]]},
    ]
    wanted = route(variants=written)

    assert replanned(route(), wanted) is wanted


def test_a_new_salt_deals_all_anew() -> None:
    """So does another key or another model."""
    for keys in ({"salt": "s"}, {"split_by": "id"}, {"model": "other"}):
        assert moved(route(), route(None, "r", **keys)) == BUCKETS


def test_a_plan_says_what_each_route_goes_through() -> None:
    """Added, changed key by key, unchanged, and left alone unless pruned."""
    log = log_of(
        ("a", route(name="a"), 0), ("b", route(name="b"), 0), ("c", route(name="c"), 0), ("d", None, 0)
    )
    wanted = table(route(name="a"), route([("stable", "2", 1)], name="b", ttl_s=5), route(name="new"))
    left, pruned = plan(log, wanted, prune=False), plan(log, wanted, prune=True)

    assert [(each.name, each.kind, each.number) for each in left] == [
        ("a", "unchanged", 1),
        ("b", "changed", 2),
        ("new", "added", 0),
        ("c", "left", 3),
    ]
    assert [each.kind for each in pruned][3] == "deleted"
    assert [tuple(each) for each in left[1].fields] == [("ttl_s", None, 5)]
    assert [tuple(each) for each in left[1].shares] == [("stable", "1", "2", BUCKETS, BUCKETS)]
    assert left[1].moved == BUCKETS
    assert [each.changes for each in left] == [False, True, True, False]


def test_what_is_announced_already_is_not_announced_twice() -> None:
    """An apply that was cut off goes on; the old content takes the announcement back."""
    new = route([("stable", "2", 1)])
    log = log_of(("r", route(), 0), ("r", new, None))
    (again,) = plan(log, table(new), prune=False)
    (back,) = plan(log, table(route()), prune=False)
    (third,) = plan(log, table(route([("stable", "3", 1)])), prune=False)

    assert (again.kind, again.same, again.changes) == ("changed", True, True)
    assert (back.kind, back.same, back.changes) == ("withdrawn", False, True)
    assert (third.kind, third.same) == ("changed", False)


def test_deleting_names_what_stood() -> None:
    """Nothing moves where nobody is left to answer."""
    found = change_of(log_of(("r", route(), 0)), "r", None)

    assert (found.kind, found.moved, found.after) == ("deleted", 0, None)
