"""Who may do what: roles, and tokens of which only hashes are kept.

A token file has one line for each token: ``name role sha256:<hex> [expires=…] [routes=a,b]``. A token is 256
random bits, so that a plain hash of it cannot be turned back.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import structlog

from inferfleet.errors import ConfigError
from inferfleet.tables import nearest

log = structlog.get_logger(__name__)

PREFIX = "ifl_"
"""What every token starts with, so that a scanner for secrets finds one that got where it should not be."""
MAX_TOKEN_FILE_BYTES = 1_000_000
RESERVED = frozenset({"coordinator", "local"})
"""What the audit log calls the machine itself, and whoever needs no token: nobody else goes by that name."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class Role(IntEnum):
    """What somebody may do; each may do what those below may.

    A viewer reads. An operator stops things: pause, resume, abort. A deployer changes what answers: apply,
    start, promote, approve. An admin may go back to an older log.
    """

    VIEWER = 1
    OPERATOR = 2
    DEPLOYER = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """How it is written in token files and messages."""
        return self.name.lower()


class Caller(NamedTuple):
    """Who asks. ``routes`` are the only ones that may be changed; ``None``: all. Reading is not limited."""

    name: str
    role: Role
    routes: frozenset[str] | None = None

    def may_change(self, route: str) -> bool:
        """Whether a change of the route is within the token's bounds."""
        return self.routes is None or route in self.routes


LOCAL = Caller("local", Role.ADMIN)
"""Whoever asks over loopback where there is no token file."""


class Token(NamedTuple):
    """One line of a token file; ``hash`` is the token's SHA-256 as hexadecimal digits."""

    caller: Caller
    hash: str
    expires_s: float | None = None


def parse_role(word: str) -> Role:
    """Return the role of that name; raises ConfigError with the nearest."""
    known = {role.word: role for role in Role}
    if word not in known:
        raise ConfigError(f'there is no role "{word}"{nearest(word, known)}; there are: {", ".join(known)}')
    return known[word]


def parse_line(line: str, place: str) -> Token:
    """Return what a line says; raises ConfigError that starts with ``place`` and repeats no hash."""
    name, role, digest, *rest = [*line.split(), "", "", ""]
    if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest):
        raise ConfigError(f"{place}: a line is `name role sha256:<64 hex digits> [expires=…] [routes=a,b]`")
    if name in RESERVED:
        raise ConfigError(
            f"{place}: {name} is a name of the coordinator's own in the audit log; choose another"
        )
    try:
        found = parse_role(role)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    expires_s: float | None = None
    routes: frozenset[str] | None = None
    for word in filter(None, rest):
        key, _, value = word.partition("=")
        if key == "expires":
            expires_s = _instant(value, place)
        elif key == "routes":
            routes = frozenset(value.split(","))
            if not all(_NAME.fullmatch(each) for each in routes):
                raise ConfigError(f"{place}: routes= must be names with commas between them")
        else:
            raise ConfigError(f"{place}: there is no key before that = sign; there are: expires, routes")
    return Token(Caller(name, found, routes), digest.removeprefix("sha256:"), expires_s)


def _instant(text: str, place: str) -> float:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{place}: expires= must be a time such as 2027-01-31T00:00:00Z") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


class TokenBook:
    """The tokens of a file, read again whenever the file changes. Safe to use from several threads.

    ``now`` returns epoch seconds. At first a file that cannot be read or understood raises ConfigError;
    later a line that is wrong grants nothing and the others go on, and a file that is gone grants nothing.
    """

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._tokens = [token for token in _read(path, strict=True) if token is not None]

    def caller(self, token: str) -> Caller | None:
        """Return whose token that is; ``None`` where it is nobody's or has expired."""
        given = hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
        found: Caller | None = None
        # All are compared, so that the time says nothing of which line was near.
        for each in self._current():
            same = hmac.compare_digest(given, each.hash)
            if same and (each.expires_s is None or self._now() < each.expires_s):
                found = each.caller
        return found

    def _current(self) -> list[Token]:
        with self._lock:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._tokens = _read(self._path, strict=False)
                except ConfigError as error:
                    self._tokens = []
                    log.error("token_file_unreadable", error=str(error))
                else:
                    log.info("token_file_read_again", callers=len(self._tokens))
            return self._tokens


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path, *, strict: bool) -> list[Token]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"[coordinator] token_file {path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_TOKEN_FILE_BYTES:
        raise ConfigError(f"[coordinator] token_file {path} has more than {MAX_TOKEN_FILE_BYTES} bytes")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"[coordinator] token_file {path} may be written by others; chmod 600 it")
    return list(_parsed(data.decode("utf-8", "replace").splitlines(), str(path), strict))


def _parsed(lines: Iterable[str], origin: str, strict: bool) -> Iterable[Token]:
    for number, line in enumerate(lines, 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        try:
            yield parse_line(said, f"{origin} line {number}")
        except ConfigError as error:
            if strict:
                raise
            log.error("token_line_grants_nothing", error=str(error))


def new_token() -> str:
    """Return a fresh token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def token_line(token: str, caller: Caller, expires_s: float | None = None) -> str:
    """Return the line of a token file that lets ``token`` be the caller's."""
    words = [caller.name, caller.role.word, f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"]
    if expires_s is not None:
        words.append(f"expires={datetime.fromtimestamp(int(expires_s), UTC):%Y-%m-%dT%H:%M:%SZ}")
    if caller.routes is not None:
        words.append(f"routes={','.join(sorted(caller.routes))}")
    return " ".join(words)


def append_line(path: Path, line: str) -> None:
    """Add a line to a token file, which is made for its owner alone; raises ConfigError where that fails."""
    parse_line(line, str(path))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            size = os.fstat(file.fileno()).st_size
            ended = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
            file.write(("" if ended else "\n").encode() + line.encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"[coordinator] token_file {path} cannot be written: {error.strerror}") from None
