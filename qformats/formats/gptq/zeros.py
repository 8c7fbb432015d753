"""GPTQ zero points: five ways of storing them, and the decision which one a tensor uses. Numpy only.

| policy | stored field | true z | who |
|---|---|---|---|
| ``v1`` | z - 1 | 1 … 2^b | ``gptq`` as exllama, vLLM and llama.cpp read it: a field of 2^b - 1 is z = 2^b |
| ``v1-word`` | word - 0x1111…, borrows ripple into higher fields | 0 … 2^b - 1 | ``gptq`` by GPTQModel, 2, 4, 8 bits |
| ``v1-field`` | (z - 1) mod 2^b | 0 … 2^b - 1 | ``gptq`` by GPTQModel, 3 bits |
| ``v2`` | z | 0 … 2^b - 1 | ``gptq_v2``, ``gptq_p``, AutoRound's own packings |
| ``unset`` | 0 in every word | 2^(b-1) | symmetric files whose zero points were never filled in |

Sources: gptqmodel 7.7.0 ``utils/model.py convert_gptq_v1_to_v2_format_module`` and its inverse; auto-gptq 0.7.1 ``qlinear_cuda_old.py``.
The three v1 policies agree wherever 1 <= z <= 2^b - 1. Worked example, b = 4: z = 8 0 5 3 15 1 0 7 is written by GPTQModel as fields
7 15 3 2 14 0 15 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qformats.bits import pack_planar_rows, pack_rows, unpack_planar_rows, unpack_rows
from qformats.errors import UsageError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

__all__ = ["POLICIES", "Zeros", "decide", "decode", "encode", "zero_range"]

POLICIES = ("v1", "v1-word", "v1-field", "v2", "unset")


@dataclass(frozen=True, slots=True)
class Zeros:
    """How a tensor's zero points are stored; ``constant`` is the one true z if all are equal, else None."""

    policy: str
    constant: int | None
    warnings: tuple[str, ...] = ()


def zero_range(policy: str, bits: int) -> tuple[int, int]:
    """The lowest and highest true zero point that ``policy`` can store."""
    half = 1 << (bits - 1)
    return {"v1": (1, 1 << bits), "unset": (half, half)}.get(policy, (0, (1 << bits) - 1))


def decide(
    words: Array,
    bits: int,
    count: int,
    label: str,
    sym: bool | None,
    gptqmodel: bool,
    forced: str | None = None,
    *,
    planar: bool = False,
) -> Zeros:
    """Find the policy of a whole ``qzeros`` (G, W) with ``count`` fields a row.

    ``label`` and ``sym`` are the config's; ``gptqmodel`` says who wrote the file; ``forced`` is the user's choice and ends the matter.
    A symmetric file whose fields all equal 2^(b-1) stores true zero points whatever its label says (mislabelled files exist, and the
    common kernels never look at the zero points of symmetric weights).
    """
    field = _constant_field(words, bits, count, planar)
    half = 1 << (bits - 1)
    by_label = "v2" if label != "gptq" else "v1" if not gptqmodel else "v1-field" if bits in (3, 5, 6, 7) else "v1-word"
    if forced is not None:
        if forced not in POLICIES:
            raise UsageError("zero-policy", f"zero policy {forced!r} is not known", hint=f"use one of {', '.join(POLICIES)}")
        if forced == "v1-word" and bits not in (2, 4, 8):
            raise UsageError("zero-policy", f"zero policy v1-word is of 2, 4 and 8 bits, not {bits}", hint="use v1, v1-field or v2")
        return Zeros(forced, _true(field, forced, bits))
    if sym is False:
        return Zeros(by_label, _true(field, by_label, bits))
    if field == half - 1 and (sym or by_label != "v2"):
        said = () if by_label != "v2" else (f"labelled {label}, but its zero points are all stored minus one ({field}); read as {half}",)
        return Zeros("v1" if by_label == "v2" else by_label, half, said)
    if field == half:
        said = () if by_label == "v2" else (f"labelled {label}, but its zero points are all stored as they are ({field}); read as {half}",)
        return Zeros("v2", half, said)
    if field == 0 and sym and not words.any():
        return Zeros("unset", half, (f"symmetric, but every zero-point word is 0: read as never filled in, z = {half}",))
    said = (f"sym is true, but the zero points are not all {half}; the stored ones are used",) if sym else ()
    return Zeros(by_label, _true(field, by_label, bits), said)


def _true(field: int | None, policy: str, bits: int) -> int | None:
    if policy == "unset":
        return 1 << (bits - 1)
    if field is None or policy == "v2":
        return field
    top = field == (1 << bits) - 1
    if policy == "v1-word" and top:
        return None  # the carries make neighbours differ
    return 0 if top and policy == "v1-field" else field + 1


def _constant_field(words: Array, bits: int, count: int, planar: bool) -> int | None:
    """The value of every field of (G, W) words, or None if they differ; fields beyond ``count`` are not looked at."""
    if not words.size:
        return None
    if planar:
        fields = unpack_planar_rows(words, bits, count)
        return int(fields[0, 0]) if (fields == fields[0, 0]).all() else None
    word_bits = words.itemsize * 8
    first = int(unpack_rows(words[:1], bits, count)[0, 0])
    row = pack_rows(np.full((1, count), first, np.uint8), bits, word_bits)
    if count * bits % word_bits == 0:
        same = np.array_equal(words, np.broadcast_to(row, words.shape))
    else:
        mask = pack_rows(np.full((1, count), (1 << bits) - 1, np.uint8), bits, word_bits)
        same = not ((words ^ row) & mask).any()
    return first if same else None


def _ones(bits: int, word_bits: int) -> int:
    """A word with 1 in each of its fields: 0x11111111 for 4 bits."""
    return sum(1 << at for at in range(0, word_bits, bits))


def decode(words: Array, bits: int, count: int, policy: str, *, planar: bool = False) -> Array:
    """Words (G, W) -> true zero points (count, G), uint8 below eight bits, else int16."""
    dtype = np.dtype(np.uint8 if bits < 8 else np.int16)
    if policy == "unset":
        return np.full((count, words.shape[0]), 1 << (bits - 1), dtype)
    if policy == "v1-word":
        unsigned = np.dtype(f"<u{words.itemsize}")
        words = words.view(unsigned) + unsigned.type(_ones(bits, words.itemsize * 8))
    unpacked = unpack_planar_rows(words, bits, count) if planar else unpack_rows(words, bits, count)
    fields: Array = unpacked.T.astype(dtype, order="C")  # (G, count) -> (count, G)
    if policy in ("v1", "v1-field"):
        fields += dtype.type(1)
    if policy == "v1-field":
        fields &= dtype.type((1 << bits) - 1)
    return fields


def encode(zeros: Array, bits: int, word_bits: int, policy: str, *, planar: bool = False) -> Array:
    """True zero points (count, G) in ``zero_range(policy, bits)`` -> signed words (G, W): the inverse of ``decode``."""
    fields = np.ascontiguousarray(zeros.T).astype(np.int16)  # (G, count)
    if policy == "unset":
        fields = np.zeros_like(fields)
    elif policy in ("v1", "v1-field"):
        fields = (fields - 1) & ((1 << bits) - 1)
    words = pack_planar_rows(fields.astype(np.uint8), bits) if planar else pack_rows(fields.astype(np.uint8), bits, word_bits)
    if policy != "v1-word":
        return words
    unsigned = np.dtype(f"<u{words.itemsize}")
    borrowed: Array = words.view(unsigned) - unsigned.type(_ones(bits, word_bits))
    return borrowed.view(words.dtype)
