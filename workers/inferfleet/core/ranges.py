"""From shares to ranges of buckets, moving as few buckets as can be.

A bucket that changes its variant takes its keys along, so a key would meet two versions for no reason.
When shares change, a variant that shrinks gives up its highest buckets, and exactly as many as it must;
a variant that grows keeps all that it has.
"""

from __future__ import annotations

from collections.abc import Mapping

from inferfleet.variants import BUCKETS, Ranges


def replan(standing: Mapping[str, Ranges], counts: Mapping[str, int]) -> dict[str, Ranges]:
    """Return the ranges of variants that are to own ``counts`` buckets, which sum to all.

    ``standing`` says what the variants own now; together they own every bucket, or nothing is owned yet.
    The number of buckets that change their owner is the least possible: the sum of what shrinking
    variants lose. Raises ValueError where ``counts`` does not sum to all buckets.
    """
    if sum(counts.values()) != BUCKETS or min(counts.values()) < 0:
        raise ValueError(f"shares must sum to {BUCKETS} buckets: {dict(counts)}")
    owner: list[str | None] = [None] * BUCKETS
    for name, ranges in standing.items():
        keep = counts.get(name, 0)
        for low, high in ranges:
            kept = min(high - low, keep)
            owner[low : low + kept] = [name] * kept
            keep -= kept
    missing = {name: count - owner.count(name) for name, count in counts.items()}
    free = [bucket for bucket in range(BUCKETS) if owner[bucket] is None]
    at = 0
    for name, count in missing.items():
        for bucket in free[at : at + count]:
            owner[bucket] = name
        at += count
    return {name: _ranges(owner, name) for name in counts}


def moved(before: Mapping[str, Ranges], after: Mapping[str, Ranges]) -> int:
    """Return how many buckets have another owner after than before."""
    kept = sum(
        max(0, min(high, other_high) - max(low, other_low))
        for name, ranges in after.items()
        for low, high in ranges
        for other_low, other_high in before.get(name, ())
    )
    return BUCKETS - kept


def _ranges(owner: list[str | None], name: str) -> Ranges:
    found: list[tuple[int, int]] = []
    for bucket, each in enumerate(owner):
        if each != name:
            continue
        if found and found[-1][1] == bucket:
            found[-1] = (found[-1][0], bucket + 1)
        else:
            found.append((bucket, bucket + 1))
    return tuple(found)
