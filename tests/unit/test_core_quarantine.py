"""Quarantine: what a crash loop costs until exactly the requests that kill the process are found."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.quarantine import CONDEMNED_AT, CONDEMNED_KEPT, UNMET_PATIENCE, Quarantine

CLEAN_BATCHES = 30
OPEN_AT_MOST = 24
SLOTS = 3


@dataclass
class World:
    """What outlives a process: the source, what was answered, the committed prefix and the mark."""

    count: int
    poison: set[int]
    chance: random.Random
    stops: int = 0
    """Times that somebody stops the process from outside, never while a suspect runs."""
    settled: set[int] = field(default_factory=set)
    committed: int = 0
    condemned: set[int] = field(default_factory=set)
    mark: dict[str, int] | None = None
    marked_crashes: int = 0
    unmarked_crashes: int = 0

    def commit(self) -> None:
        while self.committed in self.settled:
            self.committed += 1

    def live(self) -> bool:
        """Run one process; return whether it came to the end of its work."""
        process = Process(self)
        if process.run():
            self.mark = None
            return True
        # What was answered behind an open request is delivered again.
        self.settled = set(range(self.committed))
        return False


class Process:
    """One life: takes in order, batches at random, runs up to three batches at once, suspects alone."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.quarantine = Quarantine(world.mark is not None, world.mark or {}, CLEAN_BATCHES)
        if world.mark is None:
            world.mark = {}
        self.next = world.committed
        self.clean: list[int] = []
        self.suspects: list[int] = []
        self.running: dict[int, list[int]] = {}
        self.exclusive = False
        self.batches = 0

    def run(self) -> bool:
        world = self.world
        while world.committed < world.count:
            self._take()
            self._begin()
            if world.stops and not self.exclusive and world.chance.random() < 0.1:
                world.stops -= 1
                return False
            if not self.running:  # all that was taken is condemned
                continue
            key = world.chance.choice(sorted(self.running))
            if world.poison & set(self.running[key]):
                if self.quarantine.active:
                    world.marked_crashes += 1
                else:
                    world.unmarked_crashes += 1
                return False
            self._end(key)
        return True

    def _take(self) -> None:
        world = self.world
        while self.next < world.count and self.next - world.committed < OPEN_AT_MOST:
            chunk = list(range(self.next, min(world.count, self.next + world.chance.randint(1, 8))))
            self.next = chunk[-1] + 1
            parts = self.quarantine.sort([f"r{n}" for n in chunk])
            assert sorted([i for part in parts for i in part]) == list(range(len(chunk)))
            self.clean += [chunk[i] for i in parts.clean]
            self.suspects += [chunk[i] for i in parts.suspects]
            for i in parts.condemned:
                world.condemned.add(chunk[i])
                self._settle([chunk[i]])

    def _begin(self) -> None:
        while not self.exclusive and len(self.running) < SLOTS:
            if self.suspects:
                if self.running:
                    return
                self.exclusive = True
                batch = [self.suspects.pop(0)]
            elif self.clean:
                size = self.world.chance.randint(1, 6)
                batch, self.clean = self.clean[:size], self.clean[size:]
            else:
                return
            self.batches += 1
            self._write(self.quarantine.began(self.batches, [f"r{n}" for n in batch]))
            self.running[self.batches] = batch

    def _end(self, key: int) -> None:
        self._settle(self.running.pop(key))
        self.exclusive = False
        self._write(self.quarantine.ended(key))

    def _settle(self, batch: list[int]) -> None:
        self.world.settled |= set(batch)
        self.world.commit()

    def _write(self, mark: dict[str, int] | None) -> None:
        if mark is not None:
            self.world.mark = mark


_WORLDS = st.integers(1, 400).flatmap(
    lambda count: st.tuples(
        st.just(count), st.sets(st.integers(0, count - 1), max_size=8), st.integers(0, 2**32)
    )
)


@given(_WORLDS)
def test_a_request_that_kills_costs_three_marked_crashes_and_one_unmarked(
    world: tuple[int, set[int], int],
) -> None:
    """In a crash loop exactly the poison is condemned, all others are answered, and the loop is short."""
    count, poison, seed = world
    made = World(count, poison, random.Random(seed))
    while not made.live():
        assert made.marked_crashes <= CONDEMNED_AT * len(poison)
        assert made.unmarked_crashes <= len(poison)
    assert made.condemned == poison
    assert made.committed == count


@given(_WORLDS, st.integers(1, 6))
def test_a_stop_from_outside_condemns_nobody(world: tuple[int, set[int], int], stops: int) -> None:
    """Whoever was in flight then becomes a suspect, runs alone and is cleared."""
    count, poison, seed = world
    made = World(count, poison, random.Random(seed), stops)
    lives = 1
    while not made.live():
        lives += 1
        assert lives <= (CONDEMNED_AT + 1) * len(poison) + stops + 1
    assert made.condemned == poison
    assert made.committed == count


def test_a_clean_start_writes_no_mark() -> None:
    """Being careful costs a write for each batch; a worker whose last life ended well is not."""
    quarantine = Quarantine(False, {"a": 1})
    assert not quarantine.active
    assert quarantine.sort(["a", "b"]) == ([], [], [0, 1])
    assert quarantine.began(1, ["a"]) is None
    assert quarantine.ended(1) is None


def test_the_mark_says_what_counts_if_the_process_dies_now() -> None:
    """Requests in flight count one more; suspects that wait keep their crash, and so does the condemned."""
    quarantine = Quarantine(True, {"s": 1, "t": 1, "c": 3})
    assert quarantine.sort(["x", "s", "c", "y", "t"]) == ([2], [1, 4], [0, 3])
    assert quarantine.began("first", ["x", "y"]) == {"s": 1, "t": 1, "c": 3, "x": 1, "y": 1}
    assert quarantine.began("second", ["z"]) == {"s": 1, "t": 1, "c": 3, "x": 1, "y": 1, "z": 1}
    assert quarantine.ended("first") == {"s": 1, "t": 1, "c": 3, "z": 1}
    assert quarantine.ended("second") == {"s": 1, "t": 1, "c": 3}
    assert quarantine.began("third", ["s"]) == {"s": 2, "t": 1, "c": 3}
    assert quarantine.ended("third") == {"t": 1, "c": 3}
    assert quarantine.began("fourth", ["v", "w"]) == {"t": 1, "c": 3, "v": 1, "w": 1}
    assert repr(quarantine) == "Quarantine(active=True, suspects=1, condemned=1)"


def test_the_next_life_goes_on_with_the_mark() -> None:
    """A suspect that was in flight alone twice is condemned; one that waited is a suspect still."""
    quarantine = Quarantine(True, {"s": 2, "t": 1})
    mark = quarantine.began("alone", ["s"])
    assert mark is not None
    assert Quarantine(True, mark).sort(["t", "s"]) == ([1], [0], [])
    assert CONDEMNED_AT == 3


def test_careful_mode_ends_after_enough_clean_batches() -> None:
    """Without a suspect it ends by itself, and the last mark is empty."""
    quarantine = Quarantine(True, {}, clean_batches=3)
    marks = []
    for n in range(4):
        quarantine.began(n, [f"{n}"])
        marks.append(quarantine.ended(n))
    assert marks == [{}, {}, {}, None]
    assert not quarantine.active


def test_careful_mode_waits_for_the_suspects_and_starts_counting_behind_them() -> None:
    """A suspect that came and ran resets the count."""
    quarantine = Quarantine(True, {"s": 1}, clean_batches=3)
    for n in range(5):
        quarantine.began(n, [f"{n}"])
        assert quarantine.ended(n) == {"s": 1}
    quarantine.began("s", ["s"])
    assert quarantine.ended("s") == {}
    for n in range(3):
        assert quarantine.active
        quarantine.began(n, [f"{n}"])
        quarantine.ended(n)
    assert not quarantine.active


def test_suspects_that_never_come_are_given_up() -> None:
    """Their partition went elsewhere: a worker does not write marks for ever because of them."""
    quarantine = Quarantine(True, {"gone": 1}, clean_batches=3)
    for n in range(3 * UNMET_PATIENCE):
        assert quarantine.active
        quarantine.began(n, [f"{n}"])
        mark = quarantine.ended(n)
    assert not quarantine.active
    assert mark == {}
    assert quarantine.sort(["gone"]) == ([], [], [0])


def test_the_condemned_stay_in_the_mark() -> None:
    """Answered and not committed, it comes again after the next crash: that must not cost two more."""
    quarantine = Quarantine(True, {"c": 5}, clean_batches=1)
    assert quarantine.sort(["c"]).condemned == [0]
    quarantine.began(1, ["x"])
    mark = quarantine.ended(1)
    assert not quarantine.active
    assert mark == {"c": 5}
    assert Quarantine(True, mark).sort(["c"]).condemned == [0]


def test_the_condemned_are_bounded() -> None:
    """A mark that is never taken back by a clean end does not grow for ever; the newest are kept."""
    quarantine = Quarantine(True, {f"{n}": CONDEMNED_AT for n in range(CONDEMNED_KEPT + 5)})
    assert quarantine.sort(["0", "4", "5", f"{CONDEMNED_KEPT}"]) == ([2, 3], [], [0, 1])


def test_a_batch_that_nobody_began_changes_nothing() -> None:
    """Batches that were under way before the worker became careful end without a mark."""
    quarantine = Quarantine(True, {"s": 1})
    assert quarantine.ended("unknown") is None
