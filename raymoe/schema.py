"""The base of every configuration type, what identifies a result, and the error that a user is shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


class InputError(Exception):
    """Input of the user's that can't be used; the message, one line per problem, is all that they are shown."""


def added(default: Any, **constraints: Any) -> Any:
    """A field that was added after results without it were stored: use it as pydantic's `Field`.

    Its default must mean what raymoe did before the field existed.
    """
    return Field(default, json_schema_extra={"added": True}, **constraints)


def is_added(field: FieldInfo) -> bool:
    """True for a field made by `added`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("added"))


class Config(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(
        self, include: Collection[str] | None = None, exclude: Collection[str] = ()
    ) -> dict[str, Any]:
        """Plain values of what decides a result: the fields in `include` (None: all) but those in `exclude`.

        A field made by `added` is left out while it has its default, so that results made before the field existed
        are still recognised.
        """
        return {
            name: _plain_identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if (include is None or name in include) and name not in exclude
            if not (is_added(field) and getattr(self, name) == field.get_default(call_default_factory=True))
        }

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {k: _plain(v, fields[k].annotation) if k in fields else v for k, v in values.items()}


def _plain(value: Any, kind: Any) -> Any:
    """Make one value for a list a list of one, and true, which a lone `--max-steps` gives, no number."""
    if isinstance(value, bool) and {int, float} & {kind, *get_args(kind), *map(type, get_args(kind))}:
        return str(value).lower()
    return (value,) if get_origin(kind) is tuple and isinstance(value, str | int | float) else value


def _plain_identity(value: Any) -> Any:
    """`value` as JSON has it, its configurations as their identities."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, tuple | list):
        return [_plain_identity(each) for each in value]
    return value
