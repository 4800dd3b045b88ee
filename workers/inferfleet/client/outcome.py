"""What comes back to a caller: a result, or an exception that names the id at fault."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from inferfleet.datatypes import DATATYPES
from inferfleet.errors import InferfleetError
from inferfleet.records import Array
from inferfleet.wire.stored import is_error


class ClientError(InferfleetError):
    """A client could not send, or not wait."""


class SubmitError(ClientError):
    """A request did not reach its topic; ``id`` is its request id where one request is meant."""

    def __init__(self, text: str, request_id: str | None = None) -> None:
        super().__init__(text)
        self.id = request_id


class DuplicateIdError(SubmitError):
    """This client waits for another payload under the same id (``E_DUP_ID``)."""


class ResultTimeout(ClientError):  # noqa: N818 - it is what happened, as in TimeoutError's own family
    """No result of ``id`` within the time; it may still come, so asking again is right.

    ``why`` is empty, or starts with a semicolon and says what else is known, such as that Redis is away.
    """

    def __init__(self, request_id: str, timeout_s: float, why: str = "") -> None:
        super().__init__(f"no result of {request_id} within {timeout_s:g} s{why}")
        self.id = request_id
        self.why = why


class OutcomeError(ClientError):
    """A request ended in an error outcome; raised by :meth:`Result.checked` only."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"request {result.id}: {result.code}: {result.error}")
        self.result = result


@dataclass(frozen=True)
class Result:
    """One outcome. ``body`` is its JSON as it stands in Redis; all else is read from it when asked for."""

    id: str
    route: str
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether it is a prediction."""
        return not is_error(self.body)

    @property
    def status(self) -> Literal["ok", "error"]:
        """``ok`` or ``error``, as in the ``inferfleet-status`` header."""
        return "ok" if self.ok else "error"

    @cached_property
    def document(self) -> dict[str, Any]:
        """The body as a dictionary. Raises ClientError if something else than JSON stands there."""
        try:
            document: dict[str, Any] = msgspec.json.decode(self.body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ClientError(f"the result of {self.id} on route {self.route} is not JSON: {error}") from None
        return document

    @property
    def error(self) -> str | None:
        """The error's text; ``None`` for a prediction."""
        return None if self.ok else str(self.document.get("error", ""))

    @property
    def code(self) -> str | None:
        """The error's code, such as ``E_SHAPE``; ``None`` for a prediction."""
        return None if self.ok else str(self.document.get("code", ""))

    @property
    def model_version(self) -> str | None:
        """The version that answered; ``None`` for an error."""
        version = self.document.get("model_version")
        return None if version is None else str(version)

    @cached_property
    def outputs(self) -> dict[str, Array]:
        """The outputs by name, with rows as first dimension; empty for an error. BYTES hold ``str``."""
        return {tensor["name"]: _array(tensor) for tensor in self.document.get("outputs", ())}

    def checked(self) -> Result:
        """Return itself; raises OutcomeError for an error outcome."""
        if not self.ok:
            raise OutcomeError(self)
        return self


Outcome: TypeAlias = Result | ClientError
"""How waiting ends: a result, or why there is none."""


def _array(tensor: dict[str, Any]) -> Array:
    shape = tensor["shape"]
    data = tensor["data"]
    if tensor["datatype"] != "BYTES":
        return np.array(data, DATATYPES[tensor["datatype"]].numpy).reshape(shape)
    if tensor.get("parameters", {}).get("encoding") == "base64":
        data = [base64.b64decode(text) for text in data]
    array = np.empty(len(data), object)
    array[:] = data
    return array.reshape(shape)
