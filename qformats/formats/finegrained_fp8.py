"""Fine-grained FP8: DeepSeek's block scales, one scale a tensor, MXFP8, and the FP4 experts beside them.

Source: ``integrations/finegrained_fp8.py`` (``FP8Linear``, ``FP8Experts``, ``Fp8Dequantize``), ``quantizers/quantizer_finegrained_fp8.py``
and ``FineGrainedFP8Config`` of transformers 5.23; the spelling with ``weight_scale`` and ``input_scale`` from ``fp8.py`` of vLLM.

| stored key       | dtype                     | shape                     | meaning                                           |
|------------------|---------------------------|---------------------------|---------------------------------------------------|
| weight           | F8_E4M3                   | (N, K)                    | e4m3fn codes                                      |
| weight           | I8, U8 or F4              | (N, K/2)                  | e2m1 codes, the even column in the low nibble     |
| weight_scale_inv | F32, BF16, F8_E8M0 or U8  | (ceil N/128, ceil K/128)  | what codes are multiplied by, in spite of its name |
| activation_scale | F32                       | ()                        | the static scale of the input, kept               |

The bytes 10 32 54 76 are the e2m1 codes 0, 1, …, 7. Blocks at the edges may be short. ``F8_E8M0`` and ``U8`` scales are exponents,
2^(b - 127), never numbers. ``weight_block_size`` of the config is the size of a block, null means one scale for the whole tensor or one
a row; FP4 experts, and weights under exponents, may have 1 x 32 instead. ``scale``, ``qscale_weight`` and
``weight_scale`` are other spellings of the scale. Experts fused into one tensor (E, N, K) are named without a leaf, ``gate_up_proj`` beside
``gate_up_proj_scale_inv``. A weight is fp32(code) * fp32(scale), rounded once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import smallfloats
from qformats.formats.packed import dtype_word, int_option
from qformats.formats.protocol import Activations, Match, Module, PartInfo, Piece, Target
from qformats.scheme import Float, No, Scheme, Storage, Yes

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = [
    "BARE",
    "EXTRAS",
    "GLUED",
    "INPUT_SCALES",
    "INPUT_SCALE_SHAPE",
    "NAME",
    "SUFFIXES",
    "activations",
    "can_store",
    "config_out",
    "detect",
    "harmonize",
    "holds_codes",
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

NAME = "fp8"
METHODS = ("fp8", "mxfp8")
SCALES = ("weight_scale_inv", "_scale_inv", "qscale_weight", "weight_scale", "scale")
SUFFIXES: frozenset[str] = frozenset({*SCALES, "_activation_scale"})
GLUED = frozenset({"_scale_inv", "_activation_scale", ""})
BARE = frozenset({""})
EXTRAS = frozenset({  # kv_scale and output_scale: of vLLM's first FP8 checkpoints
    "activation_scale", "_activation_scale", "input_scale", "qscale_act", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
})  # fmt: skip
INPUT_SCALES = {"fp8": (("activation_scale", "input_scale", "qscale_act"), False)}
INPUT_SCALE_SHAPE: tuple[int, ...] = ()
BLOCK = (128, 128)
MX_BLOCK = (1, 32)
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")
_FP4 = ("I8", "U8", "F4")
_EXPONENTS = ("F8_E8M0", "U8")
_SCALE_WORDS = ("F32", "BF16", "F16", *_EXPONENTS)
_OWN_LEAF = "weight_scale_inv"


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``fp8`` or ``mxfp8``; ``BadFile('config-value')`` for a block size that is none."""
    method = str(config.get("quant_method") or "").lower()
    if method not in METHODS:
        return None
    _block_size(config)
    return Match(NAME, config, method)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """``weight_block_size``: rows and columns of a block, None for one scale a tensor."""
    default: Any = MX_BLOCK if str(config.get("quant_method")).lower() == "mxfp8" else None
    value = config.get("weight_block_size", default)
    if value is None:
        return None
    good = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    if not good:
        raise BadFile("config-value", f"weight_block_size is {value!r}, expected two positive integers or null")
    return value[0], value[1]


def split_name(stored: str) -> tuple[str, str]:
    """The module and the leaf; ``gate_up_proj_scale_inv`` belongs to the module ``gate_up_proj``."""
    module, _, leaf = stored.rpartition(".")
    for suffix in ("_scale_inv", "_activation_scale"):
        if leaf.endswith(suffix) and leaf not in (_OWN_LEAF, suffix):
            return stored.removesuffix(suffix), suffix
    return module, leaf


def join_name(module: str, leaf: str) -> str:
    """The inverse of ``split_name``."""
    return f"{module}{leaf}" if not module or leaf in GLUED else f"{module}.{leaf}"


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes: small floats, or anything beside a scale that can be nothing else."""
    raw = parts.get("weight", parts.get(""))
    if any(leaf in parts for leaf in SCALES if leaf != "scale"):
        return True
    return raw is not None and (raw.dtype in _FP8 or ("scale" in parts and raw.dtype in _FP4))


def _weight(module: Module) -> smallfloats.Weight:
    """The stored weight, checked; ``BadFile`` where its planes disagree."""
    leaf = "" if "_scale_inv" in module.parts or "" in module.parts else "weight"
    raw = smallfloats.part_of(module, leaf, (*_FP8, *_FP4))
    scale = next((name for name in SCALES if name in module.parts), None)
    if scale is None:
        raise BadFile("missing-weight-scale-inv", f"there is no scale of {module.name}", tensor=module.name, hint="fetch all shards")
    held = smallfloats.part_of(module, scale, _SCALE_WORDS)
    packed = raw.dtype in _FP4
    if len(raw.shape) not in (2, 3) or not prod(raw.shape):
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected (N, K) or (E, N, K)", tensor=raw.name)
    shape = smallfloats.unpacked_shape(raw) if packed else tuple(raw.shape)
    grid = Float("e2m1" if packed else smallfloats.GRIDS[raw.dtype])
    rows, group = _tile(module, held, shape, packed)
    return smallfloats.Weight(raw, grid, shape, (smallfloats.tiles(held, shape, rows, group),))


def _tile(module: Module, scale: RawTensor, shape: tuple[int, ...], packed: bool) -> tuple[int | None, int | None]:
    """Rows and columns under one scale: those that the config says, 1 x 32 under exponents, or where it says none one scale a row.

    ``BadFile('wrong-shape')`` for any other grid, also one that would divide the weight evenly: transformers would take it, but the config
    and the scales then contradict each other.
    """
    config = module.match.config
    said = _block_size(config)
    known: list[tuple[int | None, int | None]] = [said or (None, None)]
    if said is None:
        known.append((1, None))
    if said is None and "weight_block_size" not in config:
        known.append(BLOCK)  # the default of FineGrainedFP8Config
    if packed or scale.dtype in _EXPONENTS:
        known.append(MX_BLOCK)
    for sizes in known:
        if _fits(scale, smallfloats.counts(shape, *sizes)):
            return sizes
    expected = " or ".join(dict.fromkeys(str(smallfloats.counts(shape, *sizes)) for sizes in known))
    text = f"has shape {tuple(scale.shape)}, expected {expected} for a weight of shape {shape} and weight_block_size {said}"
    raise BadFile("wrong-shape", text, tensor=scale.name, hint="check weight_block_size in config.json")


def _fits(scale: RawTensor, counts: tuple[int, ...]) -> bool:
    return tuple(scale.shape) == counts or (prod(counts) == 1 and prod(scale.shape) == 1)


def scheme(module: Module) -> Scheme:
    """The scheme of the weight from the headers."""
    return smallfloats.scheme_of(_weight(module))


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` (over all experts) as a tensor (stop - start, K); ``BadFile('not-finite')`` for a scale that is no number."""
    return smallfloats.read(_weight(module), start, stop, codes=codes)


def storage_of(module: Module) -> Storage:
    """The storage of a stored weight, with the spelling of its parts."""
    weight = _weight(module)
    scale = weight.scales[0]
    leaf = next(name for name in SCALES if name in module.parts)
    options: dict[str, object] = {"leaf": leaf, "word": scale.raw.dtype, "rank": len(scale.raw.shape), "codes": weight.raw.dtype}
    kind = _type_of(weight.grid, scale.rows, scale.group, scale.grid)
    made = smallfloats.storage_of(weight, kind, _bits(weight.grid, scale.rows, scale.group, scale.grid), options)
    return made if weight.grid.name != "e2m1" else replace(made, k_multiple=2)


def _type_of(grid: Float, rows: int | None, group: int | None, scale_grid: Float | None) -> str:
    if grid.name == "e2m1":
        return "fp4"
    return "mxfp8" if (rows, group) == MX_BLOCK and scale_grid is not None else "fp8"


def _bits(grid: Float, rows: int | None, group: int | None, scale_grid: Float | None) -> float:
    codes = 4.0 if grid.name == "e2m1" else 8.0
    return codes + (0.0 if rows is None or group is None else (8 if scale_grid is not None else 32) / (rows * group))


# ---------------------------------------------------------------- targets


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The storages of a target: ``block=128x128`` (the default) or ``tensor``, ``scale=float32`` or ``ue8m0``; ``mxfp8``, ``fp4``: 1 x 32.

    If the target names no block, the source's own tiles come first where it has FP8 or FP4 codes. ``UsageError`` for other options.
    """
    kind = target.type or ("fp4" if scheme.grid == Float("e2m1") else "fp8")
    if kind not in ("fp8", "mxfp8", "fp4"):
        raise UsageError("target-type", f"fp8 has no type {kind!r}", hint="types: fp8, mxfp8, fp4")
    word = dtype_word(target.options.get("scale", "float32" if kind == "fp8" else "ue8m0"))
    if word not in ("float32", "ue8m0"):
        raise UsageError("option", f"scale={word} is not float32 or ue8m0")
    text = target.options.get("block")
    if kind != "fp8":
        if text is not None and text != "1x32":
            raise UsageError("option", f"{kind} has blocks of 1x32, not {text}")
        return [_storage(kind, MX_BLOCK, word)]
    block = BLOCK if text is None else _parsed(text)
    made = [_storage(kind, block, word)]
    if text is None:
        made = [_storage(kind, own, w) for own, w in _own_tiles(scheme, word, "scale" in target.options)] + made
    return [s for at, s in enumerate(made) if s not in made[:at]]


def _parsed(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if text == "tensor":
        return None
    if found is None:
        raise UsageError("option", f"block={text} is not ROWSxCOLUMNS or tensor")
    return int(found[1]), int(found[2])


def _own_tiles(scheme: Scheme, word: str, named: bool) -> list[tuple[tuple[int, int] | None, str]]:
    """The tiles of a source of FP8 codes, with the kind of its scales unless one is named."""
    from qformats.scheme import Tile

    if not isinstance(scheme.grid, Float) or len(scheme.scales) != 1 or not isinstance(scheme.scales[0].block, Tile):
        return []
    spec, sizes = scheme.scales[0], scheme.scales[0].block.sizes
    own = word if named else ("ue8m0" if spec.nested is not None else "float32")
    single = len(sizes) > 1 and sizes[-2] >= scheme.shape[-2] > 1 and sizes[-1] >= scheme.shape[-1]
    if single:
        return [(BLOCK, own), (None, own)] if scheme.shape[-2] <= BLOCK[0] and scheme.shape[-1] <= BLOCK[1] else [(None, own)]
    rows = sizes[-2] if len(sizes) > 1 else 1
    if sizes[-1] >= scheme.shape[-1] and rows == 1:
        return [((1, BLOCK[1]), own)]  # a config has one block size for all widths: the row's scale is repeated
    return [((rows, sizes[-1]), own)]


def _storage(kind: str, block: tuple[int, int] | None, word: str) -> Storage:
    grid, small = Float("e2m1" if kind == "fp4" else "e4m3fn"), Float("e8m0") if word == "ue8m0" else None
    rows, group = block or (None, None)
    stored = "F32" if small is None else ("U8" if kind == "mxfp8" else "F8_E8M0")
    options: dict[str, object] = {"leaf": _OWN_LEAF, "word": stored, "rank": 0 if block is None else 2,
                                  "codes": "I8" if kind == "fp4" else "F8_E4M3"}  # fmt: skip
    return Storage(kind, grid, group, _bits(grid, rows, group, small), ("float32",), rows=rows, scale_grid=small, options=options,
                   k_multiple=32 if kind != "fp8" else 1)  # fmt: skip


def _leaf(storage: Storage) -> str:
    return str(storage.options.get("leaf", _OWN_LEAF))


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The two parts of a weight (N, K) or (E, N, K)."""
    codes = smallfloats.code_part(storage, shape)
    word = str(storage.options.get("codes", codes.dtype))
    stored = shape if word == "F4" else codes.shape
    counts = smallfloats.counts(shape, storage.rows, storage.group)
    single = prod(counts) == 1
    rank = int_option(storage.options, "rank", len(counts))
    held = PartInfo(str(storage.options.get("word", "F32")), (1,) * rank if single else counts)
    leaf = _leaf(storage)
    return {"" if leaf == "_scale_inv" else "weight": PartInfo(word, stored), leaf: held}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Codes of the grid under one scale for each block."""
    return smallfloats.can_store(storage, scheme)


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows from ``start`` of the weight ``shape``; ``Unsupported('storage-form')`` for another form, ``row-range`` inside a block."""
    smallfloats.verdict(storage, tensor, shape)
    leaf = _leaf(storage)
    codes = smallfloats.write_codes(storage, tensor)
    return [Piece("" if leaf == "_scale_inv" else "weight", codes, start),
            *smallfloats.scale_pieces(storage, tensor, leaf, start, shape)]  # fmt: skip


# ---------------------------------------------------------------- configuration


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where it still says the truth of every module, else one of transformers' own form."""
    left = list(skipped)
    if original is not None and detect(original, ()) is not None and _describes(original, modules, left):
        return dict(original)
    eights = {name: s for name, s in modules.items() if s.type != "fp4"} or dict(modules)
    blocks = Counter((s.rows, s.group) for s in eights.values())
    block = blocks.most_common(1)[0][0] if blocks else BLOCK
    powers = any(s.scale_grid is not None for s in eights.values())
    kept = {k: v for k, v in (original or {}).items() if k not in ("modules_to_not_convert", "ignored_layers")}
    made = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        **kept,
        "quant_method": "mxfp8" if eights and all(s.type == "mxfp8" for s in eights.values()) else "fp8",
        "weight_block_size": None if block[0] is None or block[1] is None else list(block),
        "modules_to_not_convert": left,
    }
    made.pop("scale_fmt", None)
    if powers:
        made["scale_fmt"] = "ue8m0"
    if any(s.type == "fp4" for s in modules.values()):
        made["expert_dtype"] = "fp4"
    return made


def activations(config: Mapping[str, Any]) -> Activations:
    """Static ones have a scale for the tensor, dynamic ones for the columns of a block, or a token."""
    if str(config.get("quant_method")).lower() == "mxfp8":
        return Activations("mxfp8", True, "group")
    if str(config.get("activation_scheme", "dynamic")).lower() == "static":
        return Activations("fp8", False)
    return Activations("fp8", True, "token" if _block_size(config) is None else "group")


def with_activations(config: Mapping[str, Any], activations: Activations | None, cache: bool) -> dict[str, Any] | None:
    """The config with its scheme; None for activations of another kind, and for static ones beside blocks, which are always dynamic."""
    mine = "mxfp8" if config["quant_method"] == "mxfp8" else "fp8"
    if activations is None:
        return dict(config)
    if activations.kind != mine or (not activations.dynamic and config["weight_block_size"] is not None):
        return None
    return {**config, "activation_scheme": "dynamic" if activations.dynamic else "static"}
def harmonize(modules: Mapping[str, Storage]) -> dict[str, Storage]:
    """Storages of one checkpoint on one block, since a config says one: the largest that all blocks are made of; FP4 keeps its own.

    ``Unsupported('fp8-mixed')`` where scales that are exponents would have to be cut.
    """
    eights = {name: s for name, s in modules.items() if s.type != "fp4"}
    if len({(s.rows, s.group) for s in eights.values()}) < 2:
        return dict(modules)
    rows = gcd(*(s.rows for s in eights.values() if s.rows is not None)) or None
    group = gcd(*(s.group for s in eights.values() if s.group is not None)) or None
    if any(s.scale_grid is not None and (s.rows, s.group) != (rows, group) for s in eights.values()):
        text = f"exponents for blocks of other sizes stand beside scales for blocks of {rows} x {group}, and a config says one block"
        raise Unsupported("fp8-mixed", text, hint="name a type for all weights: fp8:fp8 or fp8:mxfp8")
    return {**modules, **{name: _on_block(storage, rows, group) for name, storage in eights.items()}}


def _on_block(storage: Storage, rows: int | None, group: int | None) -> Storage:
    small = storage.scale_grid if isinstance(storage.scale_grid, Float) else None
    bits = _bits(Float("e4m3fn"), rows, group, small)
    return replace(storage, rows=rows, group=group, bits_per_weight=bits, options={**storage.options, "rank": 2})


def _describes(config: Mapping[str, Any], modules: Mapping[str, Storage], left: list[str]) -> bool:
    block = _block_size(config)
    for storage in modules.values():
        tile = None if storage.rows is None or storage.group is None else (storage.rows, storage.group)
        if tile != block and not (storage.type == "fp4" and tile == MX_BLOCK):
            return False
        powers = str(config.get("scale_fmt")) == "ue8m0"
        if config.get("scale_fmt") is not None and powers != (storage.scale_grid is not None):
            return False
    listed = config.get("modules_to_not_convert") or config.get("ignored_layers")
    if not isinstance(listed, list):
        return True  # what stays dense is left to whoever loads it
    said = {name for name in left if _is_skipped(name, listed)}
    return len(said) == len(left) and not any(_is_skipped(name, listed) for name in modules)


def _is_skipped(name: str, listed: Iterable[Any]) -> bool:
    """transformers' ``should_convert_module``: an entry from the start to a dot, as a pattern or literally, or the end of the name."""
    for entry in listed:
        text = str(entry).removesuffix(".weight")
        if name == text or name.startswith(text + ".") or name.endswith(text):
            return True
        try:
            if re.match(rf"(?:{text})(?:(?<=\.)|(?=\.|$))", name):
                return True
        except re.error:
            continue
    return False
