"""Columns of labels as class numbers: whatever has finitely many values, by number or by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MAX_CLASSES = 100_000  # a classifier has a row of weights for each number up to the largest

# What class numbers mean: themselves; places in a list of names that all splits share; or places in this split's own.
Naming = Literal["numbers", "listed", "own"]


class Labels(NamedTuple):
    numbers: Tensor  # [N] int64, -1 where there is no label
    names: tuple[str, ...]
    naming: Naming


def check_label_type(kind: Any, where: str, way_round: str) -> None:
    """
    Raises:
        ValueError: an Arrow type that is neither a number, nor a truth value, nor a text, nor a dictionary of these.
    """
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null, is_text)
    if not any(test(value) for test in tests):
        raise ValueError(
            f"{where} has labels as {kind}; expected one number, truth value or text per image. Name another column, "
            f"or leave labels out: {way_round}"
        )


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, getattr(types, "is_string_view", lambda kind: False))
    return any(test(kind) for test in tests)


def class_labels(values: Sequence[Any], listed: tuple[str, ...], where: str) -> Labels:
    """Classes of the values of a column; None and NaN are no label.

    Whole numbers from 0 stay what they are, also where they come as floats. Truth values are 0 and 1. Texts and other
    numbers are counted in their order, which is the split's own: two splits are brought together by their names.

    Args:
        listed: names of the numbers, where the data say so.

    Raises:
        ValueError: infinite or mixed values, or more than MAX_CLASSES of them.
    """
    missing = [value is None or (isinstance(value, float) and math.isnan(value)) for value in values]
    present = {value for value, gone in zip(values, missing, strict=True) if not gone}
    kinds = {str if isinstance(value, str) else bool if isinstance(value, bool) else float for value in present}
    if len(kinds) > 1:
        raise ValueError(f"{where} has labels of several kinds, such as {sorted(map(repr, present))[:3]}")
    if any(isinstance(value, float) and math.isinf(value) for value in present):
        raise ValueError(f"{where} has infinite labels")
    if kinds <= {float} and all(value == int(value) and (value >= -1 or type(value) is int) for value in present):
        high = max((int(value) for value in present), default=-1)
        if high >= MAX_CLASSES:
            raise ValueError(f"{where} has a label {high}; number classes from 0, below {MAX_CLASSES:,}")
        numbers = [-1 if gone else int(value) for value, gone in zip(values, missing, strict=True)]
        names = listed or tuple(map(str, range(high + 1)))
        return Labels(torch.tensor(numbers, dtype=torch.int64), names, "listed" if listed else "numbers")
    ordered = [False, True] if kinds == {bool} else sorted(present)
    if len(ordered) > MAX_CLASSES:
        raise ValueError(f"{where} has {len(ordered):,} different labels; {MAX_CLASSES:,} classes are the most")
    place = {value: number for number, value in enumerate(ordered)}
    numbers = [-1 if gone else place[value] for value, gone in zip(values, missing, strict=True)]
    names = tuple(value if isinstance(value, str) else f"{value!r}".removesuffix(".0") for value in ordered)
    return Labels(torch.tensor(numbers, dtype=torch.int64), names, "listed" if kinds == {bool} else "own")


def streamed_label(value: Any, where: str) -> int:
    """The class number of one value of a column of numbers or truth values; -1 for None and NaN.

    Raises:
        ValueError: no whole number.
    """
    if value is None or value != value:
        return -1
    if value != int(value):
        raise ValueError(f"{where} has a label {value}, and a stream cannot number such values: leave streaming out")
    return int(value)
