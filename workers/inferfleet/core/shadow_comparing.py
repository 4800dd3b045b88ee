"""How answers of two versions to the same requests compare, by what kind of answer they are.

Tiers come before any difference counts: identical, close (within the rounding of the number format), and
different. Only different pairs can change a label or become an example; distances are taken as they are. A
value that is finite from one version and not from the other is different, whatever else it is.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from inferfleet.datatypes import bf16_to_fp32
from inferfleet.records import Array, Tensors, TensorSpec
from inferfleet.summaries import Comparison, Example

Kind = Literal["labels", "probabilities", "embeddings", "regression", "text"]

MAX_EXAMPLES = 8
MAX_LABELS = 256
EXAMPLE_TEXT = 100
LABEL_TEXT = 40
OTHERS = "*"
HARD_MARGIN = 0.1
NOT_FINITE = 1e9
"""The distance of an example in which just one answer is finite."""

_RTOL = {"FP16": 1e-2, "BF16": 1e-2}
_RTOL_USUAL = 1e-3
_ATOL_SHARE = 1e-2
"""Absolute tolerance for each of relative tolerance: 1e-5 beside 1e-3."""
_LEADING: tuple[Kind, ...] = ("probabilities", "labels", "text", "embeddings", "regression")
_NAMES: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"prob|softmax|logit"), "probabilities"),
    (re.compile(r"embed|vector|hidden"), "embeddings"),
)
_LABEL_NAMES = re.compile(r"label|class|categor|intent|sentiment|language|type")
_SPACES = re.compile(r"\s+")
_TOKENS = re.compile(r"\w+|[^\w\s]")


def kind_of(spec: TensorSpec, values: Array) -> Kind:
    """Return what kind of answer an output is, by its datatype, its name, and some of its values."""
    name = spec.name.lower()
    if spec.datatype == "BYTES":
        return "labels" if _LABEL_NAMES.search(name) else "text"
    if not _is_float(spec):
        return "labels"
    rows = _floats(spec, values)
    if rows.shape[1] <= 1:
        return "regression"
    for pattern, kind in _NAMES:
        if pattern.search(name):
            return kind
    finite = rows[np.isfinite(rows).all(axis=1)]
    sums_to_1 = len(finite) and bool(
        (finite >= -1e-3).all() and (np.abs(finite.sum(axis=1) - 1.0) < 1e-2).all()
    )
    return "probabilities" if sums_to_1 else "embeddings"


class Comparer:
    """Compares the answers of two versions of one model, batch after batch.

    The output that says most is compared by its kind; tiers look at every output. ``declared`` says kinds by
    outputs' names where datatype, name and values would mislead; ``rtol`` is the rounding that is forgiven
    (by default 1e-3, for half precision 1e-2; 5e-2 suits int8 builds).
    """

    def __init__(
        self,
        outputs: Sequence[TensorSpec],
        declared: Mapping[str, Kind] | None = None,
        rtol: float | None = None,
    ) -> None:
        self._specs = list(outputs)
        self._declared = declared or {}
        self._rtol = rtol
        self._lead: tuple[TensorSpec, Kind] | None = None

    def compare(
        self,
        into: Comparison,
        ids: Sequence[str],
        primary: Tensors,
        shadow: Tensors,
        truth: Tensors | None = None,
    ) -> None:
        """Add pairs: row ``i`` of each output belongs to request ``ids[i]``.

        ``truth`` are outputs that hold the right labels, or the primary's repetition, for McNemar's counts.
        Outputs that either side lacks are left out; nothing is added where no output is left.
        """
        shared = [spec for spec in self._specs if spec.name in primary and spec.name in shadow]
        if not shared or not ids:
            return
        if self._lead is None or self._lead[0] not in shared:
            self._lead = self._leading(shared, primary)
        spec, kind = self._lead
        into.kind = kind
        same, close, broken = self._tiers(shared, primary, shadow)
        into.pairs += len(ids)
        into.identical += int(same.sum())
        into.close += int((close & ~same).sum())
        into.different += int((~close).sum())
        into.nonfinite += int(broken.sum())
        one, other = primary[spec.name], shadow[spec.name]
        known = None if truth is None else truth.get(spec.name)
        if kind == "text":
            distances = _texts(into, one, other)
        elif kind == "labels":
            distances = _labels(
                into, _named(one), _named(other), close, None if known is None else _named(known)
            )
        else:
            distances = self._numbers(into, spec, kind, one, other, close, known)
        _note_examples(into, spec, kind, ids, one, other, np.where(broken, NOT_FINITE, distances), ~close)

    def _leading(self, shared: Sequence[TensorSpec], primary: Tensors) -> tuple[TensorSpec, Kind]:
        kinds = [self._declared.get(spec.name) or kind_of(spec, primary[spec.name]) for spec in shared]
        first = min(range(len(shared)), key=lambda i: _LEADING.index(kinds[i]))
        return shared[first], kinds[first]

    def _tiers(
        self, shared: Sequence[TensorSpec], primary: Tensors, shadow: Tensors
    ) -> tuple[Array, Array, Array]:
        """Return for each row whether it is identical, close (or identical), and finite on one side only."""
        count = len(primary[shared[0].name])
        same, close = np.ones(count, bool), np.ones(count, bool)
        broken = np.zeros(count, bool)
        for spec in shared:
            one, other = primary[spec.name], shadow[spec.name]
            if one.shape != other.shape:
                same[:] = close[:] = False
            elif not _is_float(spec):
                equal = np.asarray(one == other, bool).reshape(count, -1).all(axis=1)
                same &= equal
                alike = (
                    [_normal(a) == _normal(b) for a, b in _byte_rows(one, other)] if _is_text(spec) else equal
                )
                close &= equal | np.asarray(alike, bool)
            else:
                x, y = _floats(spec, one), _floats(spec, other)
                rtol = self._rtol or _RTOL.get(spec.datatype, _RTOL_USUAL)
                same &= ((x == y) | (np.isnan(x) & np.isnan(y))).all(axis=1)
                close &= np.isclose(y, x, rtol=rtol, atol=rtol * _ATOL_SHARE, equal_nan=True).all(axis=1)
                broken |= (np.isfinite(x) != np.isfinite(y)).any(axis=1)
        return same, close, broken

    def _numbers(
        self,
        into: Comparison,
        spec: TensorSpec,
        kind: Kind,
        primary: Array,
        shadow: Array,
        close: Array,
        truth: Array | None,
    ) -> Array:
        one, other = _floats(spec, primary), _floats(spec, shadow)
        if one.shape != other.shape:
            into.distances.add_same(1.0, len(one))
            return np.ones(len(one))
        if not one.shape[1]:  # both found nothing, say no object in an image
            into.distances.add_same(0.0, len(one))
            return np.zeros(len(one))
        usable = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
        distances = np.zeros(len(one))
        if kind == "probabilities":
            if "logit" in spec.name.lower():
                one, other = _softmax(one), _softmax(other)
            known = None if truth is None or not truth[0].size else _floats(spec, truth)[usable]
            distances[usable] = _probabilities(into, one[usable], other[usable], close[usable], known)
        elif kind == "embeddings":
            distances[usable] = _embeddings(into, one[usable], other[usable])
        else:
            distances[usable] = _regression(into, one[usable], other[usable])
        return distances


def _is_float(spec: TensorSpec) -> bool:
    return spec.datatype in ("FP16", "FP32", "FP64", "BF16")


def _is_text(spec: TensorSpec) -> bool:
    return spec.datatype == "BYTES"


def _floats(spec: TensorSpec, array: Array) -> Array:
    """Return an output as 64-bit floats, one flat row for each row."""
    wide = bf16_to_fp32(array) if spec.datatype == "BF16" else array
    return np.asarray(wide, np.float64).reshape(len(array), -1)


def _softmax(rows: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _probabilities(into: Comparison, one: Array, other: Array, close: Array, truth: Array | None) -> Array:
    distances = 0.5 * np.abs(one - other).sum(axis=1)
    into.distances.add(distances)
    first, second = one.argmax(axis=1), other.argmax(axis=1)
    at = np.arange(len(one))
    # How sure either is of its own choice over the other's: a coin toss that falls otherwise is no flip.
    margin = np.maximum(one[at, first] - one[at, second], other[at, second] - other[at, first])
    into.hard_flips += int(((first != second) & ~close & (margin > HARD_MARGIN)).sum())
    known = None if truth is None else [str(label) for label in truth.argmax(axis=1).tolist()]
    _count_labels(
        into,
        [str(label) for label in first.tolist()],
        [str(label) for label in second.tolist()],
        close,
        known,
    )
    return np.asarray(distances)


def _embeddings(into: Comparison, one: Array, other: Array) -> Array:
    norms, others = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    both = norms * others
    cosine = np.divide((one * other).sum(axis=1), both, out=np.zeros(len(one)), where=both > 0)
    cosine[(norms == 0) & (others == 0)] = 1.0
    distances: Array = np.clip(1.0 - cosine, 0.0, 2.0)
    into.distances.add(distances)
    into.ratios.add(np.divide(others, norms, out=np.zeros(len(one)), where=norms > 0))
    return distances


def _regression(into: Comparison, one: Array, other: Array) -> Array:
    signed = (other - one).mean(axis=1)
    values = one.mean(axis=1)
    into.signed += float(signed.sum())
    into.signed_2 += float((signed * signed).sum())
    into.reference += float(values.sum())
    into.reference_2 += float((values * values).sum())
    into.above.add(values[values >= 0])
    into.below.add(-values[values < 0])
    distances: Array = np.abs(signed)
    into.distances.add(distances)
    return distances


def _labels(
    into: Comparison, one: list[str], other: list[str], close: Array, truth: list[str] | None
) -> Array:
    distances = np.array([a != b for a, b in zip(one, other, strict=True)], np.float64)
    into.distances.add(distances)
    _count_labels(into, one, other, close, truth)
    return distances


def _count_labels(
    into: Comparison, one: list[str], other: list[str], close: Array, truth: list[str] | None
) -> None:
    changed: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    for (a, b, alike), count in Counter(zip(one, other, close.tolist(), strict=True)).items():
        if a == b or alike:
            agreed[a] += count
        else:
            changed[f"{a}>{b}"] += count
    into.label_changes += changed.total()
    _add_bounded(into.flips, changed, f"{OTHERS}>{OTHERS}")
    _add_bounded(into.agreed, agreed, OTHERS)
    if truth is not None:
        for a, b, right in zip(one, other, truth, strict=True):
            into.right_wrong += a == right != b
            into.wrong_right += b == right != a


def _add_bounded(counts: dict[str, int], more: Mapping[str, int], others: str) -> None:
    for name, count in more.items():
        key = name if name in counts or len(counts) < MAX_LABELS else others
        counts[key] = counts.get(key, 0) + count


def _named(array: Array) -> list[str]:
    """Return each row as one label, in short."""
    rows = array.reshape(len(array), -1).tolist()
    return [",".join([_plain(value) for value in row])[:LABEL_TEXT].replace(">", "»") for row in rows]


def _plain(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# Texts


def _byte_rows(one: Array, other: Array) -> Iterable[tuple[bytes, bytes]]:
    return zip(_joined(one), _joined(other), strict=True)


def _joined(array: Array) -> list[bytes]:
    return [b"\n".join(row) for row in array.reshape(len(array), -1).tolist()]


def _normal(text: bytes) -> str:
    return _SPACES.sub(" ", text.decode("utf-8", "replace")).strip().casefold()


def token_f1(one: str, other: str) -> float:
    """Return the harmonic mean of precision and recall over the tokens of two texts, as bags; 0 to 1.

    The measure of SQuAD (Rajpurkar et al. 2016), here over words and single marks.
    """
    left, right = Counter(_TOKENS.findall(one)), Counter(_TOKENS.findall(other))
    if not left or not right:
        return float(left == right)
    common = (left & right).total()
    return 2 * common / (left.total() + right.total())


def _texts(into: Comparison, one: Array, other: Array) -> Array:
    distances, ratios = [], []
    for a, b in _byte_rows(one, other):
        distances.append(0.0 if a == b else 1.0 - token_f1(_normal(a), _normal(b)))
        if a:
            ratios.append(len(b) / len(a))
        if a != b:
            was, is_now = _sound(a, b)
            into.spoiled += was and not is_now
            into.mended += is_now and not was
    found = np.array(distances)
    into.distances.add(found)
    into.ratios.add(np.array(ratios))
    return found


def _sound(one: bytes, other: bytes) -> tuple[bool, bool]:
    """Return of both texts whether they are JSON, where either is, else whether they say anything."""
    first, second = _is_json(one), _is_json(other)
    return (first, second) if first or second else (bool(one.strip()), bool(other.strip()))


def _is_json(text: bytes) -> bool:
    if text.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# Examples


def _note_examples(
    into: Comparison,
    spec: TensorSpec,
    kind: Kind,
    ids: Sequence[str],
    one: Array,
    other: Array,
    distances: Array,
    different: Array,
) -> None:
    found = np.flatnonzero(different)
    if len(into.examples) == MAX_EXAMPLES:
        found = found[distances[found] >= into.examples[-1].distance]
    if len(found) > MAX_EXAMPLES:
        found = found[np.argsort(-distances[found], kind="stable")[:MAX_EXAMPLES]]
    for index in found.tolist():
        shown = (_short(spec, kind, one[index]), _short(spec, kind, other[index]))
        into.examples.append(Example(ids[index], float(distances[index]), *shown))
    into.examples = _furthest(into.examples)


def _short(spec: TensorSpec, kind: Kind, row: Array) -> str:
    row = np.asarray(row)
    if not _is_float(spec):
        return ",".join([_plain(value) for value in row.reshape(-1).tolist()])[:EXAMPLE_TEXT]
    values = _floats(spec, row.reshape(1, -1))[0]
    if kind == "probabilities" and len(values) and np.isfinite(values).all():
        top = int(values.argmax())
        return f"{top} ({values[top]:.3g})"
    shown = ", ".join([f"{value:.4g}" for value in values[:6].tolist()])
    return (shown + (", …" if len(values) > 6 else ""))[:EXAMPLE_TEXT]


def _furthest(examples: Iterable[Example]) -> list[Example]:
    return heapq.nsmallest(
        MAX_EXAMPLES, examples, key=lambda each: (-each.distance, each.id, each.primary, each.shadow)
    )


# Adding up


def merge(one: Comparison, other: Comparison) -> Comparison:
    """Return the sum of two comparisons; in any order and grouping the same, but for rounding."""
    total = Comparison(kind=max(one.kind, other.kind))
    for name in _SUMS:
        setattr(total, name, getattr(one, name) + getattr(other, name))
    for name in _COUNTS:
        setattr(total, name, dict(Counter(getattr(one, name)) + Counter(getattr(other, name))))
    for name in _SKETCHES:
        for each in (one, other):
            getattr(total, name).merge(getattr(each, name))
    total.examples = _furthest([*one.examples, *other.examples])
    return total


_COUNTS = ("flips", "agreed")
_SKETCHES = ("distances", "ratios", "above", "below")
_SUMS = tuple(
    name for name in Comparison.__struct_fields__ if name not in ("kind", "examples", *_COUNTS, *_SKETCHES)
)
