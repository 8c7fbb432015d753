"""transformers' ``gemma`` method: weights of 2, 4 and 8 bits under one float32 scale a row, quantized embeddings too.

Source: ``integrations/gemma_quant.py``, ``quantizers/quantizer_gemma.py`` and ``GemmaQuantizationConfig`` of transformers 5.23. b = bits:

| stored key | dtype | shape | meaning |
|---|---|---|---|
| ``weight``, of an embedding ``embedding_quantized`` | U8; I8 for b = 8 | (N, K b / 8) | codes of a row, the first in the lowest bits |
| ``weight_scale``, ``embedding_scale`` | F32 | (N, 1); of an embedding (N, K / block) | w = scale * (q - 2^(b-1)); b = 8: scale * q |
| ``input_activation_scale``, ``output_activation_scale`` | F32 | () | step of the rounded activations, 0 for none |

``num_bits`` holds for modules that no pattern of ``module_quant_configs`` (found anywhere in the name, the first counts) gives another. The
bits are checked against it; an embedding's table times the model's own factor is what the model uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_bytes, unpack_bytes
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import blank_codes
from qformats.formats.planes import finite, integer_verdict, own_form, part, row_range
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    from qformats.containers.raw import RawTensor
    from qformats.tensor import QuantizedTensor

__all__ = [
    "EXTRAS", "NAME", "SUFFIXES", "can_store", "config_out", "detect", "holds_codes", "layout", "read", "scheme", "storage_of", "storages",
    "write",
]  # fmt: skip

NAME = "gemma"
SUFFIXES: frozenset[str] = frozenset({"weight_scale", "embedding_quantized", "embedding_scale"})
EXTRAS: frozenset[str] = frozenset({"input_activation_scale", "output_activation_scale", "k_cache_scale", "v_cache_scale"})
WIDTHS = (4, 8, 2)
_LEAVES = (("weight", "weight_scale"), ("embedding_quantized", "embedding_scale"))


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``gemma``."""
    return Match(NAME, config) if str(config.get("quant_method") or "").lower() == NAME else None


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes: any of ``SUFFIXES``, or bytes, which are no floats, without a scale."""
    return bool(SUFFIXES & parts.keys()) or ("weight" in parts and parts["weight"].dtype in ("U8", "I8"))


def _bits(config: Mapping[str, Any], name: str) -> int:
    """What the config says of module ``name``; ``BadFile('config-value')`` for other widths and broken patterns."""
    found = config.get("num_bits", 4)
    patterns = config.get("module_quant_configs") or {}
    if not isinstance(patterns, Mapping):
        raise BadFile("config-value", f"module_quant_configs is {type(patterns).__name__}, expected an object")
    for pattern, own in patterns.items():
        try:
            matches = re.search(pattern, name) is not None
        except re.error as error:
            raise BadFile("config-value", f"pattern {pattern!r} is not a regular expression: {error}") from None
        if matches:
            found = own.get("num_bits", found) if isinstance(own, Mapping) else own
            break
    if isinstance(found, bool) or found not in WIDTHS:
        raise BadFile("config-value", f"num_bits is {found!r}, expected 2, 4 or 8", tensor=name)
    return int(found)


def _parts(module: Module) -> tuple[RawTensor, RawTensor, int]:
    """Codes, scales and bits, checked against each other."""
    codes_leaf, scale_leaf = _LEAVES["embedding_quantized" in module.parts]
    bits = _bits(module.match.config, module.name)
    codes = part(module, codes_leaf, ("I8" if bits == 8 else "U8",), (None, None))
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    scales = part(module, scale_leaf, ("F32",), (n, None if scale_leaf == "embedding_scale" else 1))
    if k % scales.shape[1]:
        raise BadFile("wrong-shape", f"{scale_leaf} has shape {scales.shape}, which does not divide {k} columns", tensor=scales.name)
    return codes, scales, bits


def _zero(bits: int) -> int | None:
    return None if bits == 8 else 1 << (bits - 1)


def scheme(module: Module) -> Scheme:
    """The scheme from headers and config; ``BadFile`` where they disagree."""
    codes, scales, bits = _parts(module)
    shape, zero = (codes.shape[0], codes.shape[1] * 8 // bits), _zero(bits)
    spec = None if zero is None else ParamSpec("int16", whole(shape), constant=float(zero))
    tile = Tile((1, shape[1] // scales.shape[1]))
    return Scheme(shape, Integer(bits, signed=bits == 8), (ParamSpec("float32", tile),), spec)


def storage_of(module: Module) -> Storage:
    """The storage of these very parts."""
    codes, scales, bits = _parts(module)
    k = codes.shape[1] * 8 // bits
    return _storage(bits, k, k // scales.shape[1] if scales.shape[1] > 1 else None, "embedding_quantized" in module.parts)


def _storage(bits: int, k: int, group: int | None, embedding: bool = False) -> Storage:
    return Storage(
        f"int{bits}", Integer(bits, signed=bits == 8), group, bits + 32 / (group or k), scale_dtypes=("float32",), zero_point=_zero(bits),
        k_multiple=8 // bits, options={"embedding": embedding},
    )  # fmt: skip


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` as codes (n, K), uint8 around 2^(b-1) or int8, with float32 scales."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    stored, scales, bits = _parts(module)
    n, k, zero = stored.shape[0], stored.shape[1] * 8 // bits, _zero(bits)
    stop = row_range(module, start, stop, n)
    shape = (stop - start, k)
    plane = blank_codes(shape).to(torch.int8 if bits == 8 else torch.uint8)
    if codes:
        packed = stored.row_range(start, stop)
        plane = torch.from_numpy(packed if bits == 8 else unpack_bytes(packed, bits))
    scale = finite(torch.from_numpy(scales.row_range(start, stop)), scales)
    held = Param(scale, Tile((1, k // scales.shape[1])))
    return QuantizedTensor(shape, plane, Integer(bits, signed=bits == 8), (held,), None if zero is None else constant(zero, shape))


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """One scale a row for the bits of a type, or for all."""
    known = {f"int{bits}": bits for bits in WIDTHS}
    if target.type is not None and target.type not in known:
        raise UsageError("type", f"gemma has no type {target.type!r}", hint=f"types: {', '.join(known)}")
    return [_storage(bits, scheme.shape[-1], None) for name, bits in known.items() if target.type in (None, name)]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K); ``Unsupported('k-multiple')`` where rows are not whole bytes."""
    (n, k), bits = shape, storage.integers.bits
    if k * bits % 8 or k % (storage.group or k):
        raise Unsupported("k-multiple", f"rows of {k} weights are not whole bytes or blocks, as gemma {storage.type} needs")
    codes, scales = _LEAVES[bool(storage.options["embedding"])]
    columns = 1 if storage.group is None else k // storage.group
    return {codes: PartInfo("I8" if bits == 8 else "U8", (n, k * bits // 8)), scales: PartInfo("F32", (n, columns))}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Integer codes around the middle under one float32 scale a row (an embedding's: a block)."""
    return integer_verdict(storage, scheme)


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; ``Unsupported('storage-form')`` for a tensor in another form."""
    own_form(storage, can_store(storage, tensor.scheme), NAME)
    bits = storage.integers.bits
    codes_leaf, scale_leaf = _LEAVES[bool(storage.options["embedding"])]
    array = tensor.codes.contiguous().numpy()
    array = array if bits == 8 else pack_bytes(array, bits)
    return [Piece(codes_leaf, array, start), Piece(scale_leaf, tensor.scales[0].values.contiguous().numpy(), start)]  # type: ignore[union-attr]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where it describes all ``modules``; else what most have, with the others under their names."""
    found = {name: storage.integers.bits for name, storage in modules.items()}
    if original and all(_bits(original, name) == bits for name, bits in found.items()):
        return dict(original)
    most = Counter(found.values()).most_common(1)[0][0] if found else 4
    others = {f"^{re.escape(name)}$": {"num_bits": bits} for name, bits in found.items() if bits != most}
    embeddings = any(storage.options["embedding"] for storage in modules.values())
    return {
        "quant_method": NAME,
        "num_bits": most,
        "quantize_embeddings": embeddings,
        "module_quant_configs": others or None,
        "modules_to_not_convert": list(skipped) or None,
    }
