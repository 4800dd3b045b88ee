"""What people may do with rollouts: start, look, pause, resume, promote, abort, approve.

Any replica may do it, and so may the command line: each is one compare-and-set on the rollout's document and,
where it changes the route, on the route's last revision. The leader sees it in its next turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from inferfleet.catalogue import Catalogue
from inferfleet.control_ports import ControlStore
from inferfleet.coordinator import stepping
from inferfleet.coordinator.announcing import Author
from inferfleet.coordinator.evidence import (
    Gathering,
    answers_of,
    evidence_name,
    feedback_source,
    is_evidence,
)
from inferfleet.coordinator.leading import barrier_of
from inferfleet.coordinator.messages import RolloutRequest, RolloutView
from inferfleet.coordinator.reading import evidence_view
from inferfleet.coordinator.route_checks import check_served
from inferfleet.coordinator.stepping import Standing
from inferfleet.core import rollout as machine
from inferfleet.core import rollout_verbs as verbs
from inferfleet.core.barrier import ahead, clock_fault
from inferfleet.core.rollout import Start, Step
from inferfleet.core.rollout_moves import approvers
from inferfleet.errors import ConfigError, ConflictError, LogLostError
from inferfleet.plane import Stored, version_name
from inferfleet.policies import Policy, policy_of
from inferfleet.ports import Clock
from inferfleet.revisions import RouteLog
from inferfleet.rollouts import RefusedError, Rollout
from inferfleet.routes import Route

TRIES = 4
VERBS = ("pause", "resume", "promote", "abort", "approve")


class Seen(NamedTuple):
    """What a person has looked at before approving; what is empty was not looked at."""

    digest: str = ""
    policy: str = ""


class RolloutControl:
    """Implements :class:`~inferfleet.coordinator.services.RolloutService`; any thread may call it."""

    def __init__(self, store: ControlStore, catalogue: Catalogue, clock: Clock) -> None:
        self._store = store
        self._catalogue = catalogue
        self._clock = clock
        self._lock = threading.Lock()
        self._gathered: dict[str, Gathering] = {}

    def __repr__(self) -> str:
        return f"RolloutControl({self._store!r})"

    # Looking

    def list(self) -> Sequence[RolloutView]:
        """Return all rollouts, newest first; what they were judged by is left out."""
        found = [RolloutView.of(each.rollout, each.version) for each in self.standing().values()]
        return sorted(found, key=lambda each: (each.begun_ms, each.id), reverse=True)

    def standing(self) -> Mapping[str, Standing]:
        """Return all rollouts that can be understood, by their ids, caught up with the log."""
        log, now = self._store.load(), self._clock.utc_ms()
        found: dict[str, Standing] = {}
        for name, stored in self._store.documents().items():
            if not is_evidence(name):
                try:
                    found[name] = stepping.read(stored, log, now)
                except ConfigError:
                    continue  # of a newer release, which shows it
        return found

    def named(self, name: str) -> str:
        """Return the id of a rollout, or of the newest one on a route of that name.

        Raises LookupError where there is neither.
        """
        standing = self.standing()
        if name in standing:
            return name
        mine = [each.rollout for each in standing.values() if each.rollout.route == name]
        if not mine:
            raise LookupError(f'there is no rollout "{name}", and none on a route of that name')
        return max(mine, key=lambda each: (not each.ended, each.begun_ms)).id

    def get(self, rollout: str) -> RolloutView:
        """Return one, with what it is judged by; raises LookupError."""
        documents, now = self._store.documents(), self._clock.utc_ms()
        if rollout not in documents or is_evidence(rollout):
            raise LookupError(f'there is no rollout "{rollout}"')
        workers, log = self._store.workers(), self._store.load()
        version, found = stepping.read(documents[rollout], log, now)
        with self._lock:
            gathering = self._gathering(found, documents.get(evidence_name(rollout)))
            evidence = gathering.gather(found, workers, now)
            looked = machine.advance(found, evidence, now)
            shown = evidence_view(found, evidence, looked.reasons)
        view = RolloutView.of(found, version, shown)
        waits = list(view.waits_for)
        barrier = barrier_of(found, log, workers)
        if barrier is not None and barrier.waiting:
            waits.append(f"barrier: {barrier}")
        elif barrier is not None and not barrier.workers:
            waits.append(f"barrier: no worker of pool {found.before.pool} has reported lately")
        lost = ahead(log.head, workers)
        if lost and not found.ended:
            waits.append(f"log: worker {lost[0].worker} {lost[0].text}: the store has lost revisions")
        off = clock_fault(now, workers)
        if off is not None and not found.ended:
            waits.append(f"clock: the clock of who answers this is {off}")
        if found.phase == "gate":
            waits.append(_gate(found))
        if evidence.unheard and not any(each.kind == "labels" for each in found.holds):
            waits.append(f"labels: {evidence.unheard}")
        return replace(view, waits_for=waits)

    def _gathering(self, rollout: Rollout, kept: Stored | None) -> Gathering:
        """Return what is known of the evidence here; the leader's own sums are where it starts from."""
        found = self._gathered.get(rollout.id)
        if found is None or rollout.ended or rollout.policy.feedback_topic:
            while len(self._gathered) >= 64:
                del self._gathered[next(iter(self._gathered))]
            found = Gathering(rollout, self._store, None if kept is None else kept.body)
            self._gathered[rollout.id] = found
        return found

    # Starting

    def start(self, request: RolloutRequest, *, author: str) -> RolloutView:
        """Begin a rollout; its first route is announced with it, and the leader goes on.

        Raises ConfigError or RefusedError in one line where it cannot be, ModelRepositoryError for a version
        that does not exist.
        """
        policy = policy_from(request)
        log = self._read()
        route = log.table().named(request.route)
        digest = self._checked(log, route, request.version, policy)
        asked = Start(self._fresh_id(request.route, log), request.version, digest, author, request.reason)
        step = machine.begin(asked, route, policy, self._clock.utc_ms())
        step = step._replace(rollout=replace(step.rollout, base=log.latest(route.name)))
        change = stepping.change_of(step, None, log, Author(author, request.reason))
        # Of two who start on one route at a time, one is refused: the route's number is checked by both.
        self._store.commit(replace(change, expected={route.name: log.latest(route.name)}))
        return self.get(step.rollout.id)

    def _read(self) -> RouteLog:
        workers = self._store.workers()
        log = self._store.load()
        lost = ahead(log.head, workers)
        if lost:
            raise LogLostError(
                f"worker {lost[0].worker} {lost[0].text}, which the store does not have: it has lost "
                "revisions; `route apply --reset FILE` starts a new log"
            )
        return log

    def _checked(self, log: RouteLog, route: Route, version: str, policy: Policy) -> str:
        """Return the digest of the new version after looking at everything that can be known beforehand."""
        running = [
            each.rollout
            for each in self.standing().values()
            if each.rollout.route == route.name and not each.rollout.ended
        ]
        if running:
            said = f"rollout {running[0].id} of version {running[0].to_version} goes on"
            raise RefusedError(f"route {route.name}: {said}; abort it, or wait for its end")
        if log.announced(route.name) is not None:
            raise RefusedError(f"route {route.name}: a change of it waits for its workers; try again then")
        if route.shadow_of is not None:
            raise RefusedError(f"route {route.name} is a shadow of {route.shadow_of} and answers nobody")
        if policy.feedback_topic:
            feedback_source(policy.feedback_topic)
            answers_of(route)
        both = replace(route, warm=(*route.warm, version))
        return check_served(both, self._catalogue)[version_name(route.model, version)]

    def _fresh_id(self, route: str, log: RouteLog) -> str:
        """Return an id that no rollout has; two who start on the same revision of a route get the same."""
        taken = self._store.documents()
        number = log.latest(route) + 1
        while f"{route}-{number}" in taken:
            number += 1
        return f"{route}-{number}"

    # Steering

    def act(
        self, rollout: str, verb: str, *, author: str, reason: str, seen: Seen | None = None
    ) -> RolloutView:
        """``pause``, ``resume``, ``promote``, ``abort`` or ``approve`` it; return it as it is then.

        Where somebody else changed it meanwhile it is decided anew on what stands, unless that would be
        another decision: then ConflictError is raised.
        """
        if verb not in VERBS:
            raise ConfigError(f'a rollout cannot be asked to "{verb}"; there are: {", ".join(VERBS)}')
        first: Rollout | None = None
        for left in reversed(range(TRIES)):
            log, documents = self._store.load(), self._store.documents()
            if rollout not in documents or is_evidence(rollout):
                raise LookupError(f'there is no rollout "{rollout}"')
            now = self._clock.utc_ms()
            before = stepping.read(documents[rollout], log, now)
            if first is not None and not _alike(verb, first, before.rollout):
                raise ConflictError(f"rollout {rollout} went on meanwhile; look at it again")
            first = before.rollout
            foreign = stepping.displaced(before.rollout, log)
            if foreign and verb != "abort":
                raise ConflictError(f"rollout {rollout} gives way: {foreign}")
            if foreign:
                step = stepping.give_way(before.rollout, foreign, now)
            else:
                step = _decided(before.rollout, verb, author, reason, now, seen or Seen())
            kept = documents.get(evidence_name(rollout))
            sums = {evidence_name(rollout): (kept.version, None)} if kept and step.rollout.ended else {}
            change = stepping.change_of(step, before, log, Author(author, reason), beside=sums)
            try:
                self._store.commit(change)
            except ConflictError:
                if not left:
                    raise
            else:
                break
        return self.get(rollout)


def policy_from(request: RolloutRequest) -> Policy:
    """Return the policy that a request names; raises ConfigError for what it cannot say."""
    tree: dict[str, Any] = dict(request.policy)
    kind = tree.setdefault("kind", request.kind)
    if request.kind not in ("canary", kind):
        raise ConfigError(f'the policy is of kind "{kind}", and kind "{request.kind}" is asked for')
    return policy_of(tree, "policy")


def _alike(verb: str, first: Rollout, now: Rollout) -> bool:
    """Say whether what a person decided on still stands: only a promotion or approval is of one state."""
    if verb in ("abort", "pause", "resume"):
        return True
    return (first.phase, first.step, first.next_percent) == (now.phase, now.step, now.next_percent)


def _decided(rollout: Rollout, verb: str, author: str, reason: str, now_ms: int, seen: Seen) -> Step:
    if verb == "approve":
        if rollout.policy.approvals > 1 and author == rollout.actor:
            raise RefusedError(
                f"{author} started rollout {rollout.id}; where two have to approve, two others do"
            )
        return verbs.approve(rollout, author, now_ms, digest=seen.digest, policy=seen.policy, reason=reason)
    decide: Mapping[str, Callable[[Rollout, str, str, int], Step]] = {
        "pause": verbs.pause,
        "resume": verbs.resume,
        "promote": verbs.promote,
        "abort": verbs.abort,
    }
    return decide[verb](rollout, author, reason, now_ms)


def _gate(rollout: Rollout) -> str:
    people = approvers(rollout, rollout.next_percent)
    wanted = rollout.policy.approvals
    by = f" (by {', '.join(people)})" if people else ""
    return f"gate: {len(people)} of {wanted} approvals of {rollout.next_percent:g} %{by}"
