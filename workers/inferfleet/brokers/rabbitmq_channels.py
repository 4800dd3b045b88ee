"""What everybody needs who keeps an AMQP channel: hearing how it ends, and closing it within a bound."""

from __future__ import annotations

import asyncio

from aiormq.abc import AbstractChannel

from inferfleet.brokers.rabbitmq_link import Connected

CLOSE_TIMEOUT_S = 3.0


class Nobody:
    """Hears what still comes on a channel that is being closed; the broker keeps it, or has it already."""

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """It will come again."""

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        """It was refused already."""

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """It was refused already."""

    def closed(self) -> None:
        """It is, then."""

    def flush(self) -> None:
        """Nobody waits."""


async def channel_ends(channel: AbstractChannel, *events: asyncio.Event) -> BaseException | None:
    """Wait until a channel has ended or one of ``events`` is set; return why, ``None`` for the latter."""
    closing = channel.closing
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait([closing, *waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
    if closing.done() and not closing.cancelled() and not any(event.is_set() for event in events):
        return closing.exception() or ConnectionError("the channel was closed")
    return None


async def close_channel(connected: Connected, channel: AbstractChannel) -> None:
    """Close a channel; a broker that does not answer loses the connection, unless it told us to wait."""
    tap = connected.tap
    tap.splitter.sinks[channel.number] = Nobody()
    tap.release()  # or its answer is never read
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await channel.close()
    except Exception:
        _give_up(connected)
    except asyncio.CancelledError:
        _give_up(connected)
        if cancelled():
            raise
    finally:
        tap.splitter.forget(channel.number)


def _give_up(connected: Connected) -> None:
    if not connected.tap.splitter.blocked:
        connected.tap.abort()


def cancelled() -> bool:
    """Return whether the running task was asked to end: the library cancels those who wait for it, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def in_one_line(error: BaseException) -> str:
    """Return what an error says."""
    return " ".join(str(error).split()) or type(error).__name__
