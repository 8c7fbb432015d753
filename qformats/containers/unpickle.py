"""A pickle read as data: an opcode machine that builds plain values and can call nothing. Torch-free.

Python's own unpickler is not used, not even as a base class. A global never becomes a Python object: it is looked up in a table of
``Callables`` by its dotted name, and what is not in the table ends the reading at once (``Unsafe('pickle-global')``), before anything
that follows is looked at. A table entry is a function of this project that makes a plain value of plain values.

Accepted are the opcodes that pickle writes in protocols 2 to 5 (CPython 3.11, ``Lib/pickletools.py``) for scalars, strings, containers,
globals, ``REDUCE``, ``NEWOBJ``, ``BUILD`` and persistent ids. Refused by name: the text opcodes of protocols 0 and 1 (``INST``, ``OBJ``
among them), the extension registry (``EXT1 EXT2 EXT4``), out-of-band buffers, ``DUP``, ``POP`` and ``POP_MARK``.
Every size is held against what is left before anything is allocated; opcodes, objects and memo are counted. The value that comes out
is a finite tree: cycles are refused, and its nodes, counted as often as they can be reached, are limited, so that walking is safe.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported

__all__ = ["MAX_DEPTH", "MAX_OBJECTS", "MAX_PICKLE_NBYTES", "Global", "Record", "Symbol", "plain_tree", "unpickle"]

MAX_PICKLE_NBYTES = 1 << 26
MAX_OPERATIONS = 1 << 24
MAX_OBJECTS = 1 << 21
MAX_MEMO = 1 << 22
MAX_STRING_NBYTES = 1 << 24
MAX_INTEGER_NBYTES = 16  # room for padding; values have 64 bits
MAX_NAME_NBYTES = 512
MAX_DEPTH = 64
PROTOCOLS = (2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Symbol:
    """An inert name, such as ``torch.float16``: a constant of the writer's program that stands for itself."""

    path: str


@dataclass(slots=True, eq=False)
class Record:
    """An inert object of a class that the caller allowed: its dotted name, the arguments it was made with, the state it was given."""

    class_name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that a pickle may use. ``call`` makes a value of the arguments, None if it is a constant; ``symbol`` is its plain value."""

    symbol: Symbol
    call: Callable[[tuple[Any, ...]], Any] | None = None
    is_class: bool = False


_SMALL = (str, int)  # what may be a key: both hash in time of their own size, once


def unpickle(
    data: bytes, *, globals_: Callable[[str], Global | None], persistent: Callable[[Any], Any] | None = None, name: str = "pickle"
) -> Any:
    """The value of one pickle as plain Python, ``Symbol`` and ``Record`` (and what the calls of ``globals_`` and ``persistent`` return).

    ``globals_`` gives what a dotted name means, None for names that are refused. Raises ``Unsafe``: ``pickle-global``, ``pickle-opcode``,
    ``pickle-extension``, ``pickle-call``, ``pickle-build``, ``pickle-limit``, ``pickle-cycle``, ``pickle-trailing``; ``BadFile``:
    ``pickle-truncated``, ``pickle-stack``, ``pickle-memo``, ``pickle-value``; ``Unsupported('pickle-protocol')``.
    """
    if len(data) > MAX_PICKLE_NBYTES:
        raise Unsafe("pickle-limit", f"the pickle has {len(data)} bytes, at most {MAX_PICKLE_NBYTES} are read", path=name)
    machine = _Machine(data, globals_, persistent, name)
    value = machine.run()
    return plain_tree(machine.finished(value), name)


class _Machine:
    """The state of one run: position, stack, memo and the counts that bound them."""

    def __init__(self, data: bytes, globals_: Callable[[str], Global | None], persistent: Callable[[Any], Any] | None, name: str) -> None:
        self.data, self.at, self.name = data, 0, name
        self.globals, self.persistent = globals_, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.objects = 0
        self.known: dict[str, Global] = {}

    def run(self) -> Any:
        """Carry out opcodes until STOP."""
        self._protocol()
        data, table, start = self.data, _OPCODES, 0
        for _ in range(MAX_OPERATIONS):
            if self.at >= len(data):
                raise self.bad("pickle-truncated", "ends without STOP")
            start = self.at
            code = data[start]
            self.at = start + 1
            if code == _STOP:
                return self._stop()
            action = table.get(code)
            if action is None:
                self.at = start
                raise self._refused(code)
            action(self)
        raise self.unsafe("pickle-limit", f"has more than {MAX_OPERATIONS} operations")

    def _protocol(self) -> None:
        if not self.data.startswith(b"\x80") or len(self.data) < 2:
            raise self.bad("pickle-truncated" if len(self.data) < 2 else "pickle-value", "does not begin with a protocol number")
        if self.data[1] not in PROTOCOLS:
            message = f"is a pickle of protocol {self.data[1]}, expected 2 to 5"
            raise Unsupported("pickle-protocol", message, path=self.name, hint="save it again with torch.save")
        self.at = 2

    def _stop(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise self.bad("pickle-stack", f"stops with {len(self.stack)} values on its stack, expected one")
        if self.at != len(self.data):
            raise self.unsafe("pickle-trailing", f"{len(self.data) - self.at} bytes follow its end")
        return self.stack[0]

    def finished(self, value: Any) -> Any:
        """The result, where a class or a constant alone is what its name says."""
        return value.symbol if isinstance(value, Global) else value

    # ------------------------------------------------------------ errors

    def bad(self, code: str, message: str) -> QFormatError:
        """The pickle is damaged."""
        return BadFile(code, f"the pickle {message}", path=self.name, offset_bytes=self.at)

    def unsafe(self, code: str, message: str) -> QFormatError:
        """The pickle wants what is never done."""
        hint = "nothing of it was run; get the checkpoint from its author as safetensors"
        return Unsafe(code, f"the pickle {message}", path=self.name, offset_bytes=self.at, hint=hint)

    def _refused(self, code: int) -> QFormatError:
        if code in _EXTENSIONS:
            return self.unsafe("pickle-extension", "uses the extension registry")
        if code in _KNOWN_REFUSED:
            return self.unsafe("pickle-opcode", f"uses the opcode {_KNOWN_REFUSED[code]}, which no checkpoint needs")
        return self.bad("pickle-value", f"holds {code:#04x}, which is no opcode")

    # ------------------------------------------------------------ reading and the stack

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the pickle."""
        end = self.at + nbytes
        if end > len(self.data):
            raise self.bad("pickle-truncated", f"wants {nbytes} bytes, {len(self.data) - self.at} are left")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, nbytes: int) -> int:
        """The next bytes as an unsigned number."""
        return int.from_bytes(self.take(nbytes), "little")

    def text(self, nbytes: int) -> bytes:
        """The bytes of a string whose length takes ``nbytes``."""
        length = self.number(nbytes)
        if length > MAX_STRING_NBYTES:
            raise self.unsafe("pickle-limit", f"holds a string of {length} bytes, at most {MAX_STRING_NBYTES} are read")
        self.count()
        return self.take(length)

    def decoded(self, raw: bytes) -> str:
        """UTF-8 text; what pickle writes for lone surrogates is refused."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("pickle-value", "holds text that is not UTF-8") from None

    def line(self) -> str:
        """Text up to a line feed."""
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME_NBYTES)
        if end < 0:
            raise self.bad("pickle-truncated", "holds a name without an end")
        raw, self.at = self.data[self.at : end], end + 1
        return self.decoded(raw)

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def count(self) -> None:
        """One more object."""
        self.objects += 1
        if self.objects > MAX_OBJECTS:
            raise self.unsafe("pickle-limit", f"builds more than {MAX_OBJECTS} objects")

    def pop(self) -> Any:
        """The value on top, which may not lie under a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.bad("pickle-stack", "takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        """The value on top, left there."""
        value = self.pop()
        self.stack.append(value)
        return value

    def above_mark(self) -> list[Any]:
        """The values above the last mark, taken off."""
        if not self.marks:
            raise self.bad("pickle-stack", "looks for a mark that is not there")
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    # ------------------------------------------------------------ memo

    def put(self, key: int) -> None:
        """Remember the value on top; a key is written once."""
        if key in self.memo:
            raise self.bad("pickle-memo", f"writes memo entry {key} twice")
        if len(self.memo) >= MAX_MEMO:
            raise self.unsafe("pickle-limit", f"remembers more than {MAX_MEMO} values")
        self.memo[key] = self.top()

    def get(self, key: int) -> None:
        """Push a remembered value."""
        if key not in self.memo:
            raise self.bad("pickle-memo", f"asks for memo entry {key}, which was never written")
        self.stack.append(self.memo[key])

    # ------------------------------------------------------------ names and calls

    def find(self, module: str, name: str) -> None:
        """Push what a name means, or stop."""
        path = f"{module}.{name}"
        found = self.known.get(path)
        if found is None:
            if len(path) > MAX_NAME_NBYTES:
                raise self.unsafe("pickle-limit", f"holds a name of {len(path)} characters")
            found = self.globals(path)
            if found is None:
                raise self.unsafe("pickle-global", f"asks for {path!r}, which is not part of a checkpoint")
            self.known[path] = found
        self.stack.append(found)

    def call(self, function: Any, args: Any, keywords: Any = None) -> None:
        """Push what a name makes of arguments."""
        if not isinstance(function, Global) or function.call is None:
            word = repr(function.symbol.path) if isinstance(function, Global) else f"a {type(function).__name__}"
            raise self.unsafe("pickle-call", f"calls {word}")
        if type(args) is not tuple:
            raise self.unsafe("pickle-call", f"calls {function.symbol.path!r} with a {type(args).__name__}")
        self.count()
        try:
            value = function.call(tuple(self.finished(arg) for arg in args))
        except QFormatError as error:
            error.locate(path=self.name)
            raise
        if keywords:
            if not isinstance(value, Record):
                raise self.unsafe("pickle-call", f"calls {function.symbol.path!r} with keywords")
            value.keywords.update(keywords)
        self.stack.append(value)

    def build(self) -> None:
        """Give the value on top a state: a ``Record`` keeps it, attributes of an ordered dict are dropped, all else is refused."""
        state, target = self.pop(), self.top()
        if isinstance(target, Record) and target.state is None:
            target.state = self.finished(state)
        elif type(target) is not dict or type(state) is not dict:
            word = f"a {target.class_name} twice" if isinstance(target, Record) else f"a {type(target).__name__}"
            raise self.unsafe("pickle-build", f"sets the state of {word}")

    # ------------------------------------------------------------ containers

    def new(self, value: Any) -> None:
        """Push a fresh container."""
        self.count()
        self.stack.append(value)

    def fill(self, kind: type, items: list[Any]) -> Any:
        """The container on top, if it is of the right kind."""
        target = self.top()
        if type(target) is not kind:
            raise self.bad("pickle-value", f"adds {len(items)} items to a {type(target).__name__}, expected a {kind.__name__}")
        return target

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top."""
        self.fill(list, items).extend(self.finished(item) for item in items)

    def add(self, items: list[Any]) -> None:
        """Add to the set on top."""
        self.fill(set, items).update(self.key(item) for item in items)

    def update(self, items: list[Any]) -> None:
        """Set keys of the dict on top; of two values for one key the last stands, as in Python, but a checkpoint has none."""
        if len(items) % 2:
            raise self.bad("pickle-stack", "has a key without a value")
        target = self.fill(dict, items)
        for key, value in zip(items[::2], items[1::2]):
            if self.key(key) in target:
                raise self.bad("pickle-value", f"sets the key {str(key)[:80]!r} twice")
            target[key] = self.finished(value)

    def key(self, value: Any) -> Any:
        """A value that may be hashed."""
        if type(value) not in _SMALL:
            raise self.bad("pickle-value", f"has a {type(value).__name__} as a key, expected text or a number")
        return value


def plain_tree(value: Any, name: str) -> Any:
    """``value``, which is a finite tree: ``Unsafe`` (``pickle-cycle``, ``pickle-limit``) where walking it would not end soon.

    Nodes are counted as often as they can be reached, so that a few nested references to one list cannot grow without bounds.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of finished containers: nodes below and depth
    path: set[int] = set()
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        node, finished = todo.pop()
        children = _children(node)
        if children is None or (id(node) in sizes and not finished):
            continue
        if not finished:
            if id(node) in path:
                raise Unsafe("pickle-cycle", "the pickle holds a value that contains itself", path=name)
            path.add(id(node))
            todo.append((node, True))
            todo.extend((child, False) for child in children)
            continue
        path.discard(id(node))
        below = [sizes.get(id(child), (1, 0)) for child in children]
        count, depth = 1 + sum(nodes for nodes, _ in below), 1 + max((deep for _, deep in below), default=0)
        if count > MAX_OBJECTS or depth > MAX_DEPTH:
            message = f"the pickle's value is nested deeper than {MAX_DEPTH} or has more than {MAX_OBJECTS} parts"
            raise Unsafe("pickle-limit", message, path=name)
        sizes[id(node)] = count, depth
    return value


def _children(node: Any) -> list[Any] | None:
    if type(node) in (list, tuple):
        return list(node)
    if type(node) is dict:
        return list(node.values())
    if isinstance(node, Record):
        return [*node.args, node.state, *node.keywords.values()]
    return None


# ---------------------------------------------------------------- opcodes


def _signed(machine: _Machine, nbytes: int) -> None:
    raw = machine.take(nbytes) if nbytes <= MAX_INTEGER_NBYTES else b""
    value = int.from_bytes(raw, "little", signed=True)
    if nbytes > MAX_INTEGER_NBYTES or not -(2**63) <= value < 2**64:
        raise machine.unsafe("pickle-limit", f"holds an integer of {nbytes} bytes, expected 64 bits")
    machine.push(value)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        raise machine.bad("pickle-value", "names something by what is no text")
    machine.find(module, name)


def _newobj(machine: _Machine, with_keywords: bool) -> None:
    keywords = machine.pop() if with_keywords else None
    args, function = machine.pop(), machine.pop()
    if with_keywords and type(keywords) is not dict:
        raise machine.unsafe("pickle-call", f"makes an object with a {type(keywords).__name__} of keywords")
    if not isinstance(function, Global) or not function.is_class:
        word = function.symbol.path if isinstance(function, Global) else type(function).__name__
        raise machine.unsafe("pickle-call", f"makes an object of {word!r}, which is no class")
    machine.call(function, args, keywords)


def _reduce(machine: _Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.call(function, args)


def _tuple(machine: _Machine, items: list[Any]) -> None:
    machine.new(tuple(machine.finished(item) for item in items))


def _frozenset(machine: _Machine) -> None:
    machine.new(frozenset(machine.key(item) for item in machine.above_mark()))


def _persistent(machine: _Machine) -> None:
    saved = machine.pop()
    if machine.persistent is None:
        raise machine.bad("pickle-value", "refers to something outside of it")
    machine.count()
    try:
        machine.push(machine.persistent(saved))
    except QFormatError as error:
        error.locate(path=machine.name)
        raise


def _frame(machine: _Machine) -> None:
    length = machine.number(8)
    if length > len(machine.data) - machine.at:
        raise machine.bad("pickle-truncated", f"has a frame of {length} bytes, {len(machine.data) - machine.at} are left")


def _pair(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


def _last(machine: _Machine, count: int) -> list[Any]:
    return [machine.pop() for _ in range(count)][::-1]


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))
    machine.count()


_STOP = ord(".")
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord("("): _mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    ord("J"): lambda m: _signed(m, 4),
    0x8A: lambda m: _signed(m, m.number(1)),
    0x8B: lambda m: _signed(m, m.number(4)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.decoded(m.text(4))),
    0x8C: lambda m: m.push(m.decoded(m.text(1))),
    0x8D: lambda m: m.push(m.decoded(m.text(8))),
    ord("C"): lambda m: m.push(m.text(1)),
    ord("B"): lambda m: m.push(m.text(4)),
    0x8E: lambda m: m.push(m.text(8)),
    0x96: lambda m: m.push(m.text(8)),
    ord(")"): lambda m: m.new(()),
    0x85: lambda m: _tuple(m, _last(m, 1)),
    0x86: lambda m: _tuple(m, _last(m, 2)),
    0x87: lambda m: _tuple(m, _last(m, 3)),
    ord("t"): lambda m: _tuple(m, m.above_mark()),
    ord("]"): lambda m: m.new([]),
    ord("a"): lambda m: m.extend(_last(m, 1)),
    ord("e"): lambda m: m.extend(m.above_mark()),
    ord("}"): lambda m: m.new({}),
    ord("s"): lambda m: m.update(_pair(m)),
    ord("u"): lambda m: m.update(m.above_mark()),
    0x8F: lambda m: m.new(set()),
    0x90: lambda m: m.add(m.above_mark()),
    0x91: _frozenset,
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("c"): lambda m: m.find(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: lambda m: _newobj(m, False),
    0x92: lambda m: _newobj(m, True),
    ord("b"): lambda m: m.build(),
    ord("Q"): _persistent,
    0x95: _frame,
}  # fmt: skip
_EXTENSIONS = (0x82, 0x83, 0x84)
_KNOWN_REFUSED = {
    ord("i"): "INST", ord("o"): "OBJ", ord("0"): "POP", ord("1"): "POP_MARK", ord("2"): "DUP", ord("F"): "FLOAT", ord("I"): "INT",
    ord("L"): "LONG", ord("S"): "STRING", ord("T"): "BINSTRING", ord("U"): "SHORT_BINSTRING", ord("V"): "UNICODE", ord("P"): "PERSID",
    ord("d"): "DICT", ord("l"): "LIST", ord("p"): "PUT", ord("g"): "GET", 0x80: "PROTO within the stream", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
