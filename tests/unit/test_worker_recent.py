"""What came again: answered before, still running for a delivery that is gone, or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.records import Amqp, Chunk, Origin, Requests, Stream
from inferfleet.worker.recent import Recent, Seen, left_of
from inferfleet.worker.settling import Outcome, Settling
from tests.support.builders import chunk, messages, requests

NOBODY: Any = None
READY = Stream("rabbitmq:q.g.retry.ready", 2)


def delivered(
    ids: Sequence[str],
    *,
    again: bool = False,
    channel: int = 1,
    body: bytes = b"body",
    attempt: int | None = None,
    **amqp: Any,
) -> Chunk:
    """Return messages of these ids, all alike else."""
    source = "rabbitmq:q" if attempt is None else READY.source
    made = messages(
        [body] * len(ids),
        [Amqp(message_id=each, redelivered=again, **amqp) for each in ids],
        stream=Stream(source, channel),
    )
    if attempt is not None:
        made.origins = [Origin("rabbitmq:q", 1, p, 0, attempt) for p in made.positions]
    return made


def part(of: Chunk) -> Requests:
    found = requests(of, range(len(of)))
    found.ids = [of.called(row) for row in range(len(of))]
    return found


OK = {("1", "stable", "ok"): 1}
FAILED = {("1", "stable", "E_MODEL"): 1}


def settle(
    recent: Recent, of: Chunk, rows: Sequence[int] | None = None, *, ended: Mapping[Outcome, int] = OK
) -> list[tuple[Chunk, int]]:
    rows = range(len(of)) if rows is None else rows
    return recent.settled(
        Settling(NOBODY, NOBODY, of, list(rows), dict(ended), [of.called(row) for row in rows])
    )


def orphan(recent: Recent, of: Chunk, gone: Sequence[int] = ()) -> int:
    of.live = False
    return recent.orphaned(of, {row: of.called(row) for row in range(len(of))}, gone)


def test_an_error_is_not_remembered() -> None:
    """The same request may be its caller's next try, or a redrive: acknowledged unrun it would be lost."""
    recent = Recent()
    settle(recent, delivered(["a"]), ended=FAILED)
    assert recent.seen(part(delivered(["a"], again=True, channel=2))) == Seen([], [])
    settle(recent, delivered(["b"]), ended={})
    assert recent.seen(part(delivered(["b"], again=True, channel=2))) == Seen([], [])
    settle(recent, delivered(["c"]))
    settle(recent, delivered(["c"]), ended=FAILED)
    assert recent.seen(part(delivered(["c"], again=True, channel=2))) == Seen([], [])


def test_what_was_answered_need_not_run_again() -> None:
    """Its acknowledgement was lost with its channel, its outcome was not."""
    recent = Recent()
    settle(recent, delivered(["a", "b"]))
    assert recent.seen(part(delivered(["a", "c", "b"], again=True, channel=2))) == Seen([0, 2], [])


def test_a_message_that_comes_for_the_first_time_runs() -> None:
    """A client that sends the same twice is told twice; only the broker's own repeats are recognised."""
    recent = Recent()
    settle(recent, delivered(["a"]))
    assert recent.seen(part(delivered(["a"], channel=2))) == Seen([], [])


@pytest.mark.parametrize(
    "other",
    [
        delivered(["b"], again=True),
        delivered(["a"], again=True, body=b"another"),
        delivered(["a"], again=True, reply_to="amq.gen-2"),
        delivered(["a"], again=True, correlation_id="c-2"),
        delivered(["a"], again=True, attempt=2),
    ],
    ids=["id", "body", "queue", "correlation", "source"],
)
def test_another_message_is_not_taken_for_one_that_was_answered(other: Chunk) -> None:
    """Its id, its bytes, or whom to answer differs: somebody waits for it."""
    recent = Recent()
    settle(recent, delivered(["a"]))
    assert recent.seen(part(other)) == Seen([], [])


def test_a_later_attempt_is_another_message() -> None:
    """It carries the id, the bytes and the way of the one that failed before it, and nobody has answered."""
    recent = Recent()
    settle(recent, delivered(["a"], attempt=2))
    assert recent.seen(part(delivered(["a"], attempt=3, again=True, channel=3))) == Seen([], [])
    assert recent.seen(part(delivered(["a"], attempt=2, again=True, channel=3))) == Seen([0], [])


@pytest.mark.parametrize("request_id", ["amqp-0123", "amqp-"])
def test_a_message_that_nobody_named_is_never_recognised(request_id: str) -> None:
    """The id that was made up for it is another one each time."""
    recent = Recent()
    of = delivered([request_id])
    settle(recent, of)
    orphan(recent, delivered([request_id]))
    assert recent.seen(part(delivered([request_id], again=True))) == Seen([], [])


def test_kafka_records_are_not_remembered() -> None:
    """Their offsets say what was committed."""
    recent = Recent()
    of = chunk([b"a"])
    assert settle(recent, of) == []
    assert recent.seen(part(of)) == Seen([], [])
    assert repr(recent) == "Recent(answered=0, running=0)"


def test_what_still_runs_ends_for_both() -> None:
    """The delivery that came again is settled with the run that its first one began."""
    recent = Recent()
    first = delivered(["a", "b", "c"])
    first.settle([1])
    assert orphan(recent, first, gone=[2]) == 1
    assert first.orphaned
    assert first.wanted
    second = delivered(["a", "b", "c"], again=True, channel=2)
    assert recent.seen(part(second)) == Seen([], [0])
    assert settle(recent, first, [0]) == [(second, 0)]
    assert recent.seen(part(delivered(["a"], again=True, channel=3))) == Seen([0], [])


def test_a_delivery_that_is_lost_while_it_waits_is_not_settled() -> None:
    """The one that comes after it shares the end; settling the lost one would name a channel that is gone."""
    recent = Recent()
    first, second, third = (delivered(["a"], again=n > 1, channel=n) for n in (1, 2, 3))
    orphan(recent, first)
    assert recent.seen(part(second)) == Seen([], [0])
    assert orphan(recent, second) == 1
    assert recent.seen(part(third)) == Seen([], [0])
    assert settle(recent, first) == [(third, 0)]


def test_a_chunk_of_which_nothing_runs_is_no_orphan() -> None:
    """All of it is settled, or waited for a batch: its next delivery runs."""
    recent = Recent()
    first = delivered(["a", "b"])
    first.settle([0])
    assert orphan(recent, first, gone=[1]) == 0
    assert not first.wanted
    assert recent.seen(part(delivered(["a", "b"], again=True))) == Seen([], [])


def test_a_record_without_an_id_of_its_own_still_ends_as_it_began() -> None:
    """It cannot be recognised when it comes again, and its outcome is on its way: two, but none lost."""
    recent = Recent()
    first = delivered(["a"])
    first.live = False
    assert recent.orphaned(first, {0: None}, ()) == 1
    assert first.wanted
    assert recent.seen(part(delivered(["a"], again=True, channel=2))) == Seen([], [])


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    """What was answered again counts as young."""
    recent = Recent(limit=3)
    for name in ("a", "b", "c", "a", "d"):
        settle(recent, delivered([name]))
    again = part(delivered(["a", "b", "c", "d"], again=True))
    assert recent.seen(again).answered == [0, 2, 3]
    assert repr(recent) == "Recent(answered=3, running=0)"


def test_what_has_to_run_is_left() -> None:
    """Nothing, a part, or the very same."""
    whole = part(delivered(["a", "b", "c"]))
    assert left_of(whole, Seen([], [])) is whole
    assert left_of(whole, Seen([0, 1], [2])) is None
    left = left_of(whole, Seen([2], [0]))
    assert left is not None
    assert (left.rows, left.ids) == ([1], ["b"])


@given(st.data())
def test_every_delivery_runs_or_is_settled_and_none_twice(data: st.DataObject) -> None:
    """Whatever is lost and when: a message is settled exactly when its run has ended, and runs once."""
    recent = Recent()
    waiting: list[tuple[Chunk, int]] = []
    running: list[tuple[Chunk, int]] = []
    runs: dict[str, int] = {}
    answered: set[str] = set()
    open_ = {"a", "b", "c", "d"}
    for channel in range(1, 6):
        now = delivered(sorted(open_), again=channel > 1, channel=channel)
        waiting = []
        if len(now):
            whole = part(now)
            seen = recent.seen(whole)
            now.settle([whole.rows[i] for i in seen.answered])
            assert {whole.ids[i] for i in seen.answered} <= answered
            left = left_of(whole, seen)
            waiting = [] if left is None else [(now, row) for row in left.rows]
        for _ in range(data.draw(st.integers(0, 8))):
            if waiting and data.draw(st.booleans()):
                one = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                running.append(one)
                name = one[0].called(one[1])
                runs[name] = runs.get(name, 0) + 1
            elif running:
                of, row = running.pop(data.draw(st.integers(0, len(running) - 1)))
                answered.add(of.called(row))
                shared = settle(recent, of, [row])
                for other, at in [*shared, *([(of, row)] if of.live else [])]:
                    assert other.live
                    other.settle([at])
        # The acknowledgements of some that are settled are lost with the channel too.
        acked = {now.called(row) for row in range(len(now)) if now.settled[row] and data.draw(st.booleans())}
        open_ -= acked
        orphan(recent, now, gone=[row for of, row in waiting if of is now])
    assert all(count == 1 for count in runs.values())
