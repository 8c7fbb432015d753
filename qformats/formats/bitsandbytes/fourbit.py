"""NF4 and FP4 weights, plain and double-quantized.

Source: ``functional.quantize_4bit``, ``dequantize_4bit`` and ``nn.Linear4bit._save_to_state_dict`` of bitsandbytes 0.50.2. The weight
(N, K) is one row-major vector of N * K codes; blocks of ``blocksize`` B run along it, over the ends of rows, and the last may be short:

| stored key                           | dtype       | shape            | meaning                                                   |
|--------------------------------------|-------------|------------------|-----------------------------------------------------------|
| weight                               | any, see below | (words, 1)    | code 2 i in the high, 2 i + 1 in the low nibble of byte i |
| weight.absmax                        | F32, or U8  | (ceil(N K / B),) | the block's scale, or its code on ``nested_quant_map``    |
| weight.quant_map                     | F32         | (16,)            | what the codes stand for                                  |
| weight.nested_absmax                 | F32         | (blocks / 256,)  | the scale of each 256 codes of absmax                     |
| weight.nested_quant_map              | F32         | (256,)           | what the codes of absmax stand for                        |
| weight.quant_state.bitsandbytes__nf4 | U8          | (bytes,)         | JSON, see ``state``; ``__fp4`` for FP4                    |

So the codes 0, 1, …, 7 are the bytes 01 23 45 67. The weight is stored in words of ``quant_storage`` (U8, I8, F16, BF16, F32 or F64),
which are these bytes one, two, four or eight at a time, not numbers. A value is ``map[code] * absmax``; under double quantization absmax
is ``fp32(fp32(nested_map[u8] * nested_absmax) + offset)``.

Canonical form: the table's codes (N, K) under one scale on runs of gcd(K, B) columns of one row: B where B divides K, else absmax
stands once for each part that the ends of rows cut a block into. A double-quantized scale is codes of the table ``dynamic`` on the same
runs, with a scale of its own on runs of them and one offset, rounded to float32 as above. A map other than bitsandbytes' own is a
learned codebook: its kernels ignore the stored map of the codes (not that of absmax), the number here is what the file says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import NUMPY_DTYPES, RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.bitsandbytes.state import MAX_NBYTES, State, parse_state, state_bytes
from qformats.formats.protocol import Module, PartInfo, Piece
from qformats.loops import find
from qformats.scheme import Learned, No, ParamSpec, Scheme, Storage, Table, Tile, Yes, whole

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "STATE",
    "STORAGE_DTYPES",
    "SUFFIXES",
    "can_store",
    "dequantize",
    "layout",
    "map_warnings",
    "read",
    "scheme",
    "state_of",
    "storage",
    "storage_of",
    "write",
]

STATE = "weight.quant_state.bitsandbytes__"
ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP = "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"
SUFFIXES = frozenset({ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, f"{STATE}nf4", f"{STATE}fp4"})
STORAGE_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_ITEMSIZE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_HELD_NBYTES = 1 << 18
_PADDING = {"nf4": 7, "fp4": 0}  # the code after the last where their number is odd: that of 0.0


# ---------------------------------------------------------------- headers


def state_of(module: Module) -> State:
    """The module's JSON blob; ``BadFile`` where there is none, or two."""
    if "state" not in module.memo:
        found = [leaf for leaf in module.parts if leaf.startswith(STATE)]
        if not found:
            raise BadFile(
                "missing-quant-state", f"there is no {module.name}.{STATE}nf4 or …fp4", tensor=module.name, hint="fetch all shards"
            )
        raw = module.parts[found[0]]
        if len(found) > 1 or raw.dtype != "U8" or raw.shape != (raw.nbytes,) or raw.nbytes > MAX_NBYTES:
            raise BadFile("quant-state", f"{len(found)} states, the first {raw.dtype} {raw.shape} in {raw.nbytes} bytes", tensor=raw.name)
        state = parse_state(raw.read(), raw.name)
        if found[0] != STATE + state.quant_type:
            raise BadFile("quant-state", f"says {state.quant_type} under the name {found[0]}", tensor=raw.name)
        module.memo["state"] = state
    state = module.memo["state"]
    assert isinstance(state, State)
    return state


def _counts(state: State) -> tuple[int, int, int]:
    """Bytes of codes, blocks, and blocks of blocks."""
    blocks = -(-prod(state.shape) // state.blocksize)
    return -(-prod(state.shape) // 2), blocks, -(-blocks // state.nested_blocksize) if state.nested else 0


def _part(module: Module, leaf: str, dtype: str, count: int) -> RawTensor:
    raw = module.parts.get(leaf)
    if raw is None:
        raise BadFile(
            f"missing-{leaf.rpartition('.')[2]}", f"there is no {module.name}.{leaf}", tensor=module.name, hint="fetch all shards"
        )
    if raw.dtype != dtype:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {dtype}", tensor=raw.name)
    if raw.shape != (count,):
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {(count,)}", tensor=raw.name)
    if raw.nbytes != count * _ITEMSIZE[dtype]:
        raise BadFile("size", f"{raw.nbytes} bytes, expected {count * _ITEMSIZE[dtype]}", tensor=raw.name)
    return raw


def _checked(module: Module) -> State:
    """The state, all parts checked against it."""
    state = state_of(module)
    if module.memo.get("checked"):
        return state
    nbytes, blocks, outer = _counts(state)
    raw = module.parts.get("weight")
    if raw is None:
        raise BadFile("missing-weight", f"there is no {module.name}.weight", tensor=module.name, hint="fetch all shards")
    size = _ITEMSIZE.get(raw.dtype)
    if size is None:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected one of {', '.join(_ITEMSIZE)}", tensor=raw.name)
    if nbytes % size or raw.shape != (nbytes // size, 1) or raw.nbytes != nbytes:
        expected = f"({nbytes // size}, 1): {prod(state.shape)} codes of 4 bits in {raw.dtype}"
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {expected}", tensor=raw.name)
    _part(module, ABSMAX, "U8" if state.nested else "F32", blocks)
    _part(module, MAP, "F32", 16)
    for leaf, count in ((NESTED_ABSMAX, outer), (NESTED_MAP, 256)):
        if state.nested:
            _part(module, leaf, "F32", count)
        elif leaf in module.parts:
            raise BadFile("quant-state", f"there is a {leaf}, but the state speaks of plain scales", tensor=module.name)
    module.memo["checked"] = True
    return state


def _grid(module: Module, leaf: str, name: str) -> Table | Learned:
    """The table of that name where the stored map equals it, else the map as a codebook; ``BadFile('quant-map')`` for one of no numbers."""
    key = f"grid:{leaf}"
    if key not in module.memo:
        import numpy as np

        stored = module.parts[leaf].array()
        if not np.isfinite(stored).all():
            raise BadFile("quant-map", "holds NaN or infinities", tensor=module.parts[leaf].name)
        module.memo[key] = Table(name) if np.array_equal(stored, _table(name)) else Learned(len(stored))
    grid = module.memo[key]
    assert isinstance(grid, Table | Learned)
    return grid


@cache
def _table(name: str) -> Array:
    """A table's entries as float32."""
    import numpy as np

    from qformats import grids

    return grids.table_values(name).numpy().astype(np.float32)


def map_warnings(module: Module) -> list[str]:
    """What is unusual about the module's maps."""
    state = _checked(module)
    if isinstance(_grid(module, MAP, state.quant_type), Table):
        return []
    return [f"its quant_map is not the table of {state.quant_type}: bitsandbytes ignores a stored map, here it is what codes mean"]


def _runs(shape: tuple[int, ...], blocksize: int) -> tuple[int, int]:
    """Columns of one run of the canonical scale, and runs in a row."""
    run = gcd(shape[-1], blocksize)
    return run, shape[-1] // run


def _outer_run(shape: tuple[int, ...], state: State) -> int:
    """Runs of the scale in one run of the scale's scale."""
    run, count = _runs(shape, state.blocksize)
    return gcd(count, state.nested_blocksize) if run == state.blocksize else 1


def scheme(module: Module) -> Scheme:
    """The scheme of the weight (N, K), from the headers, the JSON blob and the maps."""
    state = _checked(module)
    run, count = _runs(state.shape, state.blocksize)
    grid = _grid(module, MAP, state.quant_type)
    if not state.nested:
        return Scheme(state.shape, grid, (ParamSpec("float32", Tile((1, run))),))
    inner = (state.shape[0], count)
    scale = ParamSpec("float32", Tile((1, _outer_run(state.shape, state))))
    offset = ParamSpec("float32", whole(inner), constant=state.nested_offset)
    nested = Scheme(inner, _grid(module, NESTED_MAP, "dynamic"), (scale,), None, offset)
    return Scheme(state.shape, grid, (ParamSpec("codes", Tile((1, run)), nested=nested),))


# ---------------------------------------------------------------- reading


def _bytes(raw: RawTensor, start: int, stop: int) -> Array:
    """Bytes ``start:stop`` of a part, as a fresh array."""
    import numpy as np

    out = np.empty(stop - start, np.uint8)
    if out.size:
        raw.source.pread_into(raw.offset + start, out.data)
    return out


def _finite(raw: RawTensor, values: Array) -> Array:
    import numpy as np

    if not np.isfinite(values).all():
        raise BadFile("not-finite", "holds NaN or infinite scales", tensor=raw.name, hint="the source is damaged")
    return values


def _floats(raw: RawTensor, start: int, stop: int) -> Array:
    import numpy as np

    return _finite(raw, _bytes(raw, start * 4, stop * 4).view(np.float32))


def _codes(module: Module, state: State, start: int, stop: int) -> Array:
    """The codes of rows ``start:stop``, uint8 (stop - start, K)."""
    import numpy as np

    first, last = start * state.shape[1], stop * state.shape[1]
    packed = _bytes(module.parts["weight"], first // 2, -(-last // 2))
    skip = first % 2
    loops = find("books")
    if loops is not None and not skip:
        out = np.empty(2 * len(packed), np.uint8)
        loops.unpack_pairs(packed, out)
    else:
        out = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    return out[skip : skip + last - first].reshape(stop - start, state.shape[1])


def _block_index(state: State, start: int, stop: int, step: int = 1) -> Array:
    """The block of every ``step``-th run of rows ``start:stop``, int64 (stop - start, runs of a row / step)."""
    import numpy as np

    run, count = _runs(state.shape, state.blocksize)
    rows = np.arange(start, stop, dtype=np.int64)[:, None] * state.shape[1]
    return (rows + np.arange(0, count, step, dtype=np.int64) * run) // state.blocksize


def _spread(raw: RawTensor, index: Array, read: Callable[[RawTensor, int, int], Array]) -> Array:
    """The entries of ``raw`` that ``index``, ascending, names; as they come where each is named once."""
    first, last = int(index[0, 0]), int(index[-1, -1]) + 1
    found = read(raw, first, last)
    return found.reshape(index.shape) if index.size == last - first else found[index - first]


def _scale(module: Module, state: State, start: int, stop: int) -> Param:
    """The canonical scale of rows ``start:stop``."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    index = _block_index(state, start, stop)
    run, raw = _runs(state.shape, state.blocksize)[0], module.parts[ABSMAX]
    if not state.nested:
        return Param(torch.from_numpy(_spread(raw, index, _floats)), Tile((1, run)))
    codes = torch.from_numpy(_spread(raw, index, _bytes))
    step = _outer_run(state.shape, state)
    outer = _block_index(state, start, stop, step) // state.nested_blocksize
    scales = torch.from_numpy(_spread(module.parts[NESTED_ABSMAX], outer, _floats))
    grid = _grid(module, NESTED_MAP, "dynamic")
    book = _book(module, NESTED_MAP) if isinstance(grid, Learned) else None
    inner = (stop - start, index.shape[1])
    offset = Param(torch.full((1, 1), state.nested_offset, dtype=torch.float32), whole(inner))
    held = QuantizedTensor(
        inner, codes if book is None else codes.unsqueeze(-1), grid, (Param(scales, Tile((1, step))),), None, offset, codebook=book
    )
    return Param(held, Tile((1, run)), rounded_to=torch.float32)


def _book(module: Module, leaf: str) -> Tensor:
    """A stored map as a codebook (1, entries, 1, 1)."""
    import torch

    return torch.from_numpy(module.parts[leaf].array()).reshape(1, -1, 1, 1)


def _range(state: State, start: int, stop: int | None, name: str) -> int:
    last = state.shape[0] if stop is None else stop
    if not 0 <= start < last <= state.shape[0]:
        raise UsageError("row-range", f"rows {start}:{last} of a weight of {state.shape[0]} rows", tensor=name)
    return last


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``: codes uint8 (n, K), one scale on runs of gcd(K, blocksize) columns."""
    import torch

    from qformats.tensor import QuantizedTensor

    state = _checked(module)
    stop = _range(state, start, stop, module.name)
    shape = (stop - start, state.shape[1])
    plane = torch.from_numpy(_codes(module, state, start, stop)) if codes else torch.zeros((), dtype=torch.uint8).expand(shape)
    grid = _grid(module, MAP, state.quant_type)
    book = _book(module, MAP) if isinstance(grid, Learned) else None
    return QuantizedTensor(
        shape, plane if book is None else plane.unsqueeze(-1), grid, (_scale(module, state, start, stop),), codebook=book
    )


def dequantize(module: Module, start: int, stop: int | None, dtype: torch.dtype) -> Tensor | None:
    """Rows ``start:stop`` straight from the packed bytes, the numbers of ``read(…).dequantize(dtype, like="bitsandbytes")``.

    None where the compiled loop does not serve: another dtype, or a run of an odd number of codes.
    """
    import numpy as np
    import torch

    state, loops = _checked(module), find("books")
    stop = _range(state, start, stop, module.name)
    run = _runs(state.shape, state.blocksize)[0]
    if loops is None or run % 2 or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    scale, table, raw = _multipliers(module, state, start, stop), module.parts[MAP].array(), module.parts["weight"]
    loop, width = loops.DEQUANTIZE[str(dtype).removeprefix("torch.")], run // 2
    first, count = start * state.shape[1] // 2, (stop - start) * state.shape[1] // 2
    out = np.empty(2 * count, np.float32 if dtype == torch.float32 else np.uint16)  # on huge pages, unlike torch's
    step = max(1, _HELD_NBYTES // width) * width
    held = np.empty(min(step, count), np.uint8)  # a few bytes at a time, which stay in a core's cache
    for at in range(0, count, step):
        packed = held[: min(step, count - at)]
        raw.source.pread_into(raw.offset + first + at, packed.data)
        loop(packed, scale[at // width : -(-(at + len(packed)) // width)], table, out[2 * at : 2 * (at + len(packed))], width)
    return torch.from_numpy(out).view(dtype).reshape(stop - start, state.shape[1])


def _multipliers(module: Module, state: State, start: int, stop: int) -> Array:
    """The scales of rows ``start:stop`` as float32 (runs,): under double quantization each product and sum of ``_scale`` rounded."""
    index, raw = _block_index(state, start, stop), module.parts[ABSMAX]
    if not state.nested:
        return _spread(raw, index, _floats).reshape(-1)
    import numpy as np

    step = _outer_run(state.shape, state)
    outer = _spread(module.parts[NESTED_ABSMAX], _block_index(state, start, stop, step) // state.nested_blocksize, _floats)
    values = module.parts[NESTED_MAP].array()[_spread(raw, index, _bytes)].reshape(-1, step)
    values *= outer.reshape(-1, 1)
    values += np.float32(state.nested_offset)
    made: Array = values.reshape(-1)
    return made


# ---------------------------------------------------------------- storages


def storage(kind: str, shape: tuple[int, ...], *, blocksize: int, nested: int, words: str, dtype: str, grid: Table | Learned | None = None,
            offset: float | None = None) -> Storage:  # fmt: skip
    """A 4-bit storage for weights of ``shape``. ``nested``: runs of absmax under one scale, 0 for plain; ``words``: quant_storage."""
    options: dict[str, object] = {"storage": words, "dtype": dtype}
    if nested:
        options["nested"] = nested
    if offset is not None:
        options["offset"] = offset
    bits = 4 + ((8 + 32 / nested) if nested else 32) / blocksize
    return Storage(
        kind, grid or Table(kind), blocksize, bits, ("float32",), flat=shape[-1] % blocksize != 0, options=options,
        scale_grid=Table("dynamic") if nested else None, whole=bool(nested),
    )  # fmt: skip


def storage_of(module: Module) -> Storage:
    """The storage that ``write`` makes these parts of."""
    state = _checked(module)
    words = {v: k for k, v in STORAGE_DTYPES.items()}[module.parts["weight"].dtype]
    grid = _grid(module, MAP, state.quant_type)
    offset = state.nested_offset if state.nested else None
    return storage(state.quant_type, state.shape, blocksize=state.blocksize, nested=state.nested_blocksize, words=words,
                   dtype=state.dtype, grid=grid, offset=offset)  # fmt: skip


def _state(storage: Storage, shape: tuple[int, ...], offset: float = 0.0) -> State:
    nested = int(str(storage.options.get("nested", 0)))
    return State(storage.type, storage.group or 64, str(storage.options["dtype"]), (shape[0], shape[1]), nested, offset)


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K); ``Unsupported('storage-dtype')`` where the packed bytes do not fill words of ``quant_storage``."""
    if len(shape) != 2:
        raise Unsupported("rank", f"bitsandbytes stores matrices, not weights of {len(shape)} dimensions")
    known = storage.options.get("offset")
    state = _state(storage, shape, float(known) if isinstance(known, float) else 0.0)
    nbytes, blocks, outer = _counts(state)
    word = STORAGE_DTYPES[str(storage.options["storage"])]
    if nbytes % _ITEMSIZE[word]:
        raise Unsupported("storage-dtype", f"{nbytes} bytes of codes do not fill words of {word}", hint="name storage=uint8")
    blob = len(state_bytes(state, padded=known is None))
    parts = {"weight": PartInfo(word, (nbytes // _ITEMSIZE[word], 1)), ABSMAX: PartInfo("U8" if state.nested else "F32", (blocks,))}
    if state.nested:
        parts |= {NESTED_ABSMAX: PartInfo("F32", (outer,)), NESTED_MAP: PartInfo("F32", (256,))}
    return {**parts, MAP: PartInfo("F32", (16,)), STATE + storage.type: PartInfo("U8", (blob,))}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Codes of the storage's own table under scales on its runs, plain or double-quantized as the storage says."""
    if len(scheme.shape) != 2 or scheme.grid != storage.grid:
        return No(f"it is not a matrix of {storage.type} codes")
    if scheme.zero_point or scheme.offset or scheme.signs or scheme.group_index or len(scheme.scales) != 1 or scheme.scales[0].inverse:
        return No("it has more than one scale")
    state, scale = _state(storage, scheme.shape), scheme.scales[0]
    run = _runs(scheme.shape, state.blocksize)[0]
    if scale.block != Tile((1, run)):
        return No(f"its scales are on {scale.block}, not on runs of {run} columns")
    if not state.nested:
        return Yes() if scale.dtype == "float32" else No(f"its scales are {scale.dtype}, not float32")
    held = scale.nested
    if held is None or held.grid != storage.scale_grid or held.zero_point or len(held.scales) != 1 or held.offset is None:
        return No("its scales are not 8-bit codes with a scale and an offset")
    blocks = (Tile((1, _outer_run(scheme.shape, state))), "float32")
    plain = (held.scales[0].block, held.scales[0].dtype) == blocks and held.offset.dtype == "float32" and held.offset.constant is not None
    return Yes() if plain else No(f"the scales of its scales are not float32 for each {state.nested_blocksize}")


# ---------------------------------------------------------------- writing


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; a range begins and ends on a whole word, unless the weight does.

    ``Unsupported('form')`` for a tensor in another form, ``Unsupported('row-range')`` for rows that cut a word.
    """
    import torch

    answer = can_store(storage, tensor.scheme)
    scale = tensor.scales[0] if tensor.scales else None
    if not answer or scale is None or (storage.scale_grid is not None and scale.rounded_to != torch.float32):
        reason = answer.reason if isinstance(answer, No) else "its scales are not rounded to float32"
        raise Unsupported("form", f"cannot be stored as {storage.type}: {reason}")
    offset = _offset(scale)
    state = _state(storage, shape, offset)
    known = storage.options.get("offset")
    if known is not None and known != offset:
        raise Unsupported("form", f"the offset of its scales is {offset}, not {known}")
    pieces = [_weight_piece(storage, tensor, start, shape), *_scale_pieces(scale, state, start, tensor.shape[0])]
    if start == 0:
        pieces += _whole_pieces(storage, tensor, scale, state, padded=known is None)
    return pieces


def _offset(scale: Param) -> float:
    from qformats.tensor import QuantizedTensor

    held = scale.values
    if not isinstance(held, QuantizedTensor) or held.offset is None:
        return 0.0
    assert not isinstance(held.offset.values, QuantizedTensor)
    return float(held.offset.values.reshape(-1)[0])


def _weight_piece(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> Piece:
    import numpy as np

    first, last, total = start * shape[1], (start + tensor.shape[0]) * shape[1], prod(shape)
    word = STORAGE_DTYPES[str(storage.options["storage"])]
    size = _ITEMSIZE[word]
    if first % (2 * size) or (last % (2 * size) and last != total):
        raise Unsupported("row-range", f"rows {start}:{start + tensor.shape[0]} of {shape} begin or end inside a word of {word}")
    flat = np.ascontiguousarray(tensor.codes.numpy()).reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(_PADDING[storage.type]))
    if flat.size and int(flat.max()) > 15:
        raise BadFile("codes-range", f"codes run up to {int(flat.max())}, expected 0 … 15")
    loops = find("books")
    packed = np.empty(len(flat) // 2, np.uint8)
    if loops is not None:
        loops.pack_pairs(flat, packed)
    else:
        np.bitwise_or(flat[::2] << 4, flat[1::2], out=packed)
    return Piece("weight", packed.view(NUMPY_DTYPES[word]).reshape(-1, 1), first // 2 // size)


def _scale_pieces(scale: Param, state: State, start: int, rows: int) -> list[Piece]:
    """absmax of the blocks that begin in these rows, and nested_absmax of the runs of blocks that do."""
    from qformats.tensor import QuantizedTensor

    index = _block_index(state, start, start + rows)
    held = scale.values
    if not isinstance(held, QuantizedTensor):
        return _run_piece(ABSMAX, held.numpy(), index, state.blocksize, start * state.shape[1])
    codes = held.codes.reshape(held.shape).numpy()
    pieces = _run_piece(ABSMAX, codes, index, state.blocksize, start * state.shape[1])
    outer = held.scales[0].values
    assert not isinstance(outer, QuantizedTensor)
    step, every = _outer_run(state.shape, state), state.blocksize * state.nested_blocksize
    owner = index[:, ::step] // state.nested_blocksize
    return pieces + _run_piece(NESTED_ABSMAX, outer.numpy(), owner, every, start * state.shape[1])


def _run_piece(leaf: str, plane: Array, index: Array, every: int, first: int) -> list[Piece]:
    """The values of runs of ``every`` weights that begin at or after the weight ``first``; all parts of a run must hold one value."""
    import numpy as np

    flat, owner = plane.reshape(-1), index.reshape(-1)
    at = np.flatnonzero(np.diff(owner, prepend=owner[0] - 1))  # where a run begins, or goes on from rows before
    chosen = flat[at]
    if not np.array_equal(chosen[owner - owner[0]], flat):
        raise Unsupported("form", f"the parts of one block have different scales: they cannot be one entry of {leaf}")
    begins = int(owner[0]) * every >= first
    chosen = chosen if begins else chosen[1:]
    return [Piece(leaf, np.ascontiguousarray(chosen).reshape(-1, 1), int(owner[0]) + (not begins))] if chosen.size else []


def _whole_pieces(storage: Storage, tensor: QuantizedTensor, scale: Param, state: State, *, padded: bool) -> list[Piece]:
    """What stands once for the weight: the maps and the JSON blob."""
    import numpy as np

    from qformats.tensor import QuantizedTensor

    def entries(held: QuantizedTensor, name: str) -> Array:
        book = held.codebook
        return (_table(name) if book is None else book.to(held.codes.device).numpy().astype(np.float32)).reshape(-1, 1)

    blob = np.frombuffer(state_bytes(state, padded=padded), np.uint8).reshape(-1, 1)
    pieces = [Piece(MAP, entries(tensor, storage.type)), Piece(STATE + storage.type, blob)]
    if isinstance(scale.values, QuantizedTensor):
        pieces.append(Piece(NESTED_MAP, entries(scale.values, "dynamic")))
    return pieces
