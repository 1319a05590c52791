"""Plain values -> the frozen dataclasses of `saejax.config`, by their fields' types and rules; and one value from its text."""

import dataclasses
import difflib
import types
import typing


def base_type(hint):
    """`int` from `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def build(cls, values, path: str, problems: list[str]):
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        problems.append(f"config.{path}: expected a section with keys {', '.join(known)}, got {values!r}")
        return cls()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {join(path, near[0])!r}?" if near else f"; known: {', '.join(known)}"
            problems.append(f"config: unknown key {join(path, key)!r}{hint}")
    kwargs = {}
    for name, f in known.items():
        if name not in values:
            continue
        here = join(path, name)
        if dataclasses.is_dataclass(hints[name]):
            kwargs[name] = build(hints[name], values[name], here, problems)
        else:
            kwargs[name] = _checked(values[name], hints[name], f.metadata, here, problems)
    return cls(**kwargs)


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _checked(value, hint, rules, path: str, problems: list[str]):
    base = base_type(hint)
    if value is None and base is not hint:
        return None
    if typing.get_origin(base) is tuple:
        item, words = (str, "strings") if typing.get_args(base)[0] is str else (float, "numbers")
        empty = rules.get("empty", False)
        if item is float and isinstance(value, (list, tuple)):
            value = tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, item) for v in value) or not (value or empty):
            problems.append(f"config.{path}: expected a {'' if empty else 'non-empty '}tuple of {words}, got {value!r}")
            return ()
        for v in value:
            _check_choice(v, rules, path, problems)
        return tuple(value)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        problems.append(f"config.{path}: expected {base.__name__}, got {type(value).__name__} {value!r}")
        return value
    _check_choice(value, rules, path, problems)
    for rule, ok, words in (("ge", lambda a, b: a >= b, "at least"), ("gt", lambda a, b: a > b, "greater than"),
                            ("le", lambda a, b: a <= b, "at most"), ("lt", lambda a, b: a < b, "less than")):
        if rule in rules and not ok(value, rules[rule]):
            problems.append(f"config.{path}: {value!r} must be {words} {rules[rule]}")
    return value


def _check_choice(value, rules, path: str, problems: list[str]) -> None:
    if "choices" in rules and value not in rules["choices"]:
        problems.append(f"config.{path}: {value!r} is not one of {', '.join(map(str, rules['choices']))}")


def leaf(cls, key: str) -> tuple[type, dataclasses.Field] | None:
    """(type, field) of a dotted key of a config dataclass; None for a section or a key that does not exist."""
    *parents, name = key.split(".")
    for parent in parents:
        cls = typing.get_type_hints(cls).get(parent)
        if not dataclasses.is_dataclass(cls):
            return None
    hint = typing.get_type_hints(cls).get(name)
    if hint is None or dataclasses.is_dataclass(hint):
        return None
    return hint, next(f for f in dataclasses.fields(cls) if f.name == name)


def from_text(text: str, hint):
    """A value of a field's type from how it is written in a sweep; the items of a tuple are joined by `+`.

    Raises `ValueError` that says what was expected.
    """
    base = base_type(hint)
    if base is not hint and text == "none":
        return None
    if typing.get_origin(base) is tuple:
        item = typing.get_args(base)[0]
        return tuple(from_text(part, item) for part in text.split("+")) if text else ()
    if base is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    if base is str:
        return text
    try:
        value = base(text)
    except ValueError:
        raise ValueError(f"expected {base.__name__}, got {text!r}{rounder(text)}") from None
    if value != value:
        raise ValueError(f"expected a number, got {text!r}")
    return value


def rounder(text: str) -> str:
    """A whole number in another spelling (1e6, 10.0, 1_000) is named as Python would read it."""
    try:
        number = float(text)
        return f"; write {int(number)}" if number.is_integer() else ""
    except (ValueError, OverflowError):
        return ""


def nearest(key: str, known) -> str:
    """The known key that is most like a mistaken one, or "" where none is."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    return near[0] if near else ""
