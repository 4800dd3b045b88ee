"""Clients: submit a request to a route's topic or queue and wait for its result.

``Client`` is for threads, ``AsyncClient`` for asyncio; both keep the same rules (``inbox``, ``session``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferfleet.client.aio import AsyncClient
    from inferfleet.client.outcome import ClientError, DuplicateIdError, Result, ResultTimeout, SubmitError
    from inferfleet.client.request import Request
    from inferfleet.client.sync import Client

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "DuplicateIdError",
    "Request",
    "Result",
    "ResultTimeout",
    "SubmitError",
]

_HOMES = {"Client": "sync", "AsyncClient": "aio", "Request": "request"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'outcome')}"), name)
