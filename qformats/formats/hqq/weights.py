"""HQQ weights read and written: ``read`` and ``write`` mirror each other; the table of parts is in the package's docstring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.hqq.state import FLOATS, PACKINGS, Geometry, bits_of, encode, geometry_of, layer, part_info
from qformats.formats.hqq.stats import nested_spec, statistic_param
from qformats.formats.packed import CONTAINER_FLOATS, blank_codes, dtype_option, float_array, group_option
from qformats.formats.packed import FLOATS as TORCH_WORDS
from qformats.formats.protocol import Module, PartInfo, Piece, Target
from qformats.scheme import Block, Cyclic, Flat, Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["can_store", "layout", "read", "scheme", "storage_of", "storages", "write"]

WIDTHS: dict[str, float] = {f"int{b:g}": b for b in (4, 3, 2, 8, 1, 1.58, 5, 6)}
_GROUP = 64  # ``BaseQuantizeConfig`` of hqq 0.2.8


def _block(g: Geometry) -> Block:
    """The block of one number in the whole weight."""
    if g.kind == "whole":
        return whole(g.shape)
    if g.kind == "cyclic":
        return Cyclic(g.count)
    return Tile((1, g.group)) if g.kind == "rows" else Flat(g.group)


def scheme(module: Module) -> Scheme:
    """Shape, codes and parameters; ``BadFile`` where the parts contradict each other."""
    found = layer(module)
    g, block = found.geometry, _block(found.geometry)
    specs = []
    for leaf, raw in (("scale", found.scale), ("zero", found.zero)):
        nested = nested_spec(module, leaf, found)
        only = float(_only(raw)) if g.count == 1 and nested is None else None
        specs.append(ParamSpec("codes" if nested else TORCH_WORDS[found.compute], block, nested=nested, constant=only))
    return Scheme(g.shape, Integer(g.bits), (specs[0],), specs[1])


def _only(raw: RawTensor) -> float:
    from qformats.formats.packed import float_tensor

    return float(float_tensor(raw.array().reshape(-1), raw.dtype)[0])


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``: codes uint8 (n, K), scale and zero in the compute dtype.

    On axis 1 both are (n, K / group) on tiles of a row, or runs of the vector where groups go over the ends of rows; on axis 0 they are
    cyclic in the whole weight and (n, K), one for each weight, in a range of rows.
    """
    import torch

    from qformats.tensor import QuantizedTensor

    found = layer(module)
    g = found.geometry
    n, k = g.shape
    stop = n if stop is None else stop
    if not 0 <= start < stop <= n:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {n} rows", tensor=module.name)
    shape = (stop - start, k)
    if codes:
        plane = torch.from_numpy(g.slabs.unpack(module.parts["W_q"], start * k, stop * k)).reshape(shape)
        if g.slabs.bits > g.bits or g.highest < (1 << g.bits) - 1:
            _check_range(plane, g, module)
    else:
        plane = blank_codes(shape)
    block, index = _places(g, start, stop)
    scale, zero = (statistic_param(module, leaf, found, index, block) for leaf in ("scale", "zero"))
    return QuantizedTensor(shape, plane, Integer(g.bits), (scale,), zero)


def _check_range(plane: Tensor, g: Geometry, module: Module) -> None:
    top = int(plane.max()) if plane.numel() else 0
    if top > (1 << g.bits) - 1:
        raise BadFile("codes-range", f"a code is {top}, more than {g.bits} bits hold", tensor=f"{module.name}.W_q")


def _places(g: Geometry, start: int, stop: int) -> tuple[Block, Tensor]:
    """The block of the numbers under rows ``start:stop``, and which of them stand where, int64."""
    import torch

    n, k = g.shape
    if g.kind == "whole":
        return whole((stop - start, k)), torch.zeros((1, 1), dtype=torch.int64)
    if g.kind == "rows":
        across = k // g.group
        return Tile((1, g.group)), torch.arange(start * across, stop * across).reshape(-1, across)
    if (start, stop) == (0, n):
        return _block(g), torch.arange(g.count)
    if g.kind == "flat":
        run = gcd(k, g.group)
        return Tile((1, run)), (torch.arange(start * k, stop * k, run) // g.group).reshape(stop - start, -1)
    if g.count == k:
        return Tile((stop - start, 1)), torch.arange(k).reshape(1, k)
    return Tile((1, 1)), (torch.arange(start * k, stop * k) % g.count).reshape(stop - start, k)


# ---------------------------------------------------------------- storages


def storage_of(module: Module) -> Storage:
    """The storage whose ``write`` makes these parts again; out of a pickled file, the one that says the same in safetensors."""
    found = layer(module)
    state = {leaf: list(value) if leaf == "shape" else value for leaf, value in found.state.items()}
    if "encoded_state_dict" not in state or state.get("quant_scale") or state.get("quant_zero"):
        usual = _new_state(found.state["nbits"], found.geometry.shape, None, found.state["axis"], TORCH_WORDS[found.compute])
        state = {**usual, **state, "quant_scale": False, "quant_zero": False}
    return _storage(found.geometry, state, TORCH_WORDS[found.compute], "zero_scale" in module.parts)


def _storage(g: Geometry, state: Mapping[str, Any], dtype: str, stacked: bool = False) -> Storage:
    nbits = state["nbits"]
    group = None if g.kind == "whole" or (g.kind == "rows" and g.group == g.shape[-1]) else g.group
    width = {"float16": 16, "bfloat16": 16, "float32": 32}[dtype]
    return Storage(
        f"int{nbits:.3g}",
        Integer(g.bits),
        group,
        8 * g.slabs.nbytes / prod(g.shape) + 2 * width / g.group,
        (dtype,),
        zero_dtype=dtype,
        highest=None if g.highest == (1 << g.bits) - 1 else g.highest,
        rows=None if g.kind == "whole" else 1,
        flat=g.kind == "flat",
        cyclic=g.kind == "cyclic",
        together=len(g.slabs.shifts) > 1 or g.kind != "rows",
        options={"state": dict(state), "stacked": stacked},
    )


def _new_state(nbits: float, shape: tuple[int, ...], group: int | None, axis: int, dtype: str) -> dict[str, Any]:
    """What ``HQQLinear.state_dict`` says of a layer made with the defaults."""
    packing = bits_of(nbits)[2]
    n, k = shape
    word = "torch.int32" if PACKINGS[packing][2] == 4 else "torch.uint8"
    return {
        "nbits": nbits, "group_size": group or (k if axis == 1 else n), "shape": [n, k], "axis": axis, "packing": packing,
        "unpack_view_dtype": word, "view_as_float": False, "quant_scale": False, "quant_zero": False,
        "compute_dtype": f"torch.{dtype}", "offload_meta": False, "encoded_state_dict": True, "stores_quant_config": True,
        "channel_wise": True, "optimize": True, "round_zero": nbits == 4,
    }  # fmt: skip


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """Candidates for a weight shaped like ``scheme``: those that could hold its codes first.

    Options: ``group=N|-1`` (default: the source's, else 64), ``axis=0|1`` (default 1), ``dtype=float16|bfloat16|float32`` of scale and
    zero (default float16, and the scale's own where that is another). A group that does not divide the weight is a whole row.
    """
    if target.type is not None and target.type not in WIDTHS:
        raise UsageError("type", f"hqq has no type {target.type!r}", hint=f"types: {', '.join(WIDTHS)}")
    unknown = sorted(set(target.options) - {"group", "axis", "dtype"})
    if unknown:
        raise UsageError("option", f"hqq has no option {unknown[0]!r}", hint="options: group, axis, dtype")
    axis = target.options.get("axis", "1")
    if axis not in ("0", "1"):
        raise UsageError("option", f"axis={axis} is not 0 or 1")
    dtypes = _dtypes(target, scheme)
    widths = [WIDTHS[target.type]] if target.type is not None else list(WIDTHS.values())
    if target.type is None and isinstance(scheme.grid, Integer):
        widths.sort(key=lambda b: abs(b - scheme.grid.bits))  # type: ignore[union-attr]
    found = []
    for group in _groups(target, scheme):
        for nbits in widths:
            for dtype in dtypes:
                storage = _candidate(nbits, scheme.shape, group, int(axis), dtype)
                found += [storage] if storage is not None else []
    if not found:
        raise Unsupported("group-size", f"hqq has no groups for a weight of shape {scheme.shape}", hint="choose int8 or another group")
    return found


def _dtypes(target: Target, scheme: Scheme) -> list[str]:
    asked = dtype_option(target)
    if asked is not None:
        return [asked]
    own = [s.dtype for s in scheme.scales if f"torch.{s.dtype}" in FLOATS]
    return list(dict.fromkeys([*own[:1], "float16"]))


def _groups(target: Target, scheme: Scheme) -> list[int | None]:
    """The group asked for; else the source's, then the usual one, then the whole row."""
    if "group" in target.options:
        return [group_option(target, scheme)]
    own = scheme.group_size if scheme.scales else None
    usual = _GROUP if own is None or scheme.shape[-1] % _GROUP == 0 else None  # kept codes have groups within rows
    wanted = [own if own is not None and own < scheme.shape[-1] else (None if own else _GROUP), usual, None]
    return list(dict.fromkeys(wanted))


def _candidate(nbits: float, shape: tuple[int, ...], group: int | None, axis: int, dtype: str) -> Storage | None:
    if len(shape) != 2:
        return None
    state = _new_state(nbits, shape, group, axis, dtype)
    try:
        return _storage(geometry_of(shape, state, "the target"), state, dtype)
    except BadFile:
        return None


def _own_state(storage: Storage, shape: tuple[int, ...]) -> dict[str, Any]:
    """The storage's values for a weight of ``shape``."""
    state = storage.options.get("state")
    if not isinstance(state, Mapping):
        raise Unsupported("storage-form", f"{storage.type} is no storage of hqq")
    if tuple(state.get("shape", ())) == tuple(shape):
        return dict(state)
    if len(shape) != 2:
        raise Unsupported("rank", f"hqq holds matrices, not weights of shape {shape}")
    changed = {**state, "shape": list(shape)}
    if storage.group is None and "group_size" in state:
        changed["group_size"] = shape[1] if state["axis"] == 1 else shape[0]
    return changed


def _geometry(storage: Storage, shape: tuple[int, ...]) -> tuple[Geometry, dict[str, Any]]:
    state = _own_state(storage, shape)
    try:
        return geometry_of(shape, state, "the target"), state
    except BadFile as error:
        raise Unsupported("group-size", error.message, hint="choose another group or int8") from None


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    g, state = _geometry(storage, shape)
    dtype = CONTAINER_FLOATS[storage.scale_dtypes[0]]
    codes = PartInfo("U8" if g.slabs.word_nbytes == 1 else "I32", (g.slabs.packed_rows, g.slabs.columns))
    if state.get("view_as_float"):
        wide = {"F16": 2, "BF16": 2, "F32": 4}[dtype]
        codes = PartInfo(dtype, (codes.shape[0], codes.shape[1] * g.slabs.word_nbytes // wide))
    if storage.options.get("stacked"):
        planes = {"zero_scale": PartInfo(dtype, (2, *g.plane))}
    else:
        planes = {"scale": PartInfo(dtype, g.plane), "zero": PartInfo(dtype, g.plane)}
    return {"W_q": codes, **planes, **{leaf: part_info(leaf, value) for leaf, value in state.items()}}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands."""
    if len(scheme.shape) != 2:
        return No(f"it has {len(scheme.shape)} dimensions, not 2")
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if scheme.offset is not None or scheme.signs or scheme.group_index or len(scheme.scales) != 1 or scheme.zero_point is None:
        return No("it is not codes with one scale and one zero point")
    try:
        block = _block(_geometry(storage, scheme.shape)[0])
    except Unsupported as error:
        return No(error.message)
    scale, zero = scheme.scales[0], scheme.zero_point
    if scale.inverse or scale.dtype != storage.scale_dtypes[0] or not _on(scale, block, scheme):
        return No(f"its scale is {scale.dtype} on {scale.block}, not {storage.scale_dtypes[0]} on {block}")
    if zero.dtype not in (storage.zero_dtype, "uint8", "int8", "int16") or not (zero.constant is not None or _on(zero, block, scheme)):
        return No(f"its zero point is {zero.dtype} on {zero.block}, not {storage.zero_dtype} on {block}")
    return Yes()


def _on(spec: ParamSpec, block: Block, scheme: Scheme) -> bool:
    return spec.block == block or (spec.constant is not None and block.counts(scheme.shape) == spec.block.counts(scheme.shape))


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; all rows at once unless codes are whole bytes on axis 1."""
    n, k = tensor.shape
    if storage.together and (start, n) != (0, shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + n} of {shape[0]}: hqq packs distant rows into one byte")
    answer = can_store(storage if n == shape[0] else _resized(storage, tensor.shape), tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("storage-form", f"cannot be written as hqq {storage.type}: {answer.reason}")
    g, state = _geometry(storage, shape)
    codes = tensor.codes.contiguous().numpy()
    if storage.together:
        packed = g.slabs.pack(codes)
        if state.get("view_as_float"):
            packed = packed.view({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[storage.scale_dtypes[0]])
        pieces = [Piece("W_q", packed)]
    else:
        codes = codes.reshape(-1, g.slabs.columns)
        if state.get("view_as_float"):
            codes = codes.view({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[storage.scale_dtypes[0]])
        pieces = [Piece("W_q", codes, start * k // g.slabs.columns)]
    pieces += _stat_pieces(storage, tensor, g, start * k // g.group)
    return pieces + ([Piece(leaf, encode(leaf, value)) for leaf, value in state.items()] if start == 0 else [])


def _resized(storage: Storage, shape: tuple[int, ...]) -> Storage:
    return replace(storage, options={**storage.options, "state": _own_state(storage, shape)})


def _stat_pieces(storage: Storage, tensor: QuantizedTensor, g: Geometry, first: int) -> list[Piece]:
    """Scale and zero in the storage's dtype, one number a row of the plane on axis 1, one row on axis 0."""
    import torch

    dtype = getattr(torch, storage.scale_dtypes[0])
    count = g.count if storage.together else tensor.shape[0] * tensor.shape[1] // g.group
    planes = {}
    assert tensor.zero_point is not None
    for leaf, param in (("scale", tensor.scales[0]), ("zero", tensor.zero_point)):
        values = param.values
        assert isinstance(values, torch.Tensor)
        made = values.to(dtype).reshape(-1)
        if leaf == "zero" and not values.is_floating_point() and not torch.equal(made.to(torch.int64), values.reshape(-1).to(torch.int64)):
            raise Unsupported("zero-point-range", f"a zero point is no {storage.scale_dtypes[0]} number")
        made = made.expand(count) if made.numel() == 1 else made
        planes[leaf] = float_array(made.contiguous()).reshape((-1, 1) if len(g.plane) == 0 or g.plane[1] == 1 else (1, -1))
    if storage.options.get("stacked"):
        return [Piece("zero_scale", planes["zero"]), Piece("zero_scale", planes["scale"], planes["zero"].shape[0])]
    return [Piece(leaf, plane, first if g.kind == "rows" else 0) for leaf, plane in planes.items()]
