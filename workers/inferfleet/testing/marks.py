"""The marks of a crash in memory: what one life of a simulated process leaves to the next."""

from __future__ import annotations

from collections.abc import Mapping


class MemoryMarks:
    """Implements :class:`~inferfleet.ports.CrashMarks`; give the same one to each life of a process."""

    def __init__(self) -> None:
        self.mark: dict[str, int] | None = None
        """What stands; ``None`` after a clean end."""

    def load(self) -> dict[str, int] | None:
        """Return the mark that the last life left."""
        return None if self.mark is None else dict(self.mark)

    def running(self) -> None:
        """Note that a process runs."""
        self.mark = self.mark or {}

    def save(self, mark: Mapping[str, int]) -> None:
        """Put ``mark`` in the place of the one before."""
        self.mark = dict(mark)

    def ended(self) -> None:
        """Note a clean end."""
        self.mark = None
