"""What of the exporter's environment must not be seen in a log."""

from __future__ import annotations

import pytest

from inferfleet.cli.tracing import secrets_of


@pytest.mark.parametrize("sign", ["=", ":", ": "])
def test_values_of_headers_are_secrets_however_they_are_written(sign: str) -> None:
    """A colon is a usual slip, and the SDK quotes what it cannot read."""
    headers = f"Authorization{sign}Bearer marked-1,x-key{sign}marked-2"

    found = secrets_of(headers)

    assert {headers, "Bearer marked-1", "marked-2"} <= found
    assert secrets_of("") == set()
