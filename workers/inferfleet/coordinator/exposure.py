"""Where the API may be offered: on loopback to everybody there, elsewhere only with TLS and tokens."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from inferfleet.config import Coordinator
from inferfleet.coordinator.gate import LOOPBACK
from inferfleet.coordinator.tokens import TokenBook
from inferfleet.errors import ConfigError
from inferfleet.telemetry.admin import split_address

BACKLOG = 256


class Exposure(NamedTuple):
    """A bound socket, the TLS files (empty: none), the tokens (``None``: everybody) and the known hosts."""

    listener: socket.socket
    certificate: str
    key: str
    tokens: TokenBook | None
    hosts: frozenset[str]

    @property
    def url(self) -> str:
        """The address with the port that the system gave where 0 was asked for."""
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.certificate else 'http'}://{shown}:{port}"


def expose(settings: Coordinator, base: Path, now: Callable[[], float]) -> Exposure:
    """Bind the API's address; relative files start at ``base``, ``now`` returns epoch seconds.

    Raises ConfigError for an address that may not be offered so, or that is taken.
    """
    host, port = split_address(settings.address, "[coordinator] address")
    found = _resolved(host, port, settings.address)
    _check(settings, loopback=ipaddress.ip_address(str(found[4][0]).partition("%")[0]).is_loopback)
    certificate = str(base / settings.tls_cert) if settings.tls_cert else ""
    key = str(base / settings.tls_key) if settings.tls_key else ""
    if certificate:
        _check_certificate(certificate, key)
    tokens = TokenBook(base / settings.token_file, now) if settings.token_file else None
    return Exposure(_bound(found, settings.address), certificate, key, tokens, _hosts(settings, host))


def _resolved(
    host: str, port: int, address: str
) -> tuple[socket.AddressFamily, int, int, str, tuple[object, ...]]:
    try:
        family, kind, protocol, name, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f'[coordinator] address = "{address}": {error.strerror}') from None
    return family, int(kind), protocol, name, place


def _check(settings: Coordinator, *, loopback: bool) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("[coordinator] tls_cert and tls_key stand together: one of them is missing")
    if settings.tls and settings.tls_cert:
        raise ConfigError('[coordinator] tls = "terminated-upstream" and tls_cert exclude each other')
    if loopback:
        return
    place = f'[coordinator] address = "{settings.address}" is not loopback'
    if not (settings.tls_cert or settings.tls):
        raise ConfigError(f'{place}: it needs tls_cert and tls_key, or tls = "terminated-upstream"')
    if not settings.token_file:
        raise ConfigError(f"{place}: it needs token_file (`inferfleet coordinator token` writes it)")


def _check_certificate(certificate: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        said = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(f"[coordinator] tls_cert {certificate} with tls_key {key}: {said}") from None


def _bound(
    found: tuple[socket.AddressFamily, int, int, str, tuple[object, ...]], address: str
) -> socket.socket:
    family, kind, protocol, _, place = found
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f'[coordinator] address = "{address}" cannot be used: {error.strerror}; '
            "choose another port, or 0 for any free one"
        ) from None
    return listener


def _hosts(settings: Coordinator, host: str) -> frozenset[str]:
    own = f"[{host}]" if ":" in host else host
    return LOOPBACK | {own.lower()} | {each.lower() for each in settings.hosts}
