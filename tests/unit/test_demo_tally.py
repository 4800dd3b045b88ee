"""The demo's bookkeeping: answers decoded, judged once, counted truly."""

from __future__ import annotations

import json

import numpy as np

from inferfleet.core.routing import Steering
from inferfleet.demo.digits import Digits
from inferfleet.demo.report import Findings, Killing
from inferfleet.demo.show import mixed
from inferfleet.demo.stage import Batches, batches_of
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import Answer, DigitsLoad, Request, decode_answer

SERVED = b"route=digits;model=digits;version=2;variant=canary;revision=1;worker=worker-1"


def digits_load() -> DigitsLoad:
    """Four images that models 1 and 2 answer differently; all keys are steered to version 1."""
    data = Digits(
        images=np.zeros((4, 64), dtype=np.float32),
        digits=np.array([0, 1, 0, 1]),
        learned=np.array([0]),
    )
    expected = {
        "1": np.tile(np.array([0.9, 0.1], dtype=np.float32), (4, 1)),
        "2": np.tile(np.array([0.2, 0.8], dtype=np.float32), (4, 1)),
    }
    return DigitsLoad("digits", data, expected, Steering("salt", [10_000]))


def answer(number: int, version: str = "1", first: float = 0.9, error: str | None = None) -> Answer:
    """An answer with the probabilities ``first`` and its rest."""
    probabilities = np.array([first, 1 - first], dtype=np.float32)
    outputs = {"probabilities": probabilities, "label": np.array([int(first < 0.5)])}
    return Answer("digits", f"digit-{number}", version, "worker-1", outputs, error)


def sent_tally() -> Tally:
    """A tally of four digits that were sent at 10 s."""
    load = digits_load()
    tally = Tally({"digits": load})
    for request in load.requests:
        tally.note_sent(request.route, request.id, 10.0)
    return tally


def findings(tally: Tally, missing_in_redis: int = 0) -> Findings:
    """Findings around a tally."""
    return Findings(tally, {}, Killing("worker-1", "worker-3", 1, 1), 1, 1.0, missing_in_redis)


def test_a_json_answer_is_decoded_without_its_row_dimension() -> None:
    """Version and worker come from body and header, data from the JSON."""
    body = {
        "model_name": "digits",
        "model_version": "2",
        "id": "digit-7",
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [1, 1], "data": [7]}],
    }
    headers = {"inferfleet-id": b"digit-7", "inferfleet-status": b"ok", "inferfleet-served": SERVED}

    decoded = decode_answer("digits", json.dumps(body).encode(), headers)

    assert (decoded.id, decoded.version, decoded.worker, decoded.error) == ("digit-7", "2", "worker-1", None)
    assert decoded.outputs["label"].tolist() == [7]


def test_a_binary_answer_is_decoded_tensor_by_tensor() -> None:
    """Tensors with a binary size stand behind the JSON in the order of the outputs."""
    first, second = np.arange(3, dtype=np.float32), np.array([9], dtype=np.int64)
    outputs = [
        {"name": "a", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}},
        {"name": "b", "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": 8}},
    ]
    head = json.dumps({"model_version": "1", "id": "file-1", "outputs": outputs}).encode()
    headers = {"inferfleet-id": b"file-1", "inference-header-content-length": str(len(head)).encode()}

    decoded = decode_answer("files", head + first.tobytes() + second.tobytes(), headers)

    assert decoded.outputs["a"].tolist() == [0.0, 1.0, 2.0]
    assert decoded.outputs["b"].tolist() == [9]


def test_an_error_outcome_keeps_its_code_and_text() -> None:
    """An error counts as an outcome, and the demo says which."""
    body = {"error": "it broke", "code": "E_MODEL", "id": "digit-1", "retryable": False}

    decoded = decode_answer("digits", json.dumps(body).encode(), {"inferfleet-id": b"digit-1"})

    assert decoded.error == "E_MODEL: it broke"


def test_a_second_outcome_is_a_duplicate_and_changes_nothing_else() -> None:
    """Only the first outcome of a request is judged."""
    tally = sent_tally()

    tally.note_answer(answer(1), 11.0)
    tally.note_answer(answer(1, first=0.3), 12.0)

    assert (tally.answered, tally.duplicates, tally.wrong) == (1, 1, [])
    assert len(tally.unanswered) == 3
    assert tally.slowest_s == 1.0


def test_an_answer_of_the_wrong_version_or_to_another_image_is_wrong() -> None:
    """Right is what the version that the key is steered to says about this very image."""
    tally = sent_tally()

    tally.note_answer(answer(1, version="2", first=0.2), 11.0)
    tally.note_answer(answer(2, first=0.2), 11.0)
    tally.note_answer(answer(3), 11.0)

    assert tally.wrong == ["digits digit-1", "digits digit-2"]


def test_accuracy_counts_only_images_that_no_model_learned_from() -> None:
    """Image 0 was learned from; of the others, 0 is the digit of image 2 only."""
    tally = sent_tally()

    for number in range(4):
        tally.note_answer(answer(number), 11.0)

    version = tally.versions["digits", "1"]
    assert (version.answered, version.judged, version.hits) == (4, 3, 1)


def test_it_passes_only_if_nothing_is_lost_wrong_failed_strange_or_missing_in_redis() -> None:
    """One fault of any kind fails the demo; duplicates do not, they are what at least once allows."""
    good = sent_tally()
    for number in range(4):
        good.note_answer(answer(number), 11.0)
    good.note_answer(answer(0), 11.0)
    assert findings(good).passed
    assert not findings(good, missing_in_redis=1).passed

    for spoiled in (answer(3, first=0.2), answer(3, error="E_MODEL: it broke"), answer(99)):
        tally = sent_tally()
        for number in range(3):
            tally.note_answer(answer(number), 11.0)
        assert findings(tally).lost == 1
        tally.note_answer(spoiled, 11.0)
        assert not findings(tally).passed


def test_requests_of_all_routes_are_spread_evenly_and_keep_their_order() -> None:
    """The short route is not sent first or last, but all along."""

    class Fixed:
        def __init__(self, route: str, count: int) -> None:
            self.requests = [Request(route, str(number), b"", b"", []) for number in range(count)]

        def is_right(self, answer: Answer) -> bool:
            return True

        def is_hit(self, answer: Answer) -> bool | None:
            return None

    order = mixed([Fixed("long", 8), Fixed("short", 2)])

    assert [request.id for request in order if request.route == "long"] == [str(n) for n in range(8)]
    assert [number for number, request in enumerate(order) if request.route == "short"] == [1, 6]


def test_batches_are_read_from_a_metrics_page_per_model_version() -> None:
    """Counts and rows of one version are added over its other labels."""
    page = "\n".join(
        [
            "# TYPE inferfleet_batch_rows histogram",
            'inferfleet_batch_rows_bucket{le="+Inf",model="digits",role="primary",version="1"} 2',
            'inferfleet_batch_rows_count{model="digits",role="primary",version="1"} 2',
            'inferfleet_batch_rows_sum{model="digits",role="primary",version="1"} 64',
            'inferfleet_batch_rows_count{model="digits",role="shadow",version="1"} 1',
            'inferfleet_batch_rows_sum{model="digits",role="shadow",version="1"} 3',
            "",
        ]
    )

    assert batches_of(page) == {("digits", "1"): Batches(3, 67)}
