"""What the control plane's verbs stand on: the catalogue over a repository, the actor, an absent Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferfleet.cli.control import RepositoryCatalogue, actor, opened
from inferfleet.client import Client
from inferfleet.config import parse
from inferfleet.errors import ControlError, ModelRepositoryError
from inferfleet.models.repository import Repository
from inferfleet.route_reader import read_routes
from inferfleet.testing.checksum import write_checksum_model

AWAY = "[redis]\nurl = 'redis://:canary@127.0.0.1:1/0'\n[routes]\nsource = 'fleet'\n"


@pytest.fixture
def catalogue(tmp_path: Path) -> RepositoryCatalogue:
    repository = Repository(tmp_path)
    for version in ("2", "10"):
        write_checksum_model(repository, "sums", version)
    return RepositoryCatalogue(repository)


def test_the_latest_version_is_the_highest_number(catalogue: RepositoryCatalogue) -> None:
    """Not the last by name."""
    assert catalogue.latest("sums") == "10"
    with pytest.raises(ModelRepositoryError, match='did you mean "sums"'):
        catalogue.latest("sum")


def test_a_version_is_described_without_reading_its_model(
    catalogue: RepositoryCatalogue, tmp_path: Path
) -> None:
    """Gigabytes are not read for a look; loading reads and compares every byte."""
    found = catalogue.version("sums", "2")
    assert found.digest == Repository(tmp_path).fetch("sums", "2").digest
    assert found.signature is not None
    assert [each.name for each in found.signature.inputs] == ["x"]
    (tmp_path / "sums" / "2" / "model.py").write_text("changed")
    assert catalogue.version("sums", "2") == found
    with pytest.raises(ModelRepositoryError, match="has no version '3'; there is: 2, 10"):
        catalogue.version("sums", "3")


def test_the_actor_is_user_and_host() -> None:
    """As one reads it in a log."""
    user, at, host = actor().partition("@")
    assert user
    assert at == "@"
    assert host


def test_a_control_plane_that_is_away_is_one_line_without_its_password() -> None:
    """For verbs that read the routes, for verbs that write them, and for a program's client."""
    config = parse(AWAY)
    with pytest.raises(ControlError, match="does not answer") as read:
        read_routes(config, 1.0)
    with opened(config) as store, pytest.raises(ControlError) as written:
        store.load()
    with pytest.raises(ControlError, match="does not answer"):
        Client(config)
    for error in (read, written):
        assert "redis://127.0.0.1:1/0" in str(error.value)
        assert "canary" not in str(error.value)
