"""Options as typed dataclasses: command-line arguments, defaults, choices and help all come from the one table.

A field is written as `option(default, help)` with its type as annotation; `Literal[...]` gives choices, `bool` a flag,
`X | None` an optional value and `tuple[X, ...]` an argument that may be repeated.

>>> @dataclasses.dataclass(frozen=True)
... class Example:
...     mode: Literal["fast", "exact"] = option("fast", "how it is done")
...     size: int = option(512, "examples at once", metavar="N", least=4)
>>> parser = argparse.ArgumentParser()
>>> add_arguments(parser, Example)
>>> from_args(parser.parse_args(["--size", "8"]), Example)
Example(mode='fast', size=8)
>>> build(Example, {"mod": "exact"})
Traceback (most recent call last):
...
cka_addon.errors.SpecError: got option 'mod'; did you mean 'mode'?
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

from cka_addon.errors import SpecError

__all__ = ["Literal", "add_arguments", "build", "check", "did_you_mean", "from_args", "option", "values_of"]
T = TypeVar("T")


def option(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    short: str | None = None,
    least: float | None = None,
) -> Any:
    """A dataclass field with its help. short : one-letter form, e.g. "-a"; least : smallest value allowed."""
    return dataclasses.field(
        default=default, metadata={"help": text, "metavar": metavar, "short": short, "least": least}
    )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """End of a message about an unknown name.

    >>> did_you_mean("fbnk", ["fbank", "mfcc"]), did_you_mean("x", ["fbank", "mfcc"])
    ("; did you mean 'fbank'?", '; expected one of: fbank, mfcc')
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; expected one of: {', '.join(known)}"


def _kind(hint: Any) -> tuple[type, tuple[str, ...], bool, bool]:
    """(plain type, choices, may be None, may be repeated) of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kind, choices, _, many = _kind(next(a for a in args if a is not type(None)))
        return kind, choices, True, many
    if origin is Literal:
        return type(args[0]), args, False, False
    if origin is tuple:
        kind, choices, _, _ = _kind(args[0])
        return kind, choices, False, True
    return hint, (), False, False


def add_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    only: Collection[str] | None = None,
    required: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Add an argument for every field of the dataclass `cls` (only for those named, where `only` is given)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only or "help" not in field.metadata:
            continue
        kind, choices, _, many = _kind(hints[field.name])
        default = (defaults or {}).get(field.name, field.default)
        names = [n for n in (field.metadata["short"], "--" + field.name.replace("_", "-")) if n]
        text = field.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"dest": field.name, "help": text, "default": default}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction if default else "store_true", **keywords)
            continue
        keywords |= {"type": kind, "metavar": field.metadata["metavar"], "required": field.name in required}
        if choices:
            keywords |= {"choices": choices, "metavar": None}
        if many:
            keywords |= {"action": "append", "default": None}
        elif default is not None and default != "" and "default" not in text:
            keywords["help"] += f" (default {default})"
        parser.add_argument(*names, **keywords)


def values_of(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The parsed values of the fields of `cls`, those that have arguments."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if hasattr(args, field.name):
            value = getattr(args, field.name)
            found[field.name] = tuple(value or ()) if _kind(hints[field.name])[3] else value
    return found


def from_args(args: argparse.Namespace, cls: type[T]) -> T:
    """An instance of the dataclass `cls` from parsed arguments."""
    return cls(**values_of(args, cls))


def build(cls: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """An instance of `cls` with `values` over `base` (or the defaults). Raises SpecError for an unknown name."""
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise SpecError(f"got option '{name}'{did_you_mean(name, known)}")
    return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]


def check(options: Any) -> None:
    """Raise SpecError where a value is not of its field's type, not among its choices or below its least value."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        kind, choices, optional, many = _kind(hints[field.name])
        value = getattr(options, field.name)
        if value is None and optional:
            continue
        for item in value if many and isinstance(value, (tuple, list)) else [value]:
            if choices and item not in choices:
                raise SpecError(f"got {field.name}={item!r}; expected one of {', '.join(map(str, choices))}")
            fits = isinstance(item, (int, float)) if kind is float else isinstance(item, kind)
            if not fits or kind is not bool and isinstance(item, bool):
                raise SpecError(f"got {field.name}={item!r}; expected {kind.__name__}")
            least = field.metadata.get("least")
            if least is not None and item < least:
                raise SpecError(f"got {field.name}={item}; expected at least {least}")
