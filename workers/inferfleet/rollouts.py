"""The state of a rollout as it is stored: enough that any coordinator goes on from it alone.

Times are epoch milliseconds of coordinators' clocks, spans are seconds. What the machine of
:mod:`inferfleet.core.rollout` needs stands here; what was measured stands in its evidence.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace as replace

from inferfleet.errors import ConfigError, InferfleetError
from inferfleet.policies import Kind, Policy
from inferfleet.routes import Route

FORMAT = 1
KEPT_DECISIONS = 200

Phase: TypeAlias = Literal["shadow", "step", "gate", "test", "bake", "done", "aborted", "inconclusive"]
"""Where a rollout stands. ``test`` is an A/B test's; ``gate`` waits for approvals before ``next_percent``;
``bake`` is after promotion, with the old version warm. The last three never change any more."""

Effect: TypeAlias = Literal["none", "barrier", "retroactive"]
"""How a route takes effect: through an announcement and the ready barrier, or at once, at a time that may be
past. What is gone back to is warm everywhere, so that it needs no barrier."""

ENDED: frozenset[str] = frozenset({"done", "aborted", "inconclusive"})


class RefusedError(InferfleetError):
    """What a person asked of a rollout cannot be done as it stands; says why and what can."""


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """A person's word that the rollout may pass a gate; it holds for these bytes and this policy alone."""

    actor: str
    at_ms: int
    percent: float
    digest: str
    policy: str


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """A reason for which the rollout stays where it is; ``kind`` is one word, ``reason`` is for people."""

    kind: str
    reason: str
    since_ms: int


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A halt that only a person ends. ``actor`` asked for it; empty: the machine, after too many holds."""

    actor: str
    reason: str
    at_ms: int


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One planned look of an A/B test: the bound, and each metric's z and difference at that moment."""

    number: int
    at_ms: int
    bound: float
    z: dict[str, float]
    difference: dict[str, float]
    verdict: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided when, by whom (empty: the machine), and why."""

    at_ms: int
    action: str
    phase: Phase
    percent: float
    reason: str
    actor: str = ""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout of ``to_version`` on a route, in one value.

    ``before`` is the route as it stood, and what an abort goes back to; ``current`` the one decided on last.
    ``step`` counts the policy's steps
    from 0, -1 before the first. ``effect`` says that a route was decided on and is not in force yet;
    ``base`` is the route's last revision before the rollout, 0 where nobody has said;
    ``revision`` is the last one that is in force, ``first_revision`` and ``first_ms`` the first and its time,
    ``promoted_revision`` the one from which the new version answers alone. ``watched_s`` is how long the
    current phase was in force and seen without a hold, ``age_s`` how long it has lasted in all; both grow by
    observation only, so that neither a jump of the clock nor a coordinator's absence makes time pass.
    ``canary_from`` and ``control_from`` are the messages that the arms had answered when the step began.
    ``holds`` are those that stand, ``hold_count`` those that began in this phase.
    """

    format: int = FORMAT
    id: str
    route: str
    kind: Kind
    policy: Policy
    policy_hash: str
    model: str
    from_version: str
    to_version: str
    digest: str
    before: Route
    current: Route
    actor: str
    begun_ms: int
    reason: str = ""
    phase: Phase
    step: int = -1
    next_percent: float = 0.0
    percent: float = 0.0
    effect: Effect = "none"
    base: int = 0
    first_revision: int = 0
    first_ms: int | None = None
    revision: int = 0
    promoted_revision: int = 0
    since_ms: int = 0
    last_ms: int = 0
    watched_s: float = 0.0
    age_s: float = 0.0
    canary_from: float = 0.0
    control_from: float = 0.0
    holds: tuple[Hold, ...] = ()
    hold_count: int = 0
    paused: Pause | None = None
    approvals: tuple[Approval, ...] = ()
    looks: tuple[Look, ...] = ()
    outcome: str = ""
    history: tuple[Decision, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing can change any more."""
        return self.phase in ENDED


def encode_rollout(rollout: Rollout) -> bytes:
    """Return a rollout as it is stored."""
    return msgspec.json.encode(rollout)


def decode_rollout(body: bytes) -> Rollout:
    """Return a stored rollout; raises ConfigError where it cannot be understood or is of a newer format."""
    try:
        rollout = msgspec.json.decode(body, type=Rollout)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"a stored rollout cannot be read: {error}") from None
    if rollout.format > FORMAT:
        said = f"rollout {rollout.id} has format {rollout.format}, this release knows {FORMAT}"
        raise ConfigError(f"{said}: a newer release wrote it")
    return rollout
