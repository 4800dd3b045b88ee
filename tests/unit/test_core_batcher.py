"""The batcher: its rules one by one, then all of them at once against a model that only counts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferfleet.core.batcher import NEVER, Batcher
from inferfleet.records import Batch, Chunk, Lane, Requests
from tests.support.builders import NOW_MS, chunk, lane, requests

LANE = lane(max_batch_size=8, delay_s=1.0)


def _part(count: int, *, first: int = 0, **columns: object) -> Requests:
    return requests(chunk([b"{}"] * count, first=first), range(count), **columns)  # type: ignore[arg-type]


def _ids(batch: Batch | None) -> list[str]:
    assert batch is not None
    assert batch.rows == sum(part.total_rows for part in batch.parts)
    return [request_id for part in batch.parts for request_id in part.ids]


def test_a_lane_is_due_when_full_and_what_is_over_waits_on() -> None:
    """A full batch leaves at once; the rest keeps its place and its time."""
    batcher = Batcher()
    batcher.add(LANE, _part(11), 10.0)
    assert _ids(batcher.due("m", "1", 10.0, NOW_MS)) == [f"id-{i}" for i in range(8)]
    assert batcher.due("m", "1", 10.0, NOW_MS) is None
    assert batcher.next_due("m", "1", 10.0, NOW_MS) == 11.0
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-8", "id-9", "id-10"]
    assert (batcher.rows, batcher.waiting("m", "1"), batcher.next_due("m", "1", 11.0, NOW_MS)) == (
        0,
        0,
        NEVER,
    )


def test_the_oldest_request_decides_when_a_lane_is_due() -> None:
    """Later company neither hastens nor delays it."""
    batcher = Batcher()
    batcher.add(LANE, _part(1), 10.0)
    batcher.add(LANE, _part(1, first=1), 10.9)
    assert batcher.due("m", "1", 10.99, NOW_MS) is None
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-0", "id-1"]


def test_a_batch_knows_since_when_its_first_request_waited() -> None:
    """Of those in it: what is left behind keeps its own time."""
    batcher = Batcher()
    batcher.add(LANE, _part(6, priority=9), 10.0)
    batcher.add(LANE, _part(4, first=6, priority=1), 10.5)
    batcher.add(LANE, _part(6, first=10, priority=1), 10.7)

    urgent, rest = (batcher.due("m", "1", NEVER, NOW_MS) for _ in range(2))
    assert urgent is not None
    assert rest is not None
    assert (urgent.since, urgent.rows) == (10.5, 8)
    assert (rest.since, rest.rows) == (10.0, 8)


def test_a_deadline_closes_a_batch_just_in_time() -> None:
    """The batch leaves when the earliest deadline has only the expected batch time left."""
    batcher = Batcher()
    batcher.add(LANE, _part(1), 10.0)
    batcher.observed(LANE, 1, 0.2)
    batcher.add(LANE, _part(1, first=1, deadlines_ms=[NOW_MS + 500]), 10.0)
    assert batcher.next_due("m", "1", 10.0, NOW_MS) == pytest.approx(10.3)
    assert batcher.due("m", "1", 10.2, NOW_MS + 200) is None
    assert _ids(batcher.due("m", "1", 10.31, NOW_MS + 310)) == ["id-0", "id-1"]
    batcher.add(LANE, _part(1, first=2), 10.4)
    assert batcher.next_due("m", "1", 10.4, NOW_MS + 400) == pytest.approx(11.4), "the deadline left with it"


def test_priorities_leave_in_order_and_share_what_is_left() -> None:
    """Lower numbers first; a later class only fills up what earlier ones leave."""
    batcher = Batcher()
    batcher.add(LANE, _part(6, first=0, priority=9), 10.0)
    batcher.add(LANE, _part(6, first=10, priority=1), 10.5)
    urgent = [f"id-{i}" for i in range(10, 16)]
    assert _ids(batcher.due("m", "1", 10.5, NOW_MS)) == [*urgent, "id-0", "id-1"]
    assert batcher.next_due("m", "1", 10.5, NOW_MS) == 11.0, "the oldest that is left came at 10.0"


def test_a_request_stays_whole() -> None:
    """Rows of one request are never spread over batches, though a smaller one behind it would fit."""
    batcher = Batcher()
    batcher.add(LANE, _part(4, counts=[5, 5, 2, 1]), 10.0)
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-0"]
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-1", "id-2", "id-3"]


@pytest.mark.parametrize("costs", [None, [1, 1, 1]])
def test_a_request_larger_than_the_limit_leaves_alone(costs: list[int] | None) -> None:
    """It is not refused, takes nobody along, and runs in several calls later."""
    batcher = Batcher()
    batcher.add(LANE, _part(3, counts=[3, 20, 3], costs=costs), 10.0)
    batches = [_ids(batcher.due("m", "1", 11.0, NOW_MS)) for _ in range(3)]
    assert batches == [["id-0"], ["id-1"], ["id-2"]]


def test_similar_costs_run_together_and_the_oldest_is_among_them() -> None:
    """A long text waits for other long ones, but never behind those that came after it for ever."""
    batcher = Batcher()
    small = lane(max_batch_size=3, delay_s=1.0)
    batcher.add(small, _part(6, costs=[900, 10, 910, 11, 12, 905]), 10.0)
    assert sorted(_ids(batcher.due("m", "1", 11.0, NOW_MS))) == ["id-0", "id-2", "id-5"]
    assert sorted(_ids(batcher.due("m", "1", 11.0, NOW_MS))) == ["id-1", "id-3", "id-4"]


def test_a_second_class_with_costs_never_overfills_a_batch() -> None:
    """Its oldest request does not fit behind the first class, so none of it leaves."""
    batcher = Batcher()
    batcher.add(LANE, _part(2, counts=[3, 3], costs=[5, 5], priority=1), 10.0)
    batcher.add(LANE, _part(2, first=10, counts=[4, 1], costs=[5, 5], priority=9), 10.0)
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-0", "id-1"]
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-10", "id-11"]


def test_the_most_urgent_lane_of_a_version_leaves_first() -> None:
    """Odd shapes wait in lanes of their own and are not starved by a busy one."""
    batcher = Batcher()
    odd = lane(max_batch_size=8, delay_s=0.1, shape=(9,))
    batcher.add(LANE, _part(8, first=10), 10.2)
    batcher.add(odd, _part(1), 10.0)
    first = batcher.due("m", "1", 10.3, NOW_MS)
    assert first is not None
    assert first.lane == odd
    assert batcher.lanes == 2
    batcher.tidy()
    assert batcher.lanes == 1
    assert batcher.due("m", "2", 99.0, NOW_MS) is None, "another version's engine gets nothing of it"


def test_expired_requests_are_taken_out_and_their_neighbours_stay() -> None:
    """A deadline is over when it is not after now; a request without one never expires."""
    batcher = Batcher()
    batcher.add(LANE, _part(3, deadlines_ms=[NOW_MS, None, NOW_MS + 1]), 10.0)
    (gone,) = batcher.expire(NOW_MS)
    assert gone.ids == ["id-0"]
    assert batcher.expire(NOW_MS) == []
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-1", "id-2"]


def test_a_learned_limit_holds_for_lanes_that_come_later_and_never_grows() -> None:
    """The device had no memory for more, whatever the shape."""
    batcher = Batcher()
    batcher.add(LANE, _part(1), 10.0)
    batcher.limit("m", "1", 2)
    batcher.limit("m", "1", 4)
    batcher.add(lane(shape=(9,), delay_s=1.0), _part(4, first=10), 10.0)
    batcher.add(LANE, _part(3, first=20), 10.0)
    sizes = []
    while (batch := batcher.due("m", "1", 11.0, NOW_MS)) is not None:
        sizes.append(batch.rows)
    assert sorted(sizes) == [2, 2, 2, 2]


def test_requests_of_a_stream_that_is_gone_are_forgotten() -> None:
    """They free their rows; what waits beside them keeps its place."""
    batcher = Batcher()
    dead = _part(3, deadlines_ms=[NOW_MS + 1] * 3)
    batcher.add(LANE, dead, 9.0)
    batcher.add(LANE, _part(2, first=10), 10.0)
    dead.chunk.live = False
    assert sum(part.total_rows for part in batcher.drop_dead()) == 3
    assert repr(batcher) == "Batcher(lanes=1, rows=2)"
    assert batcher.next_due("m", "1", 10.0, NOW_MS) == 11.0
    assert _ids(batcher.due("m", "1", 11.0, NOW_MS)) == ["id-10", "id-11"]


class BatcherMachine(RuleBasedStateMachine):
    """Any order of arrivals, deadlines, losses and closings; the model only knows who must still leave."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher()
        self.now = 1_000.0
        self.waiting: dict[str, tuple[Lane, int, int, int | None, Chunk, int, bool]] = {}
        self.limits: dict[str, int] = {}
        self.made = 0

    @property
    def now_ms(self) -> int:
        return NOW_MS + round((self.now - 1_000.0) * 1000)

    @rule(
        shape=st.sampled_from([(4,), (9,)]),
        version=st.sampled_from(["1", "2"]),
        priority=st.sampled_from([1, 5, 9]),
        sorted_lane=st.booleans(),
        rows=st.lists(
            st.tuples(st.integers(1, 12), st.none() | st.integers(-5, 3_000), st.integers(1, 50)),
            min_size=1,
            max_size=12,
        ),
    )
    def add(
        self,
        shape: tuple[int, ...],
        version: str,
        priority: int,
        sorted_lane: bool,
        rows: list[tuple[int, int | None, int]],
    ) -> None:
        # Whether a lane sorts by cost is a property of the model, so it is tied to the lane here too.
        where = Lane("m", version, "sorted" if sorted_lane else "primary", (shape,), 8, 0.5)
        counts = [count for count, _, _ in rows]
        deadlines = [None if after is None else self.now_ms + after for _, after, _ in rows]
        of = chunk([b"{}"] * len(rows), first=self.made)
        self.made += len(rows)
        part = requests(
            of,
            range(len(rows)),
            counts=None if max(counts) == 1 else counts,
            deadlines_ms=None if all(each is None for each in deadlines) else deadlines,
            priority=priority,
            costs=[cost for _, _, cost in rows] if sorted_lane else None,
        )
        for index, request_id in enumerate(part.ids):
            self.waiting[request_id] = (
                where,
                priority,
                counts[index],
                deadlines[index],
                of,
                of.positions[index],
                sorted_lane,
            )
        self.batcher.add(where, part, self.now)

    @rule(seconds=st.floats(0.001, 0.7))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        gone = Counter(request_id for part in self.batcher.expire(self.now_ms) for request_id in part.ids)
        late = {i for i, (_, _, _, due, *_) in self.waiting.items() if due is not None and due <= self.now_ms}
        assert gone == Counter(late)
        for request_id in late:
            del self.waiting[request_id]

    @rule(version=st.sampled_from(["1", "2"]), flush=st.booleans())
    def close(self, version: str, flush: bool) -> None:
        now = NEVER if flush else self.now
        due_at = self.batcher.next_due("m", version, self.now, self.now_ms)
        batch = self.batcher.due("m", version, now, self.now_ms)
        assert (batch is not None) == (due_at <= now and due_at < NEVER)
        if batch is None:
            return
        ids = _ids(batch)
        assert len(set(ids)) == len(ids)
        limit = min(8, self.limits.get(version, 8))
        assert batch.rows <= limit or len(ids) == 1
        taken = [self.waiting.pop(request_id) for request_id in ids]
        assert {entry[0] for entry in taken} == {batch.lane}
        assert batch.lane.version == version
        self._check_order(batch.lane, ids, taken)

    def _check_order(self, where: Lane, ids: list[str], taken: list[tuple[object, ...]]) -> None:
        left = [entry for entry in self.waiting.values() if entry[0] == where]
        highest = max(int(str(entry[1])) for entry in taken)
        assert not any(entry[1] < highest for entry in left), "a lower number waits while a higher one leaves"
        for priority in {entry[1] for entry in taken}:
            mine = [int(str(entry[5])) for entry in taken if entry[1] == priority]
            others = [entry[5] for entry in left if entry[1] == priority]
            if where.role == "sorted":
                assert not others or min(mine) < min(others), "the oldest is always among them"
            else:
                assert mine == sorted(mine)
                assert not others or max(mine) < min(others)

    @rule(version=st.sampled_from(["1", "2"]), rows=st.integers(1, 10))
    def learn_a_limit(self, version: str, rows: int) -> None:
        self.batcher.limit("m", version, rows)
        self.limits[version] = min(rows, self.limits.get(version, rows))

    @rule(rows=st.integers(1, 8), seconds=st.floats(0.0, 0.4))
    def observe(self, rows: int, seconds: float) -> None:
        for shape in ((4,), (9,)):
            self.batcher.observed(Lane("m", "1", "primary", (shape,), 8, 0.5), rows, seconds)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def lose_a_chunk(self, data: st.DataObject) -> None:
        of = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))][4]
        of.live = False
        dead = {i: entry for i, entry in self.waiting.items() if entry[4] is of}
        dropped = self.batcher.drop_dead()
        assert sum(part.total_rows for part in dropped) == sum(entry[2] for entry in dead.values())
        for request_id in dead:
            del self.waiting[request_id]

    @rule()
    def tidy(self) -> None:
        self.batcher.tidy()
        assert self.batcher.lanes == len({entry[0] for entry in self.waiting.values()})

    @invariant()
    def rows_add_up(self) -> None:
        assert self.batcher.rows == sum(entry[2] for entry in self.waiting.values())
        for version in ("1", "2"):
            mine = [entry for entry in self.waiting.values() if entry[0].version == version]
            assert self.batcher.waiting("m", version) == sum(entry[2] for entry in mine)

    def teardown(self) -> None:
        for version in ("1", "2"):
            while (batch := self.batcher.due("m", version, NEVER, self.now_ms)) is not None:
                for request_id in _ids(batch):
                    del self.waiting[request_id]
        assert not self.waiting, "everything that was added has left"


TestBatcher = BatcherMachine.TestCase
