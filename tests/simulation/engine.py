"""What stands in for device threads and for waiting: batches end when told, time passes on purpose."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from inferfleet.ports import Clock
from inferfleet.records import Batch, Tensors
from inferfleet.testing.puppet import PuppetError, PuppetModel, Script
from inferfleet.worker.engine import BatchRunner, Engine, Finished, News
from tests.simulation.traffic import FLAKY, KILLER


class KilledError(BaseException):
    """The process has ended, in the middle of whatever it did."""


class VirtualNews(SimpleQueue):  # type: ignore[type-arg]
    """The loop's queue, whose waiting is virtual: ``wait`` lets the time pass, and things happen in it."""

    def __init__(self) -> None:
        self.wait: Callable[[float], None] = lambda _: None

    def get(self, block: bool = True, timeout: float | None = None) -> News:
        """Return the next item, after letting ``timeout`` pass where there is none."""
        try:
            return super().get_nowait()
        except Empty:
            if not block:
                raise
        if timeout is None:
            raise AssertionError("the record path waits without a bound")
        self.wait(timeout)
        return super().get_nowait()


class SimModel(PuppetModel):
    """A puppet that can stumble: the next ``stumbles`` runs fail for no reason of any request.

    While ``broken`` every run fails. ``attempts`` says how many attempts a request has had, by its number.
    """

    stumbles = 0
    broken = False

    def __init__(self, version: str, script: Script, *, attempts: Callable[[int], int]) -> None:
        super().__init__(version, script)
        self._attempts = attempts

    def run(self, tensors: Tensors, rows: int) -> Tensors:
        """Run, or stumble."""
        if self.stumbles:
            self.stumbles -= 1
            raise RuntimeError("a passing fault")
        if self.broken:
            raise PuppetError("it fails on everything")
        for first, number, times, *_ in tensors["x"]:
            if first == FLAKY and self._attempts(int(number)) <= times:
                raise PuppetError("not yet", retryable=True)
        return super().run(tensors, rows)


class SimEngine(Engine):
    """An engine without a thread: it runs its oldest batch, with the real runner, when it is told to."""

    def __init__(self, name: str, model: SimModel, news: VirtualNews, clock: Clock) -> None:
        super().__init__(name, model.version, lambda: model, news, clock)
        self.loaded = model
        self.signature = model.signature
        self.queued: deque[Batch] = deque()
        self._runner = BatchRunner(model)

    def start(self) -> None:
        """It is loaded already."""

    def submit(self, batch: Batch) -> None:
        """Queue a batch until :meth:`finish`."""
        self.in_flight += 1
        self.queued.append(batch)

    def finish(self, seconds: float = 0.01) -> None:
        """Run the oldest batch; its result arrives as news."""
        if (self.queued[0].tensors()["x"][:, 0] == KILLER).any():
            raise KilledError
        result = self._runner.run(self.queued.popleft())
        result.seconds = seconds
        self._news.put(Finished(self, result))

    def close(self) -> None:
        """Nothing has to end."""

    def join(self, timeout_s: float) -> bool:
        """It never ran by itself."""
        return not self.queued
