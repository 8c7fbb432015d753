"""Parameter planes in a provenance record: what a target rounds or has no form for, and the proof that it still is that plane's rounding.

``describe`` takes the parameters of a source weight, ``revive`` makes them again. A plane that the target's own parameters nearly
tell (a scale in a wider dtype, a zero point that became an offset) is kept as the difference of the bit patterns: mostly zeros.
``restored`` gives a tensor its earlier parameters back, only if converting the result forward gives the very tensor that was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from converters.packing import MAX_NBYTES, pack, unpack
from converters.zero_signs import ZeroSigns
from qformats.scheme import Block, Cyclic, Flat, Float, Grid, Integer, Scheme, Storage, Table, Tile

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qformats.reencode import Fit
    from qformats.tensor import Param, QuantizedTensor

__all__ = ["Kept", "Stale", "describe", "grid_from_json", "grid_to_json", "guess", "restored", "revive", "same_params"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_DTYPES = (*_FLOATS, "uint8", "int8", "int16", "int32")


class Stale(Exception):
    """The planes that a recorded one is told from are not those it was recorded with."""


@dataclass(frozen=True)
class Kept:
    """The parameters a weight had: ``params`` as ``describe`` gave them, ``held`` the storage that it was converted to, its minus zeros."""

    params: Mapping[str, Any]
    grid: Grid
    held: Storage
    zeros: ZeroSigns | None = None


# ---------------------------------------------------------------- parameters as data


def describe(t: QuantizedTensor, guesses: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The parameters of ``t`` as JSON data, those in ``guesses`` as differences; None for a form that has none here."""
    if t.signs is not None or t.codebook is not None:
        return None
    return {name: _param_to_json(param, guesses.get(name)) for name, param in t.params()}


def _param_to_json(param: Param, guess: Tensor | None) -> dict[str, Any]:
    import torch

    data: dict[str, Any] = {"block": _block_to_json(param.block)}
    if param.inverse:
        data["inverse"] = True
    if param.rounded_to is not None:
        data["rounded_to"] = _word(param.rounded_to)
    values = param.values
    if isinstance(values, torch.Tensor):
        return {**data, **_tensor_to_json(values, guess)}
    nested = {name: _param_to_json(held, None) for name, held in values.params()}
    codes = _tensor_to_json(values.codes, guess)
    return {**data, "shape": list(values.shape), "grid": grid_to_json(values.grid), "codes": codes, "params": nested}


def _tensor_to_json(values: Tensor, guess: Tensor | None) -> dict[str, Any]:
    import numpy as np

    bits = _bits(values)
    true = bits
    near = guess is not None and guess.shape == values.shape and guess.dtype == values.dtype
    if near and guess is not None:
        bits = bits - _bits(guess)  # modulo the width of the word
    columns = np.ascontiguousarray(bits.reshape(-1)).view("u1").reshape(-1, values.element_size())
    planes = np.ascontiguousarray(columns.T)  # byte by byte: the high ones say little
    data = {"dtype": _word(values.dtype), "size": list(values.shape), "bytes": pack(planes.tobytes())}
    return {**data, "near": _digest(true)} if near else data


def _digest(bits: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(bits.tobytes()).hexdigest()[:32]


def _tensor_from_json(data: Mapping[str, Any], guess: Tensor | None) -> Tensor:
    import numpy as np
    import torch

    if data["dtype"] not in _DTYPES or not all(type(n) is int and 0 <= n <= MAX_NBYTES for n in data["size"]):
        raise ValueError("no plane")
    dtype, size = getattr(torch, data["dtype"]), tuple(data["size"])
    width = torch.empty((), dtype=dtype).element_size()
    planes = np.frombuffer(unpack(data["bytes"], prod(size) * width), "u1").reshape(width, -1)
    bits = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{width}").reshape(size)
    if data.get("near"):
        if guess is None or tuple(guess.shape) != size or guess.dtype != dtype:
            raise ValueError("no plane to differ from")
        bits = bits + _bits(guess)
        if _digest(bits) != data["near"]:
            raise Stale
    return torch.from_numpy(bits.view(f"<i{width}" if width > 1 else "u1").copy()).view(dtype)


def _bits(values: Tensor) -> np.ndarray[Any, Any]:
    """The bit patterns as unsigned words."""
    import torch

    width = values.element_size()
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return values.contiguous().view(signed).numpy().view(f"<u{width}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _block_to_json(block: Block) -> list[int | str]:
    if isinstance(block, Tile):
        return ["tile", *block.sizes]
    return ["flat", block.n] if isinstance(block, Flat) else ["cyclic", block.count]


def _block_from_json(data: Any) -> Block:
    kind, *numbers = data
    if not numbers or not all(type(n) is int and 0 < n <= MAX_NBYTES for n in numbers):
        raise ValueError("no block")
    if kind == "tile":
        return Tile(tuple(numbers))
    return Flat(*numbers) if kind == "flat" else Cyclic(*numbers)


def grid_to_json(grid: Grid) -> list[Any]:
    if isinstance(grid, Integer):
        return ["integer", grid.bits, grid.signed]
    assert isinstance(grid, Float | Table)
    return ["float", grid.name] if isinstance(grid, Float) else ["table", grid.name, grid.v_in]


def grid_from_json(data: Any) -> Grid:
    kind, *rest = data
    if kind == "integer":
        return Integer(*rest)
    return Float(*rest) if kind == "float" else Table(*rest)


def _param_from_json(data: Mapping[str, Any], guess: Tensor | None) -> Param:
    import torch

    from qformats.tensor import Param, QuantizedTensor

    block, rounded = _block_from_json(data["block"]), data.get("rounded_to")
    if rounded is not None and rounded not in _FLOATS:
        raise ValueError("no dtype")
    inverse, dtype = bool(data.get("inverse")), None if rounded is None else getattr(torch, rounded)
    if "grid" not in data:
        return Param(_tensor_from_json(data, guess), block, inverse, dtype)
    held = {name: _param_from_json(entry, None) for name, entry in data["params"].items()}
    codes, shape = _tensor_from_json(data["codes"], guess), tuple(data["shape"])
    return Param(QuantizedTensor(shape, codes, grid_from_json(data["grid"]), **_by_role(held)), block, inverse, dtype)


def _by_role(params: Mapping[str, Param]) -> dict[str, Any]:
    scales = tuple(params[name] for name in sorted(params) if name.startswith("scale"))
    return {"scales": scales, "zero_point": params.get("zero_point"), "offset": params.get("offset")}


def revive(data: Mapping[str, Any], shape: tuple[int, ...], grid: Grid, guesses: Mapping[str, Tensor]) -> QuantizedTensor:
    """A weight (N, K) with the parameters ``data`` and codes of zeros; ``ValueError``, ``KeyError`` or ``TypeError`` for what is none."""
    import torch

    from qformats.tensor import QuantizedTensor

    params = {name: _param_from_json(entry, guesses.get(name)) for name, entry in data.items()}
    dtype = torch.int8 if isinstance(grid, Integer) and grid.signed else torch.uint8
    return QuantizedTensor(shape, torch.zeros((1, 1), dtype=dtype).expand(shape), grid, **_by_role(params))


# ---------------------------------------------------------------- what the target's parameters tell


def guess(blank: QuantizedTensor, found: Fit | QuantizedTensor) -> dict[str, Tensor]:
    """What the plain planes of ``blank`` would be, told from the parameters of the same rows in the other form."""
    import torch

    from qformats.real import Real, round_once
    from qformats.tensor import QuantizedTensor

    scales = found.scales if isinstance(found, QuantizedTensor) else (found.scale, *found.extra)
    guesses: dict[str, Tensor] = {}
    for name, param in blank.params():
        if isinstance(param.values, QuantizedTensor):
            same = [codes for codes in map(partial(_like_codes, param), scales) if codes is not None]
            guesses.update({name: same[0]} if same else {})
            continue
        plain = isinstance(param.values, torch.Tensor) and param.values.dtype.is_floating_point
        if not plain or not isinstance(param.block, Tile) or param.block.sizes[0] != 1 or param.values.shape[0] != blank.shape[0]:
            continue
        starts = torch.arange(param.values.shape[-1]) * min(param.block.sizes[-1], blank.shape[-1])
        at = partial(_at, starts=starts, rows=blank.shape[0])
        scale = torch.ones(param.values.shape, dtype=torch.float64)
        for held in scales:
            scale = scale / at(held) if held.inverse else scale * at(held)
        zero = None if found.zero_point is None else at(found.zero_point)
        offset = None if found.offset is None else at(found.offset)
        if name.startswith("scale"):
            value = 1 / scale if param.inverse else scale
        elif name == "zero_point":
            value = zero if zero is not None else -offset / scale if offset is not None else torch.zeros_like(scale)
        else:
            value = offset if offset is not None else -scale * zero if zero is not None else torch.zeros_like(scale)
        value = torch.where(torch.isfinite(value), value, 0.0)
        assert isinstance(param.values, torch.Tensor)
        guesses[name] = round_once(Real(value), param.values.dtype)
    return guesses


def _like_codes(param: Param, held: Param) -> Tensor | None:
    """The codes of ``held`` where it is, as ``param`` is, codes on these blocks: of one small float, or of two that differ in the sign."""
    from qformats.tensor import QuantizedTensor

    mine, theirs = param.values, held.values
    if not isinstance(mine, QuantizedTensor) or not isinstance(theirs, QuantizedTensor) or mine.params() or theirs.params():
        return None
    return theirs.codes if held.block == param.block and (mine.shape, mine.codes.dtype) == (theirs.shape, theirs.codes.dtype) else None


def _at(param: Param, starts: Tensor, rows: int) -> Tensor:
    """A parameter's numbers at some columns (rows, columns), float64; zeros for a form that is no plane."""
    import torch

    block = param.block
    if not isinstance(block, Tile):
        return torch.zeros((rows, len(starts)), dtype=torch.float64)
    values = param.real().high
    values = values if values.shape[-1] == 1 else values.index_select(-1, (starts // block.sizes[-1]).clamp(max=values.shape[-1] - 1))
    if values.shape[0] not in (1, rows):
        values = values.repeat_interleave(block.sizes[0], 0)[:rows]
    return values.expand(rows, len(starts)).to(torch.float64)


# ---------------------------------------------------------------- the way back


def restored(
    t: QuantizedTensor, earlier: QuantizedTensor, storage: Storage, held: Storage,
    own: Callable[[Storage, Scheme], object], own_held: Callable[[Storage, Scheme], object],
) -> QuantizedTensor | None:  # fmt: skip
    """Rows ``t`` under the parameters of ``earlier`` (the same rows, codes of zeros), or None unless they convert to ``t`` again."""
    for codes in (_kept_codes, _nearest_codes):
        found = codes(t, earlier, storage, own)
        if found is None:
            continue
        candidate = earlier.replace(codes=found, group_index=t.group_index)
        if _becomes(candidate, t, held, own_held):
            return candidate
    return None


def _kept_codes(t: QuantizedTensor, earlier: QuantizedTensor, storage: Storage, own: Callable[[Storage, Scheme], object]) -> Tensor | None:
    """The codes that the usual search finds for ``storage``."""
    from qformats.reencode import finish, fit
    from qformats.rewrite import Refused

    try:
        found = finish(t, fit(t, storage, rounding=True, own=partial(own, storage)))
    except Refused:
        return None
    return found.codes if found.grid == earlier.grid and found.codes.shape == t.shape else None


def _nearest_codes(
    t: QuantizedTensor, earlier: QuantizedTensor, storage: Storage, own: Callable[[Storage, Scheme], object]
) -> Tensor | None:
    """The codes whose values under the earlier parameters are nearest to the weights."""
    import torch

    from qformats import grids
    from qformats.tensor import expand

    grid, shape = earlier.grid, earlier.shape
    w = t.dequantize(torch.float64)
    spread = [expand(p.real().high, p.block, shape, t.group_index).to(torch.float64) for _, p in earlier.params()]
    planes = dict(zip((name for name, _ in earlier.params()), spread))
    if "offset" in planes:
        w = w - planes["offset"]
    for at, scale in enumerate(earlier.scales):
        factor = planes[f"scale{at}" if at else "scale"]
        w = w * factor if scale.inverse else torch.where(factor == 0, 0.0, w / factor)
    if "zero_point" in planes:
        w = w + planes["zero_point"]
    if isinstance(grid, Integer):
        return w.round().clamp(grid.lowest, grid.highest).to(earlier.codes.dtype)
    if not isinstance(grid, Float) and not (isinstance(grid, Table) and grid.v_in == 1):
        return None
    values = (grids.float_values(grid.name) if isinstance(grid, Float) else grids.table_values(grid.name)).to(torch.float64)
    usable = torch.where(torch.isfinite(values), values, torch.inf)
    order = torch.argsort(usable, stable=True)[: int(torch.isfinite(usable).sum())]
    ordered = usable[order]
    place = torch.searchsorted(((ordered[1:] + ordered[:-1]) / 2).contiguous(), w.contiguous())
    return order[place].to(earlier.codes.dtype)


def _becomes(candidate: QuantizedTensor, t: QuantizedTensor, held: Storage, own: Callable[[Storage, Scheme], object]) -> bool:
    """Whether ``candidate`` as ``held`` is ``t``, bit for bit."""
    import torch

    from qformats.reencode import finish, fit
    from qformats.rewrite import Refused

    try:
        made = finish(candidate, fit(candidate, held, rounding=True, own=partial(own, held)))
    except Refused:
        return False
    same = made.grid == t.grid and torch.equal(made.codes.to(torch.int16), t.codes.to(torch.int16))
    return same and same_params(made, t)


def same_params(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Equal parameters as they spread over the weight; a zero point of zero counts as none."""
    import torch

    from qformats.tensor import expand

    mine, theirs = dict(a.params()), dict(b.params())
    for name in {*mine, *theirs}:
        planes = []
        for t, params in ((a, mine), (b, theirs)):
            if name not in params:
                planes.append(torch.full(t.shape, 1.0 if name.startswith("scale") else 0.0, dtype=torch.float64))
                continue
            real = params[name].real()
            spread = expand(real.high, params[name].block, t.shape, t.group_index).to(torch.float64)
            planes.append(1 / spread if params[name].inverse else spread)
        if not torch.equal(*planes):
            return False
    return True
