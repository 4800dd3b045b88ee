"""What a comparison says of a shadow: figures by kind, minus the primary's own noise, against limits.

The noise is the answering version against its own repetition (``secondary``): what it does not repeat itself
cannot be asked of another version. A value that is finite from one side only always blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal, NamedTuple

from inferfleet.summaries import Comparison

Level = Literal["ok", "warn", "block"]

Z = 1.96
NORMAL_IQR = 1.349
"""A normal distribution's distance between its quartiles, in standard deviations."""


class Limit(NamedTuple):
    """From where on a figure warns, and from where on it blocks; what it is called to people."""

    warn: float
    block: float
    said: str


LIMITS: dict[str, Limit] = {
    "disagreement": Limit(0.01, 0.03, "share of changed labels"),
    "mean_variation": Limit(0.02, 0.05, "mean total variation"),
    "hard_flips": Limit(0.005, 0.01, "share of top-1 changes with a margin"),
    "cosine_loss_p99": Limit(0.02, 0.05, "1 - cosine at the worst percent"),
    "bias": Limit(0.05, 0.1, "bias in quartile distances"),
    "p95_difference": Limit(0.25, 0.5, "p95 difference in quartile distances"),
    "f1_loss": Limit(0.1, 0.3, "1 - token F1"),
    "spoiled": Limit(0.005, 0.01, "share of texts that became empty or no JSON"),
}
WORST_CLASS = 0.05
"""How many points more of one class may change; it blocks where that is beyond chance."""


class ShadowVerdict(NamedTuple):
    """``ok``, ``warn`` or ``block``, and why, one line for each figure that is over a limit."""

    level: Level
    reasons: tuple[str, ...] = ()


def figures(found: Comparison) -> dict[str, float]:
    """Return a comparison's figures; those of :data:`LIMITS` are worse the higher they are.

    Others are for people: ``top1_changes``, ``variation_p99``, ``kappa``, ``cosine_median``, ``cosine_p1``,
    ``ratio_median`` (norm or length), ``bias_low`` and ``bias_high`` (95 %), ``exact`` and ``mcnemar_p``.
    """
    if not found.pairs:
        return {}
    finite = max(1, len(found.distances))
    shown = {"exact": (found.identical + found.close) / found.pairs}
    if found.kind == "labels":
        shown |= {"disagreement": found.label_changes / found.pairs, "kappa": kappa(found)}
    elif found.kind == "probabilities":
        shown |= {
            "mean_variation": found.distances.total / finite,
            "variation_p99": found.distances.quantile(0.99),
            "top1_changes": found.label_changes / found.pairs,
            "hard_flips": found.hard_flips / found.pairs,
            "kappa": kappa(found),
        }
    elif found.kind == "embeddings":
        shown |= {
            "cosine_median": 1 - found.distances.quantile(0.5),
            "cosine_p1": 1 - found.distances.quantile(0.99),
            "cosine_loss_p99": found.distances.quantile(0.99),
            "ratio_median": found.ratios.quantile(0.5),
        }
    elif found.kind == "regression":
        shown |= _regression(found, finite)
    elif found.kind == "text":
        shown |= {
            "f1_loss": found.distances.total / finite,
            "spoiled": (found.spoiled - found.mended) / found.pairs,
            "ratio_median": found.ratios.quantile(0.5),
        }
    if found.right_wrong + found.wrong_right:
        shown["mcnemar_p"] = mcnemar(found.right_wrong, found.wrong_right)
    return shown


def verdict(found: Comparison, secondary: Comparison | None = None) -> ShadowVerdict:
    """Say whether a shadow's answers are as good as the primary's; without pairs there is nothing against it.

    How many pairs are enough is the policy's to say.
    """
    if not found.pairs:
        return ShadowVerdict("ok")
    said: list[tuple[Level, str]] = []
    if found.nonfinite:
        said.append(("block", f"{found.nonfinite} pairs in which just one answer is finite"))
    noise = {} if secondary is None else figures(secondary)
    for name, value in figures(found).items():
        limit = LIMITS.get(name)
        if limit is None:
            continue
        extra = value - max(0.0, noise.get(name, 0.0))
        if extra >= limit.warn:
            level: Level = "block" if extra >= limit.block else "warn"
            bound = limit.block if level == "block" else limit.warn
            said.append((level, f"{limit.said}: {extra:.4g} beyond its noise (limit {bound:g})"))
    if found.kind == "labels":
        said += _worst_classes(found, secondary)
    if found.kind == "text" and (secondary is None or not secondary.pairs):
        said.append(("warn", "the primary's own noise is not known: no text was answered by it twice"))
    level = "block" if any(each == "block" for each, _ in said) else "warn" if said else "ok"
    return ShadowVerdict(level, tuple(text for _, text in said))


def _worst_classes(found: Comparison, secondary: Comparison | None) -> list[tuple[Level, str]]:
    changed, noisy = _leaving(found), {} if secondary is None else _leaving(secondary)
    said: list[tuple[Level, str]] = []
    for name, left in sorted(changed.items()):
        total = left + found.agreed.get(name, 0)
        before = noisy.get(name, 0)
        noise = 0.0
        if secondary is not None and before:
            noise = before / (before + secondary.agreed.get(name, 0))
        if left / total - noise < WORST_CLASS:
            continue
        level: Level = "block" if wilson_low(left, total) - noise >= WORST_CLASS else "warn"
        said.append((level, f"class {name}: {left} of {total} changed"))
    return said


def _leaving(found: Comparison) -> dict[str, int]:
    left: Counter[str] = Counter()
    for name, count in found.flips.items():
        left[name.split(">", 1)[0]] += count
    return dict(left)


def _regression(found: Comparison, count: int) -> dict[str, float]:
    spread = reference_spread(found)
    mean = found.signed / count
    deviation = math.sqrt(max(0.0, found.signed_2 / count - mean * mean))
    half = Z * deviation / math.sqrt(count)
    return {
        "bias": abs(mean) / spread,
        "bias_low": (mean - half) / spread,
        "bias_high": (mean + half) / spread,
        "median_difference": found.distances.quantile(0.5) / spread,
        "p95_difference": found.distances.quantile(0.95) / spread,
    }


def reference_spread(found: Comparison) -> float:
    """Return the distance between the quartiles of the primary's values; positive.

    From the sketch, or where that is too coarse (values far from 0 that lie close together), from the
    standard deviation. Where all values are one, a thousandth of it.
    """
    count = len(found.above) + len(found.below)
    if not count:
        return 1.0
    mean = found.reference / count
    low, high = _signed_quantile(found, 0.25), _signed_quantile(found, 0.75)
    coarse = 0.18 * max(abs(low), abs(high))  # four of the sketch's steps
    spread = high - low
    if spread <= coarse:
        spread = NORMAL_IQR * math.sqrt(max(0.0, found.reference_2 / count - mean * mean))
    # A constant has no spread but what rounding of its squares leaves.
    return spread if spread > 1e-6 * abs(mean) and spread > 0 else max(abs(mean) * 1e-3, 1e-12)


def _signed_quantile(found: Comparison, share: float) -> float:
    below, above = len(found.below), len(found.above)
    wanted = share * (below + above)
    if wanted <= below and below:
        return -found.below.quantile(1 - wanted / below)
    return found.above.quantile((wanted - below) / above) if above else 0.0


def kappa(found: Comparison) -> float:
    """Return Cohen's kappa between the versions' labels: agreement beyond chance; 1 where it is whole."""
    total = sum(found.agreed.values()) + sum(found.flips.values())
    if not total:
        return 1.0
    firsts, seconds = Counter(found.agreed), Counter(found.agreed)
    for name, count in found.flips.items():
        first, _, second = name.partition(">")
        firsts[first] += count
        seconds[second] += count
    by_chance = sum(count * seconds[name] for name, count in firsts.items()) / total**2
    agreement = sum(found.agreed.values()) / total
    return 1.0 if by_chance >= 1 else (agreement - by_chance) / (1 - by_chance)


def mcnemar(right_wrong: int, wrong_right: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: are the discordant pairs a fair coin's?

    Above 1,000 pairs by the chi-square with continuity correction (McNemar 1947; Edwards 1948).
    """
    total = right_wrong + wrong_right
    if not total:
        return 1.0
    if total > 1_000:
        statistic = max(0.0, abs(right_wrong - wrong_right) - 1) ** 2 / total
        return math.erfc(math.sqrt(statistic / 2))
    smaller = min(right_wrong, wrong_right)
    tail = float(sum(math.comb(total, k) for k in range(smaller + 1)) / 2**total)
    return min(1.0, 2 * tail)


def wilson_low(events: int, trials: int) -> float:
    """Return the lower end of Wilson's 95 % interval of a share (Wilson 1927)."""
    if not trials:
        return 0.0
    share = events / trials
    centre = share + Z * Z / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    return max(0.0, (centre - half) / (1 + Z * Z / trials))
