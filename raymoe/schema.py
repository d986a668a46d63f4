"""The base of every configuration type, and the error that a user is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    model_validator,
)


class InputError(Exception):
    """What the user gave can't be used; the message is one line per problem and is all they need to see."""


class Config(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {k: _plain(v, fields[k].annotation) if k in fields else v for k, v in values.items()}


def _plain(value: Any, kind: Any) -> Any:
    """One value for a list is a list of one; true, which a lone `--max-steps` gives, is not the number 1."""
    if isinstance(value, bool) and {int, float} & {kind, *get_args(kind), *map(type, get_args(kind))}:
        return str(value).lower()
    return (value,) if get_origin(kind) is tuple and isinstance(value, str | int | float) else value
