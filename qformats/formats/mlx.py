"""MLX: weights of mlx-community checkpoints, and transformers' ``metal`` method with the same words.

Source: ``mlx.core.quantize`` and ``dequantize`` of mlx 0.32.4 (run on a CPU), ``mlx/nn/layers/quantized.py`` there, ``load_model`` and
``quantize_model`` of mlx-lm, ``integrations/metal_quantization.py`` of transformers 5.23. b = bits, g = group size:

| stored key | dtype | shape | meaning |
|---|---|---|---|
| ``weight`` | U32 | (N, K b / 32) | codes of a row as one bit stream, the first in the lowest bits |
| ``scales`` | model's; U8 in the float modes | (N, K / g) | |
| ``biases`` (``qbiases`` under ``metal``) | as the scales | (N, K / g) | w = scale * q + bias; absent in the float modes |

So the 4-bit codes 1 2 3 4 5 6 7 8 are the word 0x87654321; codes of 3, 5 and 6 bits straddle bytes and words.

| mode | b | g | codes | scales |
|---|---|---|---|---|
| ``affine`` | 1 2 3 4 5 6 8 | 32 64 128 | unsigned integers | floats, with biases |
| ``mxfp4``, ``mxfp8`` | 4, 8 | 32 | e2m1, e4m3 | e8m0: 2^(s - 127) |
| ``nvfp4`` | 4 | 16 | e2m1 | e4m3, of nothing else |

config.json holds ``quantization`` and the same again as ``quantization_config``: ``group_size``, ``bits``, ``mode`` (``affine`` if absent)
for all layers that have scales, embeddings too, and under a module's name what it has instead, or false. ``metal`` is affine alone, with
bits 2, 4 or 8 and no overrides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_rows, unpack_rows
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, blank_codes, dtype_option, float_array, float_tensor, yes_no
from qformats.formats.planes import finite, own_form, part, row_range
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.grids import not_finite
from qformats.scheme import Float, Grid, Integer, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.containers.raw import RawTensor
    from qformats.tensor import Param, QuantizedTensor

__all__ = [
    "CONFIG_KEYS",
    "NAME",
    "NEEDS_DTYPE",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "embeddings",
    "holds_codes",
    "layout",
    "metadata_out",
    "read",
    "scheme",
    "storage_of",
    "storages",
    "write",
]

NAME = "mlx"
NEEDS_DTYPE = True
SUFFIXES: frozenset[str] = frozenset({"scales", "biases", "qbiases"})
CONFIG_KEYS = ("quantization", "quantization_config")  # where its config stands in config.json
GROUPS = (128, 64, 32)
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
METAL_WIDTHS = (2, 4, 8)
_FLOAT_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Mode:
    """What a word for ``mode`` stands for: the group and bits where the config leaves them out, the grids of codes and scales."""

    group: int
    bits: int
    grid: Float | None = None
    scale_grid: Float | None = None


MODES = {
    "affine": Mode(64, 4),
    "mxfp4": Mode(32, 4, Float("e2m1"), Float("e8m0")),
    "mxfp8": Mode(32, 8, Float("e4m3fn"), Float("e8m0")),
    "nvfp4": Mode(16, 4, Float("e2m1"), Float("e4m3fn")),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How one module is stored."""

    mode: str
    bits: int
    group: int

    @property
    def grid(self) -> Grid:
        return MODES[self.mode].grid or Integer(self.bits)


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config without a method that has ``bits`` and ``group_size`` beside tensors named ``scales``; or the methods ``mlx``, ``metal``."""
    method = str(config.get("quant_method") or "").lower()
    if method in ("mlx", "metal"):
        return Match(NAME, config, dialect="metal" if method == "metal" else "")
    if method or not {"bits", "group_size"} <= set(config) or {"desc_act", "version", "w_bit"} & set(config):
        return None
    return Match(NAME, config) if any(name.endswith(".scales") for name in names) else None


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes: any of ``SUFFIXES``, or words, which are no floats, without a scale."""
    return bool(SUFFIXES & parts.keys()) or ("weight" in parts and parts["weight"].dtype == "U32")


def _settings(config: Mapping[str, Any], name: str) -> Settings:
    """What the config says of module ``name``; ``BadFile('config-value')`` for numbers that mlx does not take."""
    own = config.get(name, True)
    if own is False:
        raise BadFile("config-disagrees", "has scales, but the config says that it is not quantized", tensor=name)
    said = own if isinstance(own, Mapping) else config
    mode = said.get("mode") or "affine"
    if mode not in MODES:
        raise Unsupported("mlx-mode", f"mode {mode!r} is not known", tensor=name, hint=f"known modes: {', '.join(MODES)}")
    bits, group = (said.get(key) or getattr(MODES[mode], short) for key, short in (("bits", "bits"), ("group_size", "group")))
    floats = MODES[mode].grid is not None
    if bits not in ((MODES[mode].bits,) if floats else WIDTHS) or isinstance(bits, bool):
        raise BadFile("config-value", f"bits is {bits!r}, expected one of {WIDTHS}, or that of mode {mode}", tensor=name)
    if not isinstance(group, int) or isinstance(group, bool) or group < 1 or (floats and group != MODES[mode].group):
        raise BadFile("config-value", f"group_size is {group!r}, expected a number of columns, or that of mode {mode}", tensor=name)
    return Settings(mode, bits, group)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A module's parts, checked against its settings; ``shape`` is the weight's."""

    settings: Settings
    weight: RawTensor
    scales: RawTensor
    biases: RawTensor | None
    shape: tuple[int, ...]


def _parts(module: Module) -> _Parts:
    s = _settings(module.match.config, module.name)
    weight = part(module, "weight", ("U32",), (None, None), (None, None, None))
    lead, words = weight.shape[:-1], weight.shape[-1]
    k = words * 32 // s.bits
    if words * 32 % s.bits or k % s.group:
        text = f"weight has shape {weight.shape}: {words} words are no groups of {s.group} codes of {s.bits} bits, as the config says"
        raise BadFile("wrong-shape", text, tensor=weight.name)
    counts = (*lead, k // s.group)
    if MODES[s.mode].grid is not None:
        return _Parts(s, weight, part(module, "scales", ("U8",), counts), None, (*lead, k))
    scales = part(module, "scales", _FLOAT_DTYPES, counts)
    biases = part(module, "qbiases" if module.match.dialect == "metal" else "biases", (scales.dtype,), counts)
    return _Parts(s, weight, scales, biases, (*lead, k))


def scheme(module: Module) -> Scheme:
    """The scheme from headers and config; ``BadFile`` where they disagree."""
    p = _parts(module)
    return _scheme(p.settings, p.shape, FLOATS.get(p.scales.dtype, ""))


def _scheme(s: Settings, shape: tuple[int, ...], dtype: str) -> Scheme:
    tile = Tile((*(1,) * (len(shape) - 1), s.group))
    scale_grid = MODES[s.mode].scale_grid
    if scale_grid is not None:
        nested = Scheme((*shape[:-1], shape[-1] // s.group), scale_grid)
        return Scheme(shape, s.grid, (ParamSpec("codes", tile, nested=nested),))
    return Scheme(shape, s.grid, (ParamSpec(dtype, tile),), offset=ParamSpec(dtype, tile))


def storage_of(module: Module) -> Storage:
    """The storage of these very parts."""
    p = _parts(module)
    return _storage(p.settings, FLOATS.get(p.scales.dtype, ""), "qbiases" if module.match.dialect == "metal" else "biases")


def _storage(s: Settings, dtype: str, leaf: str = "biases") -> Storage:
    scale_grid, options = MODES[s.mode].scale_grid, {"mode": s.mode, "leaf": leaf}
    if scale_grid is not None:
        return Storage(s.mode, s.grid, s.group, s.bits + 8 / s.group, k_multiple=s.group, scale_grid=scale_grid, options=dict(options))
    size = 64 if dtype == "float32" else 32
    return Storage(
        f"int{s.bits}", s.grid, s.group, s.bits + size / s.group, scale_dtypes=(dtype,), offset=dtype, k_multiple=s.group,
        options=dict(options),
    )  # fmt: skip


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` (of all matrices of a stack) as codes uint8 (n, K) with their scales and offsets."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    p = _parts(module)
    k, stop = p.shape[-1], row_range(module, start, stop, prod(p.shape[:-1]))
    shape, tile = (stop - start, k), Tile((1, p.settings.group))
    plane = torch.from_numpy(unpack_rows(p.weight.row_range(start, stop), p.settings.bits, k)) if codes else blank_codes(shape)
    scale_grid = MODES[p.settings.mode].scale_grid
    if scale_grid is not None:
        patterns = p.scales.row_range(start, stop)
        if any(bool((patterns == bad).any()) for bad in not_finite(scale_grid.name)):
            raise BadFile("not-finite", "holds scales that are NaN", tensor=p.scales.name, hint="the file is damaged")
        small = QuantizedTensor((shape[0], k // p.settings.group), torch.from_numpy(patterns), scale_grid)
        return QuantizedTensor(shape, plane, p.settings.grid, (Param(small, tile),))
    assert p.biases is not None
    scale, bias = (Param(_floats(raw, start, stop), tile) for raw in (p.scales, p.biases))
    return QuantizedTensor(shape, plane, p.settings.grid, (scale,), None, bias)


def _floats(raw: RawTensor, start: int, stop: int) -> Tensor:
    return finite(float_tensor(raw.row_range(start, stop), raw.dtype), raw)


def embeddings(target: Target, scheme: Scheme) -> bool:
    """``quantize_model`` of mlx-lm quantizes what has ``to_quantized``, embeddings too; ``metal`` replaces linear layers alone."""
    return not yes_no(target, "metal")


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The storages of a type, or of all; ``group=``, ``dtype=`` of scales and biases, ``metal`` for transformers' spelling.

    Without ``dtype`` the model's first, where the target says it, for mlx computes in float32 where inputs and scales differ
    (``quantized_matmul`` of 0.32.4), then those that keep a scale as it is; ``metal`` has the model's alone, to which transformers rounds
    them (``MetalLinear.forward``).
    """
    metal = yes_no(target, "metal")
    named = _named(target, metal)
    groups, dtypes = _groups(target, scheme, metal), _dtypes(target, scheme, metal)
    found = []
    for name in named:
        if name in MODES:
            found.append(_storage(Settings(name, MODES[name].bits, MODES[name].group), ""))
        else:
            bits = int(name.removeprefix("int"))
            leaf = "qbiases" if metal else "biases"
            found += [_storage(Settings("affine", bits, group), dtype, leaf) for group in groups for dtype in dtypes]
    return found


def _named(target: Target, metal: bool) -> list[str]:
    widths = METAL_WIDTHS if metal else WIDTHS
    known = [*(f"int{bits}" for bits in widths), *(() if metal else (mode for mode in MODES if mode != "affine"))]
    if target.type is None:
        return known
    if target.type not in known:
        raise UsageError("type", f"{'metal' if metal else 'mlx'} has no type {target.type!r}", hint=f"types: {', '.join(known)}")
    return [target.type]


def _groups(target: Target, scheme: Scheme, metal: bool) -> list[int]:
    """The group asked for, else the largest that divides the source's; 64, mlx's own default, where there are no codes."""
    value, k = target.options.get("group"), scheme.shape[-1]
    if value is not None:
        if not value.isdigit() or not int(value) or (int(value) not in GROUPS and not metal):
            raise UsageError("option", f"group={value} is not a group size", hint=f"use one of {', '.join(map(str, sorted(GROUPS)))}")
        return [int(value)]
    width = (scheme.group_size or k) if scheme.scales else 64
    if width == k and scheme.scales and all(s.constant is not None for s in scheme.scales):
        width = 64
    return [next((group for group in GROUPS if width % group == 0 and k % group == 0), 32)]


def _dtypes(target: Target, scheme: Scheme, metal: bool) -> list[str]:
    value = dtype_option(target) or (target.dtype if metal else None)
    if value is not None:
        return [value]
    own = {s.dtype for s in scheme.scales}
    others = sorted(("float16", "bfloat16"), key=lambda dtype: dtype not in own)
    return list(dict.fromkeys([target.dtype or others[0], *others]))


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (…, N, K); ``Unsupported('k-multiple')`` where rows are not whole groups."""
    group, bits = storage.group or shape[-1], _bits(storage)
    if shape[-1] % group or shape[-1] * bits % 32:
        raise Unsupported("k-multiple", f"rows of {shape[-1]} weights are not a multiple of {group}, as mlx needs")
    counts = (*shape[:-1], shape[-1] // group)
    parts = {"weight": PartInfo("U32", (*shape[:-1], shape[-1] * bits // 32))}
    if storage.scale_grid is not None:
        return {**parts, "scales": PartInfo("U8", counts)}
    info = PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], counts)
    return {**parts, "scales": info, str(storage.options["leaf"]): info}


def _bits(storage: Storage) -> int:
    return MODES[str(storage.options["mode"])].bits if storage.scale_grid is not None else storage.integers.bits


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Integer codes with a scale and an offset of one dtype for each group, or small floats under a small float for each group."""
    group = storage.group or scheme.shape[-1]
    if scheme.shape[-1] % group:
        return No(f"{scheme.shape[-1]} columns are not a multiple of {group}")
    settings = Settings(str(storage.options["mode"]), _bits(storage), group)
    wanted = _scheme(settings, scheme.shape, "" if storage.scale_grid is not None else storage.scale_dtypes[0])
    if _plain(scheme) == wanted:
        return Yes()
    what = "a scale and an offset" if storage.offset else "a scale of one byte"
    return No(f"it is not {wanted.grid} codes with {what} for each {group} columns")


def _plain(scheme: Scheme) -> Scheme:
    """The scheme without the value that a parameter of one number has."""
    from dataclasses import replace

    scales = tuple(replace(s, constant=None) for s in scheme.scales)
    return replace(scheme, scales=scales, offset=None if scheme.offset is None else replace(scheme.offset, constant=None))


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; ``Unsupported('storage-form')`` for a tensor in another form."""
    own_form(storage, can_store(storage, tensor.scheme), NAME)
    words = pack_rows(tensor.codes.contiguous().numpy(), _bits(storage))
    pieces = [Piece("weight", words, start), Piece("scales", _bytes(tensor.scales[0]), start)]
    if tensor.offset is not None:
        pieces.append(Piece(str(storage.options["leaf"]), _bytes(tensor.offset), start))
    return pieces


def _bytes(param: Param) -> Any:
    from qformats.tensor import QuantizedTensor

    if isinstance(param.values, QuantizedTensor):
        return param.values.codes.contiguous().numpy()
    return float_array(param.values.contiguous())


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where it describes all ``modules``; else what most have, with the others under their names."""
    found = {name: Settings(str(s.options["mode"]), _bits(s), s.group or 0) for name, s in modules.items()}
    metal = any(s.options["leaf"] == "qbiases" for s in modules.values())
    if original and _describes(original, found, metal):
        return dict(original)
    most = Counter(found.values()).most_common(1)[0][0] if found else Settings("affine", 4, 64)
    if metal:
        return _metal_config(found, most, list(skipped))
    made: dict[str, Any] = {"group_size": most.group, "bits": most.bits, "mode": most.mode}
    others = {name: {"group_size": s.group, "bits": s.bits, "mode": s.mode} for name, s in found.items() if s != most}
    return {**made, **others}


def _describes(original: Mapping[str, Any], found: Mapping[str, Settings], metal: bool) -> bool:
    said = str(original.get("quant_method") or "").lower() == "metal"
    return said == metal and all(_settings(original, name) == settings for name, settings in found.items())


def _metal_config(found: Mapping[str, Settings], most: Settings, skipped: list[str]) -> dict[str, Any]:
    if set(found.values()) - {most}:
        text = "layers differ in bits or group, but a config of metal holds one of each"
        raise Unsupported("metal-mixed", text, hint="name one type and group")
    return {"quant_method": "metal", "bits": most.bits, "group_size": most.group, "modules_to_not_convert": skipped or None}


def metadata_out(modules: Mapping[str, tuple[Storage, tuple[int, ...]]], tensors: Iterable[str]) -> dict[str, str]:
    """mlx marks its files; transformers reads only those of ``pt``."""
    return {} if any(storage.options["leaf"] == "qbiases" for storage, _ in modules.values()) else {"format": "mlx"}
