"""Values from outside as tensors, data types and seeds: converted in one place, with one kind of error."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "fp64": torch.float64,
}


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor, a NumPy array, anything else that NumPy takes (lists, tuples, frames), or a list of tensors.

    Tensors are handed through. Arrays of another byte order or with negative strides are copied.

    Raises:
        ValueError: ragged lists, texts, objects or complex numbers.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ValueError(f"{name} holds complex numbers; give real ones")
        return value
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
            return torch.stack(list(value))
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as one array of numbers: {error}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} is {type(value).__name__} of {array.dtype}; give a tensor, an array or lists of numbers"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4, 8):
        array = array.astype(np.float64)  # long double
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def as_floats(value: Any, name: str, *sizes: int | None) -> Tensor:
    """`as_tensor` of finite numbers; a tensor of floats keeps its type, all else becomes float64.

    Args:
        sizes: of the dimensions; None stands for any from 1 up.

    Raises:
        ValueError: as `as_tensor`, or another shape, nothing in it, truth values, NaN or infinity.
    """
    tensor = as_tensor(value, name)
    if tensor.dtype == torch.bool:
        raise ValueError(f"{name} holds truth values; give numbers")
    check_shape(tensor, name, *sizes)
    if not tensor.numel():
        wanted = ", ".join("N" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: the shape is {list(tensor.shape)}; expected [{wanted}], not empty")
    if not tensor.is_floating_point() or not isinstance(value, Tensor):
        tensor = tensor.double()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


def check_shape(tensor: Tensor, name: str, *sizes: int | None) -> None:
    """
    Raises:
        ValueError: the shape is another one; None in `sizes` stands for any size.
    """
    shape = tensor.shape
    if len(shape) != len(sizes) or any(size is not None and n != size for n, size in zip(shape, sizes, strict=True)):
        letters = iter("NSSL")
        wanted = ", ".join(next(letters) if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: the shape is {list(shape)}; expected [{wanted}]")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type of torch; texts such as "float16" or "torch.bfloat16" and NumPy's types name one.

    Raises:
        ValueError: no floating type.
    """
    if dtype is None:
        return None
    found: Any = dtype
    if not isinstance(dtype, torch.dtype):
        text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))  # np.float16, np.dtype(…)
        found = _DTYPES.get(text.strip().lower().removeprefix("torch."))
    if found is None or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype}; models run in a floating dtype such as torch.float16 or 'bfloat16'")
    return found


def as_whole(value: Any, name: str) -> int:
    """A whole number, also one of NumPy's.

    Raises:
        ValueError: 1.5, "1", True or None.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; give a whole number") from error
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value}; give a whole number")
    return number


def as_seed(seed: Any, name: str = "seed") -> int:
    """
    Raises:
        ValueError: no whole number in [0, 2**64).
    """
    number = as_whole(seed, name)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} is {seed}; it must be in [0, 2**64)")
    return number


def seeded(seed: Any, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own for this seed; torch's global one is neither read nor moved.

    Raises:
        ValueError: as `as_seed`.
    """
    return torch.Generator(device).manual_seed(as_seed(seed))
