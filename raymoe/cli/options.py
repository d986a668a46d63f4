"""Options of the command line as configuration keys, and the help text on them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import yaml

from raymoe.config import RunFile, all_settings
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
    """`word` read as YAML; itself where that is no YAML (`*.jsonl`) or a date."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return word if isinstance(value, date) else value


def help_text() -> str:
    """Every key of a job with its default and what it means, as `--help` shows them."""
    lines = [
        "configuration (default < YAML file < command line; a key may stand alone where it is the only one):"
    ]
    for name, field in all_settings(RunFile).items():
        if name == "method.name":
            lines.append(f"  --method {'|'.join(METHODS)}")
            continue
        default = field.get_default(call_default_factory=True)
        about = " ".join((field.description or "").split())
        users = [m for m, k in METHODS.items() if name.removeprefix("method.") in k.model_fields]
        only = f"[{', '.join(users)}] " if name.startswith("method.") else ""
        lines.append(f"  --{name.replace('_', '-'):<38} {only}{about}{' ' * bool(about)}(default: {default})")
    return "\n".join(lines)
