"""The JSON blob beside a 4-bit weight: what its bytes are, and the values they came from.

Source: ``QuantState.as_dict``, ``from_dict`` and ``utils.pack_dict_to_tensor`` of bitsandbytes 0.50.2. The blob is the UTF-8 text of
``json.dumps`` with the keys in this order; the last three are there under double quantization only:

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.63519287109375}

``dtype`` is that of the weight before quantization and of the dequantized result; ``nested_offset`` is a float32 number.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qformats.errors import BadFile

__all__ = ["BLOCKSIZES", "DTYPES", "MAX_NBYTES", "NESTED_BLOCKSIZE", "State", "parse_state", "state_bytes"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DTYPES = ("float32", "float16", "bfloat16")
MAX_NBYTES = 1 << 16
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_OFFSET_CHARACTERS = 24  # no float32 is longer as a Python float: -1.1754943508222875e-38 and the like


@dataclass(frozen=True, slots=True)
class State:
    """What the blob says. ``nested_blocksize`` 0: the block scales are plain; ``nested_offset`` a float32 number."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @property
    def nested(self) -> bool:
        return self.nested_blocksize > 0


def parse_state(data: bytes, name: str) -> State:
    """The blob's content, its keys in any order; ``BadFile('quant-state')`` for anything but the documented keys and ranges."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _bad(name, "is not a JSON object with every key once") from None
    if not isinstance(found, dict):
        raise _bad(name, "is not a JSON object")
    nested = any(key in found for key in _NESTED_KEYS)
    wanted = (*_KEYS, *(_NESTED_KEYS if nested else ()))
    if set(found) != set(wanted):
        raise _bad(name, f"has the keys {', '.join(map(str, found))}, expected {', '.join(wanted)}")
    checks = {
        "quant_type": found["quant_type"] in ("nf4", "fp4"),
        "blocksize": _is_int(found["blocksize"]) and found["blocksize"] in BLOCKSIZES,
        "dtype": found["dtype"] in DTYPES,
        "shape": _is_shape(found["shape"]),
        "nested_blocksize": not nested or (_is_int(found["nested_blocksize"]) and found["nested_blocksize"] in BLOCKSIZES),
        "nested_dtype": not nested or found["nested_dtype"] == "float32",
        "nested_offset": not nested or _is_float32(found["nested_offset"]),
    }
    wrong = next((key for key, good in checks.items() if not good), None)
    if wrong is not None:
        raise _bad(name, f"says {wrong} = {found[wrong]!r}, which bitsandbytes never writes")
    offset = struct.unpack("<f", struct.pack("<f", found["nested_offset"]))[0] if nested else 0.0
    shape = (found["shape"][0], found["shape"][1])
    return State(found["quant_type"], found["blocksize"], found["dtype"], shape, found.get("nested_blocksize", 0), offset)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _bad(name: str, what: str) -> BadFile:
    return BadFile("quant-state", f"the quantization state {what}", tensor=name, hint="fetch the file again, or write it anew")


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_int(n) and 0 < n < 1 << 31 for n in value)


def _is_float32(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return isfinite(struct.unpack("<f", struct.pack("<f", value))[0])
    except (OverflowError, struct.error):
        return False


def state_bytes(state: State, *, padded: bool = False) -> bytes:
    """The blob as bitsandbytes writes it; ``padded`` with blanks at its end to the length it has with the longest offset."""
    found: dict[str, Any] = {key: getattr(state, key) for key in _KEYS}
    if state.nested:
        numbers = {"nested_blocksize": state.nested_blocksize, "nested_dtype": "float32", "nested_offset": state.nested_offset}
        found.update(numbers)
    text = json.dumps(found)
    if padded and state.nested:
        text += " " * (_OFFSET_CHARACTERS - len(json.dumps(state.nested_offset)))
    return text.encode("utf-8")
