"""The demo's processes: recorded, ended in order, and nobody else's is ever signalled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from inferfleet.demo.processes import DemoError, Processes, birth, last_line, recorded, stop_recorded
from inferfleet.demo.stage import Stage
from tests.support.waiting import wait_until

SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]


def test_what_was_started_is_recorded_and_ended(tmp_path: Path) -> None:
    """The record names every process while it runs, and goes with them."""
    record = tmp_path / "pids.json"
    processes = Processes(record)
    started = [processes.start(name, SLEEPER, tmp_path / f"{name}.log") for name in ("one", "two")]

    assert [(each.name, each.pid) for each in recorded(record)] == [(each.name, each.pid) for each in started]
    processes.kill(started[0])
    assert [each.name for each in recorded(record)] == ["two"]
    processes.stop()

    assert not record.exists()
    assert all(birth(each.pid) is None for each in started)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Ending is bounded: what outlives its grace gets SIGKILL."""
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(300)"
    )
    processes = Processes(tmp_path / "pids.json")
    started = processes.start("stubborn", [sys.executable, "-c", code, str(ready)], tmp_path / "log")
    wait_until(ready.exists, 30.0, "the process ignores SIGTERM")

    processes.stop(grace_s=0.1)

    assert birth(started.pid) is None


def test_a_process_with_another_birth_is_somebody_elses(tmp_path: Path) -> None:
    """An id that was given away since the record was written is neither listed nor signalled."""
    record = tmp_path / "pids.json"
    record.write_text(json.dumps([{"name": "worker-1", "pid": os.getpid(), "born": "0", "rank": 1}]))

    assert recorded(record) == []
    assert stop_recorded(record) == []
    assert not record.exists()


def test_a_later_process_ends_what_an_earlier_one_left(tmp_path: Path) -> None:
    """``--stop`` needs the record only."""
    record = tmp_path / "pids.json"
    left = Processes(record).start("left", SLEEPER, tmp_path / "log")

    assert stop_recorded(record) == ["left"]
    assert birth(left.pid) is None
    assert left.process.wait() != 0


def test_an_early_end_says_its_last_words(tmp_path: Path) -> None:
    """Whoever reads the error needs no second look into the log."""
    processes = Processes(tmp_path / "pids.json")
    started = processes.start(
        "worker-1", [sys.executable, "-c", "raise SystemExit('no port')"], tmp_path / "log"
    )
    started.process.wait()

    ended = started.ended()
    processes.stop()

    assert ended is not None
    assert "worker-1 ended with code 1" in ended
    assert ended.endswith("no port")
    assert last_line(tmp_path / "log") == "no port"


def test_a_folder_that_is_no_demos_is_never_emptied(tmp_path: Path) -> None:
    """``--folder`` pointed at somebody's models folder must not cost them their models."""
    own = tmp_path / "models" / "mine"
    own.parent.mkdir()
    own.write_text("precious")

    with pytest.raises(DemoError, match="no demo wrote"):
        Stage(tmp_path, ("digits",)).clear()

    assert own.read_text() == "precious"


def test_a_demos_own_folder_is_made_new(tmp_path: Path) -> None:
    """Models and logs of the last demo go, or versions could not be added again."""
    stage = Stage(tmp_path / ".demo", ("digits",))
    stage.clear()
    (stage.logs / "worker-1.log").write_text("old")

    stage.clear()

    assert list(stage.logs.iterdir()) == []
