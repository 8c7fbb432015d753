"""BitNet: ternary weights, four outputs in a byte, one scale a matrix.

Source: ``integrations/bitnet.py`` and ``BitNetQuantConfig`` of transformers 5.23. K = in_features, N = out_features:

| stored key | dtype | shape | meaning |
|---|---|---|---|
| ``weight`` | U8 | (N / 4, K) | bits 2 s and 2 s + 1 of row r hold code q of output s * N / 4 + r; q - 1 is -1, 0 or 1 |
| ``weight_scale`` | model's | (1,) | divides under ``linear_class: bitlinear``, multiplies under ``autobitlinear`` |
| ``bias`` | model's | (N,) | |

So the codes 1, 0, 2, 2 of outputs 0, N / 4, N / 2 and 3 N / 4 are the byte a1. Which of the two the scale does is never guessed: the
config's ``linear_class`` says it (``bitlinear`` where it is absent, as in transformers). Weights of ``quantization_mode: online`` have no
scale and are floats. An ``autobitlinear`` model that transformers saved again holds its codes less 1 as floats (N, K) beside the scale;
these are read too. Activations are rounded to int8 for each token by either class, which no tensor shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, blank_codes, float_array, float_tensor
from qformats.formats.planes import finite, integer_verdict, own_form, part, row_range
from qformats.formats.protocol import Activations, Inputs, Match, Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Yes, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.containers.raw import RawTensor
    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "NAME", "SUFFIXES", "activations", "can_store", "config_out", "detect", "holds_codes", "inputs", "layout", "read",
    "scheme", "storage_of", "storages", "write",
]  # fmt: skip

NAME = "bitnet"
SUFFIXES: frozenset[str] = frozenset({"weight_scale"})
CLASSES = ("bitlinear", "autobitlinear")
SLABS = 4
_SCALES = ("BF16", "F16", "F32")


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``bitnet``; ``BadFile('config-value')`` for a class or mode that transformers refuses too."""
    if str(config.get("quant_method") or "").lower() != NAME:
        return None
    for key, known in (("linear_class", CLASSES), ("quantization_mode", ("offline", "online"))):
        if config.get(key) is not None and config[key] not in known:
            raise BadFile("config-value", f"{key} is {config[key]!r}, expected {' or '.join(known)}")
    normed = ("the layers norm their inputs (use_rms_norm), which other formats do not hold",) if config.get("use_rms_norm") else ()
    return Match(NAME, config, warnings=normed)


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes: any of ``SUFFIXES``, or bytes, which are no floats, without a scale."""
    return bool(SUFFIXES & parts.keys()) or ("weight" in parts and parts["weight"].dtype == "U8")


def _divides(config: Mapping[str, Any]) -> bool:
    return (config.get("linear_class") or CLASSES[0]) == CLASSES[0]


def _parts(module: Module) -> tuple[RawTensor, RawTensor]:
    """``weight`` and ``weight_scale``."""
    if module.match.config.get("quantization_mode") == "online":
        text = "has a weight_scale, but the config says quantization_mode online, where scales are computed from float weights"
        raise BadFile("config-disagrees", text, tensor=module.name)
    weight = part(module, "weight", ("U8", *_SCALES), (None, None))
    if weight.dtype != "U8" and _divides(module.match.config):
        raise BadFile("wrong-dtype", f"weight is {weight.dtype}, expected U8 under linear_class bitlinear", tensor=weight.name)
    return weight, part(module, "weight_scale", _SCALES, (1,), ())


def _shape(weight: RawTensor) -> tuple[int, int]:
    n, k = weight.shape
    return (SLABS * n if weight.dtype == "U8" else n), k


def scheme(module: Module) -> Scheme:
    """The scheme from the headers; ``BadFile`` where they disagree with each other or the config."""
    weight, scale = _parts(module)
    shape = _shape(weight)
    zero = ParamSpec("int16", whole(shape), constant=1.0)
    return Scheme(shape, Integer(2), (ParamSpec(FLOATS[scale.dtype], whole(shape), _divides(module.match.config)),), zero)


def storage_of(module: Module) -> Storage:
    """The storage of these very parts; ``Unsupported('bitnet-floats')`` for codes that are stored as floats."""
    weight, scale = _parts(module)
    if weight.dtype != "U8":
        raise Unsupported("bitnet-floats", "codes stored as floats are read, and written only packed", tensor=weight.name)
    return _storage(_divides(module.match.config), FLOATS[scale.dtype])


def _storage(divides: bool, dtype: str) -> Storage:
    return Storage(
        "ternary", Integer(2), None, 2, scale_dtypes=(dtype,), zero_point=1, n_multiple=SLABS, rows=None, inverse=divides,
        together=True, options={"class": CLASSES[0 if divides else 1]},
    )  # fmt: skip


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` as codes uint8 (n, K) around the zero point 1, with one scale for all."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    weight, scale = _parts(module)
    n, k = _shape(weight)
    stop = row_range(module, start, stop, n)
    shape = (stop - start, k)
    plane = blank_codes(shape)
    if codes:
        plane = torch.from_numpy(_slabs(weight, start, stop) if weight.dtype == "U8" else _ternary(weight, start, stop))
    value = finite(float_tensor(scale.array().reshape(1, 1), scale.dtype), scale)
    if not bool(value):
        raise BadFile("not-finite", "weight_scale is 0", tensor=scale.name, hint="the file is damaged")
    return QuantizedTensor(shape, plane, Integer(2), (Param(value, whole(shape), _divides(module.match.config)),), constant(1, shape))


def _slabs(weight: RawTensor, start: int, stop: int) -> Array:
    """Codes uint8 (stop - start, K) out of the slabs that hold these outputs."""
    import numpy as np

    height = weight.shape[0]
    out = np.empty((stop - start, weight.shape[1]), np.uint8)
    for slab in range(SLABS):
        low, high = max(start, slab * height), min(stop, (slab + 1) * height)
        if low < high:
            rows = out[low - start : high - start]
            np.right_shift(weight.row_range(low - slab * height, high - slab * height), 2 * slab, out=rows)
            rows &= 3
    return out


def _ternary(weight: RawTensor, start: int, stop: int) -> Array:
    """Codes uint8 (stop - start, K) of floats -1, 0 and 1; ``BadFile('codes-range')`` for any other."""
    import torch

    values = float_tensor(weight.row_range(start, stop), weight.dtype).to(torch.float32)
    codes = (values + 1).to(torch.uint8)
    if not torch.equal(codes.to(torch.float32) - 1, values) or int(codes.max()) > 2:
        raise BadFile("codes-range", "holds floats other than -1, 0 and 1", tensor=weight.name)
    array: Array = codes.numpy()
    return array


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """Packed weights whose scale multiplies, or divides for ``class=bitlinear``; without it, whichever the source's does."""
    if target.type not in (None, "ternary"):
        raise UsageError("type", f"bitnet has no type {target.type!r}", hint="types: ternary")
    said = target.options.get("class")
    if said is not None and said not in CLASSES:
        raise UsageError("option", f"class={said} is not known", hint=f"use one of {', '.join(CLASSES)}")
    divides = any(scale.inverse for scale in scheme.scales) if said is None else said == CLASSES[0]
    own = {scale.dtype for scale in scheme.scales}
    order = sorted(("bfloat16", "float16", "float32"), key=lambda name: name not in own)
    return [_storage(divides, name) for name in order]


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    n, k = shape
    return {"weight": PartInfo("U8", (n // SLABS, k)), "weight_scale": PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], (1,))}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Codes of two bits around 1 under one scale."""
    if scheme.shape[0] % SLABS:
        return No(f"its {scheme.shape[0]} outputs are not a multiple of {SLABS}")
    return integer_verdict(storage, scheme)


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """All rows of the weight ``shape``; ``Unsupported`` for a part of them, or for a tensor in another form."""
    import numpy as np

    own_form(storage, can_store(storage, tensor.scheme), NAME)
    if start or tensor.shape[0] != shape[0]:
        raise Unsupported("row-range", f"rows {start} … {start + tensor.shape[0]} of {shape[0]} share bytes with the others")
    slabs = tensor.codes.contiguous().numpy().reshape(SLABS, shape[0] // SLABS, shape[1])
    packed = slabs[0] | slabs[1] << 2 | slabs[2] << 4 | slabs[3] << 6
    scale = tensor.scales[0].values.reshape(1, 1)  # type: ignore[union-attr]
    return [Piece("weight", np.ascontiguousarray(packed)), Piece("weight_scale", float_array(scale))]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one, with the class of the layers written; else one with that class."""
    classes = {str(storage.options["class"]) for storage in modules.values()}
    if len(classes) > 1:
        text = "some scales multiply and some divide, but a config holds one linear_class"
        raise Unsupported("bitnet-classes", text, hint="add class=autobitlinear or class=bitlinear")
    chosen = classes.pop() if classes else CLASSES[1]
    made = {"quant_method": NAME, "linear_class": chosen, "quantization_mode": "offline", "modules_to_not_convert": list(skipped) or None}
    if original and _divides(original) == (chosen == CLASSES[0]):
        return dict(original)
    return made if not original else {**original, "linear_class": chosen}


def activations(config: Mapping[str, Any]) -> Activations:
    """int8 with a scale for each token, in either class of layers."""
    return Activations("int8", True, "token")


def inputs(module: Module) -> Inputs:
    """int8 for each token, amax at least 1e-5 (transformers 5.23 ``integrations/bitnet.py``: ``activation_quant``, ``ActQuant``)."""
    return Inputs("int8", span=127.0, least=1e-5 / 127)
