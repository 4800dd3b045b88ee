"""The ledger: how far a stream may be committed, against a model that keeps every record by itself."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferfleet.core.ledger import Ledger
from inferfleet.records import Chunk, Headers, Stream
from tests.support.builders import chunk

STREAMS = [Stream("a", 0), Stream("a", 1), Stream("b", 0)]


def _chunk(stream: Stream, positions: list[int]) -> Chunk:
    made = chunk([b"{}"] * len(positions), stream=stream)
    made.positions[:] = positions
    return made


class LedgerMachine(RuleBasedStateMachine):
    """Records of three streams in any order of taking, settling, asking and losing."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.records: dict[Stream, list[tuple[Chunk, int]]] = {}
        self.next_at = dict.fromkeys(STREAMS, 0)
        self.reported: dict[Stream, int] = {}
        self.ended: list[Chunk] = []

    @rule(stream=st.sampled_from(STREAMS))
    def assign(self, stream: Stream) -> None:
        self.ended += [each for each, row in self.records.get(stream, ()) if row == 0]
        self.ledger.assigned([stream])
        self.records[stream] = []
        self.reported.pop(stream, None)

    @rule(stream=st.sampled_from(STREAMS), gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6))
    def take(self, stream: Stream, gaps: list[int]) -> None:
        positions = []
        for gap in gaps:
            positions.append(self.next_at[stream] + gap)
            self.next_at[stream] = positions[-1] + 1
        made = _chunk(stream, positions)
        self.ledger.began(made)
        self.records.setdefault(stream, []).extend((made, row) for row in range(len(made)))

    @precondition(lambda self: any(self.records.values()))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        open_chunks = {id(each): each for records in self.records.values() for each, _ in records}
        made = data.draw(st.sampled_from(sorted(open_chunks.values(), key=lambda c: c.positions[0])))
        rows = sorted(data.draw(st.sets(st.integers(0, len(made) - 1))))
        before = sum(made.settled[row] for row in rows)
        assert self.ledger.settle(made, rows) == len(rows) - before

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def settle_after_the_end(self, data: st.DataObject) -> None:
        made = data.draw(st.sampled_from(self.ended))
        assert self.ledger.settle(made, range(len(made))) == 0

    @rule(streams=st.none() | st.sets(st.sampled_from(STREAMS)))
    def ask(self, streams: set[Stream] | None) -> None:
        moved = self.ledger.positions(streams)
        expected = {
            stream: position
            for stream in self.records
            if streams is None or stream in streams
            if (position := self._position(stream)) is not None and position != self.reported.get(stream)
        }
        assert moved == expected
        for stream, position in moved.items():
            assert position > self.reported.get(stream, -1)
        self.reported.update(moved)

    @rule(stream=st.sampled_from(STREAMS))
    def refuse(self, stream: Stream) -> None:
        self.ledger.repeat([stream])
        self.reported.pop(stream, None)

    @rule(stream=st.sampled_from(STREAMS))
    def end(self, stream: Stream) -> None:
        forgotten = self.ledger.ended([stream])
        held = {id(made): made for made, row in self.records.pop(stream, ())}
        assert not any(made.live for made in forgotten)
        still_open = {key for key, made in held.items() if made.open}
        assert still_open <= {id(made) for made in forgotten} <= set(held)
        self.ended += forgotten
        self.reported.pop(stream, None)

    def _position(self, stream: Stream) -> int | None:
        """Return the end of the settled prefix, record by record."""
        position = None
        for made, row in self.records[stream]:
            if not made.settled[row]:
                break
            position = made.positions[row] + 1
        return position

    @invariant()
    def open_records_are_those_without_an_outcome(self) -> None:
        unsettled = {
            stream: sum(not made.settled[row] for made, row in records)
            for stream, records in self.records.items()
        }
        assert self.ledger.open_records() == sum(unsettled.values())
        for stream, count in unsettled.items():
            assert self.ledger.open_records([stream]) == count

    @invariant()
    def the_streams_are_those_of_running_epochs(self) -> None:
        assert set(self.ledger.streams) == set(self.records)


TestLedger = LedgerMachine.TestCase


def test_a_refused_commit_is_reported_again_even_when_nothing_is_open() -> None:
    """The broker refused the last position, and no further record will come to move it."""
    ledger = Ledger()
    made = _chunk(STREAMS[0], [5, 6])
    ledger.assigned(STREAMS[:1])
    ledger.began(made)
    ledger.settle(made, [0, 1])
    assert ledger.positions() == {STREAMS[0]: 7}
    assert ledger.positions() == {}
    ledger.repeat(STREAMS)
    assert ledger.positions() == {STREAMS[0]: 7}
    assert ledger.positions() == {}


def test_the_oldest_record_is_the_first_open_one_of_each_stream() -> None:
    """Settled records, other sources and later chunks do not count."""
    ledger = Ledger()
    old, new, other = _chunk(STREAMS[0], [1, 2]), _chunk(STREAMS[0], [3]), _chunk(STREAMS[2], [1])
    old.timestamps_ms[:] = [100, 200]
    new.timestamps_ms[:] = [50]
    other.timestamps_ms[:] = [150]
    for made in (old, new, other):
        ledger.began(made)
    assert ledger.oldest_timestamp_ms() == 100
    ledger.settle(old, [0])
    assert ledger.oldest_timestamp_ms() == 150
    assert ledger.oldest_timestamp_ms(["a"]) == 200
    ledger.settle(old, [1])
    assert ledger.oldest_timestamp_ms(["a"]) == 50
    ledger.settle(new, [0])
    assert ledger.oldest_timestamp_ms(["a"]) is None
    assert repr(ledger) == "Ledger(streams=2, open_chunks=3)"


def test_headers_count_towards_a_chunks_size() -> None:
    """A client that fills its headers fills the worker's memory, so the bound on bytes counts them."""
    big: Headers = [("h", b"x" * 1_000)]

    assert chunk([b"body", b"body"], [big, big]).size_bytes == 2 * (4 + 1_001)
    assert chunk([b"body", b"body"], [big, None]).size_bytes == 8 + 1_001
    assert chunk([b"body", b"body"]).size_bytes == 8
