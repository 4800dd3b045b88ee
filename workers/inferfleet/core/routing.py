"""Which variant answers a request: a pure function of the route, the salt and the key.

``bucket = xxh3_64(salt + ":" + key) * 10_000 >> 64`` (unsigned 64-bit hash, so the bucket is the hash
scaled to 0..9999). A variant owns an explicit range of buckets. The formula is public: any language
with xxh3 agrees on it, and no broker's partitioner hash takes part, or variants would line up with
partitions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import xxhash

BUCKETS = 10_000


def bucket(salt: str, key: bytes) -> int:
    """Return the bucket of ``key``, 0 to 9,999."""
    digest: int = xxhash.xxh3_64_intdigest(salt.encode() + b":" + key)
    return digest * BUCKETS >> 64


class Steering:
    """Variants of one route by the upper bounds of their bucket ranges.

    ``uppers`` are strictly ascending and end at 10,000; variant ``i`` owns the buckets from the upper
    bound before it up to its own, exclusive.
    """

    def __init__(self, salt: str, uppers: Sequence[int]) -> None:
        if list(uppers) != sorted(set(uppers)) or not uppers or uppers[-1] != BUCKETS or uppers[0] <= 0:
            raise ValueError(f"bucket ranges must ascend and end at {BUCKETS}: {list(uppers)}")
        self._prefix = salt.encode() + b":"
        self._uppers = list(uppers)

    def variant(self, key: bytes) -> int:
        """Return the index of the variant that owns ``key``."""
        digest: int = xxhash.xxh3_64_intdigest(self._prefix + key)
        return bisect_right(self._uppers, digest * BUCKETS >> 64)

    def split(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Return for each variant the ascending indices of the keys it owns."""
        if len(self._uppers) == 1:
            return [list(range(len(keys)))]
        prefix, uppers, digest_of = self._prefix, self._uppers, xxhash.xxh3_64_intdigest
        owners = [bisect_right(uppers, digest_of(prefix + key) * BUCKETS >> 64) for key in keys]
        parts: list[list[int]] = [[] for _ in uppers]
        for index, owner in enumerate(owners):
            parts[owner].append(index)
        return parts
