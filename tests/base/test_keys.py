"""`Keys`: what does not fit is refused with source, key and value, at once or all together."""

import pytest

from saejax.base.errors import FormatError, LMError
from saejax.base.keys import Keys

BAD = [
    ("is missing", lambda keys: keys.get("key", int), {}),
    ("='3' (not a whole number)", lambda keys: keys.get("key", int), "3"),
    ("=True (not a whole number)", lambda keys: keys.get("key", int), True),
    ("=None (not a whole number)", lambda keys: keys.get("key", int, 3), None),
    ("=1 (not true or false)", lambda keys: keys.get("key", bool, False), 1),
    ("=[1] (not a text)", lambda keys: keys.get("key", str, None), [1]),
    ("=-1 (not a whole number from 0 to", lambda keys: keys.count("key"), -1),
    ("=9 (not a whole number from 0 to 8)", lambda keys: keys.count("key", most=8), 9),
    ("=0 (not a whole number from 1 to", lambda keys: keys.size("key"), 0),
    ("=2147483648 (not", lambda keys: keys.size("key"), 1 << 31),
    ("=nan (not a number)", lambda keys: keys.number("key"), float("nan")),
    ("=inf (not a number)", lambda keys: keys.number("key"), float("inf")),
    ("=9007199254740993 (not a number)", lambda keys: keys.number("key"), (1 << 53) + 1),
    ("=False (not a number)", lambda keys: keys.number("key"), False),
    ("=[1] (not a list of 2 numbers)", lambda keys: keys.numbers("key", 2), [1]),
    ("=[1, 'a'] (not a list of finite numbers)", lambda keys: keys.numbers("key"), [1, "a"]),
    ("='0g' (not 2 hexadecimal digits)", lambda keys: keys.hex("key", 2), "0g"),
    ("=1 (not one of True, 'a')", lambda keys: keys.one_of("key", (True, "a")), 1),
    ("=[] (not an object)", lambda keys: keys.section("key"), []),
    ("='aaaaa", lambda keys: keys.refuse_unread(), "a" * 999),
]


@pytest.mark.parametrize("problem, read, value", BAD, ids=[problem for problem, *_ in BAD])
def test_what_does_not_fit_is_refused(problem, read, value):
    values = {} if problem == "is missing" else {"key": value}
    expected = "key is missing" if not values else f"key{problem}"
    with pytest.raises(FormatError) as error:
        read(Keys({"part": values}, "a.json", FormatError).section("part"))
    assert str(error.value).startswith(f"a.json: part.{expected}") and len(str(error.value)) < 200
    whole = Keys({"part": values}, "a model", LMError, collect=True)
    read(whole.section("part"))  # goes on
    with pytest.raises(LMError) as error:
        whole.finish()
    assert str(error.value).startswith(f"a model: part.{expected}")


def test_what_fits_is_read():
    keys = Keys({"n": 3, "x": 2, "y": [1, 2.5], "off": None, "in": {"kind": "a"}, "more": 0}, "a.json", FormatError)
    assert keys.get("n", int) == keys.size("n") == keys.count("n", least=3, most=3) == 3 and keys.get("gone", str, "a") == "a"
    assert type(keys.number("x")) is float and keys.numbers("y", 2) == (1.0, 2.5)
    assert keys.number("off", None) is None and keys.size("gone", None) is None
    assert keys.section("in").one_of("kind", ("b", "a")) == "a" and keys.section("gone", {}).values == {}
    keys.ignore("more")
    keys.finish()


def test_problems_are_collected_once_and_in_order():
    keys = Keys({"a": "x", "part": {"b": 0}, "c": 1, "d": 2}, "a model", LMError, collect=True)
    part = keys.section("part")
    for _ in range(2):
        assert (keys.size("a"), part.size("b"), keys.one_of("e", ("f",))) == (1, 1, "f")
    with pytest.raises(LMError, match=r"^a model: a='x' \([^;]*; part.b=0 \([^;]*; e is missing; c=1, d=2 \(unknown key; "):
        keys.finish()


@pytest.mark.parametrize("values", [None, [], "{}", 3])
def test_no_object(values):
    with pytest.raises(FormatError, match=r"^a.json: .* \(not an object\)$"):
        Keys(values, "a.json", FormatError)
