"""AWQ tensors: scheme, reading and writing. The layout table is in the package's docstring, the checks are in ``shapes``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_interleaved, pack_rows, unpack_interleaved, unpack_rows, words_for
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import marlin
from qformats.formats.awq.settings import FAST
from qformats.formats.awq.shapes import Geometry, geometry, zeros_width
from qformats.formats.packed import (
    CONTAINER_FLOATS,
    FLOATS,
    affine_verdict,
    blank_codes,
    float_array,
    float_tensor,
    group_option,
    yes_no,
)
from qformats.formats.protocol import Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["ROW_MULTIPLE", "can_store", "layout", "module_warnings", "read", "scheme", "storage_of", "storages", "write"]

ROW_MULTIPLE = 32  # row ranges for ``write`` start at multiples of this: whole words of 8 columns, whole stream blocks of 32
_OPTIONS = {"group", "version", "sym", "zero_point"}
_ORDERS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "fast", "llm-awq": "fast", "marlin": "marlin"}


def scheme(module: Module) -> Scheme:
    """The scheme as far as headers tell; a ``zero_point: false`` config's constant is a claim that reading the tensor may refute.

    Of float zero points the tensors themselves tell whether they are integers or offsets: those are read.
    """
    g = geometry(module)
    tile = Tile((1, g.group))
    if g.order == "fast":
        return _fast_scheme(module, g, tile)
    if not g.has_zeros or not g.settings.zero_point:
        zero = ParamSpec("int16", whole(g.shape), constant=float(1 << (g.bits - 1)))
    else:
        zero = ParamSpec("uint8", tile)
    return Scheme(g.shape, Integer(g.bits), (ParamSpec(FLOATS[g.scale], tile),), zero)


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Output rows ``start:stop`` as codes uint8 (n, K), scale (n, G) in its stored dtype, zero points uint8 (n, G) or one constant.

    With ``codes=False`` the codes are a zero-stride plane of zeros and only the parameters are read.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    g = geometry(module)
    stop = g.n if stop is None else stop
    shape, tile = (stop - start, g.k), Tile((1, g.group))
    stored = torch.from_numpy(_read_plane(module, "qweight", g, g.k, start, stop)) if codes else blank_codes(shape)
    scales = float_tensor(_scale_rows(module, g, start, stop), g.scale)
    if not bool(torch.isfinite(scales).all()):
        raise BadFile("not-finite", f"a scale of {module.name} is no finite number", tensor=f"{module.name}.scales")
    scales = scales[:, : g.groups].contiguous()
    if g.order == "fast" and fast_zeros(module, g) is None:
        offset = float_tensor(_float_rows(module, g.zeros_leaf, g, start, stop), g.scale)
        if not bool(torch.isfinite(offset).all()):
            raise BadFile("not-finite", f"a zero point of {module.name} is no finite number", tensor=f"{module.name}.{g.zeros_leaf}")
        return QuantizedTensor(shape, stored, Integer(g.bits), (Param(scales, tile),), offset=Param(offset, tile))
    single = _constant_zero(module, g)
    if single is not None:
        zero = constant(single, shape)
    else:
        zero = Param(torch.from_numpy(_read_plane(module, g.zeros_leaf, g, g.groups, start, stop)), tile)
    return QuantizedTensor(shape, stored, Integer(g.bits), (Param(scales, tile),), zero)


def _scale_rows(module: Module, g: Geometry, start: int, stop: int) -> Array:
    """Scales (n, G) of rows ``start:stop``; of GEMV with the columns that fill them up, (n, 8 Zw)."""
    import numpy as np

    raw = module.parts["scales"]
    if g.order == "gemv":
        return raw.row_range(start, stop)
    if g.order == "marlin":
        first, last = start // marlin.COLUMNS * marlin.COLUMNS, -(-stop // marlin.COLUMNS) * marlin.COLUMNS
        return np.ascontiguousarray(marlin.restore_scales(raw.column_range(first, last))[:, start - first : stop - first].T)
    return _float_rows(module, "scales", g, start, stop)


def _float_rows(module: Module, leaf: str, g: Geometry, start: int, stop: int) -> Array:
    """Columns ``start:stop`` of floats (G, N), or (8 Zw, N) with rows beyond G unused, as (n, G)."""
    import numpy as np

    return np.ascontiguousarray(module.parts[leaf].column_range(start, stop)[: g.groups].T)


def fast_zeros(module: Module, g: Geometry) -> tuple[str, int | None] | None:
    """Of float zero points that are integers: the sign of their 0, and the one integer if all are equal; None if they are offsets."""
    if "fast" not in module.memo:
        from qformats.formats.awq.fast import integer_zeros

        scales, zeros = module.parts["scales"].array(), module.parts[g.zeros_leaf].array()
        _check_padding(module, g, scales, zeros)
        found = None
        if module.match.options.get("zero-points") != "float":
            found = integer_zeros(scales[: g.groups], zeros[: g.groups])
        if found is None:
            module.memo["fast"] = None
        else:
            first = int(found[0].flat[0])
            module.memo["fast"] = (found[1], first if (found[0] == first).all() else None)
    known: tuple[str, int | None] | None = module.memo["fast"]
    return known


def _check_padding(module: Module, g: Geometry, scales: Array, zeros: Array) -> None:
    """Rows beyond the groups are zero in every file the libraries write; ones that are not would be lost."""
    import numpy as np

    for leaf, plane in (("scales", scales), (g.zeros_leaf, zeros)):
        if np.ascontiguousarray(plane[g.groups :]).view(np.uint8).any():
            raise BadFile("padding", f"{leaf} has values beyond its {g.groups} groups", tensor=f"{module.name}.{leaf}")


def _fast_scheme(module: Module, g: Geometry, tile: Tile) -> Scheme:
    known, scales = fast_zeros(module, g), (ParamSpec(FLOATS[g.scale], tile),)
    if known is None:
        return Scheme(g.shape, Integer(g.bits), scales, offset=ParamSpec(FLOATS[g.scale], tile))
    if known[1] is None:
        return Scheme(g.shape, Integer(g.bits), scales, ParamSpec("uint8", tile))
    return Scheme(g.shape, Integer(g.bits), scales, ParamSpec("int16", whole(g.shape), constant=float(known[1])))


def _read_plane(module: Module, leaf: str, g: Geometry, count: int, start: int, stop: int) -> Array:
    """Rows ``start:stop`` of codes or zero points as uint8 (n, count)."""
    import numpy as np

    raw = module.parts[leaf]
    if g.order == "gemv":
        return unpack_rows(raw.row_range(start, stop), 4, count)
    if g.order == "marlin":
        first, last = start // marlin.COLUMNS * marlin.COLUMNS, -(-stop // marlin.COLUMNS) * marlin.COLUMNS
        return marlin.unpack_tiles(raw.column_range(2 * first, 2 * last))[start - first : stop - first]
    if g.order == "fast":
        return _read_fast(module, leaf, g, start, stop)
    align = 8 if g.bits == 4 else 32
    first = start // align * align
    last = min(-(-stop // align) * align, g.n)
    words = raw.column_range(first * g.bits // 32, words_for(last, g.bits))
    if g.order == "gemm":
        rows = unpack_interleaved(words, g.bits)
    else:
        rows = np.ascontiguousarray(unpack_rows(words, g.bits, last - first).T)
    return np.ascontiguousarray(rows[start - first : stop - first])


def _read_fast(module: Module, leaf: str, g: Geometry, start: int, stop: int) -> Array:
    import numpy as np

    from qformats.formats.awq.fast import integer_zeros, unpack_words

    if leaf == "qweight":
        first = start // 4
        return unpack_words(module.parts[leaf].row_range(first, -(-stop // 4)))[start - 4 * first : stop - 4 * first]
    found = integer_zeros(_float_rows(module, "scales", g, start, stop), _float_rows(module, leaf, g, start, stop))
    if found is None:
        raise BadFile("changed", f"{leaf} is not what it was a moment ago", tensor=f"{module.name}.{leaf}")
    return np.ascontiguousarray(found[0])


def _constant_zero(module: Module, g: Geometry) -> int | None:
    """The one zero point of the whole module, or None if they differ."""
    if g.order == "fast":
        known = fast_zeros(module, g)
        return None if known is None else known[1]
    if not g.has_zeros:
        return 1 << (g.bits - 1)
    if "zero" not in module.memo:
        module.memo["zero"] = _find_constant(module, g)
    zero: int | None = module.memo["zero"]
    return zero


def _find_constant(module: Module, g: Geometry) -> int | None:
    import numpy as np

    words = module.parts["qzeros"].array().view(np.int32)
    count = g.groups if g.order == "gemv" else g.n
    first = int(unpack_rows(words[:1], g.bits, count)[0, 0])
    row = pack_rows(np.full((1, count), first, np.uint8), g.bits)
    same = np.array_equal(words[:, : row.shape[1]], np.broadcast_to(row, (words.shape[0], row.shape[1])))
    return first if same else None


def module_warnings(module: Module) -> tuple[str, ...]:
    """What a user should know of how ``module`` was understood."""
    g = geometry(module)
    half = 1 << (g.bits - 1)
    if g.order == "fast" and fast_zeros(module, g) is None:
        return ("its float zero points are no multiples of the scales: read as offsets",)
    if not g.settings.zero_point and _constant_zero(module, g) != half:
        return (f"zero_point is false, but the zero points are not all {half}; the stored ones are used",)
    return ()


def storage_of(module: Module) -> Storage:
    """The storage that reproduces ``module`` byte for byte when what ``read`` returns is written again."""
    g = geometry(module)
    single = _constant_zero(module, g)
    options: dict[str, object] = {
        "version": g.settings.version,
        "order": g.order,
        "qzeros": "absent" if not g.has_zeros else "stored" if g.zeros_leaf == "qzeros" else g.zeros_leaf,
        "zero_point": g.settings.zero_point,
        "word_dtype": module.parts["qweight"].dtype,
        "dialect": module.match.dialect,
        "in_features": g.k,
    }
    zero = single if single is not None else (0, (1 << g.bits) - 1)
    if g.order == "fast":
        known = fast_zeros(module, g)
        if known is None:
            return _offset_storage(None if g.groups == 1 else g.group, FLOATS[g.scale], options)
        options["zero_sign"] = known[0]
    return _storage(g.bits, None if g.groups == 1 else g.group, zero, FLOATS[g.scale], options)


def _storage(bits: int, group: int | None, zero: int | tuple[int, int], scale: str, options: dict[str, object]) -> Storage:
    order = str(options["order"])
    rows = {"natural": 1, "marlin": 32}.get(order, 8)
    return Storage(
        f"int{bits}",
        Integer(bits),
        group,
        bits + ((16 + bits) / group if group else 0.0),
        (scale,),
        zero_point=zero,
        k_multiple=lcm({"gemv": 8, "fast": 64, "marlin": marlin.ROWS}.get(order, 1), group or 1),
        n_multiple=rows,
        options=options,
    )


def _offset_storage(group: int | None, scale: str, options: dict[str, object]) -> Storage:
    """Float zero points as they are: any offset, in the scales' dtype."""
    return replace(_storage(4, group, 0, scale, options), zero_point=None, offset=scale)


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The storage of the target: zero points 0 … 15, or the constant 8 with ``sym`` (``zero_point=false``).

    GEMV_FAST and llm-awq have a second one, of offsets. Options: ``group=N|-1`` (default: the source's, else 128), ``sym``,
    ``zero_point=yes|no``, ``version=gemm|gemv|gemv_fast|llm-awq|marlin`` (Marlin is symmetric, in groups of 128 or one a row).
    """
    if target.type not in (None, "int4"):
        raise UsageError("type", f"awq has no type {target.type!r}", hint="types: int4")
    unknown = sorted(set(target.options) - _OPTIONS)
    if unknown:
        raise UsageError("option", f"awq has no option {unknown[0]!r}", hint=f"options: {', '.join(sorted(_OPTIONS))}")
    version = target.options.get("version", "gemm").lower()
    if version not in _ORDERS:
        raise UsageError("option", f"version={version} cannot be written", hint=f"use version={', '.join(_ORDERS)}")
    group = group_option(target, scheme)
    if version in ("gemv", *FAST) and group is not None and group < 32:
        raise UsageError("option", f"AWQ {version} has no groups of {group}", hint="use groups of 32, 64, 128 or more, or version=gemm")
    if version == "marlin":
        marlin.check_kernel(scheme.shape, group)
    sym = yes_no(target, "sym", not yes_no(target, "zero_point", True)) or version == "marlin"
    options: dict[str, object] = {
        "version": version,
        "order": _ORDERS[version],
        "qzeros": {"marlin": "absent", "llm-awq": "scaled_zeros"}.get(version, "stored"),
        "zero_point": not sym,
        "word_dtype": "I16" if version in FAST else "I32",
        "dialect": "",
        "in_features": scheme.shape[-1],
    }
    found = _storage(4, group, 8 if sym else (0, 15), "float16", options)
    return [found, _offset_storage(group, "float16", options)] if version in FAST and not sym else [found]


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands (the values of its zero points aside)."""
    verdict = affine_verdict(storage, scheme)
    if not verdict:
        return verdict
    n, k = scheme.shape
    multiple = marlin.COLUMNS if storage.options.get("order") == "marlin" else storage.n_multiple
    if n % multiple:
        return No(f"its {n} outputs are not a multiple of {multiple}")
    group = min(storage.group or k, k)
    if k % group or k % storage.k_multiple:
        return No(
            f"its {k} inputs are not whole groups of {group}" if k % group else f"its {k} inputs are not a multiple of {storage.k_multiple}"
        )
    return Yes()


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    n, k = shape
    bits, group, options = storage.integers.bits, min(storage.group or k, k), storage.options
    words, scale = str(options.get("word_dtype", "I32")), CONTAINER_FLOATS[storage.scale_dtypes[0]]
    if options.get("order") == "marlin":
        return {"qweight": PartInfo(words, (k // marlin.ROWS, 2 * n)), "scales": PartInfo(scale, (k // group, n))}
    if options.get("order") == "fast":
        padded = PartInfo(scale, (zeros_width(k, group) * 8, n))
        return {"qweight": PartInfo(words, (n // 4, k)), "scales": padded, _zeros_leaf(storage): padded}
    if options.get("order") == "gemv":
        width = zeros_width(k, group)
        parts = {"qweight": PartInfo(words, (n, k // 8)), "qzeros": PartInfo(words, (n, width)), "scales": PartInfo(scale, (n, width * 8))}
    else:
        columns = words_for(n, bits)
        parts = {
            "qweight": PartInfo(words, (k, columns)),
            "qzeros": PartInfo(words, (k // group, columns)),
            "scales": PartInfo(scale, (k // group, n)),
        }
    if options.get("qzeros") == "absent":
        del parts["qzeros"]
    return parts


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + len(tensor)`` of a weight ``shape``; ``start`` is a multiple of ``ROW_MULTIPLE``, and so is the end unless it
    is N. ``Unsupported('storage-form')`` if ``tensor`` is not exactly in the storage's form."""
    import numpy as np

    rows, order = tensor.shape[0], storage.options.get("order")
    multiple = marlin.COLUMNS if order == "marlin" else ROW_MULTIPLE
    if start % multiple or ((start + rows) % multiple and start + rows != shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + rows} of {shape[0]} do not fall on multiples of {multiple}")
    verdict = affine_verdict(storage, tensor.scheme)
    whole_verdict = can_store(storage, replace(tensor.scheme, shape=shape)) if verdict else verdict
    if isinstance(whole_verdict, No):
        raise Unsupported("storage-form", f"cannot be written as awq {storage.type}: {whole_verdict.reason}")
    groups = shape[1] // min(storage.group or shape[1], shape[1])
    if order == "fast":
        return _fast_pieces(storage, tensor, start, shape, groups)
    zeros = _zero_array(tensor, storage, groups)
    scale = float_array(tensor.scales[0].values.contiguous())  # type: ignore[union-attr]
    planes = {"qweight": tensor.codes.numpy(), "scales": scale, "qzeros": zeros}
    if storage.options.get("qzeros") == "absent":
        del planes["qzeros"]
    if order == "marlin":
        columns = marlin.permute_scales(np.ascontiguousarray(scale.T))
        return [Piece("qweight", marlin.pack_tiles(planes["qweight"]), 0, 2 * start), Piece("scales", columns, 0, start)]
    if order == "gemv":
        return _gemv_pieces(planes, zeros_width(shape[1], shape[1] // groups), start)
    return [_gemm_piece(storage, leaf, plane, start) for leaf, plane in planes.items()]


def _zeros_leaf(storage: Storage) -> str:
    return "qzeros" if storage.options.get("qzeros") == "stored" else str(storage.options.get("qzeros"))


def _fast_pieces(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...], groups: int) -> list[Piece]:
    """16-bit words of four rows each, scales and zero points padded with rows of zeros."""
    import numpy as np

    from qformats.formats.awq.fast import float_zeros, integer_zeros, pack_words

    scale: Array = float_array(tensor.scales[0].values.contiguous())  # type: ignore[union-attr]
    if tensor.offset is not None:
        zeros: Array = float_array(tensor.offset.values.contiguous())  # type: ignore[union-attr]
    else:
        integers = _zero_array(tensor, storage, groups)
        zeros = float_zeros(scale, integers, str(storage.options.get("zero_sign", "minus")))
        if integer_zeros(scale, zeros) is None:
            raise Unsupported("zero-point-range", "a product of scale and zero point overflows or vanishes as a float")
    pieces = [Piece("qweight", pack_words(tensor.codes.numpy()), start // 4)]
    for leaf, plane in (("scales", scale), (_zeros_leaf(storage), zeros)):
        padded = np.zeros((zeros_width(shape[1], shape[1] // groups) * 8, plane.shape[0]), plane.dtype)
        padded[:groups] = plane.T
        pieces.append(Piece(leaf, padded, 0, start))
    return pieces


def _zero_array(tensor: QuantizedTensor, storage: Storage, groups: int) -> Array:
    """Zero points uint8 (n, G), checked against what the storage can hold."""
    import numpy as np

    assert tensor.zero_point is not None
    values: Array = tensor.zero_point.values.numpy()  # type: ignore[union-attr]
    half, top = 1 << (storage.integers.bits - 1), (1 << storage.integers.bits) - 1
    low, high = (half, half) if storage.options.get("qzeros") == "absent" else (0, top)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise Unsupported("zero-point-range", f"zero points {int(values.min())} … {int(values.max())} are outside {low} … {high}")
    return np.ascontiguousarray(np.broadcast_to(values, (tensor.shape[0], groups)).astype(np.uint8))


def _gemm_piece(storage: Storage, leaf: str, plane: Array, start: int) -> Piece:
    """(n, K) or (n, G) -> rows of K or G, packed along N."""
    import numpy as np

    bits = storage.integers.bits
    if leaf == "scales":
        return Piece(leaf, np.ascontiguousarray(plane.T), 0, start)
    if storage.options.get("order") == "natural":
        words = pack_rows(np.ascontiguousarray(plane.T), bits)
    else:
        words = pack_interleaved(plane, bits)
    return Piece(leaf, words, 0, start * bits // 32)


def _gemv_pieces(planes: Mapping[str, Array], width: int, start: int) -> list[Piece]:
    """Rows as they are; scales and zero points padded with zeros to ``width`` words."""
    import numpy as np

    pieces = [Piece("qweight", pack_rows(planes["qweight"], 4), start)]
    for leaf in ("scales", "qzeros"):
        if leaf in planes:
            plane = planes[leaf]
            padded = np.zeros((plane.shape[0], width * 8), plane.dtype)
            padded[:, : plane.shape[1]] = plane
            pieces.append(Piece(leaf, pack_rows(padded, 4) if leaf == "qzeros" else padded, start))
    return pieces
