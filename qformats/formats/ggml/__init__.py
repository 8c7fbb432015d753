"""The ggml types inside a GGUF: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 and the K-quants Q2_K … Q6_K, read and written; F32 F16 BF16 beside them.

Map: ``legacy`` holds the 32-weight blocks, ``kquants`` the 256-weight super-blocks, ``floats`` the plain float types; each one's
docstring has the byte layout. Here are the names every format module has (``qformats.formats.protocol``) and ``dequantize``, the
fast path to float32.

A weight is one part, ``weight``, whose ``RawTensor.dtype`` is the ggml type's name and whose shape is (N, K) or, for experts, (E, N, K);
rows are counted over E * N.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.ggml import floats, kquants, legacy
from qformats.formats.ggml.kquants import KQUANTS, KQuant
from qformats.formats.ggml.legacy import LEGACY, Legacy
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.scheme import No, ParamSpec, Scheme, Storage, Tile, Yes

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
    "write",
]

NAME = "gguf"
SUFFIXES: frozenset[str] = frozenset()
CONTAINER = {"container": "gguf"}  # what the checkpoint layer passes as the config of a GGUF
TARGETS = (*LEGACY, *KQUANTS)  # what weights can become; only Q4_K and Q5_K can take the codes of other formats, floats become any
CANDIDATES = ("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # for affine sources when no type is named, smallest first

Kind = Legacy | KQuant
BLOCK_TYPES: dict[str, Kind] = {**LEGACY, **KQUANTS}


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A GGUF container says so itself; nothing else is ever one."""
    return Match(NAME, config) if dict(config) == CONTAINER else None


def _kind(raw: RawTensor) -> Kind:
    kind = BLOCK_TYPES.get(raw.dtype)
    if kind is None:
        known = ", ".join(BLOCK_TYPES)
        raise Unsupported("ggml-type", f"blocks of type {raw.dtype} cannot be read", tensor=raw.name, hint=f"readable block types: {known}")
    return kind


def _block(kind: Kind) -> int:
    return legacy.BLOCK if isinstance(kind, Legacy) else kquants.SUPER


def row_nbytes(kind: Kind, k: int) -> int:
    """Bytes of one row of ``k`` weights."""
    return k // _block(kind) * kind.nbytes


def _weight(module: Module) -> tuple[RawTensor, Kind]:
    raw = module.parts.get("weight")
    if raw is None:
        raise BadFile("missing-part", "there is no weight", tensor=module.name)
    kind = _kind(raw)
    if not raw.shape or raw.shape[-1] % _block(kind):
        raise BadFile("gguf-row-size", f"rows of shape {raw.shape} are not whole {raw.dtype} blocks of {_block(kind)}", tensor=raw.name)
    expected = prod(raw.shape[:-1]) * row_nbytes(kind, raw.shape[-1])
    if raw.nbytes != expected:
        raise BadFile("gguf-size", f"{raw.nbytes} bytes, expected {expected} for {raw.dtype} {raw.shape}", tensor=raw.name)
    return raw, kind


def scheme(module: Module) -> Scheme:
    """The scheme of ``weight`` from its header; ``BadFile`` for ragged rows, ``Unsupported('ggml-type')`` for types not read here."""
    raw, kind = _weight(module)
    return kind.scheme(raw.shape)


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
    return _from_blocks(kind, blocks) if codes else _params_only(kind, blocks, raw.shape[-1])


def _swap(kind: Kind, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Reverse the bytes of every multi-byte field: d, m or dmin, and Q5's u32 ``qh``, which ggml copies as one word."""
    b = blocks.reshape(-1, kind.nbytes)
    fields = [(at, 2) for at in kind.halves]
    if isinstance(kind, Legacy) and kind.bits == 5:
        fields.append((2 * len(kind.halves), 4))
    for at, width in fields:
        b[:, at : at + width] = b[:, at : at + width][:, ::-1].copy()
    return blocks


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The named type, or all candidates for an affine source, smallest first; ``UsageError`` for unknown types and options."""
    if target.options:
        raise UsageError("target-option", f"gguf takes no option {sorted(target.options)}", hint="name a type only, as in gguf:q5_0")
    if target.type is None:
        return [BLOCK_TYPES[name].storage for name in CANDIDATES]
    name = target.type.upper()
    if name in floats.FLOATS:
        return [floats.storage(name)]
    if name in TARGETS:
        return [BLOCK_TYPES[name].storage]
    known = ", ".join(n.lower() for n in (*TARGETS, *floats.FLOATS))
    raise UsageError("target-type", f"gguf type {target.type!r} cannot be written", hint=f"types: {known}")


def _stored(storage: Storage) -> Kind | None:
    return BLOCK_TYPES.get(storage.type.upper())


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """One part, ``weight``, of the ggml type; ``Unsupported('k-multiple')`` where rows are not whole blocks."""
    if shape[-1] % storage.k_multiple:
        reason = f"rows of {shape[-1]} weights are not a multiple of {storage.k_multiple}"
        raise Unsupported("k-multiple", f"{reason}, as {storage.type} needs", hint="choose a type with smaller blocks")
    return {"weight": PartInfo(storage.type.upper(), shape)}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes a tensor of ``scheme`` as it stands; the shape's last dimension is K."""
    kind = _stored(storage)
    if kind is None:
        return No(f"{storage.type} holds no codes")
    if scheme.shape[-1] % storage.k_multiple:
        return No(f"{scheme.shape[-1]} columns are not a multiple of {storage.k_multiple}")
    if scheme.signs or scheme.group_index:
        return No("it has an act-order index" if scheme.group_index else "it has a sign plane")
    wanted = kind.scheme(scheme.shape)
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
    wanted = "torch.int8" if kind.grid.signed else "torch.uint8"
    if str(tensor.codes.dtype) != wanted:
        raise Unsupported("form", f"cannot be stored as {storage.type}: its codes are {tensor.codes.dtype}, not {wanted}")
    if len(tensor.shape) != 2 or tensor.shape[-1] != shape[-1] or start + tensor.shape[0] > prod(shape[:-1]):
        raise Unsupported("form", f"rows {start}+{tensor.shape} do not fit a weight of shape {shape}")
    return [Piece("weight", _to_blocks(kind, tensor), start)]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A GGUF has no quantization config: every tensor carries its type."""
    return {}


@cache
def _loops() -> Any:
    """``qformats.loops.ggml``, or None where numba cannot be imported."""
    try:
        return importlib.import_module("qformats.loops.ggml")
    except ImportError:
        return None


def _loop(table: str, kind: Kind) -> Any:
    """The compiled loop of ``kind`` in ``UNPACK``, ``PACK`` or ``DEQUANTIZE``, or None."""
    loops = _loops()
    return None if loops is None else getattr(loops, table).get(kind.name)


def _from_blocks(kind: Kind, blocks: np.ndarray[Any, Any]) -> QuantizedTensor:
    import torch

    loop, rows = _loop("UNPACK", kind), blocks.shape[0]
    if loop is None:
        source = torch.from_numpy(blocks)
        if isinstance(kind, Legacy):
            return legacy.to_tensor(kind, *legacy.unpack_blocks(kind, source))
        return kquants.to_tensor(kind, *kquants.unpack_blocks(kind, source))
    across = blocks.shape[1] // kind.nbytes  # blocks a row
    planes = _empty_planes(kind, rows * across)
    loop(blocks.reshape(rows * across, kind.nbytes), *planes)
    codes, first, *rest = (_plane(plane, rows, across) for plane in planes)
    if isinstance(kind, Legacy):
        return legacy.to_tensor(kind, codes.view(torch.int8) if kind.grid.signed else codes, first, *rest)
    return kquants.to_tensor(kind, codes, first.view(torch.int8) if kind.sub_grid.signed else first, *rest)


def _plane(plane: np.ndarray[Any, Any], rows: int, across: int) -> Any:
    """What a loop filled, for each block, as a torch plane of the rows: fp16 from uint16; None for a field the type lacks."""
    import torch

    if not plane.size:
        return None
    values = torch.from_numpy(plane).reshape(rows, across * (plane.size // len(plane)))
    return values.view(torch.float16) if plane.dtype.itemsize == 2 else values


def _params_only(kind: Kind, blocks: np.ndarray[Any, Any], k: int) -> QuantizedTensor:
    import torch

    source = torch.from_numpy(blocks)
    codes = torch.zeros((), dtype=torch.int8 if kind.grid.signed else torch.uint8).expand(len(blocks), k)
    if isinstance(kind, Legacy):
        return legacy.to_tensor(kind, codes, *legacy.unpack_params(kind, source))
    return kquants.to_tensor(kind, codes, *kquants.unpack_params(kind, source))


def _empty_planes(kind: Kind, count: int) -> list[np.ndarray[Any, Any]]:
    """codes, d, m of ``count`` legacy blocks, or codes, sc, m, d, dmin of super-blocks; fp16 as uint16."""
    import numpy as np

    codes, half = np.empty((count, _block(kind)), np.uint8), np.empty(count, np.uint16)
    if isinstance(kind, Legacy):
        return [codes, half, np.empty(count if kind.has_offset else 0, np.uint16)]
    sub, low = (count, kquants.SUPER // kind.sub), count if kind.has_offset else 0
    return [codes, np.empty(sub, np.uint8), np.empty((low, sub[1]), np.uint8), half, np.empty(low, np.uint16)]


def _to_blocks(kind: Kind, tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    import numpy as np
    import torch

    loop = _loop("PACK", kind)
    planes: list[Any] = list(legacy.planes(kind, tensor) if isinstance(kind, Legacy) else kquants.planes(kind, tensor))
    if loop is None:
        packed = legacy.pack_blocks(kind, *planes) if isinstance(kind, Legacy) else kquants.pack_blocks(kind, *planes)
        array: np.ndarray[Any, Any] = packed.numpy()
        return array
    rows, k = tensor.codes.shape
    count = rows * k // _block(kind)
    blocks = np.empty((count, kind.nbytes), np.uint8)
    loop(blocks, *(_flat(plane, count, torch) for plane in planes))
    return blocks.reshape(rows, row_nbytes(kind, k))


def _flat(plane: Tensor | None, count: int, torch: Any) -> np.ndarray[Any, Any]:
    """A plane as the loops take it: uint8 (count, width), fp16 as uint16 (count,), a missing one empty."""
    if plane is None:
        return torch.empty(0, dtype=torch.uint16).numpy()  # type: ignore[no-any-return]
    plane = plane.contiguous()
    if plane.dtype == torch.float16:
        return plane.view(torch.uint16).reshape(count).numpy()
    return plane.view(torch.uint8).reshape(count, plane.numel() // max(count, 1)).numpy()


def dequantize(type_name: str, blocks: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Write the float32 values of ``blocks`` (uint8, (rows, row bytes)) into ``out`` (float32, (rows, K), C order).

    Bit for bit llama.cpp's: one float32 product, then one float32 sum where the type has a minimum. No product needs more than 24
    bits, so this is also the exact value rounded once (only the sign of a zero may differ). ``UsageError('shape')`` if the arrays
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
    if not fits or out.shape != (blocks.shape[0], blocks.shape[1] // kind.nbytes * _block(kind)):
        raise UsageError("shape", f"{type_name} blocks {blocks.dtype} {blocks.shape} do not fill an array {out.shape}")
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise UsageError("shape", f"the output is {out.dtype}, expected contiguous float32")
    blocks, count = np.ascontiguousarray(blocks), blocks.size // kind.nbytes
    loop = _loop("DEQUANTIZE", kind)
    if loop is not None:
        loop(blocks.reshape(count, kind.nbytes), out.reshape(count, _block(kind)))
        return
    import torch

    source = torch.from_numpy(blocks if blocks.flags.writeable else blocks.copy())
    values = legacy.dequantize_blocks(kind, source) if isinstance(kind, Legacy) else kquants.dequantize_blocks(kind, source)
    out[...] = values.numpy()
