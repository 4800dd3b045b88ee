"""What can go wrong, named by whose fault it is and by what must be fixed.

Two families. A *code* (:class:`Code`) belongs to one request and travels in its error outcome; its
:class:`Rule` says who is at fault, whether trying again can help and whether a dead letter is kept.
An *exception* (:class:`InferfleetError` and below) belongs to a person: its text is one line that
names the file, key, topic or model at fault and, where known, the mend.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Code(StrEnum):
    """The reason of an error outcome; the value stands in the body's ``code`` and in ``inferfleet-code``."""

    DECODE = "E_DECODE"
    SCHEMA = "E_SCHEMA"
    ID = "E_ID"
    DUP_ID = "E_DUP_ID"
    DTYPE = "E_DTYPE"
    SHAPE = "E_SHAPE"
    NONFINITE = "E_NONFINITE"
    TOO_LARGE = "E_TOO_LARGE"
    CONTENT_TYPE = "E_CONTENT_TYPE"
    HEADER = "E_HEADER"
    PROTOCOL = "E_PROTOCOL"
    EMPTY = "E_EMPTY"
    DEADLINE = "E_DEADLINE"
    MODEL_UNKNOWN = "E_MODEL_UNKNOWN"
    ROUTE = "E_ROUTE"
    MODEL = "E_MODEL"
    MODEL_OUTPUT = "E_MODEL_OUTPUT"
    RESULT_TOO_LARGE = "E_RESULT_TOO_LARGE"
    INTERNAL = "E_INTERNAL"


class Rule(NamedTuple):
    """What a code means for the one who reads it and for the fleet."""

    fault: str
    retryable: bool
    dead_letter: bool
    brake: bool


_CALLER = Rule("caller", retryable=False, dead_letter=True, brake=False)
_CONFIGURATION = Rule("configuration", retryable=False, dead_letter=True, brake=False)

RULES: dict[Code, Rule] = {
    Code.DECODE: _CALLER,
    Code.SCHEMA: _CALLER,
    Code.ID: _CALLER,
    Code.DUP_ID: _CALLER,
    Code.DTYPE: _CALLER,
    Code.SHAPE: _CALLER,
    Code.NONFINITE: _CALLER,
    Code.TOO_LARGE: _CALLER,
    Code.CONTENT_TYPE: _CALLER,
    Code.HEADER: _CALLER,
    Code.PROTOCOL: _CALLER,
    Code.EMPTY: _CALLER,
    Code.DEADLINE: Rule("time", retryable=False, dead_letter=False, brake=False),
    Code.MODEL_UNKNOWN: _CONFIGURATION,
    Code.ROUTE: _CONFIGURATION,
    Code.MODEL: Rule("model", retryable=False, dead_letter=True, brake=True),
    Code.MODEL_OUTPUT: Rule("model", retryable=False, dead_letter=True, brake=True),
    Code.RESULT_TOO_LARGE: Rule("model", retryable=False, dead_letter=True, brake=False),
    Code.INTERNAL: Rule("inferfleet", retryable=True, dead_letter=True, brake=True),
}


class InferfleetError(Exception):
    """Root of every error that inferfleet raises at a person; ``str()`` is one line."""


class ConfigError(InferfleetError):
    """A setting, route file or environment variable is wrong; names the file and the key."""


class ModelRepositoryError(InferfleetError):
    """A model or version cannot be found, read, or added; names the model and the file."""


class ChecksumMismatchError(ModelRepositoryError):
    """A file of a model version differs from its manifest; nothing of the version was parsed."""

    def __init__(self, model: str, version: str, file: str, expected: str, found: str) -> None:
        super().__init__(
            f"model {model} version {version}: {file} differs from manifest.json "
            f"(sha256 {expected[:12]}… expected, {found[:12]}… found)"
        )
        self.model, self.version, self.file, self.expected, self.found = model, version, file, expected, found


class UntrustedModelError(ModelRepositoryError):
    """A model version would run code and is not listed under ``[models] trusted``."""


class ModelLoadError(InferfleetError):
    """A runtime refused a model version, or its self-check against the signature failed."""


class DeviceError(InferfleetError):
    """The device asked for does not exist in this runtime."""


class DeviceOutOfMemoryError(InferfleetError):
    """The device had no memory for a batch of this size; a smaller one may fit."""


class BrokerError(InferfleetError):
    """The broker refused something that waiting does not mend (authorisation, missing topic)."""


class ControlError(InferfleetError):
    """The control plane cannot be read or written now; names its address."""


class ConflictError(InferfleetError):
    """Somebody else changed the same thing since it was read; read again and decide anew."""


class FencedError(InferfleetError):
    """The lease is gone: another coordinator leads now, and this step was not taken."""


class LogLostError(InferfleetError):
    """The store's log lies behind what workers hold; only a person may go back (``route apply --reset``)."""


class RequestError(InferfleetError):
    """One request's own failure, raised by the cold path of the decoders and by model handlers."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
