"""How much may be in flight: bounds on rows and bytes, shared fairly between routes.

A route may take while the worker is below its bounds, and always while it holds less than its own equal
share: idle shares are lent out, never given away. So the worker's total stays below twice its bound, and
with one route below the bound plus one chunk. Taking stops at the bound and resumes below
``RESUME_SHARE`` of it, so that intake does not flap around one value.
"""

from __future__ import annotations

from collections.abc import Iterable

RESUME_SHARE = 0.75


class Admission:
    """Rows and bytes that were taken and have no outcome yet, per route."""

    def __init__(self, routes: Iterable[str], max_rows: int, max_bytes: int) -> None:
        self._rows: dict[str, int] = dict.fromkeys(routes, 0)
        self._bytes: dict[str, int] = dict.fromkeys(self._rows, 0)
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.rows = 0
        self.bytes = 0
        self._full = False

    def __repr__(self) -> str:
        return f"Admission(rows={self.rows}/{self.max_rows}, bytes={self.bytes}/{self.max_bytes})"

    def routes(self, names: Iterable[str]) -> None:
        """Divide the bounds between these routes from now on; what is held stays counted."""
        wanted = set(names)
        for name in wanted:
            self._rows.setdefault(name, 0)
            self._bytes.setdefault(name, 0)
        for name in [n for n in self._rows if n not in wanted and not self._rows[n] and not self._bytes[n]]:
            del self._rows[name], self._bytes[name]

    def took(self, route: str, rows: int, size_bytes: int) -> None:
        """Count rows and bytes of ``route`` as in flight."""
        self._rows[route] = self._rows.get(route, 0) + rows
        self._bytes[route] = self._bytes.get(route, 0) + size_bytes
        self.rows += rows
        self.bytes += size_bytes
        if self.rows >= self.max_rows or self.bytes >= self.max_bytes:
            self._full = True

    def freed(self, route: str, rows: int, size_bytes: int) -> None:
        """Count rows and bytes of ``route`` as finished."""
        self._rows[route] -= rows
        self._bytes[route] -= size_bytes
        self.rows -= rows
        self.bytes -= size_bytes
        if self.rows < self.max_rows * RESUME_SHARE and self.bytes < self.max_bytes * RESUME_SHARE:
            self._full = False

    @property
    def full(self) -> bool:
        """Whether the worker as a whole has reached a bound and not yet fallen below it again."""
        return self._full

    def held(self, route: str) -> tuple[int, int]:
        """Return the rows and bytes that ``route`` has in flight."""
        return self._rows.get(route, 0), self._bytes.get(route, 0)

    def may_take(self, route: str) -> bool:
        """Return whether ``route`` may take more now."""
        if not self._full:
            return True
        share = 1 / max(1, len(self._rows))
        rows, size_bytes = self.held(route)
        return (
            len(self._rows) > 1
            and rows < self.max_rows * share * RESUME_SHARE
            and size_bytes < self.max_bytes * share * RESUME_SHARE
        )

    def room(self) -> tuple[int, int]:
        """Return how many rows and bytes one take may bring: at least one of each.

        A full worker takes for routes below their share alone: as much as the fullest of them has left of it.
        """
        if not self._full:
            return max(1, self.max_rows - self.rows), max(1, self.max_bytes - self.bytes)
        share = RESUME_SHARE / max(1, len(self._rows))
        takers = [name for name in self._rows if self.may_take(name)]
        rows = min((self.max_rows * share - self._rows[name] for name in takers), default=1)
        size_bytes = min((self.max_bytes * share - self._bytes[name] for name in takers), default=1)
        return max(1, int(rows)), max(1, int(size_bytes))
