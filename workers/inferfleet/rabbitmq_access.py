"""Opens RabbitMQ for whoever needs it: its nodes in turn, credentials asked anew, failures in one line.

A connection here is a plain one, not aio-pika's robust one: its owner knows what was in flight when it broke,
and what of that may be sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias

import aio_pika
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelInvalidStateError,
    ConnectionNotAllowed,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from yarl import URL

from inferfleet.config import Config
from inferfleet.errors import BrokerError, ConfigError

AmqpCredentials: TypeAlias = Callable[[], tuple[str, str]]
"""Returns user name and password, each ``""`` if there is none; asked again at each connection."""

# Failures are raised; with no log set up, lines of the library would break into a program's output.
for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).addHandler(logging.NullHandler())

AMQP_FAILURES = (AMQPError, ChannelInvalidStateError, OSError, TimeoutError)
"""What aio-pika raises when a broker is away, refuses, or does not answer in time."""


@dataclass(frozen=True, slots=True)
class AmqpPlace:
    """Where a RabbitMQ is and how long to wait for it; the values of ``[rabbitmq]`` in ``fleet.toml``."""

    urls: tuple[str, ...] = ("amqp://localhost/",)
    credentials: AmqpCredentials | None = None
    ca_file: str = ""
    insecure: bool = False
    heartbeat_s: int = 10
    publish_timeout_s: float = 15.0
    timeout_s: float = 5.0

    @property
    def shown(self) -> str:
        """The addresses without user name and password, for messages."""
        return ", ".join(str(URL(url).with_user(None).with_query(None)) for url in self.urls)


def amqp_place(config: Config, url: str | None = None) -> AmqpPlace:
    """Return where the fleet's RabbitMQ is; ``url`` overrules the configured one and its credentials."""

    def credentials() -> tuple[str, str]:
        return config.current("rabbitmq.username"), config.current("rabbitmq.password")

    section = config.rabbitmq
    return AmqpPlace(
        tuple(each.strip() for each in (url or section.url).split(",")),
        credentials if url is None else None,
        str(config.base / section.ca_file) if section.ca_file else "",
        section.insecure,
        section.heartbeat_s,
        section.publish_timeout_s,
    )


async def open_amqp(place: AmqpPlace, name: str) -> AbstractConnection:
    """Return a connection to the first node that lets us in; ``name`` is what operators see of it.

    Raises BrokerError when none does, with the mend, and ConfigError for what cannot be read.
    """
    context = _tls(place)
    failure: BaseException = ConnectionError("[rabbitmq] url names no node")
    for url in place.urls:
        try:
            async with asyncio.timeout(place.timeout_s):
                return await aio_pika.connect(
                    _with_credentials(place, url),
                    ssl_context=context,
                    client_properties={"connection_name": name},
                )
        except AMQP_FAILURES as error:
            failure = error
        except ValueError as error:
            raise ConfigError(f"[rabbitmq] url: {error}") from None
    raise amqp_failure(place, failure) from failure


def amqp_failure(place: AmqpPlace, error: BaseException) -> BrokerError:
    """Return the error that tells a person what failed and what to look at."""
    where = f"RabbitMQ {place.shown}"
    reason = " ".join(" ".join(map(str, error.args)).split()) or type(error).__name__
    if isinstance(error, _LOGIN):
        return BrokerError(f"{where} refused the login; check username and password under [rabbitmq]")
    if isinstance(error, _NO_SUCH_HOST):
        return BrokerError(
            f"{where} refused the virtual host; check [rabbitmq] url and the user's rights on it"
        )
    if isinstance(error, ChannelAccessRefused):
        return BrokerError(f"{where}: {reason}; `inferfleet topics plan` prints the rights")
    if isinstance(error, ssl.SSLError):
        return BrokerError(f"{where} failed at TLS: {reason}; check [rabbitmq] ca_file and amqps:// in url")
    if isinstance(error, OSError | ChannelInvalidStateError):
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        return BrokerError(
            f"{where} does not answer: {reason}; check [rabbitmq] url and that the broker runs"
        )
    return BrokerError(f"{where}: {reason}")


@contextlib.asynccontextmanager
async def ends_are_failures() -> AsyncIterator[None]:
    """Turn a cancellation that nobody asked for into a failure.

    aiormq cancels whoever waits for it when its connection ends.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("the connection has ended") from None


def refuses_for_good(error: BaseException) -> bool:
    """Return whether a person must mend something before trying again can help."""
    error = error.__cause__ if isinstance(error, BrokerError) and error.__cause__ is not None else error
    return isinstance(error, (*_LOGIN, *_NO_SUCH_HOST, ChannelAccessRefused, ssl.SSLError))


_LOGIN = (AuthenticationError, ProbableAuthenticationError)
# aiormq sees a refused virtual host as a frame that it did not expect.
_NO_SUCH_HOST = (ConnectionNotAllowed, InvalidFrameError)


def _with_credentials(place: AmqpPlace, url: str) -> URL:
    given = URL(url).update_query({"heartbeat": place.heartbeat_s})
    username, password = place.credentials() if place.credentials is not None else ("", "")
    if username:
        given = given.with_user(username)
    if password:
        given = given.with_password(password)
    return given


def _tls(place: AmqpPlace) -> ssl.SSLContext | None:
    if not any(url.startswith("amqps:") for url in place.urls):
        return None
    try:
        context = ssl.create_default_context(cafile=place.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[rabbitmq] ca_file {place.ca_file}: {error}") from None
    if place.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
