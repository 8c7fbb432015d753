"""What one target tensor becomes: its source rows, what is done to them, the parts it is stored as, and the kind of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats.architectures.mapping import TensorMap
from qformats.formats.protocol import PartInfo
from qformats.scheme import Integer, Storage

if TYPE_CHECKING:
    import numpy as np

    from qformats.reencode import Hint

__all__ = ["Job", "storage_from_json", "storage_to_json"]


@dataclass(frozen=True)
class Job:
    """One target tensor.

    ``action``: ``parts`` (stored planes as they are), ``copy`` (same dtype, rows maybe reordered), ``float`` (to ``dtype``),
    ``codes`` (codes kept, written as ``storage``) or ``quantize`` (new codes). ``orders``: column order of each act-order source
    module that was absorbed.
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
        glued = not self.map.target or leaf.startswith("_")
        return f"{self.map.target}{leaf}" if glued else f"{self.map.target}.{leaf}"


def storage_to_json(storage: Storage) -> dict[str, Any]:
    """A storage as plain JSON data."""
    return {
        "type": storage.type,
        "bits": storage.grid.bits,
        "signed": storage.grid.signed,
        "group": storage.group,
        "bpw": storage.bits_per_weight,
        "scale_dtypes": list(storage.scale_dtypes),
        "negative_scale": storage.negative_scale,
        "zero_point": list(storage.zero_point) if isinstance(storage.zero_point, tuple) else storage.zero_point,
        "offset": storage.offset,
        "sub_scale": None if storage.sub_scale is None else list(storage.sub_scale),
        "k_multiple": storage.k_multiple,
        "n_multiple": storage.n_multiple,
        "group_index": storage.group_index,
        "options": dict(sorted(storage.options.items())),
    }


def storage_from_json(data: Mapping[str, Any]) -> Storage:
    """Inverse of ``storage_to_json``; ``ValueError``, ``TypeError`` or ``KeyError`` for data that is no storage."""
    zero, sub = data["zero_point"], data["sub_scale"]
    storage = Storage(
        data["type"], Integer(data["bits"], data["signed"]), data["group"], data["bpw"], tuple(data["scale_dtypes"]),
        data["negative_scale"],
        (zero[0], zero[1]) if isinstance(zero, list) else zero, data["offset"], None if sub is None else (sub[0], sub[1], sub[2]),
        data["k_multiple"], data["n_multiple"], data["group_index"], dict(data["options"]),
    )  # fmt: skip
    if not _is_storage(storage):
        raise ValueError("not a storage")
    return storage


_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _is_storage(s: Storage) -> bool:
    """Whether every field is of its type and range: a record may come from anywhere."""

    def whole(value: object, lowest: int, highest: int) -> bool:
        return type(value) is int and lowest <= value <= highest

    zero = s.zero_point if isinstance(s.zero_point, tuple) else (0 if s.zero_point is None else s.zero_point,) * 2
    planes = s.offset is None or s.offset in _FLOATS
    flags = all(type(flag) is bool for flag in (s.grid.signed, s.negative_scale, s.group_index))
    sizes = [s.k_multiple, s.n_multiple, *(() if s.group is None else (s.group,)), *(s.sub_scale or ())]
    return (
        isinstance(s.type, str) and whole(s.grid.bits, 1, 8) and flags and planes
        and isinstance(s.bits_per_weight, int | float)
        and all(whole(size, 1, 1 << 31) for size in sizes)
        and all(whole(z, -256, 256) for z in zero)
        and bool(s.scale_dtypes) and all(word in _FLOATS for word in s.scale_dtypes)
        and all(isinstance(key, str) and isinstance(value, str | int | float | None) for key, value in s.options.items())
    )  # fmt: skip
