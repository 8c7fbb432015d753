"""AQLM: additive quantization, each weight vector a sum of entries of the layer's own codebooks under one scale a group of outputs.

Source: ``src/aqlm/inference.py`` and ``utils.py`` of aqlm 1.1.7, ``AqlmConfig`` of transformers 5.23. K = in_features, N = out_features,
o = ``out_group_size``, i = ``in_group_size``, C = ``num_codebooks``, b = ``nbits_per_codebook``:

| stored key | dtype | shape | meaning |
|---|---|---|---|
| ``codes`` | I8 (b <= 8), I16 (b <= 16) | (N / o, K / i, C) | u as a signed integer: u - 2^b where u >= 2^(b - 1) |
| ``codebooks`` | model's | (C, 2^b, o, i) | |
| ``scales`` | model's | (N / o, 1, 1, 1) | |
| ``bias`` | model's | (N,) | |

w[o r + p, i s + q] = scales[r] * sum over c of codebooks[c, u[r, s, c], p, q]; the sum is rounded, then the product. PV-tuned checkpoints
are the same. The codes come of calibration on a model's inputs: nothing here makes new ones, so that the writer takes AQLM weights alone.
aqlm's own forward pass on a CPU transposes ``codes`` where b is 8; a checkpoint saved after one is refused by the length of ``scales``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, float_array, float_tensor
from qformats.formats.planes import finite, own_form, part, row_range
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.scheme import Learned, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    from qformats.containers.raw import RawTensor
    from qformats.tensor import QuantizedTensor

__all__ = ["NAME", "SUFFIXES", "can_store", "config_out", "detect", "layout", "read", "scheme", "storage_of", "storages", "write"]

NAME = "aqlm"
SUFFIXES: frozenset[str] = frozenset({"codes", "codebooks", "scales"})
_FLOAT_DTYPES = ("F16", "BF16", "F32")
_FIELDS = {"num_codebooks": 0, "out_group_size": 2, "in_group_size": 3}  # config's name: axis of codebooks


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``aqlm``."""
    return Match(NAME, config) if str(config.get("quant_method") or "").lower() == NAME else None


def _parts(module: Module) -> tuple[RawTensor, RawTensor, RawTensor]:
    """``codes``, ``codebooks`` and ``scales``, checked against each other and the config."""
    books = part(module, "codebooks", _FLOAT_DTYPES, (None, None, None, None))
    config, bits = module.match.config, books.shape[1].bit_length() - 1
    if 1 << bits != books.shape[1] or not 1 <= bits <= 16:
        raise BadFile("wrong-shape", f"codebooks have {books.shape[1]} entries, expected a power of two up to 65536", tensor=books.name)
    known = {"nbits_per_codebook": bits, **{key: books.shape[axis] for key, axis in _FIELDS.items()}}
    for key, found in known.items():
        if config.get(key, found) != found:
            text = f"the config says {key} {config[key]!r}, codebooks {books.shape} say {found}"
            raise BadFile("config-disagrees", text, tensor=books.name)
    codes = part(module, "codes", ("I8" if bits <= 8 else "I16",), (None, None, books.shape[0]))
    return codes, books, part(module, "scales", (books.dtype,), (codes.shape[0], 1, 1, 1))


def _shape(codes: RawTensor, books: RawTensor) -> tuple[int, int]:
    return codes.shape[0] * books.shape[2], codes.shape[1] * books.shape[3]


def _grid(books: RawTensor) -> Learned:
    count, entries, v_out, v_in = books.shape
    return Learned(entries, v_out, v_in, count)


def scheme(module: Module) -> Scheme:
    """The scheme from the headers; ``BadFile`` where they disagree."""
    codes, books, scales = _parts(module)
    n, k = _shape(codes, books)
    return Scheme((n, k), _grid(books), (ParamSpec(FLOATS[scales.dtype], Tile((books.shape[2], k))),))


def storage_of(module: Module) -> Storage:
    """The storage of these very parts."""
    return _storage(scheme(module))


def _storage(scheme: Scheme) -> Storage:
    """Codes, codebooks and scales of a weight ``scheme``, all counted."""
    grid, dtype, (n, k) = scheme.grid, scheme.scales[0].dtype, scheme.shape
    assert isinstance(grid, Learned)
    size = 32 if dtype == "float32" else 16
    codes = grid.books * (8 if grid.entries <= 256 else 16) / (grid.v_out * grid.v_in)
    books = grid.books * grid.entries * grid.v_out * grid.v_in * size / (n * k)
    return Storage(
        NAME, grid, None, codes + books + size / (grid.v_out * k), scale_dtypes=(dtype,), k_multiple=grid.v_in, n_multiple=grid.v_out,
        rows=grid.v_out,
    )  # fmt: skip


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` as signed codes (n / o, K / i, C) with the codebooks; rows that are no whole groups as entries of one row."""
    import torch

    from qformats import rewrite
    from qformats.tensor import Param, QuantizedTensor

    stored, books, scales = _parts(module)
    (n, k), grid = _shape(stored, books), _grid(books)
    stop = row_range(module, start, stop, n)
    first, last = start // grid.v_out, -(-stop // grid.v_out)
    counts = (last - first, k // grid.v_in, grid.books)
    plane = torch.zeros((1, 1, 1), dtype=torch.int8).expand(counts)
    if codes:
        plane = torch.from_numpy(stored.row_range(first * counts[1], last * counts[1])).reshape(counts)
    entries = finite(float_tensor(books.array(), books.dtype), books)
    scale = finite(float_tensor(scales.array(), scales.dtype), scales).reshape(-1, 1)[first:last]
    shape = (counts[0] * grid.v_out, k)
    whole = QuantizedTensor(shape, plane, grid, (Param(scale, Tile((grid.v_out, k))),), codebook=entries)
    skip = start - first * grid.v_out
    return whole if (skip, stop - start) == (0, shape[0]) else rewrite.select_rows(whole, slice(skip, skip + stop - start))


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """That of AQLM weights; ``Unsupported('no-quantizer')`` for all others."""
    if target.type not in (None, NAME) or target.options:
        raise UsageError("type", f"aqlm has no types and no options, not {target}", hint="name the format alone")
    if not isinstance(scheme.grid, Learned) or len(scheme.scales) != 1:
        hint = "convert to another format, or calibrate with the aqlm package"
        raise Unsupported("no-quantizer", "AQLM codebooks come of calibration; only AQLM weights can be written as AQLM", hint=hint)
    return [_storage(scheme)]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    grid, (n, k) = storage.grid, shape
    assert isinstance(grid, Learned)
    word, rows = CONTAINER_FLOATS[storage.scale_dtypes[0]], n // grid.v_out
    return {
        "codes": PartInfo("I8" if grid.entries <= 256 else "I16", (rows, k // grid.v_in, grid.books)),
        "codebooks": PartInfo(word, (grid.books, grid.entries, grid.v_out, grid.v_in)),
        "scales": PartInfo(word, (rows, 1, 1, 1)),
    }


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """The same codebooks' form under one scale for each group of outputs."""
    block = Tile((storage.rows or 1, scheme.shape[-1]))
    scales = tuple((s.dtype, s.inverse, s.nested) for s in scheme.scales)
    same = scheme.grid == storage.grid and scales == ((storage.scale_dtypes[0], False, None),) and scheme.scales[0].block == block
    if same and scheme.zero_point is None and scheme.offset is None and not scheme.signs and not scheme.group_index:
        return Yes()
    return No("it is not made of such codebooks under one scale for each group of outputs")


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n``, whole groups, of the weight ``shape``; the codebooks with the first."""
    import torch

    own_form(storage, can_store(storage, tensor.scheme), NAME)
    grid = storage.grid
    assert isinstance(grid, Learned) and tensor.codebook is not None and isinstance(tensor.scales[0].values, torch.Tensor)
    if start % grid.v_out:
        raise Unsupported("row-range", f"row {start} is not the first of a group of {grid.v_out}")
    word, at = (torch.int8 if grid.entries <= 256 else torch.int16), start // grid.v_out
    codes = tensor.codes.to(word).reshape(-1, grid.books).numpy()
    pieces = [Piece("codes", codes, at * (shape[1] // grid.v_in)), Piece("scales", float_array(tensor.scales[0].values), at)]
    if start == 0:
        pieces.append(Piece("codebooks", float_array(tensor.codebook.contiguous()).reshape(-1, grid.v_in)))
    return pieces


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one, else one made of the codebooks' form."""
    grids = {storage.grid for storage in modules.values()}
    if original:
        return dict(original)
    if len(grids) > 1:
        raise Unsupported("aqlm-mixed", "layers have codebooks of different forms, and a config of AQLM holds one")
    (grid,) = grids
    assert isinstance(grid, Learned)
    return {
        "quant_method": NAME,
        "in_group_size": grid.v_in,
        "out_group_size": grid.v_out,
        "num_codebooks": grid.books,
        "nbits_per_codebook": grid.entries.bit_length() - 1,
        "linear_weights_not_to_quantize": [f"{name}.weight" for name in skipped],
    }
