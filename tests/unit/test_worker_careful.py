"""After an unclean end: suspects run alone, the condemned are answered, and marks say what is in flight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.batcher import NEVER, Batcher
from inferfleet.core.quarantine import CLEAN_BATCHES, CONDEMNED_AT
from inferfleet.records import Amqp, Batch, BatchResult, Chunk, Origin, Requests, Stream
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.testing.puppet import PuppetModel
from inferfleet.worker.careful import Careful
from inferfleet.worker.dispatching import Dispatching
from inferfleet.worker.engine import Engine, Finished, News
from tests.support.builders import STREAM, chunk, lane, messages, requests

PLACE = f"{STREAM.source}-{STREAM.partition}-"


class HandEngine(Engine):
    """An engine that ends a batch when it is told to."""

    def __init__(self, version: str, news: SimpleQueue[News], clock: FakeClock) -> None:
        super().__init__("m", version, PuppetModel, news, clock)
        self.queued: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self.in_flight += 1
        self.queued.append(batch)


class Bench:
    """Two engines behind a dispatching whose last life has left ``mark``."""

    def __init__(self, mark: dict[str, int] | None = None, versions: Sequence[str] = ("1", "2")) -> None:
        self.marks = MemoryMarks()
        self.marks.mark = mark
        self.careful = Careful(self.marks)
        self.clock = FakeClock()
        self.batcher = Batcher()
        self.expired: list[Requests] = []
        self.condemned: list[Requests] = []
        self.to = Dispatching(
            self.batcher, self.careful, self.clock, self.expired.append, self.condemned.append
        )
        news: SimpleQueue[News] = SimpleQueue()
        self.engines = [HandEngine(version, news, self.clock) for version in versions]
        for engine in self.engines:
            self.to.watch(engine)

    def add(self, of: Chunk, version: str = "1", rows: Sequence[int] | None = None) -> Requests:
        """Let requests of a chunk wait; a batch holds four."""
        part = requests(of, range(len(of)) if rows is None else rows)
        self.batcher.add(lane(4, version=version), part, self.clock.monotonic())
        return part

    def run(self) -> None:
        self.to.run(flush=True)

    def end(self, engine: HandEngine) -> None:
        """Let the engine's oldest batch end."""
        self.to.finished(Finished(engine, BatchResult(engine.queued.pop(0))))

    def flying(self) -> list[list[int]]:
        """The positions that each batch in an engine holds."""
        return [_positions(batch) for engine in self.engines for batch in engine.queued]


def _positions(batch: Batch) -> list[int]:
    return [part.chunk.positions[row] for part in batch.parts for row in part.rows]


# What runs, and with whom


def test_after_a_clean_end_nothing_is_screened_or_written() -> None:
    """The marks say that a process runs, and no more."""
    bench = Bench()
    bench.add(chunk([b"b"] * 4))
    bench.run()
    assert bench.flying() == [[100, 101, 102, 103]]
    bench.end(bench.engines[0])
    assert bench.marks.mark == {}
    bench.careful.close(clean=True)
    assert bench.marks.mark is None


def test_a_suspect_runs_alone_and_its_neighbours_without_it() -> None:
    """Nothing else runs anywhere meanwhile, so that a crash is its own."""
    bench = Bench({f"{PLACE}101": 1, f"{PLACE}103": 1})
    bench.add(chunk([b"b"] * 4))
    bench.add(chunk([b"b"] * 4, first=200), "2")
    bench.run()
    assert bench.flying() == [[100, 102]]
    assert bench.marks.mark == {f"{PLACE}{p}": 1 for p in (100, 101, 102, 103)}
    bench.run()
    assert bench.flying() == [[100, 102]]
    bench.end(bench.engines[0])
    bench.run()
    assert bench.flying() == [[101]]
    assert bench.marks.mark == {f"{PLACE}101": 2, f"{PLACE}103": 1}
    bench.run()
    assert bench.flying() == [[101]]
    bench.end(bench.engines[0])
    bench.run()
    bench.run()
    assert bench.flying() == [[103]], "also the last one has no company"
    bench.end(bench.engines[0])
    bench.run()
    bench.run()
    assert bench.flying() == [[200, 201, 202, 203]]
    assert bench.marks.mark == {f"{PLACE}{p}": 1 for p in (200, 201, 202, 203)}


def test_a_suspect_waits_for_what_runs_elsewhere() -> None:
    """Also for a batch of another version that was given before it was met."""
    bench = Bench({f"{PLACE}100": 1}, versions=("2", "1"))
    bench.add(chunk([b"b"] * 4, first=200), "2")
    bench.add(chunk([b"b"]))
    bench.run()
    assert bench.flying() == [[200, 201, 202, 203]]
    bench.run()
    assert bench.flying() == [[200, 201, 202, 203]]
    bench.end(bench.engines[0])
    bench.run()
    assert bench.flying() == [[100]]


def test_the_condemned_is_answered_without_running() -> None:
    """Its neighbours run, together and at once."""
    bench = Bench({f"{PLACE}101": CONDEMNED_AT})
    bench.add(chunk([b"b"] * 4))
    bench.run()
    assert [part.rows for part in bench.condemned] == [[1]]
    assert bench.flying() == [[100, 102, 103]]


def test_a_batch_of_the_condemned_alone_runs_nothing() -> None:
    """The next batch takes its place."""
    bench = Bench({f"{PLACE}{p}": CONDEMNED_AT for p in range(100, 104)})
    bench.add(chunk([b"b"] * 5))
    bench.run()
    assert len(bench.condemned) == 4
    assert bench.flying() == [[104]]


def test_requests_of_several_rows_stay_whole() -> None:
    """A suspect takes its own tensor rows along and leaves the others theirs."""
    bench = Bench({f"{PLACE}101": 1})
    of = chunk([b"b"] * 3)
    part = requests(of, range(3), counts=[1, 2, 1])
    bench.batcher.add(lane(4), part, bench.clock.monotonic())
    bench.run()
    (rest,) = bench.engines[0].queued
    assert (rest.rows, rest.tensors()["x"][:, 0].tolist()) == (2, [100, 102])
    bench.end(bench.engines[0])
    bench.run()
    (alone,) = bench.engines[0].queued
    assert (alone.rows, alone.tensors()["x"][:, 0].tolist()) == (2, [101, 101])


def test_carefulness_ends_when_nothing_was_met_for_long() -> None:
    """Then batches are whole again, and nothing is written for them."""
    bench = Bench({})
    for first in range(CLEAN_BATCHES):
        bench.add(chunk([b"b"], first=first))
        bench.run()
        bench.end(bench.engines[0])
    assert not bench.careful.active
    assert bench.marks.mark == {}
    bench.add(chunk([b"b"] * 4))
    bench.run()
    assert bench.marks.mark == {}
    bench.end(bench.engines[0])


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("mark", [None, {}, {f"{PLACE}7": 1}])
def test_how_a_process_ends_is_left_to_the_next(mark: dict[str, int] | None, clean: bool) -> None:
    """A clean end clears everything; an error leaves what a crash before it has left."""
    bench = Bench(mark)
    bench.careful.close(clean=clean)
    assert bench.marks.mark == (None if clean or mark is None else mark)


# Streams that are taken away


def test_a_suspect_whose_stream_is_gone_is_forgotten() -> None:
    """Somebody else has it; nothing waits for it here any longer."""
    bench = Bench({f"{PLACE}100": 1, f"{PLACE}200": 1})
    gone, kept = chunk([b"b"] * 2), chunk([b"b"], first=200)
    bench.add(gone)
    bench.add(kept)
    bench.run()
    assert bench.flying() == [[101]]
    gone.live = False
    assert [part.rows for part in bench.to.drop_dead()] == [[0]]
    bench.end(bench.engines[0])
    bench.run()
    assert bench.flying() == [[200]]


def test_a_dead_suspect_does_not_run_even_if_nobody_dropped_it() -> None:
    """It is looked at when its turn comes."""
    bench = Bench({f"{PLACE}100": 1, f"{PLACE}101": 1})
    of, other = chunk([b"b"] * 1), chunk([b"b"], first=101)
    bench.add(of)
    bench.add(other)
    bench.run()
    assert bench.flying() == []
    of.live = False
    bench.run()
    assert bench.flying() == [[101]]


def test_an_engine_that_a_suspect_waits_for_is_busy() -> None:
    """It must not be unloaded under it."""
    bench = Bench({f"{PLACE}100": 1}, versions=("2", "1"))
    bench.add(chunk([b"b"], first=200), "2")
    bench.add(chunk([b"b"]))
    bench.run()
    two, one = bench.engines
    assert one.in_flight == 0
    assert bench.to.busy(one)
    bench.end(two)
    bench.run()
    bench.end(one)
    assert not bench.to.busy(one)
    bench.to.forget(two)
    assert (bench.to.watches(one), bench.to.watches(two)) == (True, False)


def test_what_expires_is_told_and_when_to_look_again_is_known() -> None:
    """As ever, when nothing is suspected."""
    bench = Bench()
    assert bench.to.next_due_s(bench.clock.monotonic()) == NEVER
    of = chunk([b"b"] * 2)
    part = requests(of, [0, 1], deadlines_ms=[bench.clock.utc_ms() + 2, None])
    bench.batcher.add(lane(4, delay_s=5.0), part, bench.clock.monotonic())
    assert bench.to.next_due_s(bench.clock.monotonic()) == pytest.approx(0.002)
    bench.clock.advance(0.003)
    bench.to.run()
    assert [part.rows for part in bench.expired] == [[0]]
    assert bench.to.next_due_s(bench.clock.monotonic()) == pytest.approx(4.997)


# What names a request


def _marked(of: Chunk, ids: Sequence[str] | None = None) -> set[str]:
    """Return the fingerprints of a chunk's requests."""
    bench = Bench({})
    part = requests(of, range(len(of)))
    part.ids = [of.called(row) for row in range(len(of))] if ids is None else list(ids)
    bench.batcher.add(lane(100), part, 0.0)
    bench.run()
    assert bench.marks.mark is not None
    json.dumps(bench.marks.mark)
    return set(bench.marks.mark)


def test_kafka_records_are_named_by_where_they_stand() -> None:
    """A retry is another record than the one before it, and equal requests are two."""
    of = chunk([b"b"] * 2)
    assert _marked(of, ["same", "same"]) == {f"{PLACE}100", f"{PLACE}101"}
    again = chunk([b"b"], stream=Stream("retry", 0))
    again.origins = [Origin(*STREAM, 100, 0, 2)]
    assert _marked(again) == {"retry-0-100"}


@pytest.mark.parametrize(
    "amqp", [Amqp(message_id="m"), Amqp(correlation_id="c"), Amqp(), Amqp("q", None, "\udcff")]
)
def test_a_message_has_the_same_name_whenever_it_comes(amqp: Amqp) -> None:
    """Its channel, its tag, and an id that was made up for it change; what it is does not."""
    first = messages([b"b"], [amqp])
    again = messages([b"b"], [amqp._replace(redelivered=True)], first=9, stream=Stream("rabbitmq:q", 7))
    assert _marked(first) == _marked(again)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Amqp(message_id="m"), Amqp(message_id="n")),
        (Amqp(correlation_id="c"), Amqp(correlation_id="d")),
        (Amqp(message_id="m"), Amqp()),
    ],
)
def test_messages_that_are_named_apart_have_names_of_their_own(one: Amqp, other: Amqp) -> None:
    """Equal bytes are common: a health check, a default; one of them must not condemn the others."""
    assert len(_marked(messages([b"b", b"b"], [one, other]))) == 2


def test_messages_without_a_name_are_what_they_hold() -> None:
    """Whatever of them kills a process, the same bytes will again."""
    assert len(_marked(messages([b"b", b"b", b"c"]))) == 2


# All at once


@given(st.data())
def test_every_request_runs_or_is_condemned_and_suspects_never_have_company(data: st.DataObject) -> None:
    """In whatever order things end and streams go."""
    count = data.draw(st.integers(1, 12))
    crashes = {f"{PLACE}{p}": data.draw(st.integers(0, CONDEMNED_AT)) for p in range(100, 100 + count)}
    bench = Bench({name: n for name, n in crashes.items() if n})
    chunks = [chunk([b"b"], first=100 + i) for i in range(count)]
    for of in chunks:
        bench.add(of, data.draw(st.sampled_from(["1", "2"])))
    ran: list[int] = []
    dropped: list[int] = []
    for _ in range(200):
        bench.run()
        bench.run()
        flying = bench.flying()
        suspects = [p for batch in flying for p in batch if crashes[f"{PLACE}{p}"] > 0]
        assert not suspects or (flying == [suspects] and len(suspects) == 1)
        for position in [p for batch in flying for p in batch]:
            name = f"{PLACE}{position}"
            assert crashes[name] < CONDEMNED_AT
            assert (bench.marks.mark or {})[name] == crashes[name] + 1
        if data.draw(st.integers(0, 9)) == 0:
            data.draw(st.sampled_from(chunks)).live = False
            dropped += [part.chunk.positions[0] for part in bench.to.drop_dead()]
        busy = [engine for engine in bench.engines if engine.queued]
        if not busy:
            break
        engine = data.draw(st.sampled_from(busy))
        ran += _positions(engine.queued[0])
        bench.end(engine)
    condemned = [part.chunk.positions[0] for part in bench.condemned]
    assert sorted(ran + dropped + condemned) == list(range(100, 100 + count))
    assert all(crashes[f"{PLACE}{p}"] == CONDEMNED_AT for p in condemned)
