"""The judge is judged: faults are put into the record path on purpose, and each must be found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest

from inferfleet.brokers.memory_group import Group
from inferfleet.core.admission import Admission
from inferfleet.core.batcher import Batcher
from inferfleet.core.brake import Brake
from inferfleet.core.ledger import Ledger
from inferfleet.core.quarantine import CONDEMNED_AT
from inferfleet.core.retry import RetryPolicy
from inferfleet.ports import Refusal, RefusalKind
from inferfleet.records import Answer, Batch, BatchResult, Chunk, Stream
from inferfleet.results.memory import MemoryResults
from inferfleet.testing.marks import MemoryMarks
from inferfleet.wire.encode import AnswerWriter
from inferfleet.worker import failing, reading
from inferfleet.worker.brakes import Brakes
from inferfleet.worker.careful import Careful, Screened
from inferfleet.worker.delivery import Delivery
from inferfleet.worker.engine import BatchRunner
from inferfleet.worker.failing import Failing
from inferfleet.worker.loop import WorkerLoop
from inferfleet.worker.reading import Reading
from inferfleet.worker.retries import restore
from inferfleet.worker.settling import EnvelopeReceipt, ResultReceipt
from tests.simulation.audit import ViolationError
from tests.simulation.worker import WatchedIntake, WatchedRetries
from tests.simulation.world import World

MOST_SEEDS = 100

Patch = Callable[[pytest.MonkeyPatch], None]


def does(result: Any = None) -> Callable[..., Any]:
    """Return a function that takes anything and returns ``result``."""

    def instead(*_: Any) -> Any:
        return result

    return instead


def settles_at_the_hand_over(patch: pytest.MonkeyPatch) -> None:
    """Records are settled when they are handed over, not when they are confirmed."""

    def init(self: EnvelopeReceipt, settling: Any, envelopes: Any, rows: Any) -> None:
        self.settling, self.envelopes, self.rows, self.left = settling, envelopes, rows, -1

    patch.setattr(EnvelopeReceipt, "__init__", init)
    patch.setattr(EnvelopeReceipt, "confirmed", does())


def settles_what_the_topic_refused(patch: pytest.MonkeyPatch) -> None:
    """A refusal counts as a confirmation."""
    patch.setattr(EnvelopeReceipt, "refused", lambda self, *_: self.confirmed(1))


def settles_before_the_store_has_it(patch: pytest.MonkeyPatch) -> None:
    """The result store is not waited for."""

    def init(self: ResultReceipt, settling: Any, results: Any, rows: Any) -> None:
        self.settling, self.results, self.rows, self.left = settling, results, rows, -1

    patch.setattr(ResultReceipt, "__init__", init)
    patch.setattr(ResultReceipt, "confirmed", does())


def writes_no_dead_letter(patch: pytest.MonkeyPatch) -> None:
    """An error outcome is all that is left of a failed request."""
    patch.setattr(failing.Failing, "_letters", does())


def spoils_the_dead_letter(patch: pytest.MonkeyPatch) -> None:
    """A dead letter loses the headers it came with."""
    right = failing.dead_letter_headers
    patch.setattr(
        failing,
        "dead_letter_headers",
        lambda chunk, row, *rest: right(chunk, row, *rest)[len(chunk.headers[row] or ()) :],
    )


def swaps_two_answers(patch: pytest.MonkeyPatch) -> None:
    """The first two answers of a part change places."""
    right = AnswerWriter.json_bodies

    def swapped(self: AnswerWriter, answer: Answer, *rest: Any) -> list[bytes]:
        if len(answer.part) > 1 and answer.part.row_counts is None:
            order = [1, 0, *range(2, len(answer.part))]
            answer = Answer(answer.part, {name: array[order] for name, array in answer.outputs.items()})
        return right(self, answer, *rest)

    patch.setattr(AnswerWriter, "json_bodies", swapped)


def shifts_answers_within_a_batch(patch: pytest.MonkeyPatch) -> None:
    """The parts of a batch of several get each other's outputs."""
    right = BatchRunner.run

    def shifted(self: BatchRunner, batch: Any) -> BatchResult:
        result = right(self, batch)
        answers = result.answers
        if len(answers) > 1 and answers[0].part.total_rows == answers[-1].part.total_rows:
            outputs = [answers[-1].outputs, *(answer.outputs for answer in answers[1:-1]), answers[0].outputs]
            result.answers = [Answer(a.part, o) for a, o in zip(answers, outputs, strict=True)]
        return result

    patch.setattr(BatchRunner, "run", shifted)


def condemns_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Of a batch with a bad request all fail."""
    right = BatchRunner._isolate

    def condemned(self: BatchRunner, batch: Any, error: Exception, result: BatchResult) -> None:
        right(self, batch, error, result)
        if result.failures and result.answers:
            neighbour = result.answers.pop().part.slice(0, 1)
            result.failures.append(result.failures[0]._replace(part=neighbour))

    patch.setattr(BatchRunner, "_isolate", condemned)


def forgets_what_is_settled_at_a_revoke(patch: pytest.MonkeyPatch) -> None:
    """Positions are not given back when a stream goes."""
    right = WorkerLoop.revoked

    def forgetful(self: WorkerLoop, streams: Collection[Stream], grace_s: float) -> Mapping[Stream, int]:
        right(self, streams, grace_s)
        return {}

    patch.setattr(WorkerLoop, "revoked", forgetful)


def goes_on_with_lost_streams(patch: pytest.MonkeyPatch) -> None:
    """An epoch that ended is not noticed."""
    patch.setattr(WorkerLoop, "lost", does())
    patch.setattr(Ledger, "assigned", does())


def settles_past_an_open_record(patch: pytest.MonkeyPatch) -> None:
    """A chunk counts as settled up to its last settled record, whatever is open before it."""
    patch.setattr(
        Chunk, "settled_prefix", lambda self: len(self.settled.rstrip(b"\0")) if self.open < len(self) else 0
    )


def settles_chunks_out_of_order(patch: pytest.MonkeyPatch) -> None:
    """A chunk that is done is committed although one before it is not."""

    def advance(self: Ledger, stream: Stream) -> int | None:
        done = [chunk for chunk in self._open[stream] if not chunk.open]
        for chunk in done:
            self._open[stream].remove(chunk)
        return max([c.positions[-1] + 1 for c in done], default=self._settled_to.get(stream))

    patch.setattr(Ledger, "_advance", advance)


def does_not_settle_again_what_was_refused(patch: pytest.MonkeyPatch) -> None:
    """A refused commit is forgotten."""
    patch.setattr(WorkerLoop, "settle_refused", does())


def loses_a_part_of_a_batch(patch: pytest.MonkeyPatch) -> None:
    """A batch leaves the queue with one part less than was taken out."""
    right = Batcher.due

    def short(self: Batcher, *given: Any) -> Batch | None:
        batch = right(self, *given)
        if batch is not None and len(batch.parts) > 1:
            batch.rows -= batch.parts.pop().total_rows
        return batch

    patch.setattr(Batcher, "due", short)


def publishes_twice(patch: pytest.MonkeyPatch) -> None:
    """Answers are published two times."""
    right = Delivery._publish_answers

    def twice(self: Delivery, *given: Any) -> Any:
        right(self, *given)
        return right(self, *given)

    patch.setattr(Delivery, "_publish_answers", twice)


def loses_parked_envelopes(patch: pytest.MonkeyPatch) -> None:
    """What a topic refuses for now is never offered again."""
    right = Delivery.envelope_refused

    def lost(self: Delivery, receipt: EnvelopeReceipt, index: int, refusal: Refusal) -> None:
        if refusal.kind is RefusalKind.TOO_LARGE:
            right(self, receipt, index, refusal)
        else:
            receipt.settling.open += 1

    patch.setattr(Delivery, "envelope_refused", lost)


def frees_nothing(patch: pytest.MonkeyPatch) -> None:
    """What is finished still counts as in flight."""
    patch.setattr(Admission, "freed", does())


def takes_without_a_bound(patch: pytest.MonkeyPatch) -> None:
    """The worker never says that it is full."""
    patch.setattr(Admission, "room", does((1 << 30, 1 << 30)))
    patch.setattr(Admission, "may_take", does(True))


def changes_a_stored_answer(patch: pytest.MonkeyPatch) -> None:
    """The store keeps the last body under an id, not the first ok."""
    right = MemoryResults._write_row

    def last(self: MemoryResults, results: Any, index: int) -> Any:
        self.results.pop((results.route, results.ids[index]), None)
        results.bodies[index] = results.bodies[index].replace(b'"model_version"', b'"model_version" ')
        return right(self, results, index)

    patch.setattr(MemoryResults, "_write_row", last)


def two_members_own_one_stream(patch: pytest.MonkeyPatch) -> None:
    """The coordinator does not wait for the old owner (a fault of the broker, which the judge must see)."""

    def claim(self: Group, member: Any) -> list[Stream]:
        gained = sorted(s for s, owner in self._target.items() if owner is member and s not in member.owned)
        member.owned.update(gained)
        return gained

    patch.setattr(Group, "claim", claim)


def settles_what_waits_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    """A record that goes on to another attempt is settled when that is handed over."""
    right = EnvelopeReceipt.__init__

    def init(self: EnvelopeReceipt, settling: Any, envelopes: Any, rows: Any) -> None:
        right(self, settling, envelopes, rows)
        if envelopes.destination in settling.plan.retries:
            self.left = -1
            settling.open -= 1

    patch.setattr(EnvelopeReceipt, "__init__", init)


def forgets_where_a_retry_stood(patch: pytest.MonkeyPatch) -> None:
    """Another attempt is written without its origin."""
    right = failing.retry_headers

    def short(*given: Any, **options: Any) -> list[Any]:
        return [each for each in right(*given, **options) if not each[0].startswith("inferfleet-origin-")]

    patch.setattr(failing, "retry_headers", short)


def takes_a_retry_for_a_first_attempt(patch: pytest.MonkeyPatch) -> None:
    """What comes from a retry topic is read as it stands there."""
    patch.setattr(reading, "restore", does())


def believes_what_a_caller_says_of_attempts(patch: pytest.MonkeyPatch) -> None:
    """Headers of the source are read as if nobody but us could write them."""
    right = Reading.read

    def believing(self: Reading, plan: Any, chunk: Chunk) -> None:
        if plan is not None and not plan.brings_retries(chunk.stream.source):
            restore(chunk)
        right(self, plan, chunk)

    patch.setattr(Reading, "read", believing)


def tries_again_for_ever(patch: pytest.MonkeyPatch) -> None:
    """The attempts that a request has had are not counted."""
    right = RetryPolicy.decide
    patch.setattr(RetryPolicy, "decide", lambda self, **given: right(self, **given | {"attempt": 1}))


def tries_again_what_cannot_pass(patch: pytest.MonkeyPatch) -> None:
    """Whatever a model fails gets all its attempts."""
    right = Failing.fail

    def hopeful(self: Failing, plan: Any, failures: Any, **given: Any) -> None:
        right(self, plan, failures, **given | {"retryable": [True] * len(failures.rows)})

    patch.setattr(Failing, "fail", hopeful)


def loses_what_is_too_large_for_another_attempt(patch: pytest.MonkeyPatch) -> None:
    """A retry topic has no room for it, and that is all."""
    patch.setattr(Failing, "give_up", does())


def takes_retries_before_their_time(patch: pytest.MonkeyPatch) -> None:
    """A retry topic is read like any other: nothing waits, and nothing is ever due."""
    patch.setattr(WatchedRetries, "_due", lambda _, chunk: chunk)


def skips_what_is_not_due(patch: pytest.MonkeyPatch) -> None:
    """The records behind the first that must wait are not come back to."""
    patch.setattr(WatchedIntake, "defer", does())


def brakes_and_lets_all_pass(patch: pytest.MonkeyPatch) -> None:
    """The route is paused, and what fails ends all the same."""
    right = Brakes.passed

    def leaky(self: Brakes, route: str, failures: Any, answered: int) -> Any:
        right(self, route, failures, answered)
        self._withheld.clear()
        return failures

    patch.setattr(Brakes, "passed", leaky)


def never_brakes(patch: pytest.MonkeyPatch) -> None:
    """Failures in a row are not counted."""
    patch.setattr(Brake, "_judge", does())


def forgets_what_it_held_back(patch: pytest.MonkeyPatch) -> None:
    """A route that is resumed goes on without what failed before."""
    patch.setattr(Brakes, "released", _after(Brakes.released, lambda _: []))


def remembers_no_crash(patch: pytest.MonkeyPatch) -> None:
    """Each life of a process begins as if the one before had ended well."""
    patch.setattr(MemoryMarks, "load", does())


def condemns_at_the_first_crash(patch: pytest.MonkeyPatch) -> None:
    """All that was in flight is answered without running."""
    patch.setattr(Careful, "__init__", _after(Careful.__init__, does(), _all_condemned))


def gives_a_suspect_company(patch: pytest.MonkeyPatch) -> None:
    """Suspects run together with everybody else, and the crash is everybody's."""
    patch.setattr(Careful, "screen", lambda _, batch: Screened([], [], batch))


def _all_condemned(careful: Careful) -> None:
    quarantine = careful._quarantine
    quarantine._condemned |= dict.fromkeys(quarantine._suspects, CONDEMNED_AT)
    quarantine._suspects.clear()


def _after(right: Callable[..., Any], result: Callable[..., Any], then: Any = None) -> Callable[..., Any]:
    """Return ``right`` with ``result`` made of what it returns, and ``then`` told of its object."""

    def instead(self: Any, *given: Any, **options: Any) -> Any:
        found = right(self, *given, **options)
        if then is not None:
            then(self)
        return result(found)

    return instead


BUGS: dict[Patch, str] = {
    settles_at_the_hand_over: "I1 I5",
    settles_what_the_topic_refused: "I1 I5 I12",
    settles_before_the_store_has_it: "I1 I5",
    writes_no_dead_letter: "I1 I5",
    spoils_the_dead_letter: "I12",
    swaps_two_answers: "I3",
    shifts_answers_within_a_batch: "I3",
    condemns_a_neighbour: "I12",
    forgets_what_is_settled_at_a_revoke: "I2",
    goes_on_with_lost_streams: "I2 I5 I6 I14",
    settles_past_an_open_record: "I1 I2 I5",
    settles_chunks_out_of_order: "I1 I2 I5",
    does_not_settle_again_what_was_refused: "I2 I6",
    loses_a_part_of_a_batch: "I6",
    publishes_twice: "I2",
    loses_parked_envelopes: "I6",
    frees_nothing: "I6",
    takes_without_a_bound: "I14",
    changes_a_stored_answer: "I2",
    two_members_own_one_stream: "broker",
    settles_what_waits_before_it_is_written: "I5",
    forgets_where_a_retry_stood: "I12",
    takes_a_retry_for_a_first_attempt: "I3 I12",
    believes_what_a_caller_says_of_attempts: "I3 I12",
    tries_again_for_ever: "I2 I6 I12",
    tries_again_what_cannot_pass: "I12",
    loses_what_is_too_large_for_another_attempt: "I1 I5",
    takes_retries_before_their_time: "delay",
    skips_what_is_not_due: "I1 I5",
    brakes_and_lets_all_pass: "I12",
    never_brakes: "I12",
    forgets_what_it_held_back: "I6",
    remembers_no_crash: "I12",
    condemns_at_the_first_crash: "I12",
    gives_a_suspect_company: "I12",
}


@pytest.mark.usefixtures("silent_logs")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_fault_put_in_on_purpose_is_found(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few seeds, and under the name of a promise that it breaks."""
    bug(monkeypatch)
    found = list(_first_violation(range(MOST_SEEDS)))
    assert found, f"{MOST_SEEDS} seeds have not found it"
    promise = found[0].split(": ")[1]
    assert promise in BUGS[bug].split(), found[0]


def _first_violation(seeds: Iterable[int]) -> Iterable[str]:
    for seed in seeds:
        try:
            World(seed).run()
        except ViolationError as violation:
            yield str(violation)
            return
