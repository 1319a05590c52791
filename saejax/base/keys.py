"""`Keys`: a JSON object read key by key. Every value is checked, and no key is overlooked."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from saejax.base.errors import SaejaxError

REQUIRED: Any = object()  # the default of a key that must be there
_KINDS = {int: "a whole number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
_HEX = frozenset("0123456789abcdef")


class Keys:
    """An object from a file. A key that is missing or does not fit is refused with one line: source, key and value.

    A null is a value like others; it is let through where the default is None. source: the file, or what the object is.
    collect: problems are noted and raised as one by `finish`; until then a harmless value stands for one that does not fit.
    """

    def __init__(self, values: Any, source: object, error: type[SaejaxError], collect: bool = False):
        if not isinstance(values, Mapping):
            raise error(f"{source}: {short(values)} (not an object)")
        self.source, self.error, self.collect, self.prefix = source, error, collect, ""
        self.values, self._read, self.problems = dict(values), set(), []

    def refuse(self, problem: str, instead: Any = None) -> Any:
        """Raises the problem, or notes it and gives `instead`. It begins with the key, without the sections around it."""
        problem = self.prefix + problem
        if not self.collect:
            raise self.error(f"{self.source}: {problem}")
        if problem not in self.problems:
            self.problems.append(problem)
        return instead

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """The value, unchecked."""
        self._read.add(key)
        return self.values.get(key, default)

    def checked(self, key: str, default: Any, fits: Callable[[Any], bool], problem: str, instead: Any) -> Any:
        """The value or `default`, if it fits."""
        value = self.value(key, default)
        if value is REQUIRED:
            return self.refuse(f"{key} is missing", instead)
        if value is None and default is None or fits(value):
            return value
        return self.refuse(f"{key}={short(value)} ({problem})", instead)

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """An int, str, bool, list or dict."""
        return self.checked(key, default, lambda value: _is(value, kind), f"not {_KINDS[kind]}", kind())

    def count(self, key: str, default: Any = REQUIRED, *, least: int = 0, most: int = 1 << 48) -> int:
        return self.checked(key, default, lambda value: _is(value, int) and least <= value <= most,
                            f"not a whole number from {least} to {most}", least)

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """At least 1 and below 2^31."""
        return self.count(key, default, least=1, most=(1 << 31) - 1)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number."""
        value = self.checked(key, default, _is_number, "not a number", 1.0)
        return None if value is None else float(value)

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers, of any length without `length`."""
        def fits(value):
            return isinstance(value, list | tuple) and length in (None, len(value)) and all(map(_is_number, value))
        return tuple(map(float, self.checked(key, REQUIRED, fits, f"not a list of {length or 'finite'} numbers", ())))

    def hex(self, key: str, digits: int = 64) -> str:
        return self.checked(key, REQUIRED, lambda value: _is(value, str) and len(value) == digits and _HEX.issuperset(value),
                            f"not {digits} hexadecimal digits", "")

    def one_of(self, key: str, allowed: Iterable, default: Any = REQUIRED) -> Any:
        """A value that is among those that are understood."""
        allowed = tuple(allowed)
        return self.checked(key, default, lambda value: any(type(value) is type(a) and value == a for a in allowed),
                            f"not one of {', '.join(map(repr, allowed))}", allowed[0] if default is REQUIRED else default)

    def section(self, key: str, default: Any = REQUIRED) -> "Keys":
        """An object in this one."""
        return self.inside(self.get(key, dict, default), key)

    def inside(self, values: Any, name: str) -> "Keys":
        """`values`, an object that lies at `name` in this one. Its problems are noted here."""
        part = copy.copy(self)
        part.values = dict(values if isinstance(values, Mapping) else self.refuse(f"{name}={short(values)} (not an object)", {}))
        part.prefix, part._read = f"{self.prefix}{name}.", set()
        return part

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing here."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        return [key for key in self.values if key not in self._read]

    def refuse_unread(self) -> None:
        """Refuses the keys that nobody read or ignored."""
        if keys := self.unread()[:20]:
            named = f", {self.prefix}".join(f"{key[:60]}={short(self.values[key])}" for key in keys)
            self.refuse(f"{named} (unknown key; written by a newer version, or not this format: what it changes is not known)")

    def finish(self) -> None:
        """`refuse_unread`; then the problems that were noted are raised as one."""
        self.refuse_unread()
        if self.problems:
            raise self.error(f"{self.source}: {'; '.join(self.problems)}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return _is(value, float) and math.isfinite(value) or _is(value, int) and abs(value) < 1 << 53


def short(value: Any) -> str:
    """`repr`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
