"""Answers of two versions compared by what they are, and sums of comparisons that do not care for order."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from inferfleet.core.shadow_comparing import MAX_EXAMPLES, MAX_LABELS, Comparer, kind_of, merge, token_f1
from inferfleet.core.shadow_verdict import figures, kappa, mcnemar, reference_spread, verdict
from inferfleet.records import Array, TensorSpec
from inferfleet.summaries import Comparison

PROBABILITIES = TensorSpec("p", "FP32", (3,))
LABEL = TensorSpec("digit", "INT64", ())
TEXT = TensorSpec("answer", "BYTES", ())
VECTOR = TensorSpec("v", "FP32", (4,))
SCORE = TensorSpec("score", "FP32", ())


def texts(*values: str) -> Array:
    found = np.empty(len(values), object)
    found[:] = [value.encode() for value in values]
    return found


def compared(spec: TensorSpec, one: Any, other: Any, truth: Any = None, **options: Any) -> Comparison:
    into = Comparison()
    kind = None if spec.datatype == "BYTES" else np.float32 if spec.datatype == "FP32" else np.int64
    first, second = (each if kind is None else np.asarray(each, kind) for each in (one, other))
    known = None if truth is None else {spec.name: np.asarray(truth, kind)}
    ids = [f"r{i}" for i in range(len(first))]
    Comparer([spec], **options).compare(into, ids, {spec.name: first}, {spec.name: second}, known)
    return into


@pytest.mark.parametrize(
    ("spec", "values", "kind"),
    [
        (PROBABILITIES, [[0.2, 0.3, 0.5]], "probabilities"),
        (PROBABILITIES, [[0.2, 0.3, 2.5]], "embeddings"),
        (TensorSpec("logits", "FP32", (3,)), [[4, -3, 2.5]], "probabilities"),
        (TensorSpec("embedding", "FP32", (2,)), [[0.5, 0.5]], "embeddings"),
        (SCORE, [1.0], "regression"),
        (LABEL, [3], "labels"),
        (TensorSpec("yes", "BOOL", ()), [True], "labels"),
        (TEXT, [b"word"], "text"),
        (TensorSpec("label", "BYTES", ()), [b"cat"], "labels"),
    ],
)
def test_what_an_answer_is_shows_in_its_datatype_name_and_values(
    spec: TensorSpec, values: list[Any], kind: str
) -> None:
    dtype = object if spec.datatype == "BYTES" else np.float32 if spec.datatype == "FP32" else np.int64

    assert kind_of(spec, np.array(values, dtype)) == kind


def test_a_declared_kind_goes_before_what_it_looks_like() -> None:
    assert compared(SCORE, [1.0], [1.0], declared={"score": "labels"}).kind == "labels"


def test_tiers_come_before_differences() -> None:
    """Rounding is close, and a label that changes by rounding alone is no flip."""
    one = [[0.4, 0.4000001, 0.2], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0]]
    other = [[0.4000001, 0.4, 0.2], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]

    found = compared(PROBABILITIES, one, other)

    assert (found.identical, found.close, found.different) == (1, 1, 1)
    assert (found.label_changes, found.hard_flips, found.flips) == (1, 1, {"0>1": 1})
    assert [(each.id, each.primary, each.shadow) for each in found.examples] == [("r2", "0 (0.9)", "1 (0.9)")]


def test_a_coin_toss_that_falls_otherwise_is_no_hard_flip() -> None:
    found = compared(PROBABILITIES, [[0.45, 0.42, 0.13]], [[0.42, 0.45, 0.13]])

    assert (found.label_changes, found.hard_flips) == (1, 0)
    assert found.distances.total == pytest.approx(0.03, abs=1e-6)


def test_finite_against_not_finite_always_blocks() -> None:
    """Also where the primary's own repetition is no better."""
    found = compared(SCORE, [1.0, np.nan, 2.0], [np.nan, np.nan, 2.0])

    assert (found.nonfinite, found.different, found.identical) == (1, 1, 2)
    assert verdict(found, found).level == "block"
    assert "just one answer is finite" in verdict(found, found).reasons[0]


def test_labels_count_who_leaves_which_class_and_how_well_they_agree() -> None:
    one = [0] * 50 + [1] * 50
    other = [0] * 50 + [1] * 40 + [0] * 10

    found = compared(LABEL, one, other)

    assert found.flips == {"1>0": 10}
    assert found.agreed == {"0": 50, "1": 40}
    assert kappa(found) == pytest.approx(0.8)
    said = verdict(found)
    assert said.level == "block"
    assert any("class 1: 10 of 50 changed" in reason for reason in said.reasons)


def test_the_primarys_own_noise_is_taken_off() -> None:
    one = [0] * 1000
    shadow = compared(LABEL, one, [1] * 40 + [0] * 960)
    noise = compared(LABEL, one, [1] * 35 + [0] * 965)

    assert verdict(shadow).level == "block"
    assert verdict(shadow, noise).level == "ok"


def test_a_repetition_stands_for_the_label_where_none_is_known() -> None:
    found = compared(LABEL, [1, 1, 1, 2], [1, 2, 2, 1], truth=[1, 1, 2, 3])

    assert (found.right_wrong, found.wrong_right) == (1, 1)


def test_embeddings_are_compared_by_angle_and_length() -> None:
    found = compared(VECTOR, [[3, 0, 0, 0]] * 100, [[6, 0, 0, 0]] * 98 + [[0, 1, 0, 0]] * 2)

    shown = figures(found)
    assert found.kind == "embeddings"
    assert shown["cosine_median"] == 1.0
    assert shown["cosine_p1"] == pytest.approx(0.0, abs=0.05)
    assert shown["ratio_median"] == pytest.approx(2.0, rel=0.05)
    assert verdict(found).level == "block"


def test_a_bias_is_measured_by_the_spread_of_what_it_is_a_bias_of() -> None:
    values = np.random.default_rng(1).normal(0, 1, 4000)

    shifted = figures(compared(SCORE, values, values + 0.2))

    assert shifted["bias"] == pytest.approx(0.2 / 1.349, rel=0.1)
    assert verdict(compared(SCORE, values, values + 0.2)).level == "block"
    assert verdict(compared(SCORE, values, values + 0.001)).level == "ok"


def test_values_far_from_zero_have_the_spread_that_they_have() -> None:
    values = np.random.default_rng(1).normal(1e4, 2, 4000)

    assert reference_spread(compared(SCORE, values, values)) == pytest.approx(1.349 * 2, rel=0.1)


def test_texts_are_compared_by_their_words_and_whether_they_say_anything() -> None:
    one = texts("Hello  World", "a b c d", '{"a": 1}', "word")
    other = texts("hello world", "a b x y", '{"a": ', " ")

    found = compared(TEXT, one, other)

    assert (found.identical, found.close, found.different) == (0, 1, 3)
    assert (found.spoiled, found.mended) == (2, 0)
    assert verdict(found, found).level == "ok"
    assert verdict(found).level == "block"


def test_a_text_needs_to_know_how_much_the_primary_repeats_itself() -> None:
    same = texts("a", "b")

    assert verdict(compared(TEXT, same, same)).level == "warn"
    assert verdict(compared(TEXT, same, same), compared(TEXT, same, same)).level == "ok"


def test_token_f1_is_that_of_bags() -> None:
    assert token_f1("a b b", "b b c") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1.0
    assert token_f1("", "a") == 0.0


def test_the_output_that_says_most_leads_and_every_output_counts_for_the_tier() -> None:
    into = Comparison()
    one = {"p": np.array([[1, 0, 0]], np.float32), "digit": np.array([0])}
    other = {"p": np.array([[1, 0, 0]], np.float32), "digit": np.array([1])}

    Comparer([LABEL, PROBABILITIES]).compare(into, ["a"], one, other)

    assert (into.kind, into.different, into.label_changes) == ("probabilities", 1, 0)


def test_outputs_of_another_shape_differ_in_every_row() -> None:
    into = Comparison()
    one, other = {"v": np.ones((2, 4), np.float32)}, {"v": np.ones((2, 5), np.float32)}

    Comparer([VECTOR]).compare(into, ["a", "b"], one, other)

    assert into.different == into.pairs == 2
    assert verdict(into).level == "block"


def test_what_is_kept_is_bounded() -> None:
    count = MAX_LABELS * 3
    found = compared(LABEL, list(range(count)), list(range(1, count + 1)))

    assert len(found.flips) == MAX_LABELS + 1
    assert sum(found.flips.values()) == found.label_changes == count
    assert len(found.examples) == MAX_EXAMPLES


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(600, 500) == pytest.approx(math.erfc(math.sqrt(99**2 / 1100 / 2)))


ROWS = arrays.arrays(np.float32, (6, 3), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, math.nan]))
SPECS = st.sampled_from([PROBABILITIES, VECTOR._replace(shape=(3,)), LABEL, SCORE, TEXT])


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    """Some comparison of one kind, over six pairs, with values that add without rounding."""
    one, other = draw(ROWS), draw(ROWS)
    kind = draw(st.sampled_from(["probabilities", "regression", "labels"]))
    if kind == "labels":
        clean = [np.nan_to_num(each[:, 0] * 4).astype(np.int64) for each in (one, other)]
        return compared(LABEL, *clean)
    if kind == "regression":
        return compared(SCORE, one[:, 0], other[:, 0])
    return compared(PROBABILITIES, one, other, declared={"p": "probabilities"})


def plain(found: Comparison) -> Any:
    return msgspec.to_builtins(found)


@settings(max_examples=60, deadline=None)
@given(comparisons(), comparisons(), comparisons())
def test_sums_do_not_care_for_order_or_grouping(a: Comparison, b: Comparison, c: Comparison) -> None:
    left, right = merge(merge(a, b), c), merge(a, merge(c, b))

    assert plain(left) == plain(right)
    assert plain(merge(a, Comparison())) == plain(a)
    assert left.pairs == left.identical + left.close + left.different == 18


@settings(max_examples=60, deadline=None)
@given(ROWS, ROWS)
def test_a_version_compared_with_itself_is_identical(one: Array, other: Array) -> None:
    found = compared(PROBABILITIES, one, one)
    forth, back = compared(SCORE, one[:, 0], other[:, 0]), compared(SCORE, other[:, 0], one[:, 0])

    assert (found.identical, found.pairs) == (6, 6)
    assert verdict(found).level == "ok"
    assert (forth.nonfinite, forth.identical) == (back.nonfinite, back.identical)


@pytest.mark.parametrize("name", ["probabilities", "embedding", "logits", "found"])
def test_answers_of_no_width_compare_too(name: str) -> None:
    """A model whose outputs grow with what it finds has found nothing: here, there, on both sides."""
    spec = TensorSpec(name, "FP32", (-1,))
    comparer, into = Comparer([spec]), Comparison()
    some, none = np.full((2, 3), 1 / 3, np.float32), np.zeros((2, 0), np.float32)
    for one, other, truth in [(some, some, none), (some, none, some), (none, some, none), (none, none, none)]:
        comparer.compare(into, ["a", "b"], {name: one}, {name: other}, {name: truth})
    assert (into.pairs, into.identical, into.different) == (8, 4, 4)
