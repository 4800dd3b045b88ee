"""What ``submit`` reads and shows: lines of JSON as requests, samples from a signature, a progress bar."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Self

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from inferfleet.client.outcome import ClientError
from inferfleet.client.request import Request
from inferfleet.config import Config
from inferfleet.datatypes import DATATYPES
from inferfleet.models.repository import Repository
from inferfleet.records import Array, TensorSpec
from inferfleet.routes import Route

LONGEST_SAMPLE = 16
"""The most elements along a dimension that varies."""
_WORDS = ("small", "red", "boat", "over", "quiet", "water", "Übung", "42")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    # The empty value means that there is none: msgspec takes no union with Raw.
    body: msgspec.Raw = msgspec.Raw()
    body_base64: str | None = None
    id: str | None = None
    key: str | None = None
    headers: dict[str, str] | None = None


_DECODER = msgspec.json.Decoder(_Line)


def read_requests(file: IO[bytes]) -> Iterator[Request]:
    """Yield the request of each line; empty lines are skipped.

    Raises ClientError that names the file and the line.
    """
    name = getattr(file, "name", "-")
    name = "standard input" if name in ("-", "<stdin>", 0) else name
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield _request(line)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ClientError(f"{name}, line {number}: {error}") from None


def _request(text: bytes) -> Request:
    line = _DECODER.decode(text)
    given = bytes(line.body)
    if bool(given) == (line.body_base64 is not None):
        raise ValueError('a request needs "body" or "body_base64", not both')
    body = _body(given) if given else _bytes(line.body_base64 or "")
    return Request(body, line.id, line.key, line.headers)


def _body(text: bytes) -> bytes:
    if text.startswith(b'"'):
        return msgspec.json.decode(text, type=str).encode()
    return text


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"body_base64: {error}") from None


def sampled(config: Config, route: Route, count: int, seed: int | None) -> Iterator[Request]:
    """Yield ``count`` random requests of one row each, valid by the signature of the route's first variant.

    Raises ModelRepositoryError if the version cannot be read, ClientError if it declares no inputs.
    """
    version = Repository(config.models_path, config.models.trusted).fetch(
        route.model, route.variants[0].version
    )
    label = f"model {version.name} version {version.version}"
    if version.signature is None or not version.signature.inputs:
        raise ClientError(f"{label} declares no [[input]] in its model.toml; give a FILE of requests")
    specs = version.signature.inputs
    for spec in specs:
        if spec.datatype == "BF16":
            raise ClientError(f"{label}: input {spec.name} is BF16, which has no samples; give a FILE")
    binary = any(spec.datatype == "FP16" for spec in specs)
    random = np.random.default_rng(seed)
    for _ in range(count):
        # Dimensions that vary share one length: inputs such as tokens and their mask belong together.
        length = int(random.integers(1, LONGEST_SAMPLE + 1))
        rows = {spec.name: _sample(spec, length, random) for spec in specs}
        if route.input == "columns":
            yield Request({name: row[0] for name, row in rows.items()})
        else:
            yield Request(rows, binary=binary)


def _sample(spec: TensorSpec, length: int, random: np.random.Generator) -> Array:
    shape = (1, *(length if size < 0 else size for size in spec.shape))
    kind = DATATYPES[spec.datatype]
    if spec.datatype == "BYTES":
        return random.choice(np.array(_WORDS, object), shape)
    if spec.datatype == "BOOL":
        return random.integers(0, 2, shape).astype(np.bool_)
    if kind.is_float:
        return random.random(shape).astype(kind.numpy)
    return random.integers(0, 10, shape).astype(kind.numpy)


class Bar:
    """A progress bar on standard error: what was sent, and while waiting what was answered."""

    def __init__(self, total: int | None, wait: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._sent = self._progress.add_task("sent", total=total)
        self._answered = self._progress.add_task("answered", total=total, visible=wait)
        self._count = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A file's length is known at its end; then both bars have the same one.
        self._progress.update(self._sent, total=self._count)
        self._progress.update(self._answered, total=self._count)
        self._progress.stop()

    def sent(self) -> None:
        """One more was sent."""
        self._count += 1
        self._progress.advance(self._sent)

    def answered(self) -> None:
        """One more was answered."""
        self._progress.advance(self._answered)
