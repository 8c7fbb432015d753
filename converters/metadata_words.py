"""``KEY=VALUE`` and ``KEY:TYPE=VALUE``: GGUF metadata as a user types it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from qformats.containers.gguf import Metadata, Value
from qformats.containers.gguf_values import MAX_KEY_NBYTES, SCALARS, encode_value
from qformats.errors import Unsupported, UsageError, did_you_mean

__all__ = ["Assignment", "assigned", "parse_assignment"]

# our names for the value types, and gguf-py's
TYPES = {
    **{name: name for name in (*SCALARS, "str")}, "string": "str", "uint8": "u8", "int8": "i8", "uint16": "u16", "int16": "i16",
    "uint32": "u32", "int32": "i32", "uint64": "u64", "int64": "i64", "float32": "f32", "float64": "f64",
}  # fmt: skip
RESERVED = ("split.", "qformats.")
_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True)
class Assignment:
    """``type`` (a value type such as ``u32`` or ``[str]``) is None where the key's own, or the value's look, decides."""

    key: str
    type: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.key}={self.text}" if self.type is None else f"{self.key}:{self.type}={self.text}"


def parse_assignment(text: str) -> Assignment:
    """Read ``KEY=VALUE`` or ``KEY:TYPE=VALUE``; raises ``UsageError`` (``metadata-form``, ``metadata-type``, ``metadata-reserved``).

    >>> parse_assignment("general.name=Tiny"), parse_assignment("llama.context_length:u32=4096").type
    (Assignment(key='general.name', type=None, text='Tiny'), 'u32')
    """
    left, equals, value = text.partition("=")
    key, colon, word = left.partition(":")
    if not equals or not key or "\0" in key or len(key.encode("utf-8", "surrogatepass")) > MAX_KEY_NBYTES:
        raise UsageError("metadata-form", f"{text!r} is not KEY=VALUE or KEY:TYPE=VALUE, such as general.name=Tiny")
    if key.startswith(RESERVED):
        raise UsageError("metadata-reserved", f"keys such as {key!r} are written by the tools themselves")
    if not colon:
        return Assignment(key, None, value)
    inner = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    if inner not in TYPES:
        hint = f"{did_you_mean(inner, TYPES)}types: {', '.join(TYPES)}; of an array [u32], [str] …"
        raise UsageError("metadata-type", f"{word!r} is no value type", hint=hint)
    return Assignment(key, f"[{TYPES[inner]}]" if inner != word else TYPES[inner], value)


def assigned(metadata: Metadata, assignment: Assignment) -> Metadata:
    """The metadata with the key set: in its place and type where it exists, at the end where it is new.

    An array's value is a JSON list. Without a type a new value that looks like a truth value, a whole number or a number is one, all
    else a string. Raises ``UsageError('metadata-value')`` for what does not fit the type.

    >>> assigned({"a": Value("u16", 1)}, Assignment("a", None, "7")), assigned({}, Assignment("b", None, "0.5"))
    ({'a': Value(type='u16', value=7)}, {'b': Value(type='f32', value=0.5)})
    """
    key, old = assignment.key, metadata.get(assignment.key)
    kind = assignment.type or (old.type if old is not None else _looks_like(assignment.text))
    try:
        value = Value(kind, _array(kind[1:-1], assignment.text) if kind.startswith("[") else _scalar(kind, assignment.text))
        encode_value(key, value)
    except (ValueError, OverflowError, RecursionError, struct.error, Unsupported):
        hint = "an array is a JSON list, such as [1, 2]" if kind.startswith("[") else "name a type, as in KEY:str=VALUE, to change it"
        raise UsageError("metadata-value", f"{assignment.text!r} is no {kind}, which {key!r} is", hint=hint) from None
    return {**metadata, key: value}


def _looks_like(text: str) -> str:
    if text in _BOOLS:
        return "bool"
    try:
        number = int(text)
    except ValueError:
        try:
            return "f32" if math.isfinite(float(text)) and "_" not in text else "str"
        except ValueError:
            return "str"
    if "_" in text or text != text.strip():
        return "str"
    kinds = (("u32", 0, 1 << 32), ("i32", -(1 << 31), 0), ("u64", 0, 1 << 64), ("i64", -(1 << 63), 0))
    return next((kind for kind, low, high in kinds if low <= number < high), "str")


def _scalar(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        if text not in _BOOLS:
            raise ValueError("no truth value")
        return _BOOLS[text]
    return float(text) if kind in ("f32", "f64") else int(text)


def _array(kind: str, text: str) -> tuple[Any, ...]:
    items = json.loads(text)
    wanted: tuple[type, ...] = {"str": (str,), "bool": (bool,), "f32": (int, float), "f64": (int, float)}.get(kind, (int,))
    if not isinstance(items, list) or not all(isinstance(i, wanted) and (kind == "bool" or not isinstance(i, bool)) for i in items):
        raise ValueError("no list of this type")
    return tuple(items)
