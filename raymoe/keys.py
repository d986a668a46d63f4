"""Dotted keys of a configuration: which there are, how one is set, and the line that says what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raymoe.methods import METHODS, SparseUpcycling
from raymoe.schema import InputError

DEFAULT_METHOD = SparseUpcycling().name


# ---- which keys there are


def parts_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield `kind` and, depth first, every part of it with the prefix of its keys; every method is a part."""
    yield prefix, kind
    for name, field in kind.model_fields.items():
        if name == "method":
            yield from (("method.", method) for method in METHODS.values())
        elif (part := _part(field)) is not None:
            yield from parts_of(part, f"{prefix}{name}.")


def settings_of(part: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of `part` that are values, not parts of their own."""
    return {
        name: field for name, field in part.model_fields.items() if name != "method" and _part(field) is None
    }


def _part(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def all_keys(kind: type[BaseModel]) -> list[str]:
    """Return every dotted key of `kind`, once each; `method.` keys are those of all methods."""
    return list(dict.fromkeys(prefix + name for prefix, part in parts_of(kind) for name in settings_of(part)))


def full_key(kind: type[BaseModel], key: str) -> str:
    """Return the dotted key that a bare `key` stands for; `key` itself if none, or more than one, ends in it."""
    if key == "method":
        return "method.name"
    if "." in key or key in kind.model_fields:
        return key
    found = _keys_called(kind, key)
    return found[0] if len(found) == 1 else key


def _keys_called(kind: type[BaseModel], name: str) -> list[str]:
    return sorted(key for key in all_keys(kind) if _last(key) == name)


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


# ---- reading and setting them


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        InputError: the file can't be read, is not YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected keys and values, found {type(values).__name__}")
    return values


def with_value(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return `values` with `value` at `path`; naming another method drops the settings of the previous one.

    Raises:
        InputError: the path leads through a value that is not a group of keys.
    """
    if len(path) == 1:
        return {**values, path[0]: value}
    below = values.get(path[0]) or {}
    named = below.get("name", DEFAULT_METHOD) if isinstance(below, Mapping) else None
    if path == ["method", "name"] and named not in (None, value):
        below = {}
    if not isinstance(below, Mapping):
        raise InputError(f"{'.'.join(path)}: {path[0]} is {below!r}, not a group of keys")
    return {**values, path[0]: with_value(below, path[1:], value)}


# ---- what is wrong with them


def error_line(kind: type[BaseModel], values: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors about `values` as a line: the key, what was expected, what was given."""
    path = [str(part) for part in error["loc"]]
    if path[:1] == ["method"] and path[1:2] and path[1] in METHODS:
        del path[1]  # pydantic names the type of the method there
    key = ".".join(path) or kind.__name__.lower()
    if error["type"] == "extra_forbidden":
        return f"{key}: {_unknown_key(kind, values, path)}"
    if error["type"] == "union_tag_invalid":
        return f"{key}.name: {error['ctx']['tag']!r} is not a method: choose from {', '.join(METHODS)}"
    given = error.get("input")
    shown = "" if error["type"] == "value_error" and isinstance(given, Mapping) else f" (got {given!r})"
    return f"{key}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _unknown_key(kind: type[BaseModel], values: Mapping[str, Any], path: Sequence[str]) -> str:
    """Say which key may have been meant by the one at `path`."""
    name, known = path[-1], _keys_at(kind, values, path[:-1])
    if len(path) == 1 and "method" in kind.model_fields:
        if elsewhere := _keys_called(kind, name):
            problem = "ambiguous" if len(elsewhere) > 1 else "unknown key"
            return f"{problem}, choose from {', '.join(elsewhere)}"
        known += map(_last, all_keys(kind))
    owners = [method for method, part in METHODS.items() if name in part.model_fields]
    if path[:-1] == ["method"] and owners:
        have = "has" if len(owners) == 1 else "have"
        return f"{_method_name(values)} has no {name} ({', '.join(owners)} {have})"
    near = difflib.get_close_matches(name, known, n=1)
    return "unknown key" + (f", did you mean {near[0]}?" if near else "")


def _keys_at(kind: type[BaseModel], values: Mapping[str, Any], path: Sequence[str]) -> list[str]:
    """Return the field names of the part of `kind` at `path`."""
    fields = kind.model_fields
    for name in path:
        if name == "method":
            fields = METHODS[_method_name(values)].model_fields
        elif name in fields and (part := _part(fields[name])) is not None:
            fields = part.model_fields
    return list(fields)


def _method_name(values: Mapping[str, Any]) -> str:
    return str((values.get("method") or {}).get("name", DEFAULT_METHOD))
