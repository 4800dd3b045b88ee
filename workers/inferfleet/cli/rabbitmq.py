"""RabbitMQ as an operator sees it: queues, exchanges, rights; a failure is one line with its mend."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed

from inferfleet.cli.rabbit_topology import QUORUM, Binding, Exchange, Queue, RabbitPlan
from inferfleet.cli.topology import DEFAULT_EXCHANGE, Need
from inferfleet.config import Config
from inferfleet.errors import BrokerError
from inferfleet.rabbitmq_access import (
    AMQP_FAILURES,
    amqp_failure,
    amqp_place,
    open_amqp,
    refuses_for_good,
)

if TYPE_CHECKING:
    from aio_pika.abc import AbstractConnection
    from aiormq.abc import AbstractChannel

ANSWER_S = 8.0
PAUSE_S = 1.0
"""Between two tries to connect."""
_HEARTBEAT_S = 60
"""Between two questions nothing runs here that could beat, so the broker must be patient."""
PLAN_HINT = "`inferfleet topics plan` prints how to create it"
QUORUM_HINT = "empty it, delete it, and `inferfleet topics plan --apply` makes it anew"
RIGHTS_HINT = "`inferfleet topics plan --format acls` prints the rights"

Answer = TypeVar("Answer")


class QueueDepth(NamedTuple):
    """What a queue holds: messages that nobody has taken, and how many consumers take from it."""

    ready: int
    consumers: int


class Problem(NamedTuple):
    """What is wrong with something that a worker needs; ``text`` ends with the mend."""

    need: Need
    text: str


class Declared(NamedTuple):
    """What became of one part of a plan.

    ``differs``: a queue of that name stands with other arguments, which ``text`` names. ``left out``: the
    exchange stood already, so whoever made it has bound its readers.
    """

    kind: Literal["queue", "exchange", "binding"]
    name: str
    outcome: Literal["created", "stood", "differs", "left out"]
    text: str = ""


class RabbitCluster:
    """The RabbitMQ of a fleet, one question after the other; every answer is waited for within a bound.

    It takes no message, and declares nothing but by :meth:`declare`. Open it, and close it.
    """

    def __init__(self, config: Config, answer_s: float = ANSWER_S) -> None:
        self._place = replace(amqp_place(config), heartbeat_s=_HEARTBEAT_S, timeout_s=answer_s)
        self._name = f"{config.worker_id} (operator)"
        self._answer_s = answer_s
        self._runner: asyncio.Runner | None = None
        self._connection: AbstractConnection | None = None
        # aiormq tells its logger what it raises as well; without a handler that lands on standard error.
        logging.getLogger("aiormq").addHandler(logging.NullHandler())

    @property
    def address(self) -> str:
        """Where it is, without credentials."""
        return self._place.shown

    def open(
        self, patience_s: float = 0.0, waiting: Callable[[BrokerError], None] = lambda _: None
    ) -> RabbitCluster:
        """Connect; raise BrokerError with the mend.

        A broker that does not answer is tried again for ``patience_s``, and ``waiting`` is told once; one
        that refuses us is not.
        """
        until = time.monotonic() + patience_s
        told = False
        while True:
            try:
                self._runner = self._runner or asyncio.Runner()
                self._connection = self._runner.run(open_amqp(self._place, self._name))
            except BrokerError as error:
                if refuses_for_good(error) or time.monotonic() >= until:
                    self.close()
                    raise
                if not told:
                    waiting(error)
                    told = True
                time.sleep(min(PAUSE_S, max(0.0, until - time.monotonic())))
            else:
                return self

    def close(self) -> None:
        """Close the connection; twice is fine."""
        runner, self._runner = self._runner, None
        connection, self._connection = self._connection, None
        if runner is None:
            return
        with contextlib.suppress(*AMQP_FAILURES):
            if connection is not None:
                runner.run(asyncio.wait_for(connection.close(), 2.0))
        runner.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> str:
        """The broker's version, empty where it does not say."""
        transport = getattr(self._connection, "transport", None)
        properties = getattr(getattr(transport, "connection", None), "server_properties", None) or {}
        return str(properties.get("version", ""))

    def queues(self, names: Iterable[str]) -> dict[str, QueueDepth | None]:
        """Return what each queue holds; ``None`` for one that does not exist. Needs no right."""
        return {name: self._depth(name) for name in names}

    def _depth(self, name: str) -> QueueDepth | None:
        async def ask(channel: AbstractChannel) -> QueueDepth | None:
            try:
                found = await channel.queue_declare(name, passive=True)
            except ChannelNotFoundEntity:
                return None
            return QueueDepth(found.message_count or 0, found.consumer_count or 0)

        return self._ask(ask)

    def problems(self, needs: Iterable[Need]) -> list[Problem]:
        """Return what is wrong with what a worker needs, in the order of the needs; empty is well."""
        found = []
        for need in needs:
            if need.broker == "rabbitmq":
                look = self._queue_problem if need.kind == "queue" else self._exchange_problem
                text = look(need)
                if text:
                    found.append(Problem(need, text))
        return found

    def check(self, needs: Iterable[Need]) -> None:
        """Raise BrokerError for the first thing that is missing, of another kind, or forbidden."""
        for need in needs:
            for each in self.problems([need]):
                raise BrokerError(f"{need} ({need.use}): {each.text}")

    def declare(self, plan: RabbitPlan) -> list[Declared]:
        """Declare what is missing; what stands is left alone, whatever it is.

        Raises BrokerError where this user may not declare.
        """
        needed = [each for each in plan.queues if not each.proposed]
        done = [self._declare_queue(each) for each in needed]
        stood = {each.name: self._exchange_stands(each.name) for each in plan.exchanges}
        kept: set[str] = set()
        for queue in plan.queues:
            if queue.proposed:
                declared = self._declare_proposed(queue, plan.bindings, stood)
                done.append(declared)
                kept |= {queue.name} if declared.outcome != "left out" else set()
        kept |= {each.name for each in needed}
        done += [self._declare_exchange(each, stood[each.name]) for each in plan.exchanges]
        done += [self._bind(each) for each in plan.bindings if each.queue in kept]
        return done

    def _declare_proposed(
        self, queue: Queue, bindings: Iterable[Binding], stood: dict[str, bool]
    ) -> Declared:
        # A queue that nobody reads fills up for ever: one is made only with a new exchange.
        mine = [each.exchange for each in bindings if each.queue == queue.name]
        old = [name for name in mine if stood.get(name, True)]
        if old and self._depth(queue.name) is None:
            text = f"exchange {old[0]} stood already: whoever made it binds its readers"
            return Declared("queue", queue.name, "left out", text)
        return self._declare_queue(queue)

    def _declare_queue(self, queue: Queue) -> Declared:
        stood = self._depth(queue.name) is not None
        arguments: dict[str, Any] = dict(queue.arguments)

        async def ask(channel: AbstractChannel) -> str:
            try:
                await channel.queue_declare(queue.name, durable=True, arguments=arguments)
            except ChannelPreconditionFailed as error:
                return _said(error)
            return ""

        text = self._ask(ask, f"queue {queue.name} was not declared")
        if text:
            return Declared("queue", queue.name, "differs", text)
        return Declared("queue", queue.name, "stood" if stood else "created")

    def _exchange_stands(self, name: str) -> bool:
        async def ask(channel: AbstractChannel) -> bool:
            try:
                await channel.exchange_declare(name, passive=True)
            except ChannelNotFoundEntity:
                return False
            return True

        return self._ask(ask)

    def _declare_exchange(self, exchange: Exchange, stood: bool) -> Declared:
        if not stood:
            self._ask(
                lambda channel: channel.exchange_declare(
                    exchange.name, exchange_type=exchange.type, durable=True
                ),
                f"exchange {exchange.name} was not declared",
            )
        return Declared("exchange", exchange.name, "stood" if stood else "created")

    def _bind(self, binding: Binding) -> Declared:
        name = f"{binding.exchange}/{binding.key} to {binding.queue}"
        self._ask(
            lambda channel: channel.queue_bind(binding.queue, binding.exchange, binding.key),
            f"binding {name} was not declared",
        )
        return Declared("binding", name, "stood")

    def _queue_problem(self, need: Need) -> str:
        if self._depth(need.name) is None:
            return f"does not exist; {PLAN_HINT}"
        if "READ" not in need.access:
            return ""
        said = self._ask(lambda channel: _refused_consumer(channel, need.name))
        if " refused for user " in said:
            return f"this user has no read right on it; {RIGHTS_HINT}"
        kind = _kind(said)
        if kind and kind != QUORUM:
            return f"is a {kind} queue and must be a quorum queue: {QUORUM_HINT}"
        return ""

    def _exchange_problem(self, need: Need) -> str:
        if need.name != DEFAULT_EXCHANGE and not self._exchange_stands(need.name):
            return f"does not exist; {PLAN_HINT}"
        said = self._ask(lambda channel: _refused_unbinding(channel, need.name))
        if f"access to exchange '{need.name}' in vhost" in said:
            return f"this user has no write right on it; {RIGHTS_HINT}"
        return ""

    def _ask(self, question: Callable[[AbstractChannel], Awaitable[Answer]], failed: str = "") -> Answer:
        """Put one question on a channel of its own: an answer that is an error closes its channel."""
        if self._runner is None or self._connection is None:
            raise BrokerError(f"RabbitMQ {self.address} is not connected")
        try:
            return self._runner.run(self._asked(self._connection, question))
        except AMQP_FAILURES as error:
            if failed and isinstance(error, ChannelAccessRefused):
                raise BrokerError(
                    f"{failed}: {_said(error)}; whoever declares needs the right to configure it"
                ) from None
            raise amqp_failure(self._place, error) from None

    async def _asked(
        self, connection: AbstractConnection, question: Callable[[AbstractChannel], Awaitable[Answer]]
    ) -> Answer:
        async with asyncio.timeout(self._answer_s):
            channel = connection.channel(publisher_confirms=False)
            await channel.initialize()
            try:
                return await question(await channel.get_underlay_channel())
            finally:
                if not channel.is_closed:
                    await channel.close()


async def _refused_consumer(channel: AbstractChannel, queue: str) -> str:
    """Ask for a consumer in a way that only streams allow, and return how the broker refuses it.

    It looks at the right to read first and then at the argument, and says the queue's type. So nothing is
    taken; should a broker grant it all the same, the channel closes at once and gives back what came.
    """
    try:
        await channel.basic_qos(prefetch_count=1)
        await channel.basic_consume(queue, _nothing, arguments={"x-stream-offset": "next"})
    except (ChannelAccessRefused, ChannelPreconditionFailed) as error:
        return _said(error)
    return ""


async def _nothing(_message: Any) -> None:
    return None


async def _refused_unbinding(channel: AbstractChannel, exchange: str) -> str:
    """Take away a binding that does not exist, and return how the broker refuses it.

    It looks at the right to write to the exchange first, so a refusal that names the exchange is about
    that; one that names what was never bound is not. Nothing changes, and nothing is published.
    """
    name = "" if exchange == DEFAULT_EXCHANGE else exchange
    try:
        await channel.exchange_unbind(
            destination=name, source=f"inferfleet.nothing.{secrets.token_hex(8)}", routing_key=""
        )
    except (ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed) as error:
        return _said(error)
    return ""


def _kind(said: str) -> str:
    found = re.search(r"of queue type (?:rabbit_)?([a-z]+)", said)
    return found.group(1) if found else ""


def _said(error: BaseException) -> str:
    return re.sub(r"^[A-Z_]+ - ", "", " ".join(" ".join(map(str, error.args)).split()))
