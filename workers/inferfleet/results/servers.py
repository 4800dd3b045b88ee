"""Runs scripts where their keys are: on one server, or on the nodes of a cluster, many calls in one write.

An error of one call is its reply, so that calls beside it keep theirs: what is done is not done again.
Nothing is repeated here but what a server asks for: a script that it does not know, a slot that is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from redis import exceptions
from redis.cluster import RedisCluster
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError

from inferfleet.redis_access import JoinPacker
from inferfleet.results.scripts import Script

ROUNDS = 5
"""How often the calls of one run are sent; a cluster that sends them on for longer is not settled."""
_CONNECTION_ERRORS = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)


class Call(NamedTuple):
    """One run of a script; on a cluster its keys must be in one slot."""

    keys: Sequence[str]
    args: Sequence[Any]

    def words(self, script: Script) -> list[Any]:
        """Return the command that runs ``script`` by its name."""
        return ["EVALSHA", script.sha, len(self.keys), *self.keys, *self.args]


class Servers(Protocol):
    """Where scripts run."""

    joins_keys: bool
    """Whether one call may hold any keys together."""

    def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Return each call's reply, or its error in the place of the reply."""

    def renew(self) -> None:
        """Connect anew, to whoever is in charge now; raises while nobody says who that is."""

    def disconnect(self) -> None:
        """End every connection, also one on which another thread waits."""

    def close(self) -> None:
        """End for good."""


def servers_of(client: Any, on_connect: Callable[[], None]) -> Servers:
    """Return the servers behind a client of redis-py; ``on_connect`` hears of every new connection."""
    kind = Cluster if isinstance(client, RedisCluster) else Single
    return kind(client, on_connect)


class Single:
    """One server, perhaps the one that sentinels name: they are asked at every new connection."""

    joins_keys = True

    def __init__(self, client: Any, on_connect: Callable[[], None]) -> None:
        self._client = client

        def connected(connection: Any) -> None:
            connection.on_connect()
            on_connect()

        client.connection_pool.connection_kwargs["redis_connect_func"] = connected

    def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Return each call's reply; all are sent in one write."""
        replies = self._send(script, calls)
        unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            self._client.script_load(script.text)
            for at, reply in zip(unknown, self._send(script, [calls[at] for at in unknown]), strict=True):
                replies[at] = reply
        return replies

    def _send(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        if len(calls) == 1:
            try:
                return [self._client.execute_command(*calls[0].words(script))]
            except RedisError as error:
                return [error]
        with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.execute_command(*call.words(script))
            replies: list[Any] = pipe.execute(raise_on_error=False)
        return replies

    def renew(self) -> None:
        """Forget the connection; the next use makes one."""
        self.disconnect()

    def disconnect(self) -> None:
        """End every connection."""
        self._client.connection_pool.disconnect()

    def close(self) -> None:
        """End for good."""
        self.disconnect()
        self._client.close()


class Cluster:
    """The nodes of a cluster: each gets its calls in one write, then the answers of all are read.

    redis-py's own pipeline was measured and left: it looks each command up on its way, which made it slower
    than sending one call at a time, and repeats by itself what may have been done.
    """

    joins_keys = False

    def __init__(self, client: Any, on_connect: Callable[[], None]) -> None:
        self._client = client
        self._packer = JoinPacker()
        client.user_on_connect_func = lambda _: on_connect()

    def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Return each call's reply, after following slots that have moved or are moving."""
        replies: list[Any] = [None] * len(calls)
        places = {at: _Place(self._owner(call), asking=False) for at, call in enumerate(calls)}
        for _ in range(ROUNDS):
            self._send(script, calls, places, replies)
            self._teach(script, [node for at, (node, _) in places.items() if _unknown(replies[at])])
            places = {at: place for at in places if (place := self._again(replies[at], places[at]))}
            if not places:
                break
        return replies

    def _owner(self, call: Call) -> Any:
        slot = key_slot(_bytes(call.keys[0]))
        known = self._client.nodes_manager.slots_cache.get(slot)
        return known[0] if known else self._client.nodes_manager.get_node_from_slot(slot)

    def _teach(self, script: Script, nodes: list[Any]) -> None:
        for node in {node.name: node for node in nodes}.values():
            self._client.get_redis_connection(node).script_load(script.text)

    def _again(self, reply: Any, place: _Place) -> _Place | None:
        """Return where a call must be sent anew, or ``None`` where its reply is final."""
        if _unknown(reply):
            return place
        if not isinstance(reply, AskError):  # a MovedError is one too
            return None
        moved = isinstance(reply, MovedError)
        if moved:
            self._client.nodes_manager.move_slot(reply)
        node = self._client.get_node(host=reply.host, port=reply.port)
        if node is None:
            self._client.nodes_manager.initialize(additional_startup_nodes_info=[(reply.host, reply.port)])
            node = self._client.get_node(host=reply.host, port=reply.port)
        return None if node is None else _Place(node, asking=not moved)

    def _send(
        self, script: Script, calls: Sequence[Call], places: dict[int, _Place], replies: list[Any]
    ) -> None:
        by_node: dict[str, tuple[Any, list[int]]] = {}
        for at, (node, _) in places.items():
            by_node.setdefault(node.name, (node, []))[1].append(at)
        written = [_Exchange(self._client.get_redis_connection(node), ats) for node, ats in by_node.values()]
        for each in written:
            each.write(b"".join([self._packed(script, calls[at], places[at]) for at in each.calls]))
        for each in written:
            each.read([1 + places[at].asking for at in each.calls], replies)

    def _packed(self, script: Script, call: Call, place: _Place) -> bytes:
        (packed,) = self._packer.pack(*call.words(script))
        return self._packer.pack("ASKING")[0] + packed if place.asking else packed

    def renew(self) -> None:
        """Learn from any node that is known who has which slots now."""
        self.disconnect()
        self._client.nodes_manager.initialize()

    def disconnect(self) -> None:
        """End every connection."""
        self._client.disconnect_connection_pools()

    def close(self) -> None:
        """End for good."""
        self.disconnect()
        self._client.close()


class _Place(NamedTuple):
    """A node, and whether it must be told that it is asked for a slot that is on its way to it."""

    node: Any
    asking: bool


class _Exchange:
    """One write to one node and the answers to it; a connection that fails is the answer to the rest."""

    def __init__(self, client: Any, calls: list[int]) -> None:
        self.calls = calls
        self._pool = client.connection_pool
        self._connection: Any = None
        self._error: Exception | None = None

    def write(self, packed: bytes) -> None:
        try:
            self._connection = self._pool.get_connection()
            self._connection.send_packed_command([packed])
        except _CONNECTION_ERRORS as error:
            self._failed(error)

    def read(self, commands: list[int], replies: list[Any]) -> None:
        """Put each call's answer into ``replies``: the last of the ``commands`` that were sent for it."""
        for at, sent in zip(self.calls, commands, strict=True):
            replies[at] = self._next(sent) if self._error is None else self._error
        if self._connection is not None:
            self._pool.release(self._connection)

    def _next(self, commands: int) -> Any:
        reply: Any = None
        for _ in range(commands):
            try:
                reply = self._connection.read_response()
            except _CONNECTION_ERRORS as error:
                self._failed(error)
                return error
            except RedisError as error:
                reply = error
        return reply

    def _failed(self, error: Exception) -> None:
        self._error = error
        if self._connection is not None:
            # Answers that were not read must not be taken for those of the next user.
            self._connection.disconnect()


def _unknown(reply: Any) -> bool:
    """Say whether a server does not know the script."""
    return isinstance(reply, NoScriptError)


def _bytes(key: str) -> bytes:
    return key.encode(errors="surrogatepass")
