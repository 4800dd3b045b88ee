"""The group coordinator of the memory broker: who owns which partition, and who may commit.

Rules kept here:

* A partition has at most one owner. It changes hands only after the old owner has given it up, has left, or
  has been expelled: a member learns of it in its next take (cooperative, one partition at a time).
* The target is balanced within one partition and as sticky as that allows.
* Only the owner may commit, and an expelled member owns nothing.
* A member that has vanished is expelled when its session has timed out, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from inferfleet.records import Stream


class Member:
    """One consumer. It is no member of its group before its first join, after leaving and once expelled."""

    __slots__ = ("owned", "sources", "vanished_at")

    def __init__(self) -> None:
        self.sources: frozenset[str] = frozenset()
        self.owned: set[Stream] = set()
        self.vanished_at: float | None = None


class Group:
    """A consumer group; ``generation`` counts the changes of its target assignment."""

    def __init__(
        self,
        name: str,
        partitions: Callable[[str], int],
        now: Callable[[], float],
        session_timeout_s: float,
    ) -> None:
        self.name = name
        self.generation = 0
        self.committed: dict[Stream, int] = {}
        self.refuses_commits = False
        self.denied: str | None = None
        """Why nobody may join or take any longer; ``None`` while everybody may."""
        self.away = False
        """While the coordinator is away the assignment stays as it is: nobody joins or is expelled."""
        self._partitions = partitions
        self._now = now
        self._session_timeout_s = session_timeout_s
        self._members: list[Member] = []
        self._target: dict[Stream, Member] = {}

    def __repr__(self) -> str:
        return f"Group({self.name}, generation={self.generation}, members={len(self._members)})"

    # Membership

    def __contains__(self, member: Member) -> bool:
        return member in self._members

    def join(self, member: Member, sources: Collection[str]) -> None:
        """Become a member, or change what one subscribes to; nothing happens while the group is away."""
        if self.away or (member in self._members and member.sources == frozenset(sources)):
            return
        member.sources = frozenset(sources)
        if member not in self._members:
            self._members.append(member)
        self._rebalance()

    def leave(self, member: Member) -> None:
        """Stop being a member at once; everything owned is free."""
        if member in self._members:
            self._members.remove(member)
            member.owned.clear()
            self._rebalance()

    def vanish(self, member: Member) -> None:
        """Let a member be silent from now on, as if its process had been killed."""
        if member.vanished_at is None:
            member.vanished_at = self._now()

    def expel(self, member: Member) -> None:
        """Give away what a living member owns, as after a pause longer than its session; it is not told."""
        self.leave(member)

    def topics_changed(self) -> None:
        """Look at the topics again: one was created."""
        if self._members:
            self._rebalance()

    def tick(self) -> None:
        """Expel those whose session has timed out."""
        if self.away:
            return
        now = self._now()
        for member in [m for m in self._members if m.vanished_at is not None]:
            if member.vanished_at is not None and now - member.vanished_at >= self._session_timeout_s:
                self.leave(member)

    # Assignment

    def to_give_up(self, member: Member) -> list[Stream]:
        """Return what the member owns and must give up."""
        if self.away:
            return []
        return sorted(stream for stream in member.owned if self._target.get(stream) is not member)

    def give_up(self, member: Member, streams: Collection[Stream]) -> None:
        """Free what the member has finished with."""
        member.owned.difference_update(streams)

    def claim(self, member: Member) -> list[Stream]:
        """Return the free streams that fall to the member; they are its own from now on."""
        if self.away:
            return []
        held = {stream for other in self._members for stream in other.owned}
        gained = sorted(
            stream for stream, owner in self._target.items() if owner is member and stream not in held
        )
        member.owned.update(gained)
        return gained

    def owners(self) -> dict[Stream, list[Member]]:
        """Return who owns what right now: one member each, or a rule of this group is broken."""
        owners: dict[Stream, list[Member]] = {}
        for member in self._members:
            for stream in member.owned:
                owners.setdefault(stream, []).append(member)
        return owners

    def _rebalance(self) -> None:
        """Set the target: keep what can stay, then level the loads one stream at a time."""
        self.generation += 1
        topics = sorted({topic for member in self._members for topic in member.sources})
        loads: dict[Member, list[Stream]] = {member: [] for member in self._members}
        free: list[Stream] = []
        for stream in [Stream(t, number) for t in topics for number in range(self._partitions(t))]:
            owner = self._target.get(stream)
            if owner in loads and owner is not None and stream.source in owner.sources:
                loads[owner].append(stream)
            else:
                free.append(stream)
        for stream in free:
            takers = [member for member in self._members if stream.source in member.sources]
            loads[min(takers, key=lambda member: len(loads[member]))].append(stream)
        while _level_once(loads):
            pass
        self._target = {stream: member for member, streams in loads.items() for stream in streams}

    # Commits

    def commit(self, member: Member, positions: Mapping[Stream, int]) -> list[Stream]:
        """Store the positions of streams that the member owns; return those that were refused."""
        refused = [
            stream
            for stream in positions
            if self.refuses_commits or stream not in member.owned or member not in self._members
        ]
        for stream, position in positions.items():
            if stream not in refused:
                self.committed[stream] = position
        return refused


def _level_once(loads: Mapping[Member, list[Stream]]) -> bool:
    """Move one stream from a member to one that has at least two fewer; return whether that was possible."""
    for giver in sorted(loads, key=lambda member: -len(loads[member])):
        for taker in sorted(loads, key=lambda member: len(loads[member])):
            if len(loads[giver]) - len(loads[taker]) < 2:
                break
            for stream in reversed(loads[giver]):
                if stream.source in taker.sources:
                    loads[giver].remove(stream)
                    loads[taker].append(stream)
                    return True
    return False
