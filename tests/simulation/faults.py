"""What goes wrong in a simulated fleet, one thing at a time; the world mends all of it in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from inferfleet.brokers.memory_group import Group
from inferfleet.naming import retry_group
from inferfleet.ports import RefusalKind
from inferfleet.records import Stream
from tests.simulation.fleet import RESULTS, SOURCES, table

if TYPE_CHECKING:
    from tests.simulation.world import World

MOST_WORKERS = 4


class Faults:
    """The faults of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng

    def chosen(self) -> list[tuple[Callable[[], str], int]]:
        """Return the faults that this seed has, and how often each strikes."""
        faults: list[tuple[Callable[[], str], int]] = [
            (self.join, 3),
            (self.leave, 2),
            (self.crash, 2),
            (self.freeze, 3),
            (self.refuse_commits, 5),
            (self.refuse_topic, 4),
            (self.send_store_away, 3),
            (self.run_out_of_memory, 2),
            (self.stumble, 4),
            (self.change_routes, 2),
            (self.leave_gaps, 3),
            (self.send_coordinator_away, 3),
        ]
        found = [fault for fault in faults if self._rng.random() < 0.45]
        if self._world.braked:
            # A worker that drops a route mid-way no longer hears of its pause.
            found = [fault for fault in found if fault[0] != self.change_routes]
            found += [(self.break_models, 2), (self.resume, 1)]
        return found

    def _group(self) -> Group:
        """Return the group of the sources, or that of the retries."""
        config = self._world.config
        return self._world.broker.group(
            self._rng.choice([config.group, retry_group(config, config.worker.pool)])
        )

    def join(self) -> str:
        """Start another worker."""
        return self._world.start() if len(self._world.workers) < MOST_WORKERS else "enough workers"

    def leave(self) -> str:
        """Stop a worker in order, with more or less patience."""
        worker = self._world.any()
        if worker is None:
            return "nobody leaves"
        return self._world.stop(worker, self._rng.choice([0.0, 0.02, 0.3]))

    def crash(self) -> str:
        """Kill a worker; the group notices in its own time."""
        worker = self._world.any()
        if worker is None:
            return "nobody crashes"
        self._world.workers.remove(worker)
        worker.crash()
        return f"{worker.name} is killed"

    def freeze(self) -> str:
        """Let a worker be away for longer than its session; it is not told until it takes again."""
        worker = self._world.any()
        if worker is not None:
            self._rng.choice(worker.watched).expel()
        return f"{worker and worker.name} is expelled"

    def refuse_commits(self) -> str:
        """Begin or end refusing commits."""
        group = self._group()
        group.refuses_commits = not group.refuses_commits
        return f"commits of {group.name} are refused: {group.refuses_commits}"

    def send_coordinator_away(self) -> str:
        """Let the group's coordinator go away, or come back: meanwhile no assignment changes."""
        group = self._group()
        group.away = not group.away
        return f"the coordinator of {group.name} is away: {group.away}"

    def refuse_topic(self) -> str:
        """Begin or end refusing at a result, dead-letter or retry topic."""
        world = self._world
        topic = self._rng.choice([*RESULTS.values(), *world.dead_letters, *world.retries])
        if topic in self._world.refusing:
            self._world.refusing.discard(topic)
            self._world.mend_topics()
            return f"{topic} accepts"
        self._world.refusing.add(topic)
        share = self._rng.choice([0.3, 1.0])
        kind = self._rng.choice([RefusalKind.LATER, RefusalKind.DENIED])
        self._world.broker.refuse(topic, kind, when=lambda _: self._rng.random() < share)
        return f"{topic} refuses {share} as {kind}"

    def send_store_away(self) -> str:
        """Let the result store go away, or come back."""
        self._world.set_store(away=not self._world.store_away)
        return f"the store is away: {self._world.store_away}"

    def run_out_of_memory(self) -> str:
        """Give a worker's device less memory, or enough again."""
        worker, rows = self._world.any(), self._rng.choice([1, 2, 3, None])
        for engine in worker.engines.values() if worker else ():
            engine.loaded.script.oom_above = rows
        return f"{worker and worker.name} has memory for {rows} rows"

    def stumble(self) -> str:
        """Let the next run of a worker's models fail for no reason."""
        worker = self._world.any()
        for engine in worker.engines.values() if worker else ():
            engine.loaded.stumbles = 1
        return f"{worker and worker.name} stumbles"

    def change_routes(self) -> str:
        """Shift weights, and take route b away or bring it back, worker by worker or for all."""
        self._world.table = table(self._rng.choice([10, 70]), self._rng.random() < 0.7)
        chosen = self._rng.sample(self._world.workers, self._rng.randrange(len(self._world.workers) + 1))
        for worker in chosen:
            worker.use(self._world.table)
        return f"routes {self._world.table.revision} for {[worker.name for worker in chosen]}"

    def leave_gaps(self) -> str:
        """Leave offsets without a record."""
        topic = self._rng.choice([*SOURCES.values(), *self._world.retries])
        stream = Stream(topic, self._rng.randrange(self._world.broker.partitions(topic)))
        self._world.broker.skip(stream, self._rng.randrange(1, 4))
        return f"a gap in {stream}"

    def break_models(self) -> str:
        """Let every model fail on everything, or be well again."""
        self._world.set_broken(not self._world.broken)
        return f"the models are broken: {self._world.broken}"

    def resume(self) -> str:
        """Resume what a brake has paused, whether the models are mended or not."""
        return f"resumed: {self._world.resume()}"
