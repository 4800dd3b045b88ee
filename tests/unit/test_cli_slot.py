"""Default worker ids: one per process on a host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from inferfleet import config
from inferfleet.cli import slot


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Locks of this test lie in a folder of its own and end with it."""
    held: list[IO[bytes]] = []
    monkeypatch.setattr(slot.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(slot, "_held", held)
    yield
    for file in held:
        file.close()


def test_two_workers_on_a_host_never_share_an_id() -> None:
    """Each claim takes the lowest slot that nobody holds."""
    first, second = slot.with_worker_id(config.parse("")), slot.with_worker_id(config.parse(""))

    assert first.worker.id.endswith("-0")
    assert second.worker.id.endswith("-1")


def test_another_pool_has_slots_of_its_own() -> None:
    """Names derive from fleet, pool and id, so slots are counted per pool."""
    slot.with_worker_id(config.parse(""))

    assert slot.with_worker_id(config.parse('[worker]\npool = "other"')).worker.id.endswith("-0")


def test_an_id_that_is_set_is_kept() -> None:
    """Whoever names a worker answers for the name."""
    assert slot.with_worker_id(config.parse('[worker]\nid = "w-7"')).worker.id == "w-7"


def test_a_dead_process_gives_its_slot_back(tmp_path: Path) -> None:
    """The lock goes with the process, so a restarted worker gets its old id."""
    code = (
        "import tempfile; from inferfleet import config; from inferfleet.cli import slot\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "print(slot.with_worker_id(config.parse('')).worker.id)"
    )
    ids = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]

    assert ids[0] == ids[1]
