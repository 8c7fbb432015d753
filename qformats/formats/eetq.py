"""EETQ: int8 weights with one half-precision scale an output, laid out for the mixed GEMM of FasterTransformer.

Source: ``csrc/cutlass_kernels/cutlass_preprocessors.cc`` and ``python/eetq/modules/qlinear.py`` of NetEase-FuXi/EETQ (4750aa4, 156e425),
``cutlass_extensions/gemm/kernel/mixed_gemm_B_layout.h`` for tiles of 64 rows and 2 columns, ``integrations/eetq.py`` of transformers 5.23.
K = in_features, N = out_features, w[n, k] = scale[n] * q[n, k]:

| stored key | dtype | shape | meaning |
|---|---|---|---|
| ``weight`` (``qweight`` by EETQ itself) | I8 | (K, N) | the bytes below; the shape says nothing of their order |
| ``weight_scales`` | F16 | (N,) | |
| ``bias`` | F16 | (N,) | |

Every byte is q + 128. On GPUs from sm75 to sm89 the packer permutes the rows of the (K, N) matrix inside each 16 (0 1 8 9 2 3 10 11 4 5 12
13 6 7 14 15), transposes it, interleaves two columns in tiles of 64 rows, and exchanges the two middle bytes of every four. Together: the
bytes are (N / 2, K / 64, 2, 64), outputs 2 p and 2 p + 1 taking turns, and of 16 bytes the even ones hold inputs 0 … 7, the odd ones
inputs 8 … 15. On sm70 the bytes are the (K, N) matrix by rows, with the two middle bytes of every four exchanged along N.
A file does not tell which; ``layout=sm70`` says so of a source, and of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qformats.errors import Unsupported, UsageError
from qformats.formats.packed import blank_codes
from qformats.formats.planes import finite, flat_pieces, integer_verdict, own_form, part, row_range
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.loops import find
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    import numpy as np

    from qformats.containers.raw import RawTensor
    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "NAME", "SUFFIXES", "can_store", "config_out", "detect", "holds_codes", "layout", "read", "scheme", "storage_of", "storages",
    "write",
]  # fmt: skip

NAME = "eetq"
SUFFIXES: frozenset[str] = frozenset({"weight_scales", "qweight"})
TILE = 64  # both sizes are multiples of it (the packer's checks, and its kernel's)
LAYOUTS = ("sm80", "sm70")
_GRID = Integer(8, signed=True)


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``eetq``; ``Unsupported('eetq-weights')`` for other weights than int8."""
    if str(config.get("quant_method") or "").lower() != NAME:
        return None
    found = config.get("weights", "int8")
    if found != "int8":
        raise Unsupported("eetq-weights", f"the config says weights {found!r}; EETQ checkpoints hold int8")
    return Match(NAME, config)


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes: any of ``SUFFIXES``, or int8, which are no floats, without a scale."""
    return bool(SUFFIXES & parts.keys()) or ("weight" in parts and parts["weight"].dtype == "I8")


def _parts(module: Module) -> tuple[RawTensor, RawTensor]:
    """The codes and the scales, checked against each other."""
    codes = part(module, "qweight" if "qweight" in module.parts else "weight", ("I8",), (None, None))
    scales = part(module, "weight_scales", ("F16",), (codes.shape[1],))
    if _layout_of(module) == "sm80" and (codes.shape[0] % TILE or codes.shape[1] % TILE):
        hint = "say layout=sm70 if it was made on such a GPU"
        raise Unsupported("k-multiple", f"{codes.shape} is not made of tiles of {TILE} x {TILE}", tensor=codes.name, hint=hint)
    if codes.shape[1] % 4:
        raise Unsupported("n-multiple", f"{codes.shape[1]} outputs are not a multiple of 4", tensor=codes.name)
    return codes, scales


def _layout_of(module: Module) -> str:
    return _layout_named(module.match.options.get("layout"))


def _layout_named(said: str | None) -> str:
    if said is not None and said not in LAYOUTS:
        raise UsageError("option", f"layout={said} is not known", hint=f"use one of {', '.join(LAYOUTS)}")
    return said or LAYOUTS[0]


def _scheme(n: int, k: int) -> Scheme:
    return Scheme((n, k), _GRID, (ParamSpec("float16", Tile((1, k))),))


def scheme(module: Module) -> Scheme:
    """The scheme from the headers; ``BadFile`` where they disagree."""
    k, n = _parts(module)[0].shape
    return _scheme(n, k)


def storage_of(module: Module) -> Storage:
    """The storage of these very parts."""
    k, _ = _parts(module)[0].shape
    return _storage(k, _layout_of(module), "qweight" if "qweight" in module.parts else "weight")


def _storage(k: int, arrangement: str, leaf: str) -> Storage:
    multiple = {"k_multiple": TILE, "n_multiple": TILE} if arrangement == "sm80" else {"n_multiple": 4}
    return Storage("int8", _GRID, None, 8 + 16 / k, **multiple, options={"layout": arrangement, "leaf": leaf})  # type: ignore[arg-type]


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` as codes int8 (n, K) with a scale float16 (n, 1)."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    stored, scales = _parts(module)
    k, n = stored.shape
    stop = row_range(module, start, stop, n)
    plane = blank_codes((stop - start, k)).to(torch.int8)
    if codes:
        plane = torch.from_numpy((_rows if _layout_of(module) == "sm80" else _columns)(stored, start, stop))
    values = finite(torch.from_numpy(scales.array()), scales)[start:stop].reshape(-1, 1)
    return QuantizedTensor((stop - start, k), plane, _GRID, (Param(values, Tile((1, k))),))


def _rows(stored: RawTensor, start: int, stop: int) -> Array:
    """Codes int8 (stop - start, K) out of pairs of outputs."""
    k, n = stored.shape
    first, last = start // 2 * 2, -(-stop // 2) * 2
    return unpack(replace(stored, shape=(n, k)).row_range(first, last))[start - first : stop - first]


def unpack(stored: Array) -> Array:
    """Bytes int8 (n, K) of n / 2 pairs of outputs -> codes int8 (n, K)."""
    import numpy as np

    loops, (n, k) = find("pairs"), stored.shape
    if loops is None:
        return unpack_definition(stored)
    out = np.empty((n // 2, 2, k // 8), np.uint64)
    loops.unpack(np.ascontiguousarray(stored).view(np.uint64).reshape(n // 2, k // TILE, 2, TILE // 8), out)
    return out.view(np.int8).reshape(n, k)


def pack(codes: Array) -> Array:
    """The inverse of ``unpack``."""
    import numpy as np

    loops, (n, k) = find("pairs"), codes.shape
    if loops is None:
        return pack_definition(codes)
    out = np.empty((n // 2, k // TILE, 2, TILE // 8), np.uint64)
    loops.pack(np.ascontiguousarray(codes).view(np.uint64).reshape(n // 2, 2, k // 8), out)
    return out.view(np.int8).reshape(n, k)


def unpack_definition(stored: Array) -> Array:
    """``unpack`` in numpy: axes change places."""
    import numpy as np

    n, k = stored.shape
    tiles = stored.view(np.uint8).reshape(n // 2, k // TILE, 2, TILE // 16, 8, 2)
    codes: Array = (tiles.transpose(0, 2, 1, 3, 5, 4) ^ 0x80).reshape(n, k).view(np.int8)
    return codes


def pack_definition(codes: Array) -> Array:
    """``pack`` in numpy."""
    import numpy as np

    n, k = codes.shape
    tiles = codes.view(np.uint8).reshape(n // 2, 2, k // TILE, TILE // 16, 2, 8)
    stored: Array = (tiles.transpose(0, 2, 1, 3, 5, 4) ^ 0x80).reshape(n, k).view(np.int8)
    return stored


def _columns(stored: RawTensor, start: int, stop: int) -> Array:
    """Codes int8 (stop - start, K) out of whole fours of outputs."""
    first, last = start // 4 * 4, -(-stop // 4) * 4
    return _swapped(stored.column_range(first, last)).T[start - first : stop - first].copy()


def _swapped(matrix: Array) -> Array:
    """q + 128 of (K, n) with the middle bytes of every four along n exchanged; its own inverse."""
    import numpy as np

    fours = matrix.view(np.uint8).reshape(matrix.shape[0], -1, 4) ^ 0x80
    return fours[..., [0, 2, 1, 3]].reshape(matrix.shape).view(np.int8)


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The one storage there is, for the GPUs of ``layout``, under the name that ``leaf`` says."""
    if target.type not in (None, "int8"):
        raise UsageError("type", f"eetq has no type {target.type!r}", hint="types: int8")
    leaf = target.options.get("leaf", "weight")
    if leaf not in ("weight", "qweight"):
        raise UsageError("option", f"leaf={leaf} is not known", hint="use leaf=weight, as transformers, or leaf=qweight, as EETQ itself")
    return [_storage(scheme.shape[-1], _layout_named(target.options.get("layout")), leaf)]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The codes and the scales of a weight (N, K)."""
    n, k = shape
    return {str(storage.options["leaf"]): PartInfo("I8", (k, n)), "weight_scales": PartInfo("F16", (n,))}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """int8 codes under one float16 scale a row."""
    n, k = scheme.shape[-2:] if len(scheme.shape) > 1 else (0, 0)
    if k % storage.k_multiple or n % storage.n_multiple:
        return No(f"its sizes {(n, k)} are not multiples of {storage.n_multiple} and {storage.k_multiple}")
    return integer_verdict(storage, scheme)


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``, both ends even (sm70: multiples of 4)."""
    import numpy as np

    own_form(storage, can_store(storage, replace(tensor.scheme, shape=shape)), NAME)
    unit = 4 if storage.options["layout"] == "sm70" else 2
    if start % unit or tensor.shape[0] % unit:
        raise Unsupported("row-range", f"rows {start} … {start + tensor.shape[0]} do not fall on multiples of {unit}")
    scale = tensor.scales[0].values
    scales = Piece("weight_scales", np.ascontiguousarray(scale.numpy().reshape(1, -1)), 0, start)  # type: ignore[union-attr]
    codes, leaf = tensor.codes.contiguous().numpy(), str(storage.options["leaf"])
    if storage.options["layout"] == "sm70":
        return [Piece(leaf, _swapped(np.ascontiguousarray(codes.T)), 0, start), scales]
    return [*flat_pieces(leaf, pack(codes).reshape(-1), start * shape[1], shape[0]), scales]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one, else that of transformers."""
    return dict(original) if original else {"quant_method": NAME, "weights": "int8", "modules_to_not_convert": list(skipped) or None}
