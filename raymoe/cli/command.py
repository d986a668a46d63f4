"""What a command line asks for, and the one place that turns failures into lines and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.cli.options import parse_overrides
from raymoe.config import RunFile, load
from raymoe.schema import InputError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    job: RunFile
    options: Mapping[str, Any]

    @property
    def dry_run(self) -> bool:
        """Print what would be done, and stop."""
        return bool(self.options.get("dry_run"))

    @property
    def json(self) -> bool:
        """Print results as JSON."""
        return bool(self.options.get("json"))


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, its own options (name: help) and its function, which returns the exit code."""

    about: str
    function: Callable[[Command], int]
    options: Mapping[str, str]


FLAGS = ("dry_run", "json", "asha", "submit")
COMMON = {
    "dry_run": "print what would be done and what is in the store, then stop",
    "json": "results as JSON",
}


def guarded(work: Callable[[], int]) -> int:
    """Run `work`; the user's mistakes become lines on stderr, an interrupt becomes exit code 130."""
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
    """The command that `arguments` ask for; raises InputError for what is wrong with them."""
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    known = {**COMMON, **options}
    texts, rest = _texts(arguments, [name for name in known if name not in FLAGS])
    overrides = parse_overrides(rest)
    flags = {name: _flag(name, overrides.pop(name)) for name in FLAGS if name in known and name in overrides}
    return Command(load(RunFile, file, overrides), {**texts, **flags})


def _texts(arguments: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The options `names` with their values as they were typed, whatever YAML makes of them, and all else."""
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


def option_lines(options: Mapping[str, str]) -> str:
    """A verb's own options and those of all verbs, as `--help` shows them."""
    shown = {**options, **COMMON, "help": "this text"}
    return "\n".join(f"  --{name.replace('_', '-'):<38} {text}" for name, text in shown.items()) + "\n"
