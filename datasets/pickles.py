"""Reads what Python and NumPy have pickled: a dict of numbers, texts, lists and arrays of bytes, and nothing else.

A pickle is a program: it names functions and calls them. Python's own reader carries it out; this one follows its
instructions itself, without calling anything. It knows those that data needs, and four names, which NumPy writes for an array.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dpresnet.errors import Refused


@dataclass(frozen=True)
class _Name:
    """One of the names that a pickle may mention."""

    text: str


RECONSTRUCT, NDARRAY, DTYPE, ENCODE = map(_Name, ("_reconstruct", "ndarray", "dtype", "encode"))
NAMES = {
    "numpy.core.multiarray _reconstruct": RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": RECONSTRUCT,
    "numpy ndarray": NDARRAY,
    "numpy dtype": DTYPE,
    "_codecs encode": ENCODE,  # how Python 3 writes bytes for Python 2
}
BYTES = _Name("dtype('u1')")

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # of Python 2, which are bytes
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Array:
    """An array between the instruction that makes it and the one that fills it."""

    value: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        """Takes NumPy's (version, shape, type, whether in Fortran's order, bytes)."""
        _, shape, dtype, fortran, content = state
        if dtype is not BYTES or not isinstance(content, bytes) or not isinstance(shape, tuple):
            raise ValueError("it holds an array that is not of bytes")
        if not all(type(n) is int and n >= 0 for n in shape) or prod(shape) != len(content):
            raise ValueError(f"it holds an array of shape {shape} with {len(content)} bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def loads(content: bytes, where: str) -> dict[str, Any]:
    """The dict of a pickle: keys as text, values int, float, str, bytes, list, tuple, dict or np.ndarray of uint8.

    Texts of Python 2 are bytes, but for the keys. Refused, naming ``where``, for anything else.
    """
    try:
        found = _Machine().run(pickletools.genops(content))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not a dict")
        return {key: value.value if isinstance(value, _Array) else value for key, value in found.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # what malformed instructions lead to
        raise Refused(f"{where} is not the pickle that was published ({' '.join(str(error).split())}): get it again") from None


class _Machine:
    """The stack that the instructions work on. What it makes is a tree: only texts, numbers and names are used twice, as
    containers that hold each other could be larger than memory.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, instructions: Iterator[tuple]) -> Any:
        """Follows all instructions; the value that is left."""
        for opcode, argument, position in instructions:
            if not (self._push(opcode.name, argument) or self._combine(opcode.name, argument)):
                raise ValueError(f"it has the instruction {opcode.name} at byte {position}")
        return self.stack.pop()

    def _push(self, name: str, argument: Any) -> bool:
        """Instructions that put a value on the stack; False for another one."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in STRINGS:
            self.stack.append(argument.encode("latin-1"))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            self.stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "GLOBAL":
            self.stack.append(_name(argument))
        elif name in ("BINGET", "LONG_BINGET"):
            if not isinstance(value := self.memo[argument], str | bytes | int | float | _Name):
                raise ValueError(f"it uses a {type(value).__name__} twice")
            self.stack.append(value)
        else:
            return False
        return True

    def _combine(self, name: str, argument: Any) -> bool:
        """Instructions that work on what is on the stack; False for another one."""
        if name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name == "TUPLE" or name in TUPLES:
            items = self._marked() if name == "TUPLE" else self._top(TUPLES[name])
            self.stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._top(1) if name == "APPEND" else self._marked()
            self._last(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._top(2) if name == "SETITEM" else self._marked()
            self._last(dict).update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif name == "STACK_GLOBAL":
            self.stack.append(_name(" ".join(self._top(2))))
        elif name == "REDUCE":
            self.stack.append(_called(*self._top(2)))
        elif name == "BUILD":
            (state,) = self._top(1)
            if self.stack[-1] is not BYTES:  # byte order and alignment say nothing about bytes
                self._last(_Array).fill(state)
        else:
            return False
        return True

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("it takes more than it has made")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"it treats a {type(self.stack[-1]).__name__} as a {kind.__name__.strip('_')}")
        return self.stack[-1]


def _name(text: str) -> _Name:
    if text not in NAMES:
        raise ValueError(f"it asks for {text.replace(' ', '.')}, which has no place in it")
    return NAMES[text]


def _called(function: Any, arguments: tuple) -> Any:
    """What would come of calling one of the names."""
    if function is RECONSTRUCT and arguments[0] is NDARRAY:
        return _Array()
    if function is DTYPE and arguments[0] in ("u1", b"u1"):
        return BYTES
    if function is ENCODE and isinstance(arguments[0], str) and arguments[1] in ("latin1", b"latin1"):
        return arguments[0].encode("latin-1")
    called = function.text if isinstance(function, _Name) else type(function).__name__
    raise ValueError(f"it calls {called} with other arguments")


def _key(key: Any) -> str:
    if not isinstance(key, str | bytes):
        raise ValueError(f"it has a key that is a {type(key).__name__}")
    return key.decode("ascii") if isinstance(key, bytes) else key
