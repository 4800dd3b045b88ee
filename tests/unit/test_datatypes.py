"""The datatype table and the crossing between FP32 and BF16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from inferfleet.datatypes import DATATYPES, bf16_to_fp32, fp32_to_bf16


def test_the_table_holds_every_v2_datatype():
    """Thirteen types of the protocol's table, and BF16 from its text."""
    integers = [f"{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)]

    assert ["BOOL", *integers, "FP16", "FP32", "FP64", "BF16", "BYTES"] == list(DATATYPES)


def test_widths_are_those_of_the_wire():
    """An element's width on the wire is its width in numpy; BYTES has none."""
    for datatype in DATATYPES.values():
        if datatype.name == "BYTES":
            assert datatype.width is None
        else:
            assert datatype.width == datatype.numpy.itemsize


def test_integer_bounds_are_exact_python_ints():
    """Bounds decide over JSON numbers, so they may not be rounded through a float."""
    assert DATATYPES["UINT64"].high == 18446744073709551615
    assert DATATYPES["INT64"].low == -9223372036854775808
    assert isinstance(DATATYPES["UINT64"].high, int)


def test_every_bf16_value_survives_the_way_to_fp32_and_back():
    """Widening is exact, so narrowing gives the same bits; NaNs may only become quiet."""
    every = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    wide = bf16_to_fp32(every)
    back = fp32_to_bf16(wide)
    nan = np.isnan(wide)

    np.testing.assert_array_equal(every[~nan], back[~nan])
    assert np.isnan(bf16_to_fp32(back[nan])).all()


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F808000, 0x3F80),  # a tie above an even value goes down
        (0x3F818000, 0x3F82),  # a tie above an odd value goes up
        (0x3F808001, 0x3F81),  # just over the tie goes up
        (0x7F7FFFFF, 0x7F80),  # the largest FP32 is over BF16's largest: infinity
        (0x7F800001, 0x7FC0),  # a NaN whose payload would be cut away stays a NaN
        (0xFFFFFFFF, 0xFFFF),  # a NaN that rounding would wrap stays a NaN
    ],
)
def test_narrowing_rounds_to_nearest_even(bits, expected):
    """Ties go to the even neighbour, overflow to infinity, NaN to NaN."""
    value = np.array([[bits]], np.uint32).view(np.float32)

    assert [[expected]] == fp32_to_bf16(value).tolist()
