"""Options of the command line as configuration keys, and their help text, generated from the configuration types.

    raymoe train --help
    raymoe train --help --method trsu

Every field of a configuration has a docstring, which is its text here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby, pairwise
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from raymoe.config import RunFile
from raymoe.keys import DEFAULT_METHOD, parts_of, settings_of
from raymoe.methods import METHODS
from raymoe.schema import InputError


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--method.num-experts 4 --seed=1` into `{"method.num_experts": 4, "seed": 1}`.

    Values are read as YAML, several values after one option as a list; a lone option is `true`, `--no-x` false.
    """
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        option, separator, inline = arguments[position].partition("=")
        if not option.startswith("--"):
            raise InputError(
                f"unexpected argument {arguments[position]!r}: options have the form --key value"
            )
        position += 1
        words = [inline] if separator else []
        while not separator and position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        key, value = _option(option[2:].replace("-", "_"), words)
        overrides[key] = value
    return overrides


def _option(key: str, words: Sequence[str]) -> tuple[str, Any]:
    if words:
        values = [_value(word) for word in words]
        return key, values[0] if len(values) == 1 else values
    *parents, name = key.split(".")
    if name.startswith("no_"):
        return ".".join([*parents, name[3:]]), False
    return key, True


def _value(word: str) -> Any:
    """Read `word` as YAML; return it as it is where that is not YAML (`*.jsonl`) or a date."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return word if isinstance(value, date) else value


# ---- help

WIDTH = 100
"""Columns of the help text, however wide the terminal is."""
INDENT = 41
"""Column at which an option's text begins."""
PRECEDENCE = (
    "Configuration: a key's value is that of the command line, else of the YAML file, else the default. A key may "
    "stand alone where only one part has it: --num-experts for --method.num-experts."
)


def option_lines(options: Mapping[str, str]) -> str:
    """Return options with their texts as `--help` shows them, wrapped."""
    return entries({f"--{name.replace('_', '-')}": text for name, text in options.items()})


def entries(texts: Mapping[str, str], indent: int = INDENT) -> str:
    """Return names on the left and, from column `indent` on, their texts; lines of a text stay lines."""
    lines = []
    for name, text in texts.items():
        starts = [f"  {name:<{indent - 3}} ", *[" " * indent] * text.count("\n")]
        lines += [
            wrapped(line, start, " " * indent) for start, line in zip(starts, text.split("\n"), strict=True)
        ]
    return "\n".join(lines)


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Return `text` in lines of at most WIDTH columns, which begin with `first` and then `rest`."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def asked_method(arguments: Sequence[str]) -> str | None:
    """Return the method that `--method` names beside `--help`; None if it is not given.

    Raises:
        InputError: there is no such method.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    named = [value for option, value in pairwise(words) if option in ("--method", "--method.name")]
    if named and named[-1] not in METHODS:
        raise InputError(f"method.name: {named[-1]!r} is not a method: choose from {', '.join(METHODS)}")
    return named[-1] if named else None


def help_text(method: str | None = None) -> str:
    """Return every key of a configuration by part, with meaning and default; of methods, `method` only if given."""
    groups = [wrapped(PRECEDENCE)]
    for prefix, parts in groupby(parts_of(RunFile), key=lambda part: part[0]):
        if prefix == "method.":
            groups += _method_groups([method] if method else list(METHODS))
            continue
        ((_, part),) = parts
        title = f"{prefix.rstrip('.')}: {_paragraph(part.__doc__)}" if prefix else "run:"
        groups.append(_group(title, prefix, settings_of(part)))
    return "\n\n".join(groups)


def _method_groups(names: Sequence[str]) -> list[str]:
    """Return the choice of a method, then what several have in common, then what is each one's own."""
    about = "\n".join(f"{name}: {_paragraph(METHODS[name].__doc__)}" for name in names)
    shared: dict[tuple[str, ...], dict[str, FieldInfo]] = {}
    for owners, name, field in _method_settings(names):
        shared.setdefault(owners, {})[name] = field
    groups = sorted(shared.items(), key=lambda group: -len(group[0]))
    return [
        "method:\n" + option_lines({"method": f"{about}\n(default: {DEFAULT_METHOD})"}),
        *(_group(f"method {', '.join(owners)}:", "method.", fields) for owners, fields in groups),
    ]


def _method_settings(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str, FieldInfo]]:
    """Yield each setting once with the methods that have it with the same meaning, choices and default."""
    owners: dict[tuple[str, str], list[str]] = {}
    fields: dict[tuple[str, str], FieldInfo] = {}
    for method in names:
        for name, field in settings_of(METHODS[method]).items():
            if name != "name":  # `--method` names it
                told = (name, _text(field))
                owners.setdefault(told, []).append(method)
                fields.setdefault(told, field)
    for told, field in fields.items():
        yield tuple(owners[told]), told[0], field


def _group(title: str, prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    texts = {prefix + name: _text(field) for name, field in fields.items()}
    return f"{wrapped(title)}\n{option_lines(texts)}"


def _text(field: FieldInfo) -> str:
    """Return what a setting means, what it can be and what it is by default."""
    about = " ".join((field.description or "").split())
    choices = (
        "|".join(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ""
    )
    default = field.get_default(call_default_factory=True)
    told = [choices] if choices else []
    if default is not None or "by default" not in about:
        told.append(f"default: {_typed(default)}")
    return f"{about} ({'; '.join(told)})" if told else about


def _typed(value: Any) -> str:
    """Return `value` as a command line gives it."""
    if isinstance(value, tuple):
        return " ".join(map(_typed, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0")


def _paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((text or "").split("\n\n")[0].split())
