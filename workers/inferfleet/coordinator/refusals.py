"""How the API says no: a status, a code, one line without internal names, and whether to ask again."""

from __future__ import annotations

from collections.abc import Mapping

from inferfleet.errors import (
    ConfigError,
    ConflictError,
    ControlError,
    FencedError,
    InferfleetError,
    LogLostError,
    ModelRepositoryError,
)
from inferfleet.rollouts import RefusedError as NotNowError


class RefusedError(InferfleetError):
    """A request is refused; the text goes to the caller, who may be anybody."""

    def __init__(
        self,
        status: int,
        code: str,
        text: str,
        *,
        retryable: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.status, self.code, self.text, self.retryable = status, code, text, retryable
        self.headers = dict(headers or {})


CODES: dict[int, str] = {
    400: "What was sent cannot be understood, or says what may not be.",
    401: "No token, or one that is not known or has expired.",
    403: "The token's role or routes do not allow it, or a web page of another origin asks.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "It cannot be done as things stand, or somebody else changed the same thing meanwhile.",
    412: "If-Match names another revision than the last.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The Host header names somebody else.",
    428: "If-Match is missing.",
    429: "Too many requests.",
    500: "A fault of the coordinator; its log says more.",
    503: "The control plane's Redis does not answer, or too much is asked at once.",
}
"""Every status of a refusal that the API may answer, and what it means."""


def not_found(what: str) -> RefusedError:
    """Return the refusal for something that does not exist."""
    return RefusedError(404, "E_NOT_FOUND", what)


def refusal_of(error: Exception) -> RefusedError:
    """Return how an error of the services is told; what is not foreseen becomes a 500 that says nothing."""
    match error:
        case RefusedError():
            return error
        case NotNowError():
            return RefusedError(409, "E_REFUSED", _one_line(error))
        case ConfigError():
            return RefusedError(400, "E_INVALID", _one_line(error))
        case ConflictError():
            return RefusedError(409, "E_CONFLICT", _one_line(error), retryable=True)
        case LogLostError():
            text = "the store has lost revisions that workers hold; POST /v1/reset starts a new log"
            return RefusedError(409, "E_LOG_LOST", text)
        case ModelRepositoryError():
            text = _one_line(error)
            # Its text may name folders of this machine.
            if "/" in text:
                text = "a model version cannot be read; `inferfleet model check` says why"
            return RefusedError(400, "E_MODEL_UNKNOWN", text)
        case ControlError():
            text = "the control plane's Redis does not answer"
            return RefusedError(503, "E_CONTROL", text, retryable=True, headers={"retry-after": "2"})
        case FencedError():
            return RefusedError(503, "E_CONTROL", "another coordinator leads now", retryable=True)
        case _:
            return RefusedError(500, "E_INTERNAL", "see the coordinator's log", retryable=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
