"""Dataclasses under a closed schema: to JSON and back, and the checks that their fields share."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that is malformed, out of range or contradicts itself."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _expected(where: str, value: Any, wanted: Any) -> str:
    wanted = wanted if isinstance(wanted, str) else ", ".join(map(repr, wanted))
    return f"{where} is {str(value)[:100]!r}; expected {wanted}"


def check_choices(owner: Any) -> None:
    """Literal fields of a dataclass, which Python itself does not check."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        several = typing.get_origin(hint) is tuple
        choices = typing.get_args(typing.get_args(hint)[0] if several else hint)
        if typing.get_origin(hint) is Literal or (several and typing.get_origin(typing.get_args(hint)[0]) is Literal):
            for item in value if several else (value,):
                require(item in choices, f"{type(owner).__name__}.{_expected(name, item, choices)}")


def check_range(owner: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(low <= value <= high, f"{type(owner).__name__}.{name} is {value!r}, outside {low:g} to {high:g}")


def to_dict(config: Any) -> dict[str, Any]:
    """Any of these dataclasses as JSON-able data (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """The dataclass `cls` from JSON data. Every field must be present and known.

    Raises:
        ConfigError: names the field (`where` leads to it) for a missing, unknown, mistyped or out-of-range value.
    """
    where = where or cls.__name__
    require(isinstance(data, dict), f"{where} is {type(data).__name__}, not an object")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
    require(not unknown, f"{where} has unknown fields: {', '.join(unknown)[:200]}")
    require(not missing, f"{where} lacks fields: {', '.join(missing)}")
    return cls(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in names})


def _member(members: list[Any], data: Any, where: str) -> Any:
    """That one of a union which has the `architecture` of the data; the first for data that name none."""
    if len(members) == 1 or not isinstance(data, dict) or "architecture" not in data:
        return members[0]
    choices = {member: typing.get_args(typing.get_type_hints(member).get("architecture")) for member in members}
    fitting = [member for member in members if data["architecture"] in choices[member]]
    known = [choice for member in members for choice in choices[member]]
    require(bool(fitting), _expected(f"{where}.architecture", data["architecture"], known))
    return fitting[0]


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(_member([arg for arg in args if arg is not type(None)], value, where), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is Literal:
        # `True == 1`: the type must agree too
        require(any(value == arg and type(value) is type(arg) for arg in args), _expected(where, value, args))
        return value
    if origin is tuple:
        require(isinstance(value, list) and len(value) <= 64, _expected(where, value, "a list of at most 64"))
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), _expected(where, value, "an object"))
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    require(type(value) is hint, _expected(where, value, hint.__name__))
    if hint is str:
        require(len(value) <= 4096, f"{where} is longer than 4096 characters")
    return value
