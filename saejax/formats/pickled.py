"""An interpreter of the pickles that torch writes: plain containers, numbers, strings and descriptions of tensors.

It is no unpickler with a filter: it knows the opcodes below and three names that it never imports or calls, and refuses
everything else. Nothing in a file can make it run code, touch an attribute or allocate more than the file itself takes.
"""

import math
import pickletools
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import FormatError

SIZE_CAP = 64 << 20  # of the pickle, which holds no tensor bytes
STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
            "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
_REBUILD, _PARAMETER, _ORDERED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"
_NAMES = {_REBUILD, _PARAMETER, _ORDERED, *(f"torch.{name}" for name in STORAGES)}
_ITEMS = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "INT", "LONG", "FLOAT"}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions; compared by its text only."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A storage of `count` numbers, in the archive's member `key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, `start` numbers into it."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    pass


def read_pickle(data: bytes, path: Path):
    """The value of a pickle: dicts, lists, tuples, numbers, strings and `StoredTensor`. Raises `FormatError` for all else."""
    if len(data) > SIZE_CAP:
        raise FormatError(f"{path}: a pickle of {len(data):,} bytes, at most {SIZE_CAP:,} are read")
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.result()
            machine.run(opcode.name, argument)
    except FormatError:
        raise
    except (ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a readable pickle ({type(error).__name__}: {error})") from error
    raise FormatError(f"{path}: not a readable pickle (no end)")


class _Machine:
    def __init__(self, path: Path):
        self.path, self.stack, self.memo = path, [], {}

    def result(self):
        (value,) = self.stack
        return value

    def run(self, name: str, argument) -> None:
        push = self.stack.append
        if name in _NUMBERS or name in _STRINGS:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _ITEMS:
            pass
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            push(_Mark)
        elif name in _TUPLES:
            push(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            push(tuple(self._to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else self._pop(2)
            push(self._name(".".join(parts)))
        else:
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Opcodes that put values into others."""
        if name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._to_mark()
            target = self._target(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) not in (str, int):
                    raise FormatError(f"{self.path}: a dict key of type {type(key).__name__} in a pickle; only text and "
                                      "numbers are read")
                target[key] = value
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._to_mark()
            self._target(list).extend(items)
        elif name == "BINPERSID":
            self.stack.append(self._storage(*self._pop(1)))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            self.stack.append(self._reduce(function, arguments))
        elif name == "BUILD":  # torch hangs `_metadata` (module versions) on a state dict
            state = self._pop(1)[0]
            if not (isinstance(self.stack[-1], dict) and isinstance(state, dict) and set(state) <= {"_metadata"}):
                raise FormatError(f"{self.path}: its pickle sets attributes of an object; only tensors and containers are read")
        else:
            raise FormatError(f"{self.path}: pickle opcode {name}; only tensors and plain containers are read, no code is run")

    def _name(self, text: str) -> Name:
        if text not in _NAMES:
            raise FormatError(f"{self.path}: its pickle asks for {text!r}; only tensors and plain containers are read, no code "
                              "is run")
        return Name(text)

    def _pop(self, n: int) -> list:
        if len(self.stack) < n or _Mark in self.stack[len(self.stack) - n:]:
            raise ValueError("stack underflow")
        values = self.stack[len(self.stack) - n:]
        del self.stack[len(self.stack) - n:]
        return values

    def _to_mark(self) -> list:
        at = len(self.stack) - 1 - self.stack[::-1].index(_Mark)
        values = self.stack[at + 1:]
        del self.stack[at:]
        return values

    def _target(self, kind: type):
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__}")
        return self.stack[-1]

    def _storage(self, pid) -> Storage:
        tag, kind, key, _, count = pid
        dtype = STORAGES.get(kind.text.removeprefix("torch.")) if isinstance(kind, Name) else None
        if tag != "storage" or dtype is None or not (isinstance(key, str) and key.isdigit()) or not _whole(count):
            raise FormatError(f"{self.path}: a malformed storage in its pickle")
        return Storage(key, dtype, count)

    def _reduce(self, function, arguments):
        if function == Name(_ORDERED) and arguments in ((), ([],)):
            return {}
        if function == Name(_PARAMETER) and isinstance(arguments[0], StoredTensor):
            return arguments[0]
        if function == Name(_REBUILD) and isinstance(arguments[0], Storage):
            storage, start, shape, strides = arguments[:4]
            if all(map(_whole, (start, *shape, *strides))) and len(shape) == len(strides) <= 8:
                return StoredTensor(storage, start, tuple(shape), tuple(strides))
        raise FormatError(f"{self.path}: its pickle calls {getattr(function, 'text', type(function).__name__)!r} in a way that "
                          "is not a tensor; nothing is called")


def _whole(n) -> bool:
    return type(n) is int and 0 <= n < 1 << 48


def extent(tensor: StoredTensor) -> int:
    """Numbers from the beginning of the storage to the end of the view."""
    if math.prod(tensor.shape) == 0:
        return tensor.start
    return tensor.start + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
