"""What a worker tells of its versions' answers: windows, filled per batch and settled part, then handed on.

Nothing here is kept for a single record: a batch adds a handful of sums, a settled part adds an array.
Without somebody to tell there is no :class:`Observing`, and nothing is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import xxhash

from inferfleet.control_ports import Reporter
from inferfleet.core.routing import KEY_GROUPS
from inferfleet.errors import RULES, Code
from inferfleet.ports import Clock
from inferfleet.records import Array, BatchResult, Requests, RowFailure, Served
from inferfleet.summaries import Window
from inferfleet.worker.plan import RoutePlan, VariantPlan
from inferfleet.worker.settling import Settling

MAX_KEYS = 131_072
"""Keys that are told apart for each revision of a route, over all its arms: about 12 MB."""
KEPT_REVISIONS = 3
FOLD_AT = 16_384
"""Spans that wait to be sorted into a histogram; together they cost less than one part at a time."""

_OURS = frozenset(code.value for code, rule in RULES.items() if rule.brake)
_LETTERED = frozenset(code.value for code, rule in RULES.items() if rule.dead_letter)
_WHO = Callable[[Requests], tuple[RoutePlan, VariantPlan]]


class FirstSeen:
    """Which keys a worker has met under one revision of a route, for each of its arms; bounded.

    When the bound is reached all arms stop counting at once: one that went on would look too large.
    """

    def __init__(self, bound: int = MAX_KEYS) -> None:
        self._bound = bound
        self._held = 0
        self._seen: dict[Served, set[int]] = {}
        self.full = False

    def met(self, served: Served, keys: Iterable[int]) -> int:
        """Return how many keys, by their hashes, come to this arm for the first time."""
        if self.full:
            return 0
        seen = self._seen.setdefault(served, set())
        before = len(seen)
        seen.update(keys)
        new = len(seen) - before
        self._held += new
        if self._held >= self._bound:
            self.full = True
            self._seen.clear()
        return new


class Observing:
    """Fills windows and hands them to a reporter every ``every_s``; owned by the worker loop's thread.

    ``crashed`` says that this worker's last life ended without being asked to: its first windows say so, and
    they are handed on as soon as it serves. ``letters`` are codes that get a dead letter beside the usual.
    """

    def __init__(
        self,
        worker: str,
        reporter: Reporter,
        clock: Clock,
        every_s: float,
        *,
        crashed: bool = False,
        letters: Collection[str] = (),
    ) -> None:
        self._worker = worker
        self._reporter = reporter
        self._clock = clock
        self._every_s = every_s
        self._crashed = crashed
        self._letters = _LETTERED | frozenset(letters)
        self._windows: dict[tuple[Served, str], Window] = {}
        self._spans: dict[tuple[Served, str], list[Array]] = {}
        self._waiting = 0
        self._groups: dict[Served, Array] = {}
        self._first_seen: dict[tuple[str, str], FirstSeen] = {}
        self._closed_at = clock.monotonic()
        self._since_ms = clock.utc_ms()

    def serve(self, plans: Collection[RoutePlan]) -> None:
        """Hear what is served now; after a crash, say at once which versions may have had a part in it."""
        if not self._crashed:
            return
        self._crashed = False
        for plan in plans:
            for variant in plan.variants:
                detached = plan.route.shadow_of is not None
                place = shadow_place(plan, variant.served) if detached else (variant.served, "primary")
                self.window(*place).crash = True
            for shadow in plan.shadows:
                self.window(shadow.served, "shadow").crash = True
        self.close()

    def window(self, served: Served, role: str = "primary") -> Window:
        """Return the open window of a version."""
        key = (served, role)
        found = self._windows.get(key)
        if found is None:
            found = self._windows[key] = Window(
                worker=self._worker,
                route=served.route,
                model=served.model,
                version=served.version,
                variant=served.variant,
                role=role,
                revision=revision_number(served.revision),
                start_ms=self._since_ms,
            )
        return found

    def came(self, plan: RoutePlan, piece: Requests) -> None:
        """Requests were steered to a variant: their keys count now.

        Not when they are answered: a version whose batches come later, or take longer, would look as if fewer
        keys were its own.
        """
        if piece.served is None or piece.chunk.origins is not None or len(plan.variants) == 1:
            return
        seen = self._seen(piece.served)
        if seen is None:
            return
        window = self.window(piece.served)
        if not seen.full:
            window.first_seen += seen.met(piece.served, _digests(plan.keys(piece)).tolist())
        window.first_seen_full = seen.full

    def batch(self, result: BatchResult, failures: Sequence[RowFailure], whose: _WHO) -> None:
        """A batch has ended; ``failures`` are its requests that failed, unfit answers included."""
        parts = result.batch.parts
        counts: dict[Served, tuple[int, int, int]] = {}
        places: dict[Served, tuple[Served, str]] = {}
        met: dict[Served, list[bytes]] = {}
        for part in parts:
            if part.served is None:
                continue
            # A request counts once: further attempts would make one failure into several.
            first = part.chunk.origins is None
            requests, rows, firsts = counts.get(part.served, (0, 0, 0))
            counts[part.served] = (requests + len(part), rows + part.total_rows, firsts + first * len(part))
            plan = whose(part)[0]
            if plan.route.shadow_of is not None:
                places[part.served] = shadow_place(plan, part.served)
            if first and len(plan.variants) > 1:  # together: a part may be a single request
                met.setdefault(part.served, []).extend(plan.keys(part))
        for arm, keys in met.items():
            self._groups_of(arm)[0] += np.bincount(_groups(keys), minlength=KEY_GROUPS)
        bad: dict[Served, int] = {}
        for failure in failures:
            served = failure.part.served
            if served is not None and RULES[failure.code].brake and failure.part.chunk.origins is None:
                bad[served] = bad.get(served, 0) + 1
                plan = whose(failure.part)[0]
                if len(plan.variants) > 1:
                    self._groups_of(served)[1, int(_digests(plan.keys(failure.part))[0]) % KEY_GROUPS] += 1
        total = sum([requests for requests, _, _ in counts.values()])
        for served, (requests, rows, firsts) in counts.items():
            window = self.window(*places.get(served, (served, "primary")))
            fill_batch(window, requests, rows, result.seconds / total)
            if firsts:
                window.failures.add(firsts, bad.get(served, 0))

    def _seen(self, served: Served) -> FirstSeen | None:
        """Return the keys of a revision; ``None`` for one that is older than those that are kept.

        By number: were the newest forgotten for late records of many others, its keys would count again.
        """
        key = (served.route, served.revision)
        if key not in self._first_seen:
            mine = [each for each in self._first_seen if each[0] == served.route]
            if len(mine) >= KEPT_REVISIONS:
                oldest = min(mine, key=lambda each: revision_number(each[1]))
                if revision_number(served.revision) < revision_number(oldest[1]):
                    return None
                del self._first_seen[oldest]
            self._first_seen[key] = FirstSeen()
        return self._first_seen[key]

    def _groups_of(self, served: Served) -> Array:
        """Return the requests, and the failures among them, of each group of keys of an open window."""
        found = self._groups.get(served)
        if found is None:
            found = self._groups[served] = np.zeros((2, KEY_GROUPS), np.int64)
        return found

    def settled(self, settling: Settling, now_ms: int, seconds: Array) -> None:
        """Records have their confirmed outcome, ``seconds`` after their timestamps."""
        plan = settling.plan
        served = settling.served
        if served is None:
            served = Served(plan.name, plan.route.model, "", "", plan.revision)
        key = (served, "primary") if plan.route.shadow_of is None else shadow_place(plan, served)
        window = self.window(*key)
        for (_, _, outcome), count in settling.outcomes.items():
            if not count:
                continue
            window.requests += count
            window.codes[outcome] = window.codes.get(outcome, 0) + count
            if outcome in self._letters:
                window.dead_letters += count
            if outcome == Code.MODEL_OUTPUT:
                window.invalid += count
            if outcome in _OURS:
                first, _ = window.bad_ms or (now_ms, now_ms)
                window.bad_ms = (first, now_ms)
            if served.fallback:
                window.fallbacks += count
        self._spans.setdefault(key, []).append(seconds)
        self._waiting += len(seconds)
        if self._waiting >= FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        for key, spans in self._spans.items():
            self.window(*key).latency.add(np.concatenate(spans))
        self._spans.clear()
        self._waiting = 0

    def tick(self, now: float) -> None:
        """Close the windows when their time has come."""
        if now - self._closed_at >= self._every_s:
            self._closed_at = now
            self.close()

    def close(self) -> None:
        """Hand on what was counted since the last time."""
        self._fold()
        now_ms = self._clock.utc_ms()
        for served, counts in self._groups.items():
            met = np.flatnonzero(counts[0]).tolist()
            self.window(served).key_groups = {group: tuple(counts[:, group].tolist()) for group in met}
        self._groups = {}
        windows = list(self._windows.values())
        for window in windows:
            window.end_ms = now_ms
        self._windows = {}
        self._since_ms = now_ms
        if windows:
            self._reporter.append(windows)


def shadow_place(plan: RoutePlan, served: Served | None) -> tuple[Served, str]:
    """Return the window of a detached shadow's answers: it stands with the route whose requests it sees."""
    version = "" if served is None else served.version
    return Served(plan.route.shadow_of or "", plan.route.model, version, plan.name, plan.revision), "shadow"


def _digests(keys: Sequence[bytes]) -> Array:
    """Return the unsalted xxh3 of each key, unsigned 64 bits."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, keys)), ">u8").astype(np.uint64)


def _groups(keys: Sequence[bytes]) -> Array:
    return (_digests(keys) % np.uint64(KEY_GROUPS)).astype(np.intp)


def fill_batch(window: Window, requests: int, rows: int, each_s: float) -> None:
    """Count a batch, or a version's share of it: ``each_s`` is its model time for each request."""
    window.batches += 1
    window.rows += rows
    window.compute_s += each_s * requests
    window.compute.add_same(each_s, requests)


def revision_number(revision: str) -> int:
    """Return the number of a revision; 0 for the hash of a routes file."""
    return int(revision) if revision.isdecimal() and len(revision) < 12 else 0
