"""Opens Redis for whoever needs it: one server, a cluster, or sentinels.

redis-py's own retries are off: the caller repeats the whole step, which is idempotent, and knows that it did.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import redis
import redis.asyncio
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import SSLConnection, parse_url
from redis.credentials import CredentialProvider
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from inferfleet.config import Config
from inferfleet.config import Redis as RedisSettings
from inferfleet.errors import ConfigError

Credentials: TypeAlias = Callable[[], tuple[str, str]]
"""Returns user name and password, each ``""`` if there is none; asked again at each connection."""

REDIS_ERRORS: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError)
"""What a client of any mode raises when Redis does not do as asked; the second is no ``RedisError``."""

# The library's own name is not told at each connection: it would need a right that old servers do not know.
_NAMELESS: dict[str, Any] = (
    {"driver_info": None}
    if importlib.util.find_spec("redis.driver_info") is not None
    else {"lib_name": None, "lib_version": None}
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Redis is and how long to wait for it; the values of ``[redis]`` in ``fleet.toml``.

    With ``nodes`` the URL still says how to speak to them: TLS, user name, password, database.
    """

    url: str = "redis://localhost:6379/0"
    mode: Literal["single", "cluster", "sentinel"] = "single"
    nodes: tuple[str, ...] = ()
    sentinel_master: str = ""
    credentials: Credentials | None = None
    timeout_s: float = 5.0
    client_name: str = "inferfleet"

    @property
    def shown(self) -> str:
        """The address without user name and password, for messages."""
        scheme, _, rest = self.url.partition("://")
        return ", ".join(self.nodes) or f"{scheme}://{rest.rpartition('@')[2]}"


def place_of(config: Config) -> Place:
    """Return where the results' Redis is; user name and password are read anew at each connection."""
    return _place(config, "redis", config.redis)


def control_place_of(config: Config) -> Place:
    """Return where the control plane's Redis is: ``[control]``, else the results' own."""
    return place_of(config) if config.control is None else _place(config, "control", config.control)


def _place(config: Config, name: str, section: RedisSettings) -> Place:
    def credentials() -> tuple[str, str]:
        return config.current(f"{name}.username"), config.current(f"{name}.password")

    return Place(section.url, section.mode, section.nodes, section.sentinel_master, credentials)


class _Asked(CredentialProvider):
    """Asks for the credentials at each connection, so that a rotated password needs no restart."""

    def __init__(self, ask: Credentials) -> None:
        self._ask = ask

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        username, password = self._ask()
        return (username, password) if username else (password,)


class JoinPacker:
    """Packs a command by one join; redis-py's own packer costs four times as much a row for wide commands."""

    def pack(self, *args: Any) -> list[bytes]:
        """Return the command in the wire protocol."""
        # An id may hold what UTF-8 forbids; one such row must not stop the rows beside it.
        words = [arg if type(arg) is bytes else str(arg).encode(errors="surrogatepass") for arg in args]
        if b" " in words[0]:
            words[:1] = words[0].split()
        return [b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(w), w) for w in words])]


class _Found(redis.Redis):
    """The master that sentinels named; closes what it asked them over as well."""

    def close(self) -> None:
        super().close()
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            sentinel.close()


class _AsyncFound(redis.asyncio.Redis):
    """The same for asyncio."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _options(place: Place) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": place.timeout_s,
        "socket_connect_timeout": place.timeout_s,
        "client_name": place.client_name,
        "protocol": 2,  # replies have one shape, whatever server answers
        **_NAMELESS,
    }
    if place.credentials is not None and any(place.credentials()):
        options["credential_provider"] = _Asked(place.credentials)
    return options


def _nodes(place: Place) -> list[tuple[str, int]]:
    pairs = [node.rpartition(":") for node in place.nodes]
    return [(host.strip("[]"), int(port)) for host, _, port in pairs]


def _manner(place: Place) -> dict[str, Any]:
    """Return what the URL says besides the address, as options of the connections to ``nodes``."""
    said: dict[str, Any] = dict(parse_url(place.url))  # type: ignore[no-untyped-call]
    kind = said.pop("connection_class", None)
    for address in ("host", "port", "path"):
        said.pop(address, None)
    if kind is not None and issubclass(kind, SSLConnection):
        said["ssl"] = True
    return said


def _sentinels(kind: Any, place: Place, options: dict[str, Any], once: Any) -> Any:
    """Return the master's client; ``once`` retries nothing, so that no dead sentinel is waited for."""
    timeouts = {"socket_timeout": place.timeout_s, "socket_connect_timeout": place.timeout_s}
    known = {**timeouts, "protocol": 2, "retry": once, **_NAMELESS}
    sentinels = kind(_nodes(place), sentinel_kwargs=known, **_manner(place), **options, retry=once)
    return sentinels.master_for(
        place.sentinel_master, redis_class=_Found if kind is Sentinel else _AsyncFound
    )


def connect(place: Place) -> redis.Redis:
    """Return a client that connects when it is first used; it answers with bytes and never retries itself.

    Raises :class:`~inferfleet.errors.ConfigError` for a URL that cannot be read.
    """
    options = _options(place) | {"command_packer": JoinPacker()}
    once = Retry(NoBackoff(), 0)
    try:
        if place.mode == "sentinel":
            found: redis.Redis = _sentinels(Sentinel, place, options, once)
            return found
        return redis.Redis.from_url(place.url, retry=once, **options)
    except ValueError as error:
        raise ConfigError(f"[redis] url: {error}") from None


def connect_cluster(place: Place) -> RedisCluster:
    """Return a cluster client; unlike :func:`connect` it looks at the cluster before it returns.

    It follows slots that move; where a node does not answer it looks who has the slots now, and raises.
    """
    options = _options(place) | {"retry": Retry(NoBackoff(), 0)}
    if place.nodes:
        node: Any = ClusterNode
        nodes = [node(host, port) for host, port in _nodes(place)]
        return RedisCluster(startup_nodes=nodes, **_without_database(_manner(place)), **options)
    return RedisCluster.from_url(place.url, **options)


def _without_database(said: dict[str, Any]) -> dict[str, Any]:
    said.pop("db", None)  # a cluster has one
    return said


def open_redis(place: Place) -> Any:
    """Return a client for any mode: a ``redis.Redis``, or a ``RedisCluster`` with the same commands."""
    return connect_cluster(place) if place.mode == "cluster" else connect(place)


def open_redis_async(place: Place) -> Any:
    """Return an asyncio client for any mode; it connects when it is first used.

    Raises :class:`~inferfleet.errors.ConfigError` for a URL that cannot be read.
    """
    options = _options(place)
    once = AsyncRetry(NoBackoff(), 0)
    try:
        if place.mode == "cluster":
            options["retry"] = once
            if not place.nodes:
                return AsyncRedisCluster.from_url(place.url, **options)
            node: Any = AsyncClusterNode
            nodes = [node(host, port) for host, port in _nodes(place)]
            return AsyncRedisCluster(startup_nodes=nodes, **_without_database(_manner(place)), **options)
        if place.mode == "sentinel":
            return _sentinels(AsyncSentinel, place, options, once)
        return redis.asyncio.Redis.from_url(place.url, retry=once, **options)
    except ValueError as error:
        raise ConfigError(f"[redis] url: {error}") from None
