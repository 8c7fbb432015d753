"""Bytes as text in a record: zlib-compressed, base64-encoded."""

from __future__ import annotations

import base64
import zlib
from typing import Any

from qformats.errors import BadFile

__all__ = ["MAX_NBYTES", "pack", "unpack"]

MAX_NBYTES = 1 << 31
_DAMAGED = "name a type, as in awq:int4, to convert without it"


def pack(data: bytes) -> str:
    """Bytes compressed, as text."""
    squeeze = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)  # runs and entropy: no longer matches in zero points
    return base64.b64encode(squeeze.compress(data) + squeeze.flush()).decode("ascii")


def unpack(text: Any, nbytes: int) -> bytes:
    """The inverse of ``pack`` for ``nbytes`` bytes; ``BadFile('provenance')`` for anything else."""
    try:
        if not 0 <= nbytes <= MAX_NBYTES:
            raise ValueError
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), nbytes + 1)
        if len(data) != nbytes:
            raise ValueError
    except (ValueError, TypeError, zlib.error):
        raise BadFile("provenance", "a plane of the provenance record is damaged", hint=_DAMAGED) from None
    return data
