"""inferfleet: requests in Kafka become predictions in Kafka and Redis, batch by batch, none lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferfleet.client import AsyncClient, Client, Request, Result, ResultTimeout, SubmitError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Request", "Result", "ResultTimeout", "SubmitError", "__version__"]


def __getattr__(name: str) -> Any:
    # The client's libraries load with the first use of a name: a worker or a model never needs them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inferfleet import client

    return getattr(client, name)
