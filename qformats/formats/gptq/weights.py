"""GPTQ tensors read and written. ``read`` and ``write`` mirror each other; the layout table is in the package's docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformats.bits import pack_columns, pack_planar_columns, unpack_columns, unpack_planar_columns, words_for
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import marlin
from qformats.formats.gptq.shapes import Geometry, geometry
from qformats.formats.packed import (
    CONTAINER_FLOATS,
    FLOATS,
    affine_verdict,
    blank_codes,
    float_array,
    float_tensor,
    group_option,
    int_option,
    made_by,
    yes_no,
)
from qformats.formats.protocol import Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    import numpy as np

    from qformats.formats.gptq.zeros import Zeros
    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["ROW_MULTIPLE", "can_store", "layout", "module_warnings", "read", "storage_of", "storages", "write"]

ROW_MULTIPLE = 32  # row ranges for ``write`` start at multiples of this, so that every range ends on a word of qzeros (Marlin: 64)
WIDTHS = (2, 3, 4, 8)
PLANAR_WIDTHS = (5, 6, 7)  # only planar; by name only, since transformers loads the others alone
_FORMATS = {"": "", "v1": "v1", "v2": "v2", "gptq": "v1", "gptq_v2": "v2", "planar": "planar", "gptq_p": "planar", "marlin": "marlin"}
_OPTIONS = {"group", "sym", "asym", "format", "act-order"}
_WORDS = {8: "I8", 16: "I16", 32: "I32", 64: "I64"}


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True, zero_policy: str | None = None) -> QuantizedTensor:
    """Output rows ``start:stop`` as codes uint8 (n, K), scale (n, G) in its stored dtype, zero points (n, G) or one constant.

    With ``codes=False`` the codes are a zero-stride plane of zeros and only the parameters are read. ``zero_policy``, or the user's source
    option ``zero-points``, overrides how stored zero points are understood (``v1``, ``v1-word``, ``v1-field``, ``v2``, ``unset``; see
    ``zeros``).
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    g = geometry(module)
    stop = g.n if stop is None else stop
    tile = Tile((1, g.group))
    shape = (stop - start, g.k)
    plane = torch.from_numpy(_code_rows(module, g, start, stop)) if codes else blank_codes(shape)
    scales = float_tensor(_scale_columns(module, g, start, stop), g.scale).T.contiguous()  # (G, n) -> (n, G)
    if not bool(torch.isfinite(scales).all()):
        raise BadFile("not-finite", f"a scale of {module.name} is no finite number", tensor=f"{module.name}.scales")
    zeros = _zeros(module, g, zero_policy)
    if zeros.constant is not None:
        zero = constant(zeros.constant, shape)
    else:
        zero = Param(torch.from_numpy(_zero_rows(module, g, zeros.policy, start, stop)), tile)
    index = _stored_index(module, g)[1]
    return QuantizedTensor(
        shape,
        plane,
        Integer(g.bits),
        (Param(scales, tile),),
        zero,
        group_index=None if index is None else torch.from_numpy(index),
    )


def _code_rows(module: Module, g: Geometry, start: int, stop: int) -> Array:
    """Codes uint8 (n, K) of rows ``start:stop``."""
    if g.packing == "marlin":  # (K / 16, 2 n) words -> (n, K)
        first, last = _tiles(start, stop)
        return marlin.unpack_tiles(module.parts["B"].column_range(2 * first, 2 * last))[start - first : stop - first]
    words = module.parts["qweight"].column_range(start, stop)  # (K * b / 32, n)
    return unpack_planar_columns(words, g.bits, g.k) if g.packing == "planar" else unpack_columns(words, g.bits, g.k)


def _scale_columns(module: Module, g: Geometry, start: int, stop: int) -> Array:
    """Scales (G, n) of rows ``start:stop`` in the order of the rows."""
    if g.packing != "marlin":
        return module.parts["scales"].column_range(start, stop)
    first, last = _tiles(start, stop)
    return marlin.restore_scales(module.parts["s"].column_range(first, last))[:, start - first : stop - first]


def _tiles(start: int, stop: int) -> tuple[int, int]:
    return start // marlin.COLUMNS * marlin.COLUMNS, -(-stop // marlin.COLUMNS) * marlin.COLUMNS


def _zero_rows(module: Module, g: Geometry, policy: str, start: int, stop: int) -> Array:
    """True zero points of rows ``start:stop`` (n, G); carries never leave a word."""
    import numpy as np

    from qformats.formats.gptq.zeros import decode

    words = module.parts["qzeros"]  # (G, W)
    if g.packing == "planar":  # blocks of 32 fields in b words
        block, end = start // 32, -(-stop // 32)
        window = words.column_range(block * g.bits, end * g.bits)
        fields = decode(window, g.bits, 32 * (end - block), policy, planar=True)
        return np.ascontiguousarray(fields[start - 32 * block : stop - 32 * block])
    if g.word_bits % g.bits:  # fields straddle words: decode from the first
        return np.ascontiguousarray(decode(words.array(), g.bits, g.n, policy)[start:stop])
    first = start * g.bits // g.word_bits
    skip = start - first * g.word_bits // g.bits
    window = words.column_range(first, words_for(stop, g.bits, g.word_bits))
    return np.ascontiguousarray(decode(window, g.bits, skip + stop - start, policy)[skip:])


def _zeros(module: Module, g: Geometry, forced: str | None) -> Zeros:
    """How the words of qzeros are meant."""
    from qformats.formats.gptq.zeros import Zeros, decide

    forced = forced or module.match.options.get("zero-points")
    if g.packing == "marlin":
        return Zeros("v2", 8)
    key = f"zeros {forced}"
    if key not in module.memo:
        words, gptqmodel = module.parts["qzeros"].array(), made_by(module.match.config, "gptqmodel")
        planar, label = g.packing == "planar", g.settings.label
        module.memo[key] = decide(words, g.bits, g.n, label, g.settings.sym, gptqmodel, forced, planar=planar)
    zeros: Zeros = module.memo[key]
    return zeros


def _stored_index(module: Module, g: Geometry) -> tuple[str, Array | None]:
    """``absent``, ``empty``, ``zeros``, ``trivial`` or ``act-order``, and the index (K,) int32 if it is the last."""
    if "index" not in module.memo:
        module.memo["index"] = _find_index(module, g)
    found: tuple[str, Array | None] = module.memo["index"]
    return found


def _find_index(module: Module, g: Geometry) -> tuple[str, Array | None]:
    import numpy as np

    if g.index != "stored":
        return g.index, None
    stored = module.parts["g_idx"].array()
    if np.array_equal(stored, np.arange(g.k, dtype=stored.dtype) // g.group):
        return "trivial", None
    if not stored.any():
        return "zeros", None
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= g.groups:
        text = f"g_idx holds {low if low < 0 else high}, expected 0 … {g.groups - 1}"
        raise BadFile("g-idx-range", text, tensor=f"{module.name}.g_idx")
    return "act-order", stored.astype(np.int32)


def module_warnings(module: Module, *, zero_policy: str | None = None) -> tuple[str, ...]:
    """What a user should know of how ``module`` was understood; reads its small parts, not its weights."""
    import numpy as np

    from qformats.formats.gptq.zeros import decode

    g = geometry(module)
    zeros = _zeros(module, g, zero_policy)
    said = list(zeros.warnings)
    asked = zero_policy or module.match.options.get("zero-points")
    undecided = zeros.policy == "v1" and asked is None and g.packing == "stream"
    if undecided and (decode(module.parts["qzeros"].array(), g.bits, g.n, "v1") == 1 << g.bits).any():
        said.append(f"zero-point fields of {(1 << g.bits) - 1} under v1 are read as {1 << g.bits}, as the common kernels do")
    kind, index = _stored_index(module, g)
    if kind == "zeros" and g.groups > 1:
        said.append("g_idx is all zero although there are several groups: read as consecutive groups")
    if index is not None and np.bincount(index, minlength=g.groups)[:-1].max(initial=0) > g.group:
        said.append(f"act-order groups are not all of {g.group} columns")
    if g.settings.bits is not None and g.settings.bits != g.bits:
        said.append(f"the config's first matching rule says {g.settings.bits} bits, the tensors hold {g.bits}")
    return tuple(said)


def storage_of(module: Module, *, zero_policy: str | None = None) -> Storage:
    """The storage that reproduces ``module`` byte for byte when what ``read`` returns is written again."""
    from qformats.formats.gptq.zeros import zero_range

    g = geometry(module)
    zeros = _zeros(module, g, zero_policy)
    kind, _ = _stored_index(module, g)
    options: dict[str, object] = {
        "checkpoint_format": g.settings.label,
        "zeros": zeros.policy,
        "g_idx": kind,
        "g_idx_dtype": module.parts["g_idx"].dtype if "g_idx" in module.parts else "I32",
        "word_bits": g.word_bits,
        "word_dtype": module.parts["B" if g.packing == "marlin" else "qweight"].dtype,
        "dialect": module.match.dialect,
        "act_order": kind == "act-order",
        "in_features": g.k,
    }
    if g.packing != "stream":
        options["packing"] = g.packing
    zero = zeros.constant if zeros.constant is not None else zero_range(zeros.policy, g.bits)
    return _storage(g.bits, None if g.groups == 1 else g.group, zero, (FLOATS[g.scale],), kind == "act-order", options)


def _storage(
    bits: int, group: int | None, zero: int | tuple[int, int], scales: tuple[str, ...], group_index: bool, options: dict[str, object]
) -> Storage:
    extra = (16 + bits) / group if group else 0.0
    rows, columns = {"planar": (32, 32), "marlin": (32, 16)}.get(str(options.get("packing")), (1, 1))
    return Storage(
        f"int{bits}", Integer(bits), group, bits + extra, scales, True, zero, k_multiple=columns, n_multiple=rows,
        group_index=group_index, options=options,
    )  # fmt: skip


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """Candidates in the order of preference: symmetric, asymmetric ``gptq_v2`` (0 … 2^b - 1), asymmetric v1 (1 … 2^b - 1), and last
    v1 as the kernels read it (1 … 2^b). Asymmetric v1 comes after v2 because GPTQModel (and with it transformers) loads it only from files
    that name GPTQModel as their maker (gptqmodel 7.7.0 ``models/loader.py``). ``harmonize`` brings a mixed choice under one label.

    Options: ``group=N|-1`` (default: the source's, else 128), ``sym``, ``asym``, ``format=v1|v2|planar|marlin``, ``act-order=no``.
    5, 6 and 7 bits are planar; ``marlin`` is 4 bits, symmetric, groups of 128 or the whole row.
    """
    widths = _widths(target)
    unknown = sorted(set(target.options) - _OPTIONS)
    if unknown:
        raise UsageError("option", f"gptq has no option {unknown[0]!r}", hint=f"options: {', '.join(sorted(_OPTIONS))}")
    group = group_option(target, scheme)
    sym, asym = yes_no(target, "sym"), yes_no(target, "asym")
    if sym and asym:
        raise UsageError("option", "sym and asym exclude each other")
    label = target.options.get("format", "")
    if label not in _FORMATS:
        raise UsageError("option", f"format={label} is not known", hint="use format=v1, v2, planar or marlin")
    if _FORMATS[label] == "marlin":
        return [_marlin_storage(target, scheme, group)]
    return [
        storage
        for bits in widths
        for storage in _candidates(bits, group, _FORMATS[label], scheme, target)
        if not (sym and not isinstance(storage.zero_point, int)) and not (asym and isinstance(storage.zero_point, int))
    ]


def _candidates(bits: int, group: int | None, version: str, scheme: Scheme, target: Target) -> list[Storage]:
    top = 1 << bits
    act_order = yes_no(target, "act-order", True)
    kinds: list[tuple[int | tuple[int, int], str, str]] = [
        (top // 2, "gptq", "v1"),
        ((0, top - 1), "gptq_v2", "v2"),
        ((1, top - 1), "gptq", "v1"),
        ((1, top), "gptq", "v1"),
    ]
    planar = version == "planar" or bits in PLANAR_WIDTHS
    if planar:
        if version not in ("", "planar"):
            raise UsageError("option", f"{bits} bits are stored only in planar packing", hint="leave format out, or use format=planar")
        kinds = [(top // 2, "gptq_p", "v2"), ((0, top - 1), "gptq_p", "v2")]
    elif version == "v2":
        kinds = [(top // 2, "gptq_v2", "v2"), ((0, top - 1), "gptq_v2", "v2")]
    elif version == "v1":
        kinds = [kind for kind in kinds if kind[2] == "v1"]
    may_permute = act_order and scheme.group_index
    return [
        _storage(bits, group, zero, ("float16",), act_order, {
            "checkpoint_format": label, "zeros": policy, "g_idx": "trivial", "g_idx_dtype": "I32", "word_bits": 32, "word_dtype": "I32",
            "dialect": "", "act_order": may_permute, "in_features": scheme.shape[-1],
            **({"packing": "planar"} if planar and bits in (3, *PLANAR_WIDTHS) else {}),
        })
        for zero, label, policy in kinds
    ]  # fmt: skip


def _widths(target: Target) -> tuple[int, ...]:
    if target.type is None:
        return WIDTHS
    named = {f"int{bits}": bits for bits in (*WIDTHS, *PLANAR_WIDTHS)}
    if target.type not in named:
        raise UsageError("type", f"gptq has no type {target.type!r}", hint=f"types: {', '.join(named)}")
    return (named[target.type],)


def _marlin_storage(target: Target, scheme: Scheme, group: int | None) -> Storage:
    """Marlin as its kernel takes it."""
    if target.type not in (None, "int4") or yes_no(target, "asym"):
        raise UsageError("option", "Marlin weights are int4 and symmetric", hint="use gptq:int4,format=marlin")
    marlin.check_kernel(scheme.shape, group)
    options: dict[str, object] = {
        "checkpoint_format": "marlin", "zeros": "v2", "g_idx": "absent", "g_idx_dtype": "I32", "word_bits": 32, "word_dtype": "I32",
        "dialect": "", "act_order": False, "in_features": scheme.shape[-1], "packing": "marlin",
    }  # fmt: skip
    return _storage(4, group, 8, ("float16",), False, options)


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    n, k = shape
    options, bits = storage.options, storage.integers.bits
    word_bits = int_option(options, "word_bits", 32)
    words, group = str(options.get("word_dtype", _WORDS[word_bits])), storage.group or k
    groups = -(-k // group)
    if options.get("packing") == "marlin":
        return {"B": PartInfo(words, (k // marlin.ROWS, 2 * n)), "s": PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], (groups, n))}
    parts = {
        "qweight": PartInfo(words, (words_for(k, bits, word_bits), n)),
        "qzeros": PartInfo(words, (groups, words_for(n, bits, word_bits))),
        "scales": PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], (groups, n)),
    }
    kind = options.get("g_idx", "trivial")
    if kind != "absent":
        parts["g_idx"] = PartInfo(str(options.get("g_idx_dtype", "I32")), (0 if kind == "empty" else k,))
    return parts


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + len(tensor)`` of a weight ``shape``; ``start`` is a multiple of ``ROW_MULTIPLE``, and so is the end unless it
    is N. ``Unsupported('storage-form')`` if ``tensor`` is not exactly in the storage's form."""
    from qformats.formats.gptq.zeros import encode

    rows, packing = tensor.shape[0], storage.options.get("packing")
    bits, word_bits = storage.integers.bits, int_option(storage.options, "word_bits", 32)
    multiple = marlin.COLUMNS if packing == "marlin" else ROW_MULTIPLE
    if start % multiple or ((start + rows) % multiple and start + rows != shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + rows} of {shape[0]} do not fall on multiples of {multiple}")
    verdict = affine_verdict(storage, tensor.scheme)
    verdict = _whole_blocks(storage, shape) if verdict else verdict
    if isinstance(verdict, No):
        raise Unsupported("storage-form", f"cannot be written as gptq {storage.type}: {verdict.reason}")
    scale = tensor.scales[0].values
    groups = -(-shape[1] // (storage.group or shape[1]))
    zeros, codes, planar = _zero_array(tensor, storage, groups), tensor.codes.numpy(), packing == "planar"
    columns = float_array(scale.T.contiguous())  # type: ignore[union-attr]
    if packing == "marlin":
        return [Piece("B", marlin.pack_tiles(codes), 0, 2 * start), Piece("s", marlin.permute_scales(columns), 0, start)]
    words = pack_planar_columns(codes, bits) if planar else pack_columns(codes, bits, word_bits)  # (n, K) -> (K * b / 32, n)
    policy = str(storage.options.get("zeros", "v1"))
    pieces = [
        Piece("qweight", words, 0, start),
        Piece("scales", columns, 0, start),
        Piece("qzeros", encode(zeros, bits, word_bits, policy, planar=planar), 0, start * bits // word_bits),
    ]
    if start == 0:
        pieces += _index_piece(storage, tensor, shape[1])
    return pieces


def _zero_array(tensor: QuantizedTensor, storage: Storage, groups: int) -> Array:
    """True zero points (n, G), checked against what the storage's policy can hold."""
    import numpy as np

    from qformats.formats.gptq.zeros import zero_range

    assert tensor.zero_point is not None
    values: Array = tensor.zero_point.values.numpy()  # type: ignore[union-attr]
    marlin_only = storage.options.get("packing") == "marlin"
    low, high = (8, 8) if marlin_only else zero_range(str(storage.options.get("zeros", "v1")), storage.integers.bits)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        text = f"zero points {int(values.min())} … {int(values.max())} are outside {low} … {high}"
        raise Unsupported("zero-point-range", text, hint="write gptq with format=v2")
    return np.broadcast_to(values, (tensor.shape[0], groups)).astype(np.int16)


def _index_piece(storage: Storage, tensor: QuantizedTensor, k: int) -> list[Piece]:
    import numpy as np

    kind = str(storage.options.get("g_idx", "trivial"))
    if tensor.group_index is not None:
        index = tensor.group_index.numpy()
        if kind == "absent":
            raise Unsupported("storage-form", "an act-order index cannot be written without g_idx")
    elif kind in ("absent", "empty"):
        return []
    else:
        index = np.zeros(k, np.int32) if kind == "zeros" else np.arange(k, dtype=np.int32) // (storage.group or k)
    dtype = np.int64 if storage.options.get("g_idx_dtype") == "I64" else np.int32
    return [Piece("g_idx", index.astype(dtype).reshape(1, k))]


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands (the values of its zero points aside)."""
    verdict = affine_verdict(storage, scheme)
    return _whole_blocks(storage, scheme.shape) if verdict else verdict


def _whole_blocks(storage: Storage, shape: tuple[int, ...]) -> Yes | No:
    n, k = shape
    if k % storage.k_multiple:
        return No(f"its {k} inputs are not a multiple of {storage.k_multiple}")
    multiple = marlin.COLUMNS if storage.options.get("packing") == "marlin" else storage.n_multiple
    return No(f"its {n} outputs are not a multiple of {multiple}") if n % multiple else Yes()
