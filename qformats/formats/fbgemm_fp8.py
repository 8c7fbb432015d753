"""FBGEMM FP8: e4m3fn weights with one float32 scale a row, as Meta and transformers store them.

Source: ``integrations/fbgemm_fp8.py`` (``FbgemmFp8Linear``, ``FbgemmFp8Quantize``, ``FbgemmFp8Llama4TextExperts``) and
``FbgemmFp8Config`` of transformers 5.23.

| stored key         | dtype   | shape      | meaning                                                        |
|--------------------|---------|------------|----------------------------------------------------------------|
| weight             | F8_E4M3 | (N, K)     | e4m3fn codes                                                   |
| weight_scale       | F32     | (N, 1)     | what the codes of a row are multiplied by                      |
| input_scale_ub     | F32     | (1,)       | the bound of the input's scale, ``activation_scale_ub`` again  |
| gate_up_proj       | F8_E4M3 | (E, K, N)  | experts of Llama 4, inputs as rows, named without a leaf       |
| gate_up_proj_scale | F32     | (E, 1, N)  | one scale an output, a column here                             |
| down_proj_scale    | F32     | (E, N, 1)  | the same, in spite of its shape, beside ``down_proj`` (E, K, N) |

The owner multiplies fp32(code) by the scale. The experts' tensors keep the rows they are stored with, inputs, so their scales are one for
each column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, UsageError
from qformats.formats import smallfloats
from qformats.formats.protocol import Activations, Inputs, Match, Module, PartInfo, Piece, Target
from qformats.scheme import Float, No, Scheme, Storage, Yes

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = [
    "BARE",
    "EXTRAS",
    "GLUED",
    "KEEPS_AXES",
    "NAME",
    "SUFFIXES",
    "activations",
    "can_store",
    "config_out",
    "detect",
    "holds_codes",
    "inputs",
    "join_name",
    "layout",
    "read",
    "scheme",
    "split_name",
    "storage_of",
    "storages",
    "with_activations",
    "write",
]

NAME = "fbgemm_fp8"
SUFFIXES: frozenset[str] = frozenset({"weight_scale", "_scale"})
GLUED = frozenset({"_scale", ""})
BARE = frozenset({""})
KEEPS_AXES = True
EXTRAS = frozenset({"input_scale_ub"})
UPPER_BOUND = 1200.0
_FUSED = ("gate_up_proj_scale", "down_proj_scale")
_STORAGE = Storage("fp8", Float("e4m3fn"), None, 8.0, ("float32",))


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``fbgemm_fp8``."""
    return Match(NAME, config) if str(config.get("quant_method") or "").lower() == NAME else None


def split_name(stored: str) -> tuple[str, str]:
    """The module and the leaf; ``gate_up_proj_scale`` belongs to the module ``gate_up_proj``."""
    module, _, leaf = stored.rpartition(".")
    return (stored.removesuffix("_scale"), "_scale") if leaf in _FUSED else (module, leaf)


def join_name(module: str, leaf: str) -> str:
    """The inverse of ``split_name``."""
    return f"{module}{leaf}" if not module or leaf in GLUED else f"{module}.{leaf}"


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of an FP8 weight, whole or not."""
    raw = parts.get("weight", parts.get(""))
    return bool(SUFFIXES & parts.keys()) or (raw is not None and raw.dtype in smallfloats.GRIDS)


def _weight(module: Module) -> smallfloats.Weight:
    """The stored weight, checked; ``BadFile`` where its planes disagree."""
    fused = "_scale" in module.parts or "" in module.parts
    raw = smallfloats.part_of(module, "" if fused else "weight", ("F8_E4M3",))
    scale = smallfloats.part_of(module, "_scale" if fused else "weight_scale", ("F32", "BF16", "F16"))
    if len(raw.shape) != (3 if fused else 2) or not prod(raw.shape):
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected {'(E, K, N)' if fused else '(N, K)'}", tensor=raw.name)
    shape = tuple(raw.shape)
    held = smallfloats.tiles(scale, shape, None, 1, (shape[0], shape[2], 1)) if fused else smallfloats.tiles(scale, shape, 1, None)
    return smallfloats.Weight(raw, Float("e4m3fn"), shape, (held,))


def scheme(module: Module) -> Scheme:
    """The scheme of the weight from the headers."""
    return smallfloats.scheme_of(_weight(module))


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` (over all experts) as a tensor (stop - start, K); ``BadFile('not-finite')`` for a scale that is no number."""
    return smallfloats.read(_weight(module), start, stop, codes=codes)


def storage_of(module: Module) -> Storage:
    """The storage of a stored weight."""
    weight = _weight(module)
    raw = weight.scales[0].raw
    options: dict[str, object] = {} if "weight" in module.parts else {"fused": "down" if raw.shape[-1] == 1 else "gate_up"}
    return smallfloats.storage_of(weight, "fp8", 8.0, options)


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The one storage there is; ``UsageError`` for another type or an option."""
    if target.type not in (None, "fp8") or target.options:
        raise UsageError("target-type", f"fbgemm_fp8 has the type fp8 and no options, not {target}", hint="name the format alone")
    return [_STORAGE]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """``weight`` and ``weight_scale`` of a weight (N, K), or the two planes of experts (E, K, N)."""
    fused, codes = storage.options.get("fused"), smallfloats.code_part(storage, shape)
    scale = smallfloats.scale_part(storage, shape)
    if fused is None:
        return {"weight": codes, "weight_scale": scale}
    return {"": codes, "_scale": PartInfo(scale.dtype, (*shape[:-2], shape[-1], 1) if fused == "down" else scale.shape)}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """e4m3fn codes under one scale a row."""
    return smallfloats.can_store(storage, scheme)


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows from ``start`` of the weight ``shape``; ``Unsupported('storage-form')`` for a tensor in another form."""
    smallfloats.verdict(storage, tensor, shape)
    fused = storage.options.get("fused")
    scales = smallfloats.scale_pieces(storage, tensor, "weight_scale" if fused is None else "_scale", start, shape)
    if fused == "down":  # (E, 1, N) as (E, N, 1)
        scales = [Piece(p.leaf, p.array.reshape(-1, 1), p.row * shape[-1]) for p in scales]
    return [Piece("weight" if fused is None else "", smallfloats.write_codes(storage, tensor), start), *scales]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one, else transformers' own with its bound of 1200 for the input's scale."""
    if original is not None and detect(original, ()) is not None:
        return dict(original)
    return {"quant_method": NAME, "activation_scale_ub": UPPER_BOUND, "modules_to_not_convert": list(skipped)}


def activations(config: Mapping[str, Any]) -> Activations:
    """e4m3 with a scale for each token, clipped at the bound."""
    return Activations("fp8", True, "token")


def inputs(module: Module) -> Inputs:
    """amax / 448 for each token, amax bounded by ``activation_scale_ub`` (FBGEMM's ``quantize_fp8_per_row``)."""
    bound = module.match.config.get("activation_scale_ub", UPPER_BOUND)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
        raise BadFile("config-value", f"activation_scale_ub is {bound!r}, expected a number above 0")
    return Inputs("e4m3fn", span=448.0, least=1e-12 / 448, most=float(bound))


def with_activations(config: Mapping[str, Any], activations: Activations | None, cache: bool) -> dict[str, Any] | None:
    """The config as it is: it has dynamic FP8 activations alone."""
    return dict(config) if activations is None or (activations.kind, activations.dynamic) == ("fp8", True) else None
