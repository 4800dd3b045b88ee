"""The routes that a rollout goes through: which version owns which buckets in each phase. Pure.

Ranges come from :func:`inferfleet.core.ranges.replan`, so a key that has met the new version stays with it
until an abort, and the control slice gives no key to the canary nor takes one from it.
"""

from __future__ import annotations

from functools import lru_cache

from inferfleet.core.ranges import replan
from inferfleet.evidence import CANARY, CONTROL
from inferfleet.rollouts import replace
from inferfleet.routes import Route
from inferfleet.variants import BUCKETS, Ranges, Shadow, Variant

STABLE = "stable"
CANDIDATE = "candidate"


def shadowed(before: Route, version: str, sample: float, secondary: float) -> Route:
    """Return the route with the new version as a shadow beside those that it has."""
    taken = {shadow.name for shadow in before.shadows}
    name = CANDIDATE if CANDIDATE not in taken else f"{CANDIDATE}-{version}"
    added = Shadow(name, version, sample, secondary)
    return replace(before, shadows=(*before.shadows, added))


def stepped(before: Route, current: Route, version: str, percent: float, *, control: bool) -> Route:
    """Return the route on which the new version owns ``percent`` of the buckets, the control slice as many.

    ``current`` says who owns what now. What is left is the stable variant's; with nothing left there is none.
    """
    canary = max(1, round(percent * BUCKETS / 100))
    slice_ = min(canary, BUCKETS - canary) if control else 0
    return divided(before, current, version, canary=canary, control=slice_)


@lru_cache(maxsize=256)
def divided(before: Route, current: Route, version: str, *, canary: int, control: int) -> Route:
    """Return the route with so many buckets for the canary and the control slice, the rest being stable's."""
    old = before.variants[0].version
    stable = stable_name(before)
    counts = {stable: BUCKETS - canary - control, CONTROL: control, CANARY: canary}
    counts = {name: count for name, count in counts.items() if count}
    ranges = replan(_standing(current, stable), counts)
    versions = {stable: old, CONTROL: old, CANARY: version}
    variants = tuple(
        Variant(name, versions[name], count * 100 / BUCKETS, ranges[name]) for name, count in counts.items()
    )
    return replace(before, variants=variants)


def promoted(before: Route, version: str, *, warm: bool) -> Route:
    """Return the route that the new version answers alone; ``warm`` keeps the old one loaded."""
    variants = tuple(each._replace(version=version) for each in before.variants)
    old = before.variants[0].version
    kept = tuple(each for each in before.warm if each not in (old, version))
    return replace(before, variants=variants, warm=(*kept, old) if warm else kept)


def stable_name(route: Route) -> str:
    """Return the name of the variant that answers what no slice does."""
    name = route.variants[0].name
    return STABLE if name in (CANARY, CONTROL) else name


def _standing(current: Route, stable: str) -> dict[str, Ranges]:
    """Return who owns which buckets now, all but the slices as one: they answer with the same version."""
    standing = {each.name: each.ranges for each in current.variants if each.name in (CANARY, CONTROL)}
    rest = sorted(pair for each in current.variants if each.name not in standing for pair in each.ranges)
    return {stable: tuple(rest), **standing} if rest else standing
