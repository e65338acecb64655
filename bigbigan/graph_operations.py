"""The operations that a network in graph form may have: a closed table of names, torch functions and attributes.

Images are [N, C, H, W] here, as everywhere in this package. A negative size -k stands for k times the batch size N.
Nothing is ever looked up in torch by a name from a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbigan.schema import ConfigError, require

MAX_RANK, MAX_SIZE, MAX_LISTED = 8, 1 << 24, 1 << 16
EQUATION = re.compile(r"[a-z]{1,8}(,[a-z]{1,8}){0,3}->[a-z]{0,8}")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Context:
    """What some operations need beside their inputs: the batch size, and the network's dtype."""

    batch: int
    dtype: torch.dtype


# ---- attributes: each check takes a JSON value and raises ConfigError


def _whole(low: int, high: int) -> Callable[[Any, str], None]:
    def check(value: Any, where: str) -> None:
        require(type(value) is int and low <= value <= high, f"{where} is {str(value)[:60]!r}, not {low} to {high}")

    return check


def _several(check: Callable[[Any, str], None], fewest: int, most: int) -> Callable[[Any, str], None]:
    def check_all(value: Any, where: str) -> None:
        counted = isinstance(value, list) and fewest <= len(value) <= most
        require(counted, f"{where} is {str(value)[:60]!r}, not a list of {fewest} to {most}")
        for item in value:
            check(item, where)

    return check_all


def _number(value: Any, where: str) -> None:
    require(type(value) in (int, float) and abs(value) < 3.5e38, f"{where} is {str(value)[:60]!r}, not a number")


def _flag(value: Any, where: str) -> None:
    require(type(value) is bool, f"{where} is {str(value)[:60]!r}, not true or false")


def _equation(value: Any, where: str) -> None:
    require(isinstance(value, str) and EQUATION.fullmatch(value) is not None, f"{where} is {str(value)[:60]!r}")


def _half(value: Any, where: str) -> None:
    require(isinstance(value, str) and value in HALF, f"{where} is {str(value)[:60]!r}, not {' or '.join(HALF)}")


_axis = _whole(0, MAX_RANK - 1)
_axes = _several(_axis, 0, MAX_RANK)
_pair = _several(_whole(1, 4096), 2, 2)
_margins = _several(_whole(0, MAX_SIZE), 2, 2)
_sizes = _several(_whole(-MAX_SIZE, MAX_SIZE), 0, MAX_RANK)
_four = _several(_whole(0, 4096), 4, 4)  # zeros at top, bottom, left and right


# ---- functions


def sizes(shape: list[int], batch: int) -> list[int]:
    """Sizes with the batch size put in."""
    return [-n * batch if n < 0 else n for n in shape]


def _fits(size: int, *vectors: Tensor | None) -> None:
    """Tensors without values let other sizes pass, which the kernels then refuse."""
    for vector in vectors:
        if vector is not None and tuple(vector.shape) != (size,):
            raise ConfigError(f"a vector has shape {list(vector.shape)} instead of [{size}]")


def _conv2d(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    _fits(weight.shape[0], bias)
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return F.conv2d(x, weight, bias, tuple(stride), (top, left), tuple(dilation), groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, tuple(stride), 0, tuple(dilation), groups)


def _conv_transpose2d(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: list[int]
) -> Tensor:
    _fits(weight.shape[1], bias)
    return F.conv_transpose2d(x, weight, bias, tuple(stride))


def _max_pool(context: Context, x: Tensor, *, size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """What lies outside never wins."""
    top, bottom, left, right = padding
    if top == bottom <= size[0] // 2 and left == right <= size[1] // 2:
        return F.max_pool2d(x, tuple(size), tuple(stride), (top, left))
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), tuple(size), tuple(stride))


def _avg_pool(context: Context, x: Tensor, *, size: list[int], stride: list[int]) -> Tensor:
    return F.avg_pool2d(x, tuple(size), tuple(stride))


def _affine(context: Context, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift along axis 1, in one pass."""
    _fits(x.shape[1], scale, shift)
    return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 0.0)


def _matmul(context: Context, a: Tensor, b: Tensor, *, transpose: list[bool]) -> Tensor:
    a, b = (value.transpose(-1, -2) if flag else value for value, flag in zip((a, b), transpose, strict=True))
    return a @ b


def _wide(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Reduces in float32 at least, since half precision would lose a mean."""

    def run(context: Context, x: Tensor, *, axes: list[int], keep: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return reduce(x, dim=tuple(axes), keepdim=keep, dtype=wide).to(x.dtype) if axes else x

    return run


def _extreme(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(context: Context, x: Tensor, *, axes: list[int], keep: bool) -> Tensor:
        return reduce(x, dim=tuple(axes), keepdim=keep) if axes else x

    return run


def _prod(context: Context, x: Tensor, *, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def _slice(context: Context, x: Tensor, *, axis: int, start: int, stop: int, step: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _gather(context: Context, x: Tensor, *, axis: int, indices: list[int]) -> Tensor:
    require(max(indices) < x.shape[axis], f"gather takes index {max(indices)} of {x.shape[axis]}")
    return x.index_select(axis, torch.tensor(indices, device=x.device))


def _pad(context: Context, x: Tensor, *, margins: list[list[int]], value: float) -> Tensor:
    require(len(margins) == x.ndim, f"pad has {len(margins)} margins for {x.ndim} axes")
    if x.dtype.is_floating_point:  # the least float32, as before a max-pool, is beyond float16
        limits = torch.finfo(x.dtype)
        value = min(max(value, limits.min), limits.max)
    return F.pad(x, [n for pair in reversed(margins) for n in pair], value=value)


def _nearest(context: Context, x: Tensor, *, factors: list[int]) -> Tensor:
    return F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest")


def _where(context: Context, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition if condition.dtype == torch.bool else condition != 0, a, b)


def _div_no_nan(context: Context, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros_like(b), a / torch.where(b == 0, torch.ones_like(b), b))


def truncated_normal(x: Tensor) -> Tensor:
    """From N(0, 1) to the same distribution cut at two deviations, monotonically."""
    low = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64, device=x.device))
    return torch.special.ndtri(low + torch.special.ndtr(x.double()) * (1 - 2 * low)).to(x.dtype)


def standard_uniform(x: Tensor) -> Tensor:
    """From N(0, 1) to U(0, 1), monotonically."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


@dataclass(frozen=True)
class Kind:
    """An operation: its function, how many inputs it takes, and the checks of its attributes, all of which it needs."""

    run: Callable[..., Tensor]
    fewest: int
    most: int
    attributes: dict[str, Callable[[Any, str], None]]


def _kind(run: Callable[..., Tensor], fewest: int, most: int = 0, **attributes: Callable[[Any, str], None]) -> Kind:
    return Kind(run, fewest, max(fewest, most), attributes)


def _plain(function: Callable[..., Tensor], count: int, **attributes: Callable[[Any, str], None]) -> Kind:
    """A function of tensors and attributes alone."""
    return Kind(lambda context, *inputs, **given: function(*inputs, **given), count, count, attributes)


UNARY: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "erfc": torch.erfc,
    "exp": torch.exp, "expm1": torch.expm1,
    "floor": torch.floor, "log": torch.log, "log1p": torch.log1p, "neg": torch.neg, "reciprocal": torch.reciprocal,
    "relu": F.relu, "relu6": F.relu6, "round": torch.round, "rsqrt": torch.rsqrt, "selu": F.selu,
    "sigmoid": torch.sigmoid, "sign": torch.sign, "sin": torch.sin, "softplus": F.softplus, "softsign": F.softsign,
    "sqrt": torch.sqrt, "square": torch.square, "tanh": torch.tanh, "truncate": torch.trunc,
    "logical_not": torch.logical_not, "truncated_normal": truncated_normal, "standard_uniform": standard_uniform,
}  # fmt: skip
BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide, "maximum": torch.maximum,
    "minimum": torch.minimum, "pow": torch.pow, "floor_div": torch.floor_divide, "floor_mod": torch.remainder,
    "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt, "less_equal": torch.le, "equal": torch.eq,
    "not_equal": torch.ne, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
}  # fmt: skip
OPERATIONS: dict[str, Kind] = {
    **{name: _plain(function, 1) for name, function in UNARY.items()},
    **{name: _plain(function, 2) for name, function in BINARY.items()},
    "div_no_nan": _kind(_div_no_nan, 2),
    "where": _kind(_where, 3),
    "elu": _plain(lambda x, alpha: F.elu(x, alpha), 1, alpha=_number),
    "leaky_relu": _plain(lambda x, slope: F.leaky_relu(x, slope), 1, slope=_number),
    "clamp": _plain(lambda x, low, high: x.clamp(low, high), 1, low=_number, high=_number),
    "scalar": _plain(lambda x, factor, term: x * factor + term, 1, factor=_number, term=_number),
    "affine": _kind(_affine, 3),
    "number": _kind(lambda context, x: x.to(context.dtype), 1),  # of true and false
    "round_to": _plain(lambda x, dtype: x.to(HALF[dtype]).to(x.dtype), 1, dtype=_half),
    "times_batch": _kind(lambda context, x: x * context.batch, 1),
    "linear": _kind(lambda context, x, weight, bias=None: F.linear(x, weight, bias), 2, 3),
    "matmul": _kind(_matmul, 2, transpose=_several(_flag, 2, 2)),
    "einsum": _kind(lambda context, *inputs, equation: torch.einsum(equation, *inputs), 1, 3, equation=_equation),
    "conv2d": _kind(_conv2d, 2, 3, stride=_pair, padding=_four, dilation=_pair, groups=_whole(1, 1 << 16)),
    "conv_transpose2d": _kind(_conv_transpose2d, 2, 3, stride=_pair),
    "max_pool": _kind(_max_pool, 1, size=_pair, stride=_pair, padding=_four),
    "avg_pool": _kind(_avg_pool, 1, size=_pair, stride=_pair),
    "nearest": _kind(_nearest, 1, factors=_pair),
    "resize": _plain(lambda x, rows, columns: rows @ x @ columns.t(), 3),
    "softmax": _plain(lambda x, axis: torch.softmax(x, axis), 1, axis=_axis),
    "log_softmax": _plain(lambda x, axis: torch.log_softmax(x, axis), 1, axis=_axis),
    "mean": _kind(_wide(torch.mean), 1, axes=_axes, keep=_flag),
    "sum": _kind(_wide(torch.sum), 1, axes=_axes, keep=_flag),
    "max": _kind(_extreme(torch.amax), 1, axes=_axes, keep=_flag),
    "min": _kind(_extreme(torch.amin), 1, axes=_axes, keep=_flag),
    "prod": _kind(_prod, 1, axes=_axes, keep=_flag),
    "reshape": _kind(lambda context, x, shape: x.reshape(sizes(shape, context.batch)), 1, shape=_sizes),
    "expand": _kind(lambda context, x, shape: x.expand(sizes(shape, context.batch)), 1, shape=_sizes),
    "permute": _plain(lambda x, axes: x.permute(axes), 1, axes=_axes),
    "flip": _plain(lambda x, axes: x.flip(axes), 1, axes=_axes),
    "tile": _plain(lambda x, repeats: x.tile(repeats), 1, repeats=_several(_whole(1, MAX_SIZE), 1, MAX_RANK)),
    "concat": _kind(lambda context, *inputs, axis: torch.cat(inputs, axis), 1, 4096, axis=_axis),
    "slice": _kind(
        _slice, 1, axis=_axis, start=_whole(0, MAX_SIZE), stop=_whole(0, MAX_SIZE), step=_whole(1, MAX_SIZE)
    ),
    "gather": _kind(_gather, 1, axis=_axis, indices=_several(_whole(0, MAX_SIZE), 1, MAX_LISTED)),
    "pad": _kind(_pad, 1, margins=_several(_margins, 0, MAX_RANK), value=_number),
}


# These take true and false as well as numbers.
MIXED = {
    "number", "where", "logical_and", "logical_or", "logical_not", "equal", "not_equal", "reshape", "expand", "permute",
    "concat", "slice", "gather", "flip", "tile",
}  # fmt: skip


def check_operation(name: Any, count: int, attributes: dict[str, Any], where: str) -> None:
    """Raises ConfigError for an operation that is not in the table, or not made as the table says."""
    if not isinstance(name, str) or name not in OPERATIONS:
        raise ConfigError(f"{where} is {str(name)[:60]!r}, which is not an operation of this format")
    kind = OPERATIONS[name]
    require(kind.fewest <= count <= kind.most, f"{where} ({name}) has {count} inputs")
    wanted, found = set(kind.attributes), set(attributes)
    require(wanted == found, f"{where} ({name}) has attributes {sorted(found)}; expected {sorted(wanted)}"[:300])
    for key, check in kind.attributes.items():
        check(attributes[key], f"{where} ({name}).{key}")
