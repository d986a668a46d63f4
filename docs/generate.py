"""Write docs/configuration.md from the configuration types; `--check` only says if it is stale.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raymoe.config import Data, RunFile, Source
from raymoe.methods import METHODS
from raymoe.schema import Config

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
<!-- Generated from raymoe/config.py and raymoe/methods.py by docs/generate.py: edit those, then `make docs`. -->
# Configuration

A run is a YAML file, a command line, or both. Every key has a default; the file goes over the defaults and the
command line over the file.

```yaml
# my-run.yaml
model: {name: ./my-model}
method: {name: trsu, num_experts: 4}
optimization: {learning_rate: 1.0e-5}
```

```bash
raymoe train my-run.yaml --method.num-experts 8 --data.train data/code.jsonl data/math.jsonl --no-gpu
```

- On the command line keys are dotted, with dashes or underscores. A key may stand alone where only one group has
  it: `--num-experts 8`. `--method crsu` is short for `--method.name crsu`.
- Values are read as YAML. Several values after one option are a list; an option without a value is `true`, and
  `--no-gpu` is `--gpu false`.
- Another method on the command line drops the method settings of the file, which are those of another method.
- All errors are reported at once, one line each, with the key, the value and what was expected; the exit code is 2.
- `raymoe train --help` lists the same keys.

What decides a result is in `model`, `data`, `method`, `optimization`, `evaluation`, `precision` and `seed`: their
hash is the trial's identity. `execution` says how it is computed; nothing in it enters a hash or changes a result
beyond rounding.
"""
SOURCE = "These are the keys of one entry of `data.train` or `data.validation`."
ENVIRONMENT = """
## Environment variables

| variable | |
|---|---|
| `RAYMOE_STORAGE` | default of `execution.storage` |
| `RAYMOE_CACHE` | folder for copies of what a node reads from a bucket; `~/.cache/raymoe` by default |
| `MLFLOW_TRACKING_URI` | MLflow server or database; by default `mlflow.db` in the working folder |
| `RAY_AUTH_MODE` | `token` for every cluster that you start: see [security](security.md) |
| `RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS` | where `--submit` finds the cluster, in this order |
| `AWS_ENDPOINT_URL` | an S3 server that is not AWS's: see [storage](storage.md) |
"""


def page() -> str:
    """Return the whole page as Markdown."""
    loose = [name for name, field in RunFile.model_fields.items() if _is_value(field)]
    sections: list[str] = []
    for name, field in RunFile.model_fields.items():
        if name == "method":
            sections.extend(_methods())
        elif group := _group(field):
            sections.extend(_groups(name, group))
    alone = (
        "Two keys stand outside the groups." if len(loose) == 2 else "These keys stand outside the groups."
    )
    top = _section("At the top level", alone, RunFile, loose, "")
    return "".join([INTRODUCTION, top, *sections, ENVIRONMENT])


def _groups(key: str, group: type[BaseModel]) -> Iterator[str]:
    """Yield a section for the values in `group`, then one for every group inside it."""
    leaves = [name for name, field in group.model_fields.items() if _is_value(field)]
    yield _section(key, _text(group.__doc__), group, leaves, f"{key}.")
    if group is Data:
        about = f"{_text(Source.__doc__)} {SOURCE}"
        yield _section("A source", about, Source, Source.model_fields, "", level="###")
    for name, field in group.model_fields.items():
        if inner := _group(field):
            yield from _groups(f"{key}.{name}", inner)


def _methods() -> Iterator[str]:
    """Yield a section for every class that a method's settings come from, what is shared first."""
    yield "\n## method\n\n`method.name` is one of " + ", ".join(f"`{name}`" for name in METHODS) + ".\n"
    seen: set[type] = {Config, BaseModel, object}
    for method in METHODS.values():
        for kind in reversed(method.__mro__):
            if kind in seen or not issubclass(kind, Config):
                continue
            seen.add(kind)
            users = [name for name, each in METHODS.items() if issubclass(each, kind)]
            own = [name for name in kind.__annotations__ if name in kind.model_fields and name != "name"]
            if not own and kind is not method:  # a base without settings
                continue
            title = ", ".join(users[:-1]) + " and " + users[-1] if len(users) > 1 else users[0]
            yield _section(title, _text(kind.__doc__), kind, own, "method.", level="###")


def _section(
    title: str, about: str, kind: type[BaseModel], names: Iterable[str], prefix: str, level: str = "##"
) -> str:
    rows = [_row(f"{prefix}{name}", kind.model_fields[name]) for name in names]
    table = ["", "| key | value | default | |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join(["", f"{level} {title}", *(["", about] if about else []), *table, ""])


def _row(key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", _kind(field), _default(field), _text(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:  # read from the environment: not the same everywhere
        return "`runs`"
    if field.default is PydanticUndefined:
        return "required"
    return "" if field.default is None else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    """Return `value` as a YAML file has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else str(value)


KINDS = {str: "text", int: "whole number", float: "number", bool: "true, false"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _kind(field: FieldInfo) -> str:
    """Return what a value may be, with its bounds."""
    bounds = [
        f"{word} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, word in BOUNDS.items()
        if hasattr(bound, name)
    ]
    return ", ".join([_annotation(field.annotation), *bounds])


def _annotation(kind: Any) -> str:
    arguments = [each for each in get_args(kind) if each not in (NoneType, Ellipsis)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{_yaml(each)}`" for each in arguments)
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(map(_annotation, arguments))
    if get_origin(kind) is tuple:
        words = {str: "names", int: "whole numbers", float: "numbers"}
        count = f"{len(arguments)} " if Ellipsis not in get_args(kind) else "list of "
        return count + words.get(arguments[0], "sources")
    return KINDS.get(kind, getattr(kind, "__name__", str(kind)))


def _group(field: FieldInfo) -> type[BaseModel] | None:
    """Return the type of a group of keys; None for a single value or the choice of a method."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _is_value(field: FieldInfo) -> bool:
    """True for a single value, as opposed to a group of keys."""
    return _group(field) is None and field.discriminator is None


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def main() -> None:
    """Write the page, or exit with 1 if it is stale."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.name} is stale: run `make docs`")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
