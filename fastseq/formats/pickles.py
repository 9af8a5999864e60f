"""An interpreter of pickles that imports nothing and calls nothing a file names.

`pickle.Unpickler` with a restricted `find_class` would not be enough: a file of few bytes makes it allocate gigabytes
(the index of its memo), hash a tuple so deep that the stack of C ends, or fill a dict with keys that all collide. Names
of classes and functions are values here; what a call of one gives is decided by the reader, and everything it does not
know becomes `Opaque`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastseq.formats.source import FormatError, Source, short

# A checkpoint has about 60 opcodes and 5 containers for each of its tensors.
_MAX_OPCODES = 400_000
_MAX_CONTAINERS = 100_000
_TOO_MANY = f"more than {_MAX_CONTAINERS} lists, tuples, dicts and objects; save the state dict alone"
_MAX_MARKS = 1000
_STOP = ord(".")
_MAX_INTEGER = 256  # bytes
_MAX_NAME = 300
_KEYS = (str, bool, bytes, type(None))


@dataclass(frozen=True)
class Global:
    """The name of a class or function, which is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """A value that is not made: an object of a class that the reader does not know.

    Attributes
    ----------
    what : Global or str
        Its class, or the function that would make it.
    state : object
        What the pickle sets it to: often the dict of its attributes.
    """

    def __init__(self, what: Global | str) -> None:
        self.what = what
        self.state: Any = None

    def __str__(self) -> str:
        return f"an object of {self.what}"


def interpreted(
    source: Source, place: str, data: bytes, call: Callable[[Global, tuple[Any, ...]], Any], load: Callable[[Any], Any]
) -> Any:
    """Return what a pickle of protocol 2 to 5 holds.

    Parameters
    ----------
    source, place
        What errors name.
    data : bytes
    call : callable
        Given the name of a function or class and its arguments, returns its value: `Opaque` where it is not known. A
        `ValueError` says what is wrong with them.
    load : callable
        Given a persistent id, returns its value.
    """
    machine = _Machine(data, call, load)
    try:
        return machine.run()
    except FormatError:
        raise
    except (IndexError, KeyError):
        what = "ends early, or takes a value where there is none"
    except (ValueError, OverflowError, struct.error) as error:
        what = str(error)
    raise source.fault(f"{place}, byte {machine.opcode_place}", what)


class _Machine:
    """The stack of values and the memo; one method for each opcode that is allowed."""

    def __init__(self, data: bytes, call: Callable[[Global, tuple[Any, ...]], Any], load: Callable[[Any], Any]) -> None:
        self.data, self.position = data, 0
        self.call, self.load = call, load
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.containers = 0
        self.opcode_place = 0

    def run(self) -> Any:
        data = self.data
        for _ in range(_MAX_OPCODES):
            self.opcode_place = place = self.position
            self.position = place + 1
            opcode = data[place]
            if opcode == _STOP:
                if len(self.stack) != 1 or self.marked or self.position != len(data):
                    raise ValueError("stops where it has not ended")
                return self.stack[0]
            method = _METHODS.get(opcode)
            if method is None:
                raise ValueError(f"opcode {short(bytes([opcode]))} is not allowed")
            method(self)
        raise ValueError(f"more than {_MAX_OPCODES} opcodes; save the state dict alone")

    # Bytes of the pickle.

    def take(self, size: int) -> bytes:
        begin = self.position
        if size > len(self.data) - begin:
            raise ValueError(f"ends early: {size} bytes are asked for, and {len(self.data) - begin} left")
        self.position = begin + size
        return self.data[begin : begin + size]

    def octet(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME)
        if end < 0:
            raise ValueError("a name does not end")
        line = self.data[self.position : end].decode()
        self.position = end + 1
        return line

    # Values on the stack.

    def new(self, container: Any) -> None:
        self.containers += 1
        if self.containers > _MAX_CONTAINERS:
            raise ValueError(_TOO_MANY)
        self.stack.append(container)

    def since_mark(self) -> list[Any]:
        values = self.stack
        self.stack = self.marked.pop()
        return values

    def pop_typed(self, kind: type, what: str) -> Any:
        value = self.stack.pop()
        if not isinstance(value, kind):
            raise ValueError(f"{what} should be a {kind.__name__}, not {kind_of(value)}")
        return value

    # The opcodes.

    def protocol(self) -> None:
        if self.unsigned(1) not in (2, 3, 4, 5):
            raise ValueError("the protocol is none of 2 to 5")

    def frame(self) -> None:
        if self.unsigned(8) > len(self.data) - self.position:
            raise ValueError("a frame is longer than the pickle")

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []
        if len(self.marked) > _MAX_MARKS:
            raise ValueError(f"values nested deeper than {_MAX_MARKS}")

    def pop(self) -> None:
        self.stack.pop()

    def pop_mark(self) -> None:
        self.since_mark()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def integer(self, size: int) -> None:
        if size > _MAX_INTEGER:
            raise ValueError(f"an integer of {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def real(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def text(self, length: int) -> None:
        self.stack.append(self.take(self.unsigned(length)).decode("utf-8", "surrogatepass"))

    def old_text(self, length: int) -> None:
        self.stack.append(self.take(self.unsigned(length)).decode("latin-1"))

    def raw(self, length: int) -> None:
        self.stack.append(self.take(self.unsigned(length)))

    def short_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise IndexError
        values = tuple(self.stack[len(self.stack) - length :])
        del self.stack[len(self.stack) - length :]
        self.new(values)

    def marked_tuple(self) -> None:
        self.new(tuple(self.since_mark()))

    def append(self) -> None:
        self.extend([self.stack.pop()])

    def appends(self) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise ValueError(f"something is appended to {kind_of(target)}")

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def set_items(self) -> None:
        self.update(self.since_mark())

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if len(values) % 2 or not isinstance(target, dict | Opaque):
            raise ValueError(f"items are set of {kind_of(target)}")
        if isinstance(target, dict):
            target.update(zip(map(key_of, values[::2]), values[1::2], strict=True))

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def short_put(self) -> None:
        self.memo[self.octet()] = self.stack[-1]

    def short_get(self) -> None:
        self.stack.append(self.memo[self.octet()])

    def put(self, length: int) -> None:
        self.memo[self.unsigned(length)] = self.stack[-1]

    def get(self, length: int) -> None:
        self.stack.append(self.memo[self.unsigned(length)])

    def named_global(self) -> None:
        self.new(Global(self.line(), self.line()))

    def stack_global(self) -> None:
        name, module = self.pop_typed(str, "a name"), self.pop_typed(str, "a module")
        if len(name) + len(module) > _MAX_NAME:
            raise ValueError(f"a name of more than {_MAX_NAME} characters")
        self.new(Global(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop_typed(tuple, "arguments"), self.stack.pop()
        if isinstance(function, Global):
            self.new(self.call(function, arguments))
        elif isinstance(function, Opaque):
            self.new(Opaque(function.what))
        else:
            raise ValueError(f"{kind_of(function)} is called")

    def new_object(self) -> None:
        self.pop_typed(tuple, "arguments")
        self.new(Opaque(self.pop_typed(Global, "a class")))

    def new_object_named(self) -> None:
        self.pop_typed(dict, "named arguments")
        self.new_object()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state


def key_of(key: Any) -> Any:
    """A key of a dict: others than strings and small integers, whose hashes may collide or take long, are opaque."""
    if (type(key) is int and abs(key) < 2**60) or isinstance(key, _KEYS):
        return key
    return Opaque(f"a key of type {type(key).__name__}")


def kind_of(value: Any) -> str:
    """What a value is, in a message or a description; it may be of any size, and hold itself."""
    if isinstance(value, Global | Opaque):
        return str(value)
    return type(value).__name__


def _with(method: Callable[[_Machine, int], None], argument: int) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, argument)


_METHODS: dict[int, Callable[[_Machine], None]] = {
    ord("\x80"): _Machine.protocol,
    ord("\x95"): _Machine.frame,
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("2"): _Machine.duplicate,
    ord("N"): lambda machine: machine.stack.append(None),
    ord("\x88"): lambda machine: machine.stack.append(True),
    ord("\x89"): lambda machine: machine.stack.append(False),
    ord("K"): lambda machine: machine.stack.append(machine.octet()),
    ord("M"): lambda machine: machine.stack.append(machine.unsigned(2)),
    ord("J"): lambda machine: machine.integer(4),
    ord("\x8a"): lambda machine: machine.integer(machine.octet()),
    ord("\x8b"): lambda machine: machine.integer(machine.unsigned(4)),
    ord("G"): _Machine.real,
    ord("\x8c"): _with(_Machine.text, 1),
    ord("X"): _with(_Machine.text, 4),
    ord("\x8d"): _with(_Machine.text, 8),
    ord("U"): _with(_Machine.old_text, 1),
    ord("T"): _with(_Machine.old_text, 4),
    ord("C"): _with(_Machine.raw, 1),
    ord("B"): _with(_Machine.raw, 4),
    ord("\x8e"): _with(_Machine.raw, 8),
    ord("\x96"): _with(_Machine.raw, 8),
    ord(")"): _with(_Machine.short_tuple, 0),
    ord("\x85"): _with(_Machine.short_tuple, 1),
    ord("\x86"): _with(_Machine.short_tuple, 2),
    ord("\x87"): _with(_Machine.short_tuple, 3),
    ord("t"): _Machine.marked_tuple,
    ord("]"): lambda machine: machine.new([]),
    ord("}"): lambda machine: machine.new({}),
    ord("\x8f"): lambda machine: machine.new([]),  # a set is a list here: nothing in it is hashed
    ord("\x91"): lambda machine: machine.new(machine.since_mark()),  # a frozen set
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("\x90"): _Machine.appends,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("\x94"): _Machine.memoize,
    ord("q"): _Machine.short_put,
    ord("r"): _with(_Machine.put, 4),
    ord("h"): _Machine.short_get,
    ord("j"): _with(_Machine.get, 4),
    ord("c"): _Machine.named_global,
    ord("\x93"): _Machine.stack_global,
    ord("R"): _Machine.reduce,
    ord("\x81"): _Machine.new_object,
    ord("\x92"): _Machine.new_object_named,
    ord("b"): _Machine.build,
    ord("Q"): lambda machine: machine.new(machine.load(machine.stack.pop())),
}
