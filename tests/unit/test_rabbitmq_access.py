"""Where a RabbitMQ is, and what a person is told when it does not let us in."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from aiormq.exceptions import ChannelAccessRefused, InvalidFrameError, ProbableAuthenticationError

from inferfleet.config import parse
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.rabbitmq_access import (
    AmqpPlace,
    _tls,
    _with_credentials,
    amqp_failure,
    amqp_place,
    ends_are_failures,
)
from inferfleet.rabbitmq_access import refuses_for_good as for_good


def test_a_place_is_what_the_settings_say() -> None:
    """Nodes are split at commas, a relative ca_file starts at the file's folder, secrets are not shown."""
    config = parse(
        '[rabbitmq]\nurl = "amqps://u:secret@a/v, amqps://b:5673/v"\nusername = "w"\npassword = "p"\n'
        'ca_file = "ca.pem"\nheartbeat_s = 7\n',
        base=Path("/etc/fleet"),
    )
    place = amqp_place(config)

    assert place.urls == ("amqps://u:secret@a/v", "amqps://b:5673/v")
    assert place.shown == "amqps://a/v, amqps://b:5673/v"
    assert place.ca_file == "/etc/fleet/ca.pem"
    assert str(_with_credentials(place, place.urls[0])) == "amqps://w:p@a/v?heartbeat=7"


def test_an_address_given_in_a_program_keeps_its_own_login() -> None:
    """What overrules the configured address overrules its user too."""
    place = amqp_place(parse('[rabbitmq]\nusername = "w"\npassword = "p"\n'), "amqp://u:x@c/")

    assert str(_with_credentials(place, place.urls[0])) == "amqp://u:x@c/?heartbeat=10"


@pytest.mark.parametrize(
    ("error", "said", "lasting"),
    [
        (ProbableAuthenticationError("ACCESS_REFUSED"), "refused the login; check username", True),
        (InvalidFrameError("got Connection.Close"), "refused the virtual host", True),
        (ChannelAccessRefused("no\naccess"), "no access; `inferfleet topics plan` prints the rights", True),
        (ssl.SSLError("bad certificate"), "check [rabbitmq] ca_file", True),
        (ConnectionRefusedError(111, "refused"), "does not answer: 111 refused; check [rabbitmq] url", False),
        (TimeoutError(), "no answer in time", False),
    ],
)
def test_a_failure_is_one_line_with_its_mend(error: Exception, said: str, lasting: bool) -> None:
    """The line names the address without its login and what to look at."""
    failure = amqp_failure(AmqpPlace(("amqp://u:secret@host/",)), error)

    assert said in str(failure)
    assert str(failure).startswith("RabbitMQ amqp://host/")
    assert "\n" not in str(failure)
    assert for_good(error) is lasting
    failure.__cause__ = error
    assert for_good(failure) is lasting
    assert not for_good(BrokerError("something else"))


def test_a_cancellation_that_nobody_asked_for_is_a_failure() -> None:
    """The library cancels who waits for it; a task that is cancelled, or out of time, stays so."""

    async def waits(library: bool) -> None:
        async with ends_are_failures():
            if library:
                asyncio.get_running_loop().call_soon((ended := asyncio.Future[None]()).cancel)
                await ended
            await asyncio.sleep(60)

    async def cases() -> None:
        with pytest.raises(ConnectionError, match="the connection has ended"):
            await waits(True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await waits(False)
        task = asyncio.create_task(waits(False))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cases())


def test_certificates_are_checked_unless_that_is_switched_off(tmp_path: Path) -> None:
    """amqps verifies the name and the chain; a ca_file that cannot be read is named."""
    assert _tls(AmqpPlace(("amqp://a/",))) is None
    checked, open_to_all = _tls(AmqpPlace(("amqps://a/",))), _tls(AmqpPlace(("amqps://a/",), insecure=True))
    assert checked is not None
    assert open_to_all is not None
    assert (checked.verify_mode, checked.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (open_to_all.verify_mode, open_to_all.check_hostname) == (ssl.CERT_NONE, False)
    with pytest.raises(ConfigError, match=r"ca_file .*none\.pem"):
        _tls(AmqpPlace(("amqps://a/",), ca_file=str(tmp_path / "none.pem")))
