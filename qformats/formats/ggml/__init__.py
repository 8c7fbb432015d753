"""The ggml types inside a GGUF, read and written: Q4_0 … Q8_0, Q2_K … Q6_K, IQ1_S … IQ4_XS, MXFP4 NVFP4, Q1_0 Q2_0 TQ1_0 TQ2_0; floats.

Map: ``kind`` says what every block type provides; ``legacy`` holds the 32-weight blocks, ``kquants`` the 256-weight super-blocks,
``iquants`` those with codebooks, ``tables`` four-bit codes of a fixed table, ``ternary`` one and two bits a weight, ``floats`` the plain
float types; each one's docstring has the byte layout. Here are the names every format module has (``qformats.formats.protocol``) and
``dequantize``, the fast path to float32.

A weight is one part, ``weight``, whose ``RawTensor.dtype`` is the ggml type's name and whose shape is (N, K) or, for experts, (E, N, K);
rows are counted over E * N. A ``scale`` beside it (``factor``) is a factor of the whole weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.ggml import factor, floats
from qformats.formats.ggml.iquants import IQUANTS
from qformats.formats.ggml.kind import Kind, PlaneSpec
from qformats.formats.ggml.kquants import KQUANTS
from qformats.formats.ggml.legacy import LEGACY
from qformats.formats.ggml.tables import TABLES
from qformats.formats.ggml.ternary import SPELLINGS, TERNARY
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.loops import find
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = [
    "NAME",
    "SUFFIXES",
    "can_store",
    "config_out",
    "dequantize",
    "detect",
    "layout",
    "read",
    "row_nbytes",
    "scheme",
    "storages",
    "stored_as",
    "write",
]

NAME = "gguf"
SUFFIXES: frozenset[str] = frozenset({factor.LEAF})
CONTAINER = {"container": "gguf"}  # what the checkpoint layer passes as the config of a GGUF
TARGETS = (*LEGACY, *KQUANTS, *TABLES, *IQUANTS, *TERNARY)  # what floats can become
CANDIDATES = ("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")  # for sources of codes when no type is named
NARROW = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q3_K")  # candidates too, for codes of as few bits

BLOCK_TYPES: dict[str, Kind] = {**LEGACY, **KQUANTS, **IQUANTS, **TABLES, **TERNARY}
_TWO_BYTES = ("float16", "int16")  # dtypes that the loops see as uint16; all others are bytes


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A GGUF container says so itself; nothing else is ever one."""
    return Match(NAME, config) if dict(config) == CONTAINER else None


def _kind(raw: RawTensor) -> Kind:
    kind = BLOCK_TYPES.get(raw.dtype)
    if kind is None:
        known = ", ".join(BLOCK_TYPES)
        raise Unsupported("ggml-type", f"blocks of type {raw.dtype} cannot be read", tensor=raw.name, hint=f"readable block types: {known}")
    return kind


def row_nbytes(kind: Kind, k: int) -> int:
    """Bytes of one row of ``k`` weights."""
    return k // kind.block * kind.nbytes


def _weight(module: Module) -> tuple[RawTensor, Kind]:
    raw = module.parts.get("weight")
    if raw is None:
        raise BadFile("missing-part", "there is no weight", tensor=module.name)
    kind = _kind(raw)
    if not raw.shape or raw.shape[-1] % kind.block:
        raise BadFile("gguf-row-size", f"rows of shape {raw.shape} are not whole {raw.dtype} blocks of {kind.block}", tensor=raw.name)
    expected = prod(raw.shape[:-1]) * row_nbytes(kind, raw.shape[-1])
    if raw.nbytes != expected:
        raise BadFile("gguf-size", f"{raw.nbytes} bytes, expected {expected} for {raw.dtype} {raw.shape}", tensor=raw.name)
    return raw, kind


def scheme(module: Module) -> Scheme:
    """The scheme of ``weight`` from its header; ``BadFile`` for ragged rows, ``Unsupported('ggml-type')`` for types not read here."""
    raw, kind = _weight(module)
    plain, beside = kind.scheme(raw.shape), factor.find(module, raw.shape)
    return plain if beside is None else replace(plain, scales=(*plain.scales, factor.spec(beside, raw.shape)))


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` (at least one) of the weight, counted over all but the last dimension, as a tensor (stop - start, K).

    Without ``codes`` the parameters alone are unpacked and the codes are zeros of stride zero.
    """
    raw, kind = _weight(module)
    stop = raw.rows if stop is None else stop
    if not 0 <= start < stop <= raw.rows:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {raw.rows} rows", tensor=raw.name)
    blocks = raw.row_range(start, stop)  # (n, row bytes)
    if raw.big_endian:
        blocks = _swap(kind, blocks)
    tensor = _from_blocks(kind, blocks) if codes else _params_only(kind, blocks)
    if codes and kind.name in SPELLINGS:
        tensor = replace(tensor, source_bytes=(kind.name, blocks))
    beside = factor.find(module, raw.shape)
    return tensor if beside is None else factor.multiplied(tensor, beside, raw.shape, start)


def stored_as(module: Module) -> Storage:
    """The storage in which ``write`` gives a module's own parts back."""
    raw, kind = _weight(module)
    return kind.storage if factor.find(module, raw.shape) is None else factor.with_factor(kind.storage)


def _swap(kind: Kind, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Reverse the bytes of every field of several bytes."""
    b = blocks.reshape(-1, kind.nbytes)
    for at, width in kind.swaps:
        b[:, at : at + width] = b[:, at : at + width][:, ::-1].copy()
    return blocks


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The named type, or all candidates for a source of codes; ``UsageError`` for unknown types and options."""
    if target.options:
        raise UsageError("target-option", f"gguf takes no option {sorted(target.options)}", hint="name a type only, as in gguf:q5_0")
    if target.type is None:
        bits = scheme.grid.bits if isinstance(scheme.grid, Integer) else 8
        narrow = [name for name in NARROW if bits <= max(2, BLOCK_TYPES[name].storage.integers.bits)]
        same = [name for name, kind in TABLES.items() if kind.grid == scheme.grid]
        return [_beside(BLOCK_TYPES[name].storage, scheme) for name in (*same, *narrow, *CANDIDATES)]
    name = target.type.upper()
    if name in floats.FLOATS:
        return [floats.storage(name)]
    if name in TARGETS:
        return [_beside(BLOCK_TYPES[name].storage, scheme)]
    known = ", ".join(n.lower() for n in (*TARGETS, *floats.FLOATS))
    raise UsageError("target-type", f"gguf type {target.type!r} cannot be written", hint=f"types: {known}")


def _beside(storage: Storage, scheme: Scheme) -> Storage:
    """The storage with a factor of the tensor where the source has the same codes under coded scales and a factor."""
    same = storage.scale_grid is not None and scheme.grid == storage.grid and len(scheme.scales) > 1
    return factor.with_factor(storage) if same else storage


def _stored(storage: Storage) -> Kind | None:
    return BLOCK_TYPES.get(storage.type.upper())


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """``weight`` of the ggml type, ``scale`` where the storage has one; ``Unsupported('k-multiple')`` where rows are not whole blocks."""
    if shape[-1] % storage.k_multiple:
        reason = f"rows of {shape[-1]} weights are not a multiple of {storage.k_multiple}"
        raise Unsupported("k-multiple", f"{reason}, as {storage.type} needs", hint="choose a type with smaller blocks")
    weight = {"weight": PartInfo(storage.type.upper(), shape)}
    return {**weight, factor.LEAF: factor.part(shape)} if factor.has_factor(storage) else weight


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes a tensor of ``scheme`` as it stands; the shape's last dimension is K."""
    kind = _stored(storage)
    if kind is None:
        return No(f"{storage.type} holds no codes")
    if scheme.shape[-1] % storage.k_multiple:
        return No(f"{scheme.shape[-1]} columns are not a multiple of {storage.k_multiple}")
    if scheme.group_index:
        return No("it has an act-order index")
    if factor.has_factor(storage):
        plain = factor.split(scheme)
        if plain is None:
            return No("it has no float32 factor of the whole tensor")
        scheme = plain
    wanted = kind.scheme(scheme.shape)
    if scheme.signs != wanted.signs:
        return No("it has a sign plane" if scheme.signs else "it has no sign plane")
    if scheme.grid != wanted.grid:
        return No(f"its codes are {scheme.grid}, not {wanted.grid}")
    pairs = [("scale", scheme.scales, wanted.scales)]
    pairs += [(name, _one(getattr(scheme, name)), _one(getattr(wanted, name))) for name in ("zero_point", "offset")]
    for name, found, needed in pairs:
        if len(found) != len(needed):
            return No(f"it has {len(found)} {name} planes, not {len(needed)}")
        for one, other in zip(found, needed, strict=True):
            if not _same(one, other):
                return No(f"its {name} is {_words(one)}, not {_words(other)}")
    return Yes()


def _one(spec: ParamSpec | None) -> tuple[ParamSpec, ...]:
    return () if spec is None else (spec,)


def _same(found: ParamSpec, wanted: ParamSpec) -> bool:
    if wanted.constant is not None:  # a constant counts by value; its dtype and tile say nothing
        return found.constant == wanted.constant and not found.inverse
    if found.dtype != wanted.dtype or found.block != wanted.block or found.inverse:
        return False
    if wanted.nested is None or found.nested is None:
        return wanted.nested is found.nested
    same = found.nested.grid == wanted.nested.grid and len(found.nested.scales) == len(wanted.nested.scales)
    zeros = _one(found.nested.zero_point), _one(wanted.nested.zero_point)
    same = same and len(zeros[0]) == len(zeros[1]) and all(_same(a, b) for a, b in zip(*zeros, strict=True))
    return same and found.nested.offset is None and all(_same(a, b) for a, b in zip(found.nested.scales, wanted.nested.scales, strict=True))


def _words(spec: ParamSpec) -> str:
    if spec.constant is not None and spec.dtype != "float16":
        return f"the constant {spec.constant:g}"
    sizes = f"{spec.block.sizes}" if isinstance(spec.block, Tile) else f"{spec.block}"
    return f"{'inverse ' if spec.inverse else ''}{spec.dtype} for each {sizes}"


def write(storage: Storage, tensor: QuantizedTensor | Tensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` (over all but the last dimension of ``shape``) as one piece of ggml blocks.

    ``tensor`` is (n, K) in the storage's own form, for the float types a torch tensor of that very dtype: nothing is rounded here.
    ``Unsupported('form')`` names what differs.
    """
    kind = _stored(storage)
    if kind is None:
        return [Piece("weight", floats.to_bytes(storage, tensor), start)]
    from qformats.tensor import QuantizedTensor

    if not isinstance(tensor, QuantizedTensor):
        raise Unsupported("form", f"a float tensor cannot be written as {storage.type} without quantizing it first")
    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("form", f"cannot be stored as {storage.type}: {answer.reason}")
    wanted = kind.plane_specs[0].dtype
    if str(tensor.codes.dtype) != f"torch.{wanted}":
        raise Unsupported("form", f"cannot be stored as {storage.type}: its codes are {tensor.codes.dtype}, not torch.{wanted}")
    if len(tensor.shape) != 2 or tensor.shape[-1] != shape[-1] or start + tensor.shape[0] > prod(shape[:-1]):
        raise Unsupported("form", f"rows {start}+{tensor.shape} do not fit a weight of shape {shape}")
    weight = Piece("weight", _to_blocks(kind, tensor), start)
    return [weight, *factor.pieces(tensor, start, shape)] if factor.has_factor(storage) else [weight]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A GGUF has no quantization config: every tensor carries its type."""
    return {}


def _loops() -> Any:
    return find("ggml")


def _loop(table: str, kind: Kind) -> Any:
    """The compiled loop of ``kind`` in ``UNPACK``, ``PACK`` or ``DEQUANTIZE``, or None."""
    loops = _loops()
    return None if loops is None else getattr(loops, table).get(kind.name)


def _from_blocks(kind: Kind, blocks: np.ndarray[Any, Any]) -> QuantizedTensor:
    import torch

    loop, rows = _loop("UNPACK", kind), blocks.shape[0]
    if loop is None:
        return kind.to_tensor(*kind.unpack_blocks(torch.from_numpy(blocks)))
    count = blocks.size // kind.nbytes
    planes = _empty_planes(kind, count)
    loop(blocks.reshape(count, kind.nbytes), *planes)
    return kind.to_tensor(*(_plane(plane, spec, rows) for plane, spec in zip(planes, kind.plane_specs, strict=True)))


def _plane(plane: np.ndarray[Any, Any], spec: PlaneSpec, rows: int) -> Any:
    """What a loop filled, for each block, as a torch plane of the rows; None for one the type lacks."""
    import torch

    if not spec.width:
        return None
    return torch.from_numpy(plane).reshape(rows, plane.size // rows).view(getattr(torch, spec.dtype))


def _params_only(kind: Kind, blocks: np.ndarray[Any, Any]) -> QuantizedTensor:
    import torch

    codes, across = kind.plane_specs[0], blocks.shape[1] // kind.nbytes
    zeros = torch.zeros((), dtype=getattr(torch, codes.dtype)).expand(len(blocks), across * codes.width)
    return kind.to_tensor(zeros, *kind.unpack_params(torch.from_numpy(blocks)))


def _empty_planes(kind: Kind, count: int) -> list[np.ndarray[Any, Any]]:
    """The planes of ``count`` blocks as the loops fill them: uint8 or uint16, (count, width), (count,) where the width is 1."""
    import numpy as np

    def empty(spec: PlaneSpec) -> np.ndarray[Any, Any]:
        shape = (count, spec.width) if spec.width > 1 else count * spec.width
        return np.empty(shape, np.uint16 if spec.dtype in _TWO_BYTES else np.uint8)

    return [empty(spec) for spec in kind.plane_specs]


def _to_blocks(kind: Kind, tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    import numpy as np

    if kind.name in SPELLINGS and tensor.source_bytes is not None and tensor.source_bytes[0] == kind.name:
        own: np.ndarray[Any, Any] = tensor.source_bytes[1]
        return own
    loop, planes = _loop("PACK", kind), kind.planes(tensor)
    if loop is None:
        array: np.ndarray[Any, Any] = kind.pack_blocks(*planes).numpy()
        return array
    rows, k = tensor.shape
    count = rows * k // kind.block
    blocks = np.empty((count, kind.nbytes), np.uint8)
    loop(blocks, *(_flat(plane, spec, count) for plane, spec in zip(planes, kind.plane_specs, strict=True)))
    return blocks.reshape(rows, row_nbytes(kind, k))


def _flat(plane: Tensor | None, spec: PlaneSpec, count: int) -> np.ndarray[Any, Any]:
    """A plane as the loops take it (see ``_empty_planes``); a missing one empty."""
    import torch

    word = torch.uint16 if spec.dtype in _TWO_BYTES else torch.uint8
    if plane is None:
        return torch.empty(0, dtype=word).numpy()
    plane = plane.contiguous().view(word)
    return plane.reshape((count, spec.width) if spec.width > 1 else (count,)).numpy()


def dequantize(type_name: str, blocks: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Write the float32 values of ``blocks`` (uint8, (rows, row bytes)) into ``out`` (float32, (rows, K), C order).

    Bit for bit llama.cpp's: one float32 product, then one float32 sum where the type has a minimum. No product needs more than 24
    bits, so this is also the exact value rounded once (only the sign of a zero, and
    MXFP4's scale byte 255, may differ). ``UsageError('shape')`` if the arrays
    do not belong together, ``Unsupported('ggml-type')`` for a type not read here.

    >>> import numpy as np
    >>> out = np.empty((1, 32), np.float32)
    >>> dequantize("Q4_0", np.frombuffer(bytes.fromhex("003c" + "09" * 16), np.uint8).reshape(1, 18), out)
    >>> out[0, 0], out[0, 16]
    (np.float32(1.0), np.float32(-8.0))
    """
    import numpy as np

    kind = BLOCK_TYPES.get(type_name)
    if kind is None:
        raise Unsupported("ggml-type", f"{type_name} cannot be dequantized", hint=f"types: {', '.join(BLOCK_TYPES)}")
    fits = blocks.ndim == 2 and not blocks.shape[1] % kind.nbytes and blocks.dtype == np.uint8
    if not fits or out.shape != (blocks.shape[0], blocks.shape[1] // kind.nbytes * kind.block):
        raise UsageError("shape", f"{type_name} blocks {blocks.dtype} {blocks.shape} do not fill an array {out.shape}")
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise UsageError("shape", f"the output is {out.dtype}, expected contiguous float32")
    blocks, count = np.ascontiguousarray(blocks), blocks.size // kind.nbytes
    loop = _loop("DEQUANTIZE", kind)
    if loop is not None:
        loop(blocks.reshape(count, kind.nbytes), out.reshape(count, kind.block))
        return
    import torch

    source = torch.from_numpy(blocks if blocks.flags.writeable else blocks.copy())
    out[...] = kind.dequantize_blocks(source).numpy()
