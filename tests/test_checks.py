"""Numbers at the door: every type that holds one, and what is none."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvzip import checks

KINDS = {
    "float": float,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "array": np.array,
    "tensor": lambda x: torch.tensor(x, dtype=torch.float64),
}


@given(ratio=st.floats(1e-300, 1.0), total=st.integers(0, 2**52), kind=st.sampled_from([*KINDS]))
def test_a_ratio_of_any_type_counts_as_its_float64(ratio, total, kind):
    found = checks.kept_ratio(KINDS[kind](ratio))
    assert type(found) is float and found == ratio and int(found * total) == int(ratio * total)


@pytest.mark.parametrize(
    "value",
    [np.float32(0.3), np.float16(0.3), torch.tensor(0.3), torch.tensor(0.3, dtype=torch.bfloat16)],
    ids=repr,
)
def test_a_narrow_ratio_is_widened_before_it_is_multiplied(value):
    total = 1_000_000_007
    found, wide = checks.kept_ratio(value), torch.tensor(float(value), dtype=torch.float64).item()
    assert type(found) is float and int(found * total) == int(wide * total) != int(0.3 * total)


@given(number=st.integers(0, 2**62), kind=st.sampled_from([int, np.int64, np.array, torch.tensor]))
def test_whole_numbers_of_any_type_are_ints(number, kind):
    found = checks.whole(kind(number), "chunk", least=0)
    assert type(found) is int and found == number


NONE = {
    "str": "1",
    "bool": True,
    "numpy bool": np.True_,
    "tensor of a bool": torch.tensor(True),
    "complex": 1j,
    "numpy complex": np.complex64(1),
    "complex tensor": torch.tensor(1j),
    "list": [1],
    "array": np.array([1]),
    "tensor": torch.tensor([1]),
    "True in a tensor": torch.tensor([True]),
    "nowhere": torch.tensor(1, device="meta"),
    "text in an array": np.array("1"),
    "object": object(),
    "None": None,
}


@pytest.mark.parametrize("value", NONE.values(), ids=NONE)
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"expected ratio to be a number, got .+: pass a float"):
        checks.kept_ratio(value)
    with pytest.raises(TypeError, match=r"expected chunk to be a whole number, got .+: pass an int of 1 or more"):
        checks.whole(value, "chunk", least=1)


@pytest.mark.parametrize("value", [3.0, np.float32(3), Fraction(3), Decimal(3), torch.tensor(3.0)], ids=repr)
def test_whole_numbers_are_not_guessed_from_others(value):
    with pytest.raises(TypeError, match="expected chunk to be a whole number, got"):
        checks.whole(value, "chunk")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "NaN"),
        (Decimal("NaN"), "NaN"),
        (Decimal("sNaN"), "NaN"),
        (torch.tensor(torch.nan), "NaN"),
        (np.float32("inf"), "inf"),
        (-np.inf, "-inf"),
        (10**400, "inf"),
        (-(10**400), "-inf"),
        (Fraction(10**400), "inf"),
    ],
)
def test_what_is_not_finite_is_named(value, shown):
    with pytest.raises(ValueError, match=f"expected a threshold that is a number, got {shown}: pass a finite one"):
        checks.number(value, "threshold")
    with pytest.raises(ValueError, match="expected 0 < ratio <= 1, the fraction of pairs that is KEPT, got"):
        checks.kept_ratio(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (30, "got 30: 0.3 keeps 30%"),
        (np.float32(12.5), "got 12.5: 0.125 keeps 12.5%"),
        (1.5, "got 1.5: 0.015 keeps 1.5%"),
        (100, "got 100: 1 keeps 100%"),
        (101, "got 101: 0.3 keeps 30%"),
        (0, "got 0: 0.3 keeps 30%"),
        (-30, "got -30: 0.3 keeps 30%"),
        (1.0000001, "got 1.0000001: 0.01 keeps 1.0000001%"),
    ],
)
def test_a_ratio_in_percent_is_asked_about(value, said):
    with pytest.raises(ValueError, match=said):
        checks.kept_ratio(value)


def test_numbers_below_the_least_are_named():
    with pytest.raises(ValueError, match=r"expected hint to be at least 0, got -1: pass an int of 0 or more"):
        checks.whole(np.int8(-1), "hint", least=0)
