"""Which repeats of a warning or an error are told: the first few of a kind in a window, then how many more.

Pure bookkeeping in bounded memory; the time is passed in. Nothing is dropped without being counted: the count
comes with the next line of its kind, or, when none follows, with what :meth:`Repeats.overdue` and
:meth:`Repeats.rest` return.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Kind: TypeAlias = tuple[str, ...]
"""What makes two lines the same: the event first, then where it happened and how it went wrong."""

MAX_KINDS = 512
"""Kinds that are kept apart at one time, over all events."""
MAX_KINDS_OF_EVENT = 16
"""Kinds of one event that are kept apart in one window: an error's text may differ from line to line."""
OTHERS = "others"
ANYTHING: Kind = ("", OTHERS)
"""Stands for all that there was no room for."""


class Held(NamedTuple):
    """Lines that were not told: how many, and how many requests they were about."""

    lines: int
    requests: int


NOTHING_HELD = Held(0, 0)


class _Window:
    """One kind's lines since ``began_at``."""

    __slots__ = ("began_at", "lines", "requests", "told")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.told = 0
        self.lines = 0
        self.requests = 0

    @property
    def held(self) -> Held:
        return Held(self.lines, self.requests)


class Repeats:
    """Lets ``lines`` lines of a kind through in ``window_s`` seconds; not safe for threads by itself."""

    def __init__(self, lines: int, window_s: float) -> None:
        self._lines = lines
        self._window_s = window_s
        self._windows: dict[Kind, _Window] = {}
        self._kinds: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def heard(self, kind: Kind, now: float, requests: int = 0) -> Held | None:
        """Return what was held back before this line, which is to be told; ``None`` holds it back too.

        ``now`` is monotonic seconds, ``requests`` how many requests the line is about.
        """
        window = self._windows.get(kind)
        if window is None:
            kind = self._known(kind)
            window = self._windows.get(kind)
            if window is None:
                window = self._windows[kind] = _Window(now)
                self._kinds[kind[0]] = self._kinds.get(kind[0], 0) + 1
        if now - window.began_at >= self._window_s:
            held = window.held
            self._windows[kind] = fresh = _Window(now)
            fresh.told = 1
            return held
        if window.told < self._lines:
            window.told += 1
            return NOTHING_HELD
        window.lines += 1
        window.requests += requests
        return None

    def _known(self, kind: Kind) -> Kind:
        """Return the kind to count a new one as: itself, the rest of its event, or anything."""
        if kind in self._windows:
            return kind
        if len(self._windows) >= MAX_KINDS:
            return ANYTHING
        if self._kinds.get(kind[0], 0) >= MAX_KINDS_OF_EVENT:
            return (kind[0], OTHERS)
        return kind

    def overdue(self, now: float) -> list[tuple[Kind, Held]]:
        """Forget every window that has ended; return the kinds of which lines were held back in it."""
        ended = [kind for kind, each in self._windows.items() if now - each.began_at >= self._window_s]
        return self._forget(ended)

    def rest(self) -> list[tuple[Kind, Held]]:
        """Forget everything; return the kinds of which lines were held back."""
        return self._forget(list(self._windows))

    def _forget(self, kinds: list[Kind]) -> list[tuple[Kind, Held]]:
        found = [(kind, self._windows.pop(kind).held) for kind in kinds]
        for kind in kinds:
            left = self._kinds[kind[0]] - 1
            if left:
                self._kinds[kind[0]] = left
            else:
                del self._kinds[kind[0]]
        return [(kind, held) for kind, held in found if held.lines]
