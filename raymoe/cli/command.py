"""What every verb shares: parse its command line, turn the user's mistakes into lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.cli.options import asked_method, help_text, option_lines, parse_overrides, wrapped
from raymoe.config import RunFile, load
from raymoe.schema import InputError


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    run_file: RunFile
    options: Mapping[str, Any]
    """The verb's own options that were given, by their names."""

    @property
    def dry_run(self) -> bool:
        """True if the command is to print what it would do, and stop."""
        return bool(self.options.get("dry_run"))

    @property
    def json(self) -> bool:
        """True if results are to be printed as JSON."""
        return bool(self.options.get("json"))


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    about: str
    """What it does, in one line."""
    function: Callable[[Command], int]
    """Does it and returns the exit code."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Its own options and their texts."""


FLAGS = ("dry_run", "json", "asha", "submit")
"""Options that take no value."""
COMMON = {
    "dry_run": "Print what would be done and what is in the store, then stop.",
    "json": "Print results as JSON.",
}
"""Options of every verb."""


def guarded(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code: 2 after a user's mistake, told on stderr; 130 after an interrupt."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `raymoe train --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print("\n".join(f"raymoe: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raymoe: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parse(arguments: list[str], options: Mapping[str, str]) -> Command:
    """Parse the arguments of a verb that has `options`.

    Raises:
        InputError: all that is wrong with them, one line each.
    """
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    known = {**COMMON, **options}
    texts, rest = _texts(arguments, [name for name in known if name not in FLAGS])
    overrides = parse_overrides(rest)
    flags = {name: _flag(name, overrides.pop(name)) for name in FLAGS if name in known and name in overrides}
    return Command(load(RunFile, file, overrides), {**texts, **flags})


def _texts(arguments: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Split off the options `names`, whose values stay as typed, whatever YAML would make of them."""
    texts: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        option, separator, inline = arguments[position].partition("=")
        start = position = position + 1
        if not option.startswith("--") or (name := option[2:].replace("-", "_")) not in names:
            rest.append(arguments[position - 1])
            continue
        while not separator and position < len(arguments) and not arguments[position].startswith("--"):
            position += 1
        texts[name] = _text(option, [inline] if separator else arguments[start:position])
    return texts, rest


def _text(option: str, words: Sequence[str]) -> str:
    if not "".join(words):
        raise InputError(f"{option}: expected a value")
    if len(words) > 1:
        raise InputError(f"{option}: takes one value, got {len(words)}; put it in quotes")
    return words[0]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option}: takes no value (got {value!r}); a configuration file comes before it")
    return value


def verb_help(usage: str, about: str, options: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Return the help of a verb; where `arguments` name a method, of that method alone."""
    own = option_lines(
        {**options, **COMMON, "help": "Print this text; with --method NAME, of that method alone."}
    )
    head = f"usage: {usage} [config.yaml] [--key value ...]"
    return "\n\n".join([head, wrapped(about), own, help_text(asked_method(arguments))])
