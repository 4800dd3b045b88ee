"""What is sent and what comes back: requests per route, answers decoded, and who judges them.

Requests are plain messages of the broker: nothing of inferfleet is needed to ask, only a body and, where
the default does not fit, a header. Answers are read from where they are published, as anybody would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from inferfleet.core.routing import Steering
from inferfleet.datatypes import DATATYPES
from inferfleet.demo.digits import Digits, Floats
from inferfleet.demo.files import FileTypes, SampleFile

_LENGTH_HEADER = "inference-header-content-length"
_TOLERANCE = 1e-4


class Request(NamedTuple):
    """One message to a request topic or queue."""

    route: str
    id: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of a result topic or queue, decoded; ``outputs`` are without the row dimension."""

    route: str
    id: str
    version: str
    worker: str
    outputs: dict[str, npt.NDArray[Any]]
    error: str | None = None


class Load(Protocol):
    """The requests of one route, and what their answers have to be."""

    @property
    def requests(self) -> list[Request]:
        """What is sent, each once."""

    def is_right(self, answer: Answer) -> bool:
        """Whether the answer is what its version must say to this very request."""

    def is_hit(self, answer: Answer) -> bool | None:
        """Whether the prediction is true; ``None`` where that would prove nothing."""


class DigitsLoad:
    """Every image once, as V2 JSON; which version answers is known beforehand from the key."""

    def __init__(self, route: str, data: Digits, expected: Mapping[str, Floats], steering: Steering) -> None:
        self._digits = data.digits
        self._unseen = data.unseen
        self._expected = expected
        self._versions = list(expected)
        self._steering = steering
        self.requests = [
            Request(
                route, f"digit-{row}", b"digit-%d" % row, v2_json(f"digit-{row}", "image", "FP32", image), []
            )
            for row, image in enumerate(data.images)
        ]

    def is_right(self, answer: Answer) -> bool:
        """The version is the one that the key is steered to, and says what it says outside the fleet."""
        row = request_number(answer.id)
        steered = self._versions[self._steering.variant(answer.id.encode())]
        expected = self._expected[steered][row]
        return answer.version == steered and bool(
            np.allclose(answer.outputs["probabilities"], expected, atol=_TOLERANCE)
        )

    def is_hit(self, answer: Answer) -> bool | None:
        """Whether the digit was recognised; images that the models learned from do not count."""
        row = request_number(answer.id)
        if not self._unseen[row]:
            return None
        return int(answer.outputs["label"][0]) == int(self._digits[row])


class FilesLoad:
    """Real files as one raw tensor each: 8 KiB without any JSON around them."""

    def __init__(self, route: str, types: FileTypes, samples: list[SampleFile]) -> None:
        self._types = types
        self._samples = samples
        self.requests = [
            Request(
                route,
                f"file-{number}",
                sample.name.encode(),
                sample.features.astype("<i4").tobytes(),
                [
                    ("inferfleet-id", b"file-%d" % number),
                    ("content-type", b"application/octet-stream"),
                    (_LENGTH_HEADER, b"0"),
                ],
            )
            for number, sample in enumerate(samples)
        ]

    def is_right(self, answer: Answer) -> bool:
        """The type is the one that magika itself finds."""
        best = int(np.argmax(answer.outputs["target_label"]))
        return self._types.labels[best] == self._samples[request_number(answer.id)].label

    def is_hit(self, answer: Answer) -> bool | None:  # noqa: ARG002 - the port's shape
        """Nobody has labelled these files, so there is nothing to be true to."""
        return None


def v2_json(request_id: str, name: str, datatype: str, row: npt.NDArray[Any] | list[str]) -> bytes:
    """Return a V2 JSON body with one input and one row."""
    data = row if isinstance(row, list) else row.tolist()
    tensor = {"name": name, "datatype": datatype, "shape": [1, len(data)], "data": data}
    return json.dumps({"id": request_id, "inputs": [tensor]}, separators=(",", ":")).encode()


def decode_answer(route: str, value: bytes, headers: Mapping[str, bytes]) -> Answer:
    """Return an outcome as it is published: JSON, or JSON and binary tensors behind it."""
    served = dict(
        part.partition("=")[::2] for part in headers.get("inferfleet-served", b"").decode().split(";")
    )
    length = int(headers.get(_LENGTH_HEADER, str(len(value)).encode()))
    body = json.loads(value[:length])
    error = f"{body['code']}: {body['error']}" if "error" in body else None
    outputs, offset = {}, length
    for tensor in body.get("outputs", []):
        kind = DATATYPES[tensor["datatype"]].numpy
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            flat = np.array(tensor["data"], dtype=kind)
        else:
            flat = np.frombuffer(value[offset : offset + size], dtype=kind)
            offset += size
        outputs[tensor["name"]] = flat.reshape(tensor["shape"][1:])
    return Answer(
        route=route,
        id=headers["inferfleet-id"].decode(),
        version=body.get("model_version", served.get("version", "")),
        worker=served.get("worker", ""),
        outputs=outputs,
        error=error,
    )


def request_number(request_id: str) -> int:
    """Return the number at the end of an id such as ``digit-42``."""
    return int(request_id.rpartition("-")[2])
