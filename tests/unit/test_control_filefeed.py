"""Routes from a file: what stands in it is what was asked for, and one that is wrong is said to be."""

from __future__ import annotations

import pytest

from inferfleet.control.filefeed import READ_EVERY_S, FileFeed
from inferfleet.errors import ConfigError
from inferfleet.routes import RouteTable
from inferfleet.testing.clock import FakeClock


def test_a_file_that_is_wrong_leaves_the_routes_old_until_it_is_mended() -> None:
    """Each reading says so once; meanwhile the routes before stand, and are not those that were asked for."""
    clock, wrong = FakeClock(), [""]

    def read() -> RouteTable:
        if wrong[0]:
            raise ConfigError(wrong[0])
        return RouteTable("1", ())

    feed = FileFeed(read, clock)
    log = feed.log()
    assert feed.stale == ""

    wrong[0] = "routes.toml: no"
    clock.advance(READ_EVERY_S)
    with pytest.raises(ConfigError, match="no"):
        feed.log()
    assert feed.log() is log
    assert feed.stale == "routes.toml: no"

    wrong[0] = ""
    clock.advance(READ_EVERY_S)
    assert feed.log() is log
    assert feed.stale == ""
