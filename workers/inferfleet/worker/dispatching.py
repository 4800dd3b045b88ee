"""Giving batches to engines: the most urgent due one to whoever is free, and suspects one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from inferfleet.core.batcher import NEVER, Batcher
from inferfleet.ports import Clock
from inferfleet.records import Batch, BatchResult, Requests
from inferfleet.worker.careful import Careful
from inferfleet.worker.engine import Engine, Finished


class Dispatching:
    """The engines of a worker and what waits for them; owned by the worker loop's thread.

    ``expired`` and ``condemned`` hear of requests that are not to run.
    """

    def __init__(
        self,
        batcher: Batcher,
        careful: Careful,
        clock: Clock,
        expired: Callable[[Requests], None],
        condemned: Callable[[Requests], None],
    ) -> None:
        self._batcher = batcher
        self._careful = careful
        self._clock = clock
        self._expired = expired
        self._condemned = condemned
        self._engines: list[Engine] = []
        self._alone: deque[tuple[Engine, Batch]] = deque()
        self._running: dict[int, Batch] = {}
        self._suspect: Batch | None = None
        """The one that runs now: until it has ended nothing else is given to any engine."""

    def watch(self, engine: Engine) -> None:
        """Give batches to an engine too."""
        self._engines.append(engine)

    def forget(self, engine: Engine) -> None:
        """Give nothing more to an engine; it holds no batch and no request waits for it."""
        self._engines.remove(engine)

    def watches(self, engine: Engine) -> bool:
        """Return whether this engine has loaded and is looked after."""
        return engine in self._engines

    def busy(self, engine: Engine) -> bool:
        """Return whether a batch runs or a request waits for this engine."""
        return (
            engine.in_flight > 0
            or self._batcher.waiting(engine.model, engine.version) > 0
            or any(each is engine for each, _ in self._alone)
        )

    @property
    def running(self) -> bool:
        """Whether any engine has a batch that requests wait for."""
        return any(engine.in_flight > engine.aside for engine in self._engines)

    @property
    def full(self) -> bool:
        """Whether no engine takes another batch before one has ended."""
        return bool(self._engines) and not any(engine.free for engine in self._engines)

    def run(self, *, flush: bool = False) -> None:
        """Answer what has expired, and give every free engine its most urgent due batch."""
        if self._alone or self._suspect is not None:
            self._run_alone()
            return
        if not self._batcher.rows:
            return
        now_ms = self._clock.utc_ms()
        for part in self._batcher.expire(now_ms):
            self._expired(part)
        now = NEVER if flush else self._clock.monotonic()
        for engine in self._engines:
            while engine.free and (batch := self._batcher.due(engine.model, engine.version, now, now_ms)):
                if self._careful.active:
                    self._screen(engine, batch)
                    if self._alone:
                        return
                else:
                    self._submit(engine, batch)

    def _screen(self, engine: Engine, batch: Batch) -> None:
        found = self._careful.screen(batch)
        for part in found.condemned:
            self._condemned(part)
        self._alone.extend((engine, single) for single in found.alone)
        if found.rest is not None:
            self._careful.began(found.rest)
            self._submit(engine, found.rest)

    def _run_alone(self) -> None:
        """Run the next suspect once nothing else runs anywhere, so that a crash is its own."""
        while self._alone and not self.running:
            engine, batch = self._alone.popleft()
            if batch.parts[0].chunk.live:
                self._careful.began(batch)
                self._suspect = batch
                self._submit(engine, batch)

    def _submit(self, engine: Engine, batch: Batch) -> None:
        self._running[id(batch)] = batch
        engine.used_at = self._clock.monotonic()
        engine.submit(batch)

    def finished(self, item: Finished) -> BatchResult:
        """Hear that a batch has ended, and return what became of it."""
        item.engine.in_flight -= 1
        self._running.pop(id(item.result.batch), None)
        if item.result.batch is self._suspect:
            self._suspect = None
        if self._careful.active:
            self._careful.ended(item.result.batch)
        return item.result

    def next_due_s(self, now: float) -> float:
        """Return in how many seconds the next batch is due; infinity if nothing waits."""
        if not self._batcher.rows:
            return NEVER
        now_ms = self._clock.utc_ms()
        due = [self._batcher.next_due(engine.model, engine.version, now, now_ms) for engine in self._engines]
        return min(due, default=NEVER) - now

    def drop_dead(self) -> list[Requests]:
        """Forget requests whose chunk was taken away, and return them."""
        return self.withdraw(lambda part: not part.chunk.live)

    def withdraw(self, unwanted: Callable[[Requests], bool]) -> list[Requests]:
        """Take out what waits and is no longer wanted here, and return it; what runs ends as it began."""
        gone = [part for _, batch in self._alone for part in batch.parts if unwanted(part)]
        self._alone = deque(each for each in self._alone if not unwanted(each[1].parts[0]))
        return gone + self._batcher.withdraw(unwanted)

    def open(self) -> list[Requests]:
        """Return all that waits or runs."""
        batches = [*self._running.values(), *(batch for _, batch in self._alone)]
        return [*self._batcher.parts(), *(part for batch in batches for part in batch.parts)]
