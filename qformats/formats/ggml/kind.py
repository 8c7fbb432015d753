"""What one ggml block type is to the rest of the package: a ``Kind``. A new family is one file of kinds plus its line in ``BLOCK_TYPES``.

``unpack_blocks`` and ``pack_blocks`` are a type's definition, in torch; ``to_tensor`` and ``planes`` say what the planes mean. A compiled
loop of ``qformats.loops.ggml`` may do the same faster: it fills or takes the planes that ``plane_specs`` lists, in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qformats.scheme import Grid, Scheme, Storage

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["Kind", "PlaneSpec"]


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One plane of a type: torch's word for its dtype (``uint8 int8 int16 float16``) and its elements a block; 0 for one it lacks."""

    dtype: str
    width: int


class Kind(Protocol):
    """One block type. Blocks are uint8 (N, row bytes); the planes are codes (N, K / v_in) first, then parameters, None for a missing one.

    - ``name``: ggml's; ``nbytes`` and ``block``: bytes and weights a block; ``grid``: what a code stands for.
    - ``halves``: where the fp16 fields start in a block. ``swaps``: (start, bytes) of every field that a big-endian file reverses.
    - ``storage``: the type's name and size for the planner; ``scheme`` says what it holds.
    - ``plane_specs``: of every plane, in order.
    - ``pack_blocks(*planes)``: the inverse of ``unpack_blocks``; codes and nested codes must lie on their grids.
    - ``to_tensor(*planes)``: the planes as a canonical tensor (N, K).
    """

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def halves(self) -> tuple[int, ...]: ...
    @property
    def swaps(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def storage(self) -> Storage: ...
    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]: ...
    @property
    def pack_blocks(self) -> Callable[..., Tensor]: ...
    @property
    def to_tensor(self) -> Callable[..., QuantizedTensor]: ...

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        ...

    def unpack_params(self, blocks: Tensor) -> tuple[Any, ...]:
        """The planes of ``unpack_blocks`` without the codes."""
        ...

    def unpack_blocks(self, blocks: Tensor) -> tuple[Any, ...]:
        """uint8 (N, row bytes) -> the planes, each (N, its elements a row)."""
        ...

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K), each step rounded where ggml rounds it."""
        ...

    def planes(self, tensor: QuantizedTensor) -> tuple[Any, ...]:
        """The inverse of ``to_tensor`` for a tensor of this type's scheme."""
        ...
