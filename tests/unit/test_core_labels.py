"""Labels find the answers that they are about, whichever comes first, and each counts once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core.labels import MOST_OF_ONE, LabelJoin
from inferfleet.feedback import Answered, Feedback, Label, Measured

HOUR = 3_600_000


def answered(
    request_id: str, version: str = "1", at_ms: int = 0, classes: tuple[int, ...] | None = None
) -> Answered:
    return Answered(request_id, version, f"v{version}", b"u-" + request_id.encode(), at_ms, classes)


def came(*both: Answered | Label, caught_up: bool = False) -> Feedback:
    return Feedback(
        [each for each in both if isinstance(each, Answered)],
        [each for each in both if isinstance(each, Label)],
        caught_up,
    )


def test_a_label_may_come_before_or_after_its_answer() -> None:
    """The order in which two topics are read says nothing."""
    join = LabelJoin(HOUR)

    assert join.add(came(answered("a", "2")), 0) == []
    after = join.add(came(Label("a", 5, {"clicks": 1})), 0)
    assert join.add(came(Label("b", 5, {"clicks": 3})), 0) == []
    before = join.add(came(answered("b")), 0)

    assert after == [Measured("2", "v2", "clicks", b"u-a", 1)]
    assert before == [Measured("1", "v1", "clicks", b"u-b", 3)]


def test_the_first_value_of_a_metric_counts_once() -> None:
    """A label that is sent again changes nothing; another metric of the same request is another matter."""
    join = LabelJoin(HOUR)
    join.add(came(answered("a")), 0)

    found = [
        *join.add(came(Label("a", 1, {"clicks": 1}), Label("a", 2, {"clicks": 9})), 0),
        *join.add(came(Label("a", 3, {"clicks": 1, "revenue": 4.5})), 0),
        *join.add(came(answered("a", "2"), Label("a", 4, {"clicks": 1})), 0),
    ]

    assert [(each.metric, each.value, each.version) for each in found] == [
        ("clicks", 1, "1"),
        ("revenue", 4.5, "1"),
    ]


def test_what_lies_further_apart_than_the_horizon_is_late() -> None:
    """A label of last week says nothing of this rollout, in either direction."""
    join = LabelJoin(1_000)

    assert join.add(came(answered("a", at_ms=10_000), Label("a", 11_001, {"x": 1})), 0) == []
    assert join.add(came(answered("b", at_ms=10_000), Label("b", 8_999, {"x": 1})), 0) == []
    assert len(join.add(came(answered("c", at_ms=10_000), Label("c", 11_000, {"x": 1})), 0)) == 1

    assert join.late == 2


def test_what_nothing_can_match_any_more_is_forgotten() -> None:
    """Answers go when labels are a horizon further, labels when answers are, both when nothing else waits."""
    join = LabelJoin(1_000)
    join.add(came(answered("a", at_ms=0), Label("b", 0, {"x": 1})), 0)

    join.add(came(Label("c", 1_001, {"x": 1})), 1_001)
    assert len(join) == 2  # the answer is gone; the labels wait, because answers are not that far yet

    join.add(came(caught_up=True), 1_500)
    assert len(join) == 1
    join.add(came(caught_up=True), 3_000)
    assert len(join) == 0
    assert join.late == 2


def test_a_producer_whose_clock_is_ahead_takes_no_label_from_others() -> None:
    """Hours ahead is joined by its own time; years ahead is not believed, and holds nothing in memory."""
    join = LabelJoin(1_000)
    ahead, broken = 5_000 + HOUR, 10**15
    join.add(came(answered("z", at_ms=broken), answered("a", at_ms=5_000)), 5_000)
    join.add(came(Label("x", ahead, {"x": 1}), Label("y", broken, {"x": 1})), 5_000)

    found = join.add(came(Label("a", 5_500, {"x": 1})), 5_500)
    join.add(came(caught_up=True), 7_000)

    assert [each.unit for each in found] == [b"u-a"]
    assert len(join) == 1, "the label that is an hour ahead waits for its time"
    join.add(came(caught_up=True), ahead + 1_001)
    assert len(join) == 0


def test_one_id_without_an_answer_takes_no_memory_without_end() -> None:
    """Nor labels from others: what is sent again is kept once, and what one id says is bounded."""
    join = LabelJoin(HOUR, most=1_000)
    join.add(came(answered("good")), 0)

    join.add(came(*(Label("again", 1, {"x": 1}) for _ in range(5_000))), 1)
    assert len(join) == 2
    join.add(came(*(Label("bad", i, {"x": i}) for i in range(5_000))), 5_000)
    assert len(join) == 2 + MOST_OF_ONE

    assert join.share == 1
    assert len(join.add(came(Label("good", 2, {"x": 1})), 5_000)) == 1


def test_accuracy_is_the_share_of_rows_that_got_their_true_class() -> None:
    """An error outcome is right in no row; where either side is not known nothing is counted."""
    join = LabelJoin(HOUR, accuracy=True)

    found = join.add(
        came(
            answered("right", classes=(3,)),
            answered("half", classes=(3, 4)),
            answered("error", classes=()),
            answered("shape", classes=(3,)),
            answered("unread", classes=None),
            *(Label(name, 1, {}, (3,)) for name in ("right", "error", "unread")),
            Label("half", 1, {}, (3, 5)),
            Label("shape", 1, {}, (3, 3)),
        ),
        0,
    )

    assert {each.unit: each.value for each in found} == {
        b"u-right": 1.0,
        b"u-half": 0.5,
        b"u-error": 0.0,
        b"u-shape": 0.0,
    }


def test_over_the_bound_the_join_goes_on_with_a_part_of_the_ids() -> None:
    """Memory is bounded; what is left is chosen by the id, so both versions lose alike."""
    join = LabelJoin(HOUR, most=1_000)
    ids = [f"r-{i}" for i in range(10_000)]

    found = []
    for start in range(0, len(ids), 100):
        part = ids[start : start + 100]
        join.add(came(*(answered(each, str(1 + i % 2)) for i, each in enumerate(part))), 0)
        assert len(join) <= 1_000
    found = join.add(came(*(Label(each, 1, {"x": 1}) for each in ids)), 0)

    counts = Counter(each.version for each in found)
    assert join.share <= 0.125
    assert 100 < len(found) <= 1_000
    assert abs(counts["1"] - counts["2"]) < 5 * len(found) ** 0.5


@given(st.data())
def test_how_the_topics_are_interleaved_does_not_matter(data: st.DataObject) -> None:
    """A coordinator that takes over reads both topics anew, in another order, and finds the same."""
    answers = [
        answered(f"r-{i % 12}", str(1 + i % 2), at_ms) for i, at_ms in enumerate(sorted(data.draw(_TIMES)))
    ]
    labels = [
        Label(f"r-{i % 15}", at_ms, {"x": float(i)}) for i, at_ms in enumerate(sorted(data.draw(_TIMES)))
    ]

    results = []
    for _ in range(2):
        join, found = LabelJoin(500), []
        turns = data.draw(
            st.permutations([True] * len(answers) + [False] * len(labels)), label="answers first"
        )
        left, right = iter(answers), iter(labels)
        for turn in turns:
            found += join.add(came(next(left) if turn else next(right)), 0)
        results.append(sorted(found))

    assert results[0] == results[1]


_TIMES = st.lists(st.integers(0, 2_000), max_size=12)
