"""Versions of a worker: what loads when, what there is room for, and what is let go for what."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest

from inferfleet.core.batcher import Batcher
from inferfleet.errors import ModelLoadError
from inferfleet.records import Requests, Signature, TensorSpec
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.testing.clock import FakeClock
from inferfleet.testing.marks import MemoryMarks
from inferfleet.worker import versions
from inferfleet.worker.careful import Careful
from inferfleet.worker.dispatching import Dispatching
from inferfleet.worker.engine import Engine, Loaded
from inferfleet.worker.versions import REFUSED_AGAIN_S, Version, Versions, Wanted

SIGNATURE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),))


class StillEngine(Engine):
    """An engine that loads when a test says so."""

    closed = False

    def start(self) -> None:
        """Wait for the test's word."""

    def close(self) -> None:
        self.closed = True


class Shelf:
    """Versions that hold 100 bytes each, but for those that a test weighs otherwise."""

    def __init__(self, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "Engine", StillEngine)
        self.clock = FakeClock()
        self.sizes: dict[str, int] = {}
        self.running = Dispatching(Batcher(), Careful(MemoryMarks()), self.clock, _nothing, _nothing)
        news: SimpleQueue[Any] = SimpleQueue()
        self.metrics = PrometheusMetrics()
        self.versions = Versions(self, self.running, news, self.metrics, self.clock, bound)

    def load(self, model: str, version: str) -> Any:
        raise AssertionError((model, version))

    def wishes(self, model: str, version: str) -> Any:
        raise AssertionError((model, version))

    def holds_bytes(self, model: str, version: str) -> int:
        del model
        return self.sizes.get(version, 100)

    def digest(self, model: str, version: str) -> str:
        return f"{model}@{version}"

    def loads(self, error: Exception | None = None) -> list[str]:
        """Let what loads come to its end; return which versions that were."""
        found = [engine for engine in self.versions.all if engine.signature is None]
        for engine in found:
            engine.signature = None if error else SIGNATURE
            self.versions.heard([Loaded(engine, error)], "")
        return [engine.version for engine in found]

    def have(self, *numbers: str) -> None:
        """Load these, the first used longest ago."""
        self.versions.want(Wanted(live=keys(*numbers)))
        while self.loads():
            continue
        for number in numbers:
            self.clock.advance(1)
            self.versions.loaded["m", number].used_at = self.clock.monotonic()

    @property
    def loaded(self) -> list[str]:
        return sorted(version for _, version in self.versions.loaded)


def _nothing(_: Requests) -> None:
    """No request waits here."""


def keys(*numbers: str) -> list[Version]:
    return [("m", number) for number in numbers]


def test_without_a_bound_everything_loads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes when nobody wants it any longer."""
    shelf = Shelf(0, monkeypatch)
    shelf.versions.want(Wanted(keys("1"), keys("2"), keys("3")))
    assert shelf.loads() == ["1", "2", "3"]
    assert shelf.versions.digests() == {f"m:{n}": f"m@{n}" for n in "123"}
    shelf.versions.want(Wanted(keys("2")))
    assert shelf.loaded == ["2"]
    shelf.versions.retire()
    assert [engine.version for engine in shelf.versions.all] == ["2"]


def test_with_a_bound_versions_load_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each is measured by itself."""
    shelf = Shelf(1_000, monkeypatch)
    shelf.versions.want(Wanted(keys("1", "2"), keys("3")))
    assert shelf.versions.loading == keys("1", "2", "3")
    assert [shelf.loads(), shelf.loads(), shelf.loads(), shelf.loads()] == [["1"], ["2"], ["3"], []]


def test_the_least_recently_used_of_the_past_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never one that a revision needs now, later, or as announced."""
    shelf = Shelf(300, monkeypatch)
    shelf.have("1", "2", "3")
    shelf.versions.want(Wanted(keys("1"), keys("4"), keys("2", "3")))
    assert shelf.loaded == ["1", "3"]
    assert shelf.loads() == []
    shelf.versions.retire()
    assert shelf.loads() == ["4"]
    assert shelf.loaded == ["1", "3", "4"]
    assert shelf.versions.refused == {}


def test_what_cannot_fit_is_refused_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures; what serves goes on."""
    shelf = Shelf(250, monkeypatch)
    shelf.have("1", "2")
    wanted = Wanted(keys("1", "2"), keys("3"))
    shelf.versions.want(wanted)
    (error,) = shelf.versions.refused.values()
    assert "model m version 3 needs 100 bytes and 50 are free" in str(error)
    assert "memory_bytes = 250" in str(error)
    assert shelf.loaded == ["1", "2"]
    shelf.sizes["2"] = 40
    shelf.versions.want(wanted)
    assert shelf.loads() == []
    shelf.clock.advance(REFUSED_AGAIN_S)
    shelf.versions.want(wanted)
    assert shelf.loads() == ["3"]


def test_what_is_in_force_loads_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nobody would answer."""
    shelf = Shelf(150, monkeypatch)
    shelf.have("1")
    shelf.versions.want(Wanted(keys("1", "2")))
    assert shelf.loads() == ["2"]


def test_a_version_that_grew_more_than_its_files_costs_the_past_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was measured counts from then on."""
    shelf = Shelf(300, monkeypatch)
    shelf.have("1", "2")
    shelf.versions.want(Wanted(keys("1"), keys("3"), keys("2")))
    shelf.sizes["3"] = 190
    assert shelf.loads() == ["3"]
    assert shelf.loaded == ["1", "3"]


def test_a_version_that_does_not_load_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody wants it; nobody else's version is touched."""
    shelf = Shelf(0, monkeypatch)
    shelf.have("1")
    wanted = Wanted(keys("1"), keys("2"))
    shelf.versions.want(wanted)
    assert shelf.loads(ModelLoadError("broken")) == ["2"]
    assert (shelf.loaded, [str(e) for e in shelf.versions.refused.values()]) == (["1"], ["broken"])
    assert shelf.versions.loading == []
    shelf.clock.advance(REFUSED_AGAIN_S)
    shelf.versions.want(wanted)
    assert shelf.loads() == ["2"]
    shelf.versions.want(Wanted(keys("1")))
    shelf.versions.want(wanted)
    assert shelf.loaded == ["1", "2"]  # it was still warm
    assert len(shelf.versions.all) == 2


def test_the_metrics_say_which_versions_load_are_ready_and_were_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A version that nobody wants any longer is no alarm, whether it was served or never loaded."""
    shelf = Shelf(0, monkeypatch)

    def value(name: str, version: str, **labels: str) -> float | None:
        found = {"model": "m", "version": version, **labels}
        return shelf.metrics.registry.get_sample_value(f"inferfleet_{name}", found)

    shelf.versions.want(Wanted(live=keys("1", "2")))
    assert (value("model_ready", "1"), value("model_refused", "1")) == (0, 0)
    assert value("model_loads_total", "1", outcome="refused") == 0
    first, second = shelf.versions.all
    first.signature = SIGNATURE
    shelf.versions.heard([Loaded(first, None), Loaded(second, ModelLoadError("no"))], "")
    assert (value("model_ready", "1"), value("model_refused", "1")) == (1, 0)
    assert (value("model_ready", "2"), value("model_refused", "2")) == (0, 1)
    assert value("model_loads_total", "2", outcome="refused") == 1

    shelf.clock.advance(REFUSED_AGAIN_S)
    shelf.versions.want(Wanted(live=keys("1", "2")))
    assert (value("model_ready", "2"), value("model_refused", "2")) == (0, 1)

    shelf.loads(ModelLoadError("no"))
    shelf.versions.want(Wanted())
    shelf.versions.retire()
    assert value("model_ready", "1") is None
    assert (value("model_ready", "2"), value("model_refused", "2")) == (None, None)
    assert value("model_loads_total", "2", outcome="refused") == 2
