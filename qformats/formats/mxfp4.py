"""MXFP4 as gpt-oss stores its experts: 4-bit floats in blocks of 32 under a power of two.

Source: ``convert_moe_packed_tensors`` in ``integrations/mxfp4.py`` of transformers 5.23, OCP Microscaling Formats (MX) Specification 1.0.
The codes belong to a stacked weight (E, N, K) and are named after it, with an underscore where other formats have a dot:

| stored key          | dtype | shape            | meaning                                                     |
|---------------------|-------|------------------|-------------------------------------------------------------|
| gate_up_proj_blocks | U8    | (E, N, K/32, 16) | e2m1 codes, weight 2 j in the low, 2 j + 1 in the high nibble |
| gate_up_proj_scales | U8    | (E, N, K/32)     | e8m0: the block's scale is 2^(s - 127)                      |

So the codes 0, 1, …, 7 in weights 0 … 7 are the bytes 10 32 54 76. ``quantization_config`` holds ``quant_method`` ``mxfp4`` and
``modules_to_not_convert``. The float spelling of the same weight is (E, K, N), named without a leaf; biases stand beside it as
``gate_up_proj_bias`` in either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.bits import unpack_pairs
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.scheme import Float, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = [
    "BARE",
    "GLUED",
    "NAME",
    "PACKED_EXPERTS",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "layout",
    "read",
    "scheme",
    "storage_of",
    "storages",
    "write",
]

NAME = "mxfp4"
SUFFIXES: frozenset[str] = frozenset({"_blocks", "_scales"})
GLUED = SUFFIXES  # to the weight's name
BARE = SUFFIXES
PACKED_EXPERTS = True  # it holds stacked experts and nothing else; their floats have inputs as rows
BLOCK = 32
_STORAGE = Storage("mxfp4", Float("e2m1"), BLOCK, 4.25, k_multiple=BLOCK, scale_grid=Float("e8m0"))
# what transformers leaves in floats (OpenAI's own config.json)
_SKIPPED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``mxfp4``."""
    return Match(NAME, config) if str(config.get("quant_method") or "").lower() == NAME else None


def _part(module: Module, leaf: str, rank: int) -> RawTensor:
    raw = module.parts.get(leaf)
    if raw is None:
        raise BadFile(f"missing-{leaf[1:]}", f"there is no {module.name}{leaf}", tensor=module.name, hint="fetch all shards")
    if raw.dtype != "U8":
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected U8", tensor=raw.name)
    if len(raw.shape) != rank:
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {rank} dimensions", tensor=raw.name)
    return raw


def _parts(module: Module) -> tuple[RawTensor, RawTensor]:
    """``_blocks`` and ``_scales``, checked against each other."""
    blocks, scales = _part(module, "_blocks", 4), _part(module, "_scales", 3)
    if blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise BadFile("wrong-shape", f"has shape {blocks.shape}, expected {(*scales.shape, BLOCK // 2)}", tensor=blocks.name)
    for raw in (blocks, scales):
        if raw.nbytes != prod(raw.shape):
            raise BadFile("size", f"{raw.nbytes} bytes, expected {prod(raw.shape)}", tensor=raw.name)
    return blocks, scales


def _scheme(shape: tuple[int, ...]) -> Scheme:
    tile = Tile((*(1,) * (len(shape) - 1), BLOCK))
    nested = Scheme((*shape[:-1], shape[-1] // BLOCK), Float("e8m0"))
    return Scheme(shape, Float("e2m1"), (ParamSpec("codes", tile, nested=nested),))


def scheme(module: Module) -> Scheme:
    """The scheme of the stacked weight (E, N, K) from the headers; ``BadFile`` where they disagree."""
    experts, rows, across = _parts(module)[1].shape
    return _scheme((experts, rows, across * BLOCK))


def storage_of(module: Module) -> Storage:
    """The one storage there is."""
    return _STORAGE


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``, counted over E · N, as a tensor (stop - start, K): codes uint8 of e2m1, scales codes of e8m0."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    blocks, scales = _parts(module)
    across = scales.shape[-1]
    stop = scales.rows if stop is None else stop
    if not 0 <= start < stop <= scales.rows:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {scales.rows} rows", tensor=blocks.name)
    shape = (stop - start, across * BLOCK)
    stored = scales.row_range(start, stop)
    if (stored == 0xFF).any():
        raise BadFile("not-finite", "a scale is 255, which stands for NaN", tensor=scales.name, hint="the file is damaged; fetch it again")
    exponents = QuantizedTensor((shape[0], across), torch.from_numpy(stored), Float("e8m0"))
    if codes:
        packed = blocks.row_range(start * across, stop * across)  # (n * K/32, 16)
        plane = torch.from_numpy(unpack_pairs(packed.reshape(shape[0], -1)))
    else:
        plane = torch.zeros((), dtype=torch.uint8).expand(shape)
    return QuantizedTensor(shape, plane, Float("e2m1"), (Param(exponents, Tile((1, BLOCK))),))


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The one storage there is; ``UsageError`` for a type or an option."""
    if target.type not in (None, NAME) or target.options:
        raise UsageError("target-type", f"mxfp4 has no types and no options, not {target}", hint="name the format alone")
    return [_STORAGE]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """``_blocks`` and ``_scales`` of a weight (E, N, K); ``Unsupported('k-multiple')`` where rows are not whole blocks."""
    if shape[-1] % BLOCK:
        raise Unsupported("k-multiple", f"rows of {shape[-1]} weights are not a multiple of {BLOCK}, as mxfp4 needs")
    counts = (*shape[:-1], shape[-1] // BLOCK)
    return {"_blocks": PartInfo("U8", (*counts, BLOCK // 2)), "_scales": PartInfo("U8", counts)}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Codes of e2m1 under e8m0 scales for each 32 columns, nothing else."""
    if scheme.shape[-1] % BLOCK:
        return No(f"{scheme.shape[-1]} columns are not a multiple of {BLOCK}")
    return Yes() if scheme == _scheme(scheme.shape) else No("it is not e2m1 codes with an e8m0 scale for each 32 columns")


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; ``Unsupported('form')`` for a tensor in another form."""
    from qformats.tensor import QuantizedTensor

    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("form", f"cannot be stored as mxfp4: {answer.reason}")
    held = tensor.scales[0].values
    assert isinstance(held, QuantizedTensor)
    across = shape[-1] // BLOCK
    pairs = tensor.codes.reshape(-1, BLOCK // 2, 2)  # (n * K/32, 16, 2)
    packed = (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()
    return [Piece("_blocks", packed.numpy(), start * across), Piece("_scales", held.codes.contiguous().numpy(), start)]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one, else OpenAI's."""
    return dict(original) if original else {"quant_method": NAME, "modules_to_not_convert": list(_SKIPPED)}
