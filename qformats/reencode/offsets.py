"""Float offsets for integer zero points: the shift or flip of each block whose scale x integer the target's dtype can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from qformats import rewrite
from qformats.reencode.affine import Affine
from qformats.rewrite import Refused
from qformats.scheme import Integer

__all__ = ["narrow_offset", "offset_blocks", "offset_blocks_definition", "search_offset", "search_offset_definition"]

_PROBED_ROWS = 4

# scale, offset, shift and flip of each run, and in how many runs the offset rounds, overflows, codes move and flip
_Offsets = tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]


def offset_blocks(a: Affine, width: int, top: int, dtype: torch.dtype) -> _Offsets:
    """Scale (with the sign of a flip), offset in ``dtype``, shift and flip of each run of ``width``, and the counts."""
    loops = rewrite.block_loops()
    whole_groups = a.width % width == 0 or a.width >= a.k
    if loops is None or a.scale.dtype != torch.float16 or dtype != torch.float16 or len(a.shape) != 2 or not whole_groups:
        return offset_blocks_definition(a, width, top, dtype)
    rows, blocks = a.shape[0], -(-a.k // width)
    ratio = blocks if a.width >= a.k else a.width // width
    planes = (a.scale.to(torch.float32).contiguous().numpy(), a.zero.to(torch.int16).expand(a.scale.shape).contiguous().numpy())
    shift, flip = torch.empty((rows, blocks), dtype=torch.int16), torch.empty((rows, blocks), dtype=torch.bool)
    offset, signed = torch.empty((rows, blocks)), torch.empty((rows, blocks))
    out, fits = [p.numpy() for p in (shift, flip, offset, signed)], a.grid.highest <= top

    def run(count: int, low_high: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        ranges = (p[:count].contiguous().numpy() for p in low_high)
        found: tuple[int, ...] = loops.offset_blocks(*(p[:count] for p in planes), *ranges, ratio, top, fits, *(p[:count] for p in out))
        return found

    unknown = (shift[:, :0], shift[:, :0])
    counts = run(min(rows, _PROBED_ROWS), unknown)  # a few rows tell whether ranges will be asked for
    if not counts[0]:
        counts = run(rows, unknown)
    if counts[0]:
        counts = run(rows, a.ranges(width))
    return signed.to(torch.float16), offset.to(dtype), shift, flip, counts


def offset_blocks_definition(a: Affine, width: int, top: int, dtype: torch.dtype) -> _Offsets:
    """``offset_blocks`` in torch: what the compiled loop must equal."""
    chosen, flip, exact = _choose_offset(a, width, top, dtype)
    scale, zero = a.plane(a.scale, width).expand(chosen.shape), a.plane(a.zero, width)
    flip = flip & exact
    chosen = torch.where(exact, chosen, -zero.expand(chosen.shape))
    offset = _product(scale, chosen).to(torch.float32).to(dtype)
    shift = torch.where(flip, chosen + zero, -chosen - zero)
    counts = tuple(int(plane.sum()) for plane in (~exact, ~torch.isfinite(offset), flip | (shift != 0), flip))
    return torch.where(flip, -scale, scale), offset, shift, flip, counts


def _product_exact(scale: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Where scale x integer is a finite ``dtype`` number."""
    product = _product(scale, factor)
    stored = product.to(torch.float32).to(dtype)
    return (stored.to(product.dtype) == product) & torch.isfinite(stored)


def _product(scale: Tensor, factor: Tensor) -> Tensor:
    """Scale x integer of up to 9 bits, exact: in float32 for half-precision scales, else in float64."""
    wide = torch.float32 if scale.dtype in (torch.float16, torch.bfloat16) else torch.float64
    return scale.to(wide) * factor.to(wide)


def _choose_offset(a: Affine, width: int, top: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integer, flip and "is scale x integer a ``dtype`` number" for each run of ``width``: w = s·q' + s·k, or w = −s·q' + s·j for a flip.

    The plain offset −zero or else the mirrored one (q' = top − q) serve whole groups, whatever the codes are; where both round, the
    range of a block's codes leaves room for other shifts and flips. Blocks where all of them round keep the plain offset.
    """
    zero = a.zero.expand(a.scale.shape)
    chosen, flip = -zero, torch.zeros_like(zero, dtype=torch.bool)
    found = _product_exact(a.scale, chosen, dtype) if a.grid.highest <= top else flip
    if a.grid.highest <= top and not bool(found.all()):
        flip = ~found & _product_exact(a.scale, top - zero, dtype)
        chosen, found = torch.where(flip, top - zero, chosen), found | flip
    chosen, flip, found = (a.plane(p, width).contiguous() for p in (chosen, flip, found))
    if bool(found.all()):
        return chosen, flip, found
    low, high = a.ranges(width)
    wide = a.plane(zero, width)
    return search_offset(a.plane(a.scale, width), low - wide, high - wide, chosen, flip, found, top, dtype)


def search_offset(
    scale: Tensor, smallest: Tensor, largest: Tensor, chosen: Tensor, flip: Tensor, found: Tensor, top: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For each block not ``found`` yet the first shift or flip whose offset is representable: (integer, is it a flip, was one found).

    ``smallest`` and ``largest``: range of code minus zero point, int16 like ``chosen``, which stays where nothing is found.
    """
    loops = rewrite.block_loops()
    if loops is None or scale.dtype != torch.float16 or dtype != torch.float16 or scale.device.type != "cpu":
        return search_offset_definition(scale, smallest, largest, chosen, flip, found, top, dtype)
    chosen, flip, found = (p.clone(memory_format=torch.contiguous_format) for p in (chosen, flip, found))
    planes = (scale.to(torch.float32), smallest, largest)
    loops.search_offset(*(p.reshape(-1).numpy() for p in planes), top, *(p.view(-1).numpy() for p in (chosen, flip, found)))
    return chosen, flip, found


def search_offset_definition(
    scale: Tensor, smallest: Tensor, largest: Tensor, chosen: Tensor, flip: Tensor, found: Tensor, top: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``search_offset`` in torch: what the compiled loop must equal."""
    for step in range(top + 1):
        for mirror in (False, True):
            code = largest + step if mirror else smallest - step
            legal = code <= smallest + top if mirror else code >= largest - top
            hit = ~found & legal & _product_exact(scale, code, dtype)
            chosen, flip = torch.where(hit, code, chosen), torch.where(hit, torch.tensor(mirror), flip)
            found = found | hit
    return chosen, flip, found


def narrow_offset(
    a: Affine, scale: Tensor, offset: Tensor, width: int, grid: Integer, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift or flip each block into ``grid``: w = s·q' + (m + s·k) or −s·q' + (m + s·j), the new offset representable."""
    low, high = a.ranges(width)
    top = grid.highest
    shift, flip, moved = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.bool), offset.expand(low.shape).clone()
    found = (low >= 0) & (high <= top)
    for step in range(top + 1):
        for mirror in (False, True):
            code = high + step if mirror else low - step
            legal = code <= low + top if mirror else code >= high - top
            exact = offset.to(torch.float64) + scale.to(torch.float64) * code
            rounded = exact.to(torch.float32).to(dtype)
            hit = ~found & legal & (rounded.to(torch.float64) == exact) & torch.isfinite(rounded)
            shift = torch.where(hit, code if mirror else -code, shift)
            flip, moved, found = torch.where(hit, torch.tensor(mirror), flip), torch.where(hit, rounded, moved), found | hit
    left = int((~found).sum())
    if left:
        raise Refused(f"{left} of {found.numel()} blocks span more than {grid.bits} bits or have no representable offset")
    return shift, flip, moved
