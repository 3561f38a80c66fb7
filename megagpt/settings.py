"""Frozen dataclasses as tables: built from TOML or JSON with every key and type checked, and written as TOML.

Standard library alone: the supervisor of a launch reads its settings on a batch node that may have nothing but Python.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, get_args, get_origin

from megagpt.errors import did_you_mean


def build(kind: type, values: dict[str, Any], *, where: str = "") -> Any:
    """A dataclass of `kind` from a table; every key must be a field, every value of the field's type.

    `where` is what stands before the keys' names in messages. Raises ValueError with the key's full name.
    """
    hints = typing.get_type_hints(kind)
    known = [spec.name for spec in dataclasses.fields(kind)]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"no setting is called {where}{key}.{did_you_mean(key, known)}")
        found[key] = _value(hints[key], value, name=f"{where}{key}")
    return kind(**found)


def _value(kind: Any, value: Any, *, name: str) -> Any:
    """`value` as the field's type asks: lists become tuples, tables become dataclasses."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is a section, written [{name}], and not a value.")
        return build(typing.cast(type, kind), value, where=f"{name}.")
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(str, get_args(kind)))}.")
        return value
    if origin is dict:
        item = get_args(kind)[1]
        if not isinstance(value, dict) or not all(type(one) is item for one in value.values()):
            raise ValueError(f"{name} = {value!r} must be a table of name = {item.__name__}.")
        return value
    if origin is tuple and isinstance(value, list):
        return _tuple(get_args(kind), value, name=name)
    options = get_args(kind) if origin is types.UnionType else (kind,)
    if float in options and type(value) is int:
        value = float(value)
    if type(value) not in options:
        names = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
        raise ValueError(f"{name} = {value!r} must be of type {names}.")
    return value


def _tuple(items: tuple[Any, ...], value: list[Any], *, name: str) -> tuple[Any, ...]:
    kinds = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
    if len(kinds) != len(value):
        raise ValueError(f"{name} = {value!r} must be of type tuple, of {len(kinds)} values.")
    return tuple(
        _value(kind, part, name=f"{name}[{place}]")
        for place, (kind, part) in enumerate(zip(kinds, value, strict=True))
    )


def to_toml(tree: Any) -> str:
    """A dataclass of values and sections as TOML that `build` reads back equal; None, every such field's default, is
    left out.
    """
    fields = {spec.name: getattr(tree, spec.name) for spec in dataclasses.fields(tree)}
    sections = {name: section for name, section in fields.items() if dataclasses.is_dataclass(section)}
    lines = _lines({name: value for name, value in fields.items() if name not in sections})
    for name, section in sections.items():
        values = {spec.name: getattr(section, spec.name) for spec in dataclasses.fields(section)}
        lines += ["", f"[{name}]", *_lines(values)]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None]


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return '"' + "".join(_toml_character(character) for character in str(value)) + '"'


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
