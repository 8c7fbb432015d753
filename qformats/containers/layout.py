"""What a writer needs to know before the first byte of payload: the finished header and where every tensor goes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """A planned file: ``header`` bytes from offset 0, absolute ``offsets`` and ``nbytes`` of each tensor, total ``size``.

    Bytes between tensors and after the last one, up to ``size``, are zero.
    """

    header: bytes
    offsets: dict[str, int]
    nbytes: dict[str, int]
    size: int
