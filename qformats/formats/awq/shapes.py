"""What an AWQ module's headers say: layout, sizes, width, groups; every check that needs no weights. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from qformats.bits import words_for
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import autoround, marlin
from qformats.formats.awq.settings import FAST, Settings, module_settings
from qformats.formats.packed import FLOATS, check_dtype, made_by, wrong_shape
from qformats.formats.protocol import Module

__all__ = ["SUFFIXES", "Geometry", "geometry", "zeros_width"]

SUFFIXES = frozenset({"qweight", "qzeros", "scales", "scaled_zeros"})


@dataclass(frozen=True, slots=True)
class Geometry:
    """``order``: ``"gemm"`` (eight interleaved along N), ``"natural"`` (plain stream along N), ``"gemv"`` (along K), ``"fast"`` (16-bit
    words and float zero points), ``"marlin"`` (tiles, no zero points)."""

    n: int
    k: int
    bits: int
    group: int
    scale: str
    order: str
    has_zeros: bool
    settings: Settings
    zeros_leaf: str = "qzeros"

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


def geometry(module: Module) -> Geometry:
    """Check every part of ``module`` against the others and the config; ``BadFile`` or ``Unsupported`` names what is wrong."""
    return module.remember("geometry", _checked)


def _checked(module: Module) -> Geometry:
    parts, said = module.parts, module_settings(module.match.config, module.name)
    kind = "fast" if said.version in FAST or "scaled_zeros" in parts else said.version
    _check_parts(module, said, kind)
    asked = module.match.options.get("zero-points")
    if asked is not None and (kind != "fast" or asked not in ("float", "integer")):
        text = f"zero-points={asked} says nothing of AWQ {kind if kind != 'fast' else said.version} weights"
        raise UsageError("source-option", text, hint="GEMV_FAST and llm-awq know zero-points=float and zero-points=integer")
    g = {"gemv": _gemv_geometry, "fast": _fast_geometry, "marlin": _marlin_geometry}.get(kind, _gemm_geometry)(module, said)
    if "bias" in parts and parts["bias"].shape != (g.n,):
        raise wrong_shape(module, "bias", f"({g.n},)")
    return g


def _check_parts(module: Module, said: Settings, kind: str) -> None:
    parts = module.parts
    zeros = "scaled_zeros" if "scaled_zeros" in parts else "qzeros"
    needed = ["qweight", "scales"] + ([zeros] if kind == "fast" or (said.zero_point and kind != "marlin") else [])
    known = {"qweight", "scales", "bias"} | ({zeros} if kind != "marlin" else set())
    for leaf in needed:
        if leaf not in parts:
            text = f"AWQ module has no {leaf} (found {', '.join(sorted(parts))})"
            raise BadFile(f"missing-{leaf}", text, tensor=module.name, hint="a shard may be missing")
    unknown = sorted(set(parts) - known)
    if unknown:
        raise Unsupported("unknown-part", f"AWQ module has parts of another kind: {', '.join(unknown)}", tensor=module.name)
    for leaf in ("qweight", "scales", zeros):
        if leaf in parts and (len(parts[leaf].shape) != 2 or 0 in parts[leaf].shape):
            raise wrong_shape(module, leaf, "two dimensions, none of them 0")
    if parts["qweight"].dtype in ("I16", "U16") and kind != "fast":
        text = f"the config says AWQ {said.version}, but 16-bit words are the GEMV_FAST layout"
        raise BadFile("config-disagrees", text, tensor=module.name, hint="check version in config.json")
    words = ("I16", "U16") if kind == "fast" else ("I32", "U32")
    floats = tuple(FLOATS)
    for leaf, allowed in (("qweight", words), (zeros, floats if kind == "fast" else words), ("scales", floats), ("bias", floats)):
        check_dtype(module, leaf, allowed)


def _group(module: Module, said: Settings, k: int, groups: int | None) -> int:
    """Columns a group: the config's, which must divide K and agree with the ``groups`` that the tensors have."""
    if said.group is None and groups is not None and k % groups == 0:
        return k // groups
    if said.group is None:
        raise BadFile("group-size", "the config has no group_size and the shapes do not tell it", tensor=module.name)
    group = k if said.group == -1 or said.group > k else said.group
    if k % group or (groups is not None and k // group != groups):
        text = (
            f"the config says groups of {said.group}, but {k} inputs have {groups if groups is not None else 'a broken number of'} groups"
        )
        raise BadFile("group-size", text, tensor=f"{module.name}.scales")
    return group


def _gemm_geometry(module: Module, said: Settings) -> Geometry:
    (k, columns), (groups, n) = module.parts["qweight"].shape, module.parts["scales"].shape
    fits = [b for b in range(2, 9) if words_for(n, b) == columns]
    if not fits or k < groups:
        raise _other_layout(module, said, k, columns, groups, n)
    bits = said.bits if said.bits is not None else fits[0]
    if bits not in fits:
        raise BadFile("bits-disagree", f"the config says {bits} bits, the shapes say {' or '.join(map(str, fits))}", tensor=module.name)
    order = _order(module, bits)
    if order == "gemm" and (n % 8 or n * bits % 32):
        raise wrong_shape(module, "scales", f"a multiple of {8 if bits == 4 else 32} columns")
    group = _group(module, said, k, groups)
    has_zeros = "qzeros" in module.parts
    if has_zeros and module.parts["qzeros"].shape != (groups, columns):
        raise wrong_shape(module, "qzeros", f"({groups}, {columns})")
    return Geometry(n, k, bits, group, module.parts["scales"].dtype, order, has_zeros, said)


def _order(module: Module, bits: int) -> str:
    if bits == 4:
        return "gemm"
    config = module.match.config
    by_autoround = module.match.dialect == autoround.DIALECT or "autoround_version" in config
    if by_autoround and bits in (5, 6, 7):
        return "gemm"
    if made_by(config, "gptqmodel"):
        return "natural"
    text = f"{bits}-bit AWQ weights of an unknown writer: the order of the columns inside a word is not known"
    raise Unsupported("awq-order", text, tensor=module.name)


def _gemv_geometry(module: Module, said: Settings) -> Geometry:
    (n, columns), (rows, width) = module.parts["qweight"].shape, module.parts["scales"].shape
    if said.bits not in (None, 4):
        raise Unsupported("awq-gemv-bits", f"{said.bits}-bit GEMV weights are not known", tensor=module.name)
    if n != rows:
        raise _other_layout(module, said, n, columns, rows, width)
    k = columns * 8
    group = _group(module, said, k, None)
    words = zeros_width(k, group)
    if width != words * 8:
        raise wrong_shape(module, "scales", f"({n}, {words * 8})")
    has_zeros = "qzeros" in module.parts
    if has_zeros and module.parts["qzeros"].shape != (n, words):
        raise wrong_shape(module, "qzeros", f"({n}, {words})")
    return Geometry(n, k, 4, group, module.parts["scales"].dtype, "gemv", has_zeros, said)


def _other_layout(module: Module, said: Settings, first: int, columns: int, groups: int, n: int) -> BadFile:
    """The planes fit another layout than the config names, or none."""
    found = "GPTQ" if columns == n else "AWQ GEMV" if first == groups else "AWQ GEMM" if columns * 8 == n else None
    if found is None or found == f"AWQ {said.version.upper()}":
        return wrong_shape(module, "qweight", f"a match for scales ({groups}, {n})")
    text = f"the config says AWQ {said.version}, but qweight {(first, columns)} beside scales {(groups, n)} is the {found} layout"
    return BadFile("config-disagrees", text, tensor=module.name, hint="check quant_method and version in config.json")


def zeros_width(k: int, group: int) -> int:
    """Words of a GEMV row of zero points (autoawq 0.2.9 ``calculate_zeros_width``)."""
    multiple = 1 if group >= 128 else 2 if group >= 64 else 4 if group >= 32 else 8
    return -(-words_for(k // group, 4) // multiple) * multiple


def _fast_geometry(module: Module, said: Settings) -> Geometry:
    """16-bit words (N / 4, K), scales and float zero points (8 Zw, N)."""
    (quads, k), (rows, n) = module.parts["qweight"].shape, module.parts["scales"].shape
    leaf = "scaled_zeros" if "scaled_zeros" in module.parts else "qzeros"
    if said.bits not in (None, 4):
        raise Unsupported("awq-fast-bits", f"{said.bits}-bit GEMV_FAST weights are not known", tensor=module.name)
    if n != 4 * quads or k % 64:
        raise wrong_shape(module, "qweight", f"({n} / 4, K) with K a multiple of 64")
    zeros = module.parts[leaf]
    if zeros.shape != (rows, n):
        raise wrong_shape(module, leaf, f"({rows}, {n})")
    if zeros.dtype != module.parts["scales"].dtype:
        found = f"{leaf} is {zeros.dtype}, expected {module.parts['scales'].dtype} like the scales"
        raise BadFile("wrong-dtype", found, tensor=f"{module.name}.{leaf}")
    group = _fast_group(module, k) if said.group is None else _group(module, said, k, None)
    if rows != zeros_width(k, group) * 8:
        raise wrong_shape(module, "scales", f"({zeros_width(k, group) * 8}, {n}) for groups of {group}")
    return Geometry(n, k, 4, group, module.parts["scales"].dtype, "fast", True, said, leaf)


def _fast_group(module: Module, k: int) -> int:
    """The group size of a file without a config: the one whose padded height and last used row fit the scales."""
    scales = module.parts["scales"].array()
    used = max((row + 1 for row in range(len(scales)) if scales[row].any()), default=0)
    fits = [g for g in (16, 32, 64, 128, k) if k % g == 0 and zeros_width(k, g) * 8 == len(scales) and k // g == used]
    if not fits:
        text = f"the config has no group_size, and {used} used rows of scales for {k} inputs fit none"
        raise BadFile("group-size", text, tensor=module.name)
    return fits[0]


def _marlin_geometry(module: Module, said: Settings) -> Geometry:
    """Tiles (K / 16, 2 N) and permuted scales (G, N), symmetric."""
    (tall, wide), (groups, n) = module.parts["qweight"].shape, module.parts["scales"].shape
    if said.bits not in (None, 4):
        raise Unsupported("awq-marlin-bits", f"{said.bits}-bit Marlin weights are not known", tensor=module.name)
    if wide != 2 * n or n % marlin.COLUMNS:
        raise wrong_shape(module, "qweight", f"(K / 16, {2 * n}) with N = {n} a multiple of {marlin.COLUMNS}")
    group = _group(module, said, tall * marlin.ROWS, groups)
    return Geometry(n, tall * marlin.ROWS, 4, group, module.parts["scales"].dtype, "marlin", False, said)
