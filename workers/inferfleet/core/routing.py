"""Which variant answers a request: a pure function of the route, the salt and the key.

``bucket = xxh3_64(salt + ":" + key) * 10_000 >> 64`` (unsigned 64-bit hash, so the bucket is the hash
scaled to 0..9999). A variant owns explicit ranges of buckets. The formula is public: any language
with xxh3 agrees on it, and no broker's partitioner hash takes part, or variants would line up with
partitions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import xxhash

from inferfleet.variants import BUCKETS as BUCKETS
from inferfleet.variants import Ranges


def bucket(salt: str, key: bytes) -> int:
    """Return the bucket of ``key``, 0 to 9,999."""
    digest: int = xxhash.xxh3_64_intdigest(salt.encode() + b":" + key)
    return digest * BUCKETS >> 64


class Steering:
    """Variants of one route by the buckets that they own.

    ``uppers`` are strictly ascending and end at 10,000; segment ``i`` holds the buckets from the upper bound
    before it up to its own, exclusive, and belongs to variant ``owners[i]`` (by default ``i``).
    """

    def __init__(self, salt: str, uppers: Sequence[int], owners: Sequence[int] | None = None) -> None:
        if list(uppers) != sorted(set(uppers)) or not uppers or uppers[-1] != BUCKETS or uppers[0] <= 0:
            raise ValueError(f"bucket ranges must ascend and end at {BUCKETS}: {list(uppers)}")
        self._prefix = salt.encode() + b":"
        self._uppers = list(uppers)
        self._owners = list(range(len(uppers))) if owners is None else list(owners)
        self._count = max(self._owners) + 1

    @classmethod
    def over(cls, salt: str, ranges: Sequence[Ranges]) -> Steering:
        """Return the steering of variants that own these ranges, which cover all buckets once."""
        segments = sorted((low, high, owner) for owner, own in enumerate(ranges) for low, high in own)
        if any(high != low for (_, high, _), (low, _, _) in pairwise(segments)) or segments[0][0] != 0:
            raise ValueError(f"bucket ranges must cover 0 to {BUCKETS} once: {list(ranges)}")
        return cls(salt, [high for _, high, _ in segments], [owner for _, _, owner in segments])

    def variant(self, key: bytes) -> int:
        """Return the index of the variant that owns ``key``."""
        digest: int = xxhash.xxh3_64_intdigest(self._prefix + key)
        return self._owners[bisect_right(self._uppers, digest * BUCKETS >> 64)]

    def split(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Return for each variant the ascending indices of the keys it owns."""
        if self._count == 1:
            return [list(range(len(keys)))]
        prefix, uppers, owners, digest_of = self._prefix, self._uppers, self._owners, xxhash.xxh3_64_intdigest
        parts: list[list[int]] = [[] for _ in range(self._count)]
        for index, key in enumerate(keys):
            parts[owners[bisect_right(uppers, digest_of(prefix + key) * BUCKETS >> 64)]].append(index)
        return parts


KEY_GROUPS = 128


def key_group(key: bytes) -> int:
    """Return which of the groups of keys a key belongs to: the low 7 bits of its unsalted xxh3.

    A key's requests share its fate, so what differs between groups is what a sum over keys truly varies by.
    """
    digest: int = xxhash.xxh3_64_intdigest(key)
    return digest % KEY_GROUPS


def sampled(salt: str, share: float, keys: Sequence[bytes]) -> list[int]:
    """Return the ascending indices of the keys whose bucket under ``salt`` is below ``share`` of all."""
    bound = round(share * BUCKETS)
    if bound >= BUCKETS:
        return list(range(len(keys)))
    prefix, digest_of = salt.encode() + b":", xxhash.xxh3_64_intdigest
    return [i for i, key in enumerate(keys) if digest_of(prefix + key) * BUCKETS >> 64 < bound]
