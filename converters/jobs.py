"""What one target tensor becomes: its source rows, what is done to them, the parts it is stored as, and the kind of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.formats.ggml.kquants import KQUANTS
from qformats.formats.protocol import PartInfo
from qformats.grids import FLOAT_NAMES, TABLE_WIDTHS
from qformats.scheme import Factor, Float, Grid, Integer, Learned, Storage, SubScale, Table

if TYPE_CHECKING:
    import numpy as np

    from converters.kept_planes import Earlier
    from qformats.reencode import Hint

__all__ = ["Job", "storage_from_json", "storage_to_json"]


@dataclass(frozen=True)
class Job:
    """One target tensor.

    ``action``: ``parts`` (stored planes as they are), ``copy`` (same dtype, rows maybe reordered), ``float`` (to ``dtype``),
    ``codes`` (codes kept, written as ``storage``) or ``quantize`` (new codes). ``orders``: column order of each act-order source
    module that was absorbed. ``importance``: float32 (1, K), or (E, K) of experts, that weighs the errors of new codes.
    ``search``: how they are found. ``merged``: the adapters that have a part in it. ``earlier``: the parameters that the weight had
    before it was converted to the storage beside them, to be given back. ``content``: the bytes of parts that a record holds.
    ``lossless``: the stored numbers are the source's real numbers. ``parts``: leaf → dtype and shape as stored.
    """

    map: TensorMap
    action: str
    kind: str
    reason: str
    type: str
    parts: Mapping[str, PartInfo]
    lossless: bool
    dtype: str | None = None
    storage: Storage | None = None
    format: str = "hf"
    rewrites: tuple[str, ...] = ()
    rounding: bool = False
    notes: tuple[str, ...] = ()
    orders: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    hints: Mapping[str, Hint] = field(default_factory=dict)
    importance: np.ndarray[Any, Any] | None = None
    search: str = "reference"
    merged: tuple[str, ...] = ()
    earlier: Earlier | None = None
    content: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Target tensor name (``module.leaf``)."""
        return self.map.name

    @property
    def weights(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.map.shape:
            count *= size
        return count

    def part_name(self, leaf: str) -> str:
        """Full stored name of a part."""
        return registry.join_name(self.format, self.map.target, leaf)


def storage_to_json(storage: Storage) -> dict[str, Any]:
    """A storage as plain JSON data; what most types lack is there only where a type has it."""
    grid = {"bits": storage.grid.bits, "signed": storage.grid.signed} if isinstance(storage.grid, Integer) else _grid_to_json(storage.grid)
    extras = {
        "highest": storage.highest,
        "scale_grid": None if storage.scale_grid is None else storage.scale_grid.name,
        "doubled": storage.doubled or None,
        "rows": None if storage.rows == 1 else storage.rows or "all",
        "flat": storage.flat or None,
        "inverse": storage.inverse or None,
        "zero_dtype": storage.zero_dtype,
        "factor": None if storage.factor is None else [storage.factor.dtype, storage.factor.inverse, storage.factor.constant],
        "whole": storage.whole or None,
        "cyclic": storage.cyclic or None,
        "together": storage.together or None,
        "full_groups": storage.full_groups or None,
    }
    return {
        "type": storage.type,
        **grid,
        "group": storage.group,
        "bpw": storage.bits_per_weight,
        "scale_dtypes": list(storage.scale_dtypes),
        "negative_scale": storage.negative_scale,
        "zero_point": list(storage.zero_point) if isinstance(storage.zero_point, tuple) else storage.zero_point,
        "offset": storage.offset,
        "sub_scale": None if storage.sub_scale is None else _sub_to_json(storage.sub_scale),
        "k_multiple": storage.k_multiple,
        "n_multiple": storage.n_multiple,
        "group_index": storage.group_index,
        "options": dict(sorted(storage.options.items())),
        **{key: value for key, value in extras.items() if value is not None},
    }


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    if isinstance(grid, Float):
        return {"float": grid.name}
    if isinstance(grid, Learned):
        return {"learned": [grid.entries, grid.v_out, grid.v_in, grid.books]}
    assert isinstance(grid, Table)
    return {"table": grid.name, "v_in": grid.v_in}


def _grid_from_json(data: Mapping[str, Any]) -> Grid:
    if "bits" in data:
        return Integer(data["bits"], data["signed"])
    if "learned" in data:
        return Learned(*data["learned"])
    return Float(data["float"]) if "float" in data else Table(data["table"], data["v_in"])


def _scale_grid(name: str) -> Float | Table:
    return Table(name) if name in TABLE_WIDTHS else Float(name)


def _sub_to_json(sub: SubScale) -> list[int] | dict[str, Any]:
    """[width, highest sub-scale, highest sub-offset] where there are sub-offsets, a dictionary for the others."""
    if sub.offset and sub == SubScale(sub.width, Integer(sub.grid.bits), 0, True):
        return [sub.width, sub.highest, sub.highest]
    return {"width": sub.width, "bits": sub.grid.bits, "signed": sub.grid.signed, "zero": sub.zero, "offset": sub.offset}


def _sub_from_json(data: Any) -> SubScale | None:
    if data is None:
        return None
    if isinstance(data, list):
        width, highest, _ = data
        return SubScale(width, Integer(int(highest).bit_length()), 0, True)
    return SubScale(data["width"], Integer(data["bits"], data["signed"]), data["zero"], data["offset"])


def storage_from_json(data: Mapping[str, Any]) -> Storage:
    """Inverse of ``storage_to_json``; ``ValueError``, ``TypeError`` or ``KeyError`` for data that is no storage."""
    zero, scale_grid = data["zero_point"], data.get("scale_grid")
    if isinstance(data["sub_scale"], list) and data["type"] in _ONCE_WITH_OFFSETS:
        return KQUANTS[data["type"].upper()].storage
    storage = Storage(
        data["type"], _grid_from_json(data), data["group"], data["bpw"], tuple(data["scale_dtypes"]),
        data["negative_scale"],
        (zero[0], zero[1]) if isinstance(zero, list) else zero, data["offset"], _sub_from_json(data["sub_scale"]),
        data["k_multiple"], data["n_multiple"], data["group_index"], dict(data["options"]),
        data.get("highest"), None if scale_grid is None else _scale_grid(scale_grid), data.get("doubled", False),
        None if data.get("rows") == "all" else data.get("rows", 1), data.get("flat", False), data.get("inverse", False),
        data.get("zero_dtype"), None if data.get("factor") is None else Factor(*data["factor"]), data.get("whole", False),
        data.get("cyclic", False), data.get("together", False), data.get("full_groups", False),
    )  # fmt: skip
    if not _is_storage(storage):
        raise ValueError("not a storage")
    return storage


_ONCE_WITH_OFFSETS = ("q3_k", "q6_k")  # types of which the first records said, wrongly, that they have sub-offsets
_MAX_DEPTH = 4
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _is_grid(grid: Grid) -> bool:
    if isinstance(grid, Integer):
        return type(grid.bits) is int and 1 <= grid.bits <= 8 and type(grid.signed) is bool
    if isinstance(grid, Table):
        return TABLE_WIDTHS.get(grid.name) == grid.v_in if isinstance(grid.name, str) else False
    if isinstance(grid, Learned):
        return all(type(size) is int and 1 <= size <= 1 << 16 for size in (grid.entries, grid.v_out, grid.v_in, grid.books))
    return isinstance(grid, Float) and grid.name in FLOAT_NAMES


def _is_storage(s: Storage) -> bool:
    """Whether every field is of its type and range: a record may come from anywhere."""

    def whole(value: object, lowest: int, highest: int) -> bool:
        return type(value) is int and lowest <= value <= highest

    zero = s.zero_point if isinstance(s.zero_point, tuple) else (0 if s.zero_point is None else s.zero_point,) * 2
    planes = s.offset is None or s.offset in _FLOATS
    sub = () if s.sub_scale is None else (s.sub_scale,)
    planes = planes and (s.zero_dtype is None or s.zero_dtype in _FLOATS) and (s.factor is None or s.factor.dtype in _FLOATS)
    fields = (s.negative_scale, s.group_index, s.doubled, s.flat, s.inverse, s.whole, s.cyclic, s.together, s.full_groups)
    switches = (*fields, *(x.offset for x in sub))
    flags = all(type(flag) is bool for flag in switches)
    sizes = [s.k_multiple, s.n_multiple, *(x for x in (s.group, s.rows) if x is not None), *(x.width for x in sub)]
    grids = [s.grid, *(x.grid for x in sub), *(() if s.scale_grid is None else (s.scale_grid,))]
    return (
        isinstance(s.type, str) and all(_is_grid(grid) for grid in grids) and flags and planes
        and isinstance(s.bits_per_weight, int | float)
        and all(whole(size, 1, 1 << 31) for size in sizes)
        and all(whole(z, -256, 256) for z in (*zero, *(x.zero for x in sub), s.highest or 0))
        and (bool(s.scale_dtypes) or s.scale_grid is not None) and all(word in _FLOATS for word in s.scale_dtypes)
        and _is_plain(s.options)
    )  # fmt: skip


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether a storage's options are words, numbers, and lists and objects of them."""
    if isinstance(value, dict):
        return depth < _MAX_DEPTH and all(isinstance(key, str) and _is_plain(held, depth + 1) for key, held in value.items())
    if isinstance(value, list | tuple):
        return depth < _MAX_DEPTH and all(_is_plain(held, depth + 1) for held in value)
    return isinstance(value, str | int | float | None)
