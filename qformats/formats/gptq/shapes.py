"""What a GPTQ module's headers say: sizes, width, groups; every check that needs no data. Torch-free.

N is the number of columns of ``qweight`` and ``scales``. K is the length of ``g_idx`` where there is one; else ``qweight`` rows times
32 / b, and where the last word is only partly used, no more than the groups cover (G * group_size). The width b is the one for which
both packed sides have the right number of words, ceil(K * b / 32) and ceil(N * b / 32); the config must agree. Marlin's tensors tell
N and K by themselves: ``B`` is (K / 16, 2 N), ``s`` (G, N).
"""

from __future__ import annotations

from dataclasses import dataclass

from qformats.bits import words_for
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats import autoround, marlin
from qformats.formats.gptq.settings import Settings, module_settings
from qformats.formats.packed import FLOATS, check_dtype, wrong_shape
from qformats.formats.protocol import Module
from qformats.scheme import Integer, ParamSpec, Scheme, Tile, whole

__all__ = ["SUFFIXES", "Geometry", "geometry", "scheme"]

SUFFIXES = frozenset({"qweight", "qzeros", "scales", "g_idx", "B", "s"})
_WORD_BITS = {"I8": 8, "I16": 16, "I32": 32, "I64": 64, "U8": 8, "U16": 16, "U32": 32, "U64": 64}
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}


@dataclass(frozen=True, slots=True)
class Geometry:
    """N x K codes of ``bits`` bits in G groups of ``group`` columns (the last may be short), in words of ``word_bits``.

    ``index``: ``"absent"``, ``"empty"`` or ``"stored"`` g_idx. ``scale``: the container's dtype of the scales.
    ``packing``: ``"stream"``, ``"planar"`` or ``"marlin"``.
    """

    n: int
    k: int
    bits: int
    group: int
    groups: int
    word_bits: int
    scale: str
    index: str
    settings: Settings
    packing: str = "stream"

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


def geometry(module: Module) -> Geometry:
    """Check every part of ``module`` against the others and the config; ``BadFile`` or ``Unsupported`` names what is wrong."""
    return module.remember("geometry", _checked)


def _checked(module: Module) -> Geometry:
    parts, settings = module.parts, module_settings(module.match.config, module.name)
    if settings.skipped:
        raise BadFile("config-disagrees", "the config leaves this module dense, but it has packed weights", tensor=module.name)
    if settings.label == "marlin":
        return _marlin(module, settings)
    _check_parts(module)
    word_bits = _word_bits(module)
    (rows, n), (groups, scale_columns) = parts["qweight"].shape, parts["scales"].shape
    if n != scale_columns:
        raise _transposed(module, word_bits) or wrong_shape(module, "scales", f"({groups}, {n})")
    length = _index_length(module)
    bits = _bits(module, settings, word_bits, length)
    k = length or _inner(module, settings, rows, groups, bits, word_bits)
    group = _group(module, settings, k, groups)
    if parts["qzeros"].shape[0] != groups:
        raise wrong_shape(module, "qzeros", f"({groups}, {words_for(n, bits, word_bits)})")
    if "bias" in parts and parts["bias"].shape != (n,):
        raise wrong_shape(module, "bias", f"({n},)")
    index = "absent" if "g_idx" not in parts else "stored" if length else "empty"
    if settings.ordered and groups > 1 and not length:
        text = f"the config says desc_act, but g_idx is {index}: which of the {groups} groups a column is in is not known"
        raise BadFile("missing-g-idx", text, tensor=module.name, hint="fetch all shards")
    planar = settings.label == "gptq_p" and bits in (3, 5, 6, 7)
    if planar and (n % 32 or k % 32):
        raise wrong_shape(module, "qweight", "32 x 32 blocks of codes, as planar packing has them")
    return Geometry(n, k, bits, group, groups, word_bits, parts["scales"].dtype, index, settings, "planar" if planar else "stream")


def _marlin(module: Module, settings: Settings) -> Geometry:
    """Marlin's ``B`` and ``s``; the files that GPTQModel loads under this label hold other tensors, and nobody writes them."""
    parts = module.parts
    if "qweight" in parts and "B" not in parts:
        text = f"labelled Marlin, but its tensors are {', '.join(sorted(parts))} and not B and s"
        raise Unsupported("gptq-marlin", text, tensor=module.name, hint="if they are plain GPTQ words, set checkpoint_format to gptq")
    for leaf in ("B", "s"):
        if leaf not in parts:
            raise BadFile(f"missing-{leaf}", f"Marlin module has no {leaf} (found {', '.join(sorted(parts))})", tensor=module.name)
        if len(parts[leaf].shape) != 2 or 0 in parts[leaf].shape:
            raise wrong_shape(module, leaf, "two dimensions, none of them 0")
    unknown = sorted(set(parts) - {"B", "s", "bias"})
    if unknown:
        raise Unsupported("unknown-part", f"Marlin module has parts of another kind: {', '.join(unknown)}", tensor=module.name)
    for leaf, allowed in (("B", ("I32", "U32")), ("s", ("F16", "BF16")), ("bias", tuple(FLOATS))):
        check_dtype(module, leaf, allowed)
    if settings.bits not in (None, 4) or settings.sym is False:
        text = f"the config says {settings.bits} bits, sym {settings.sym}; Marlin's B and s are 4 bits and symmetric"
        raise BadFile("config-disagrees", text, tensor=module.name)
    (tall, wide), (groups, n) = parts["B"].shape, parts["s"].shape
    if wide != 2 * n or n % marlin.COLUMNS:
        raise wrong_shape(module, "B", f"(K / 16, {2 * n}) with N = {n} a multiple of {marlin.COLUMNS}")
    if "bias" in parts and parts["bias"].shape != (n,):
        raise wrong_shape(module, "bias", f"({n},)")
    k = tall * marlin.ROWS
    group = _group(module, settings, k, groups, "s")
    return Geometry(n, k, 4, group, groups, 32, parts["s"].dtype, "absent", settings, "marlin")


def scheme(module: Module) -> Scheme:
    """The scheme as far as headers tell: ``group_index`` says that an act-order index may be there; a symmetric config's zero point is
    a claim that reading the tensor may refute."""
    g = geometry(module)
    tile = Tile((1, g.group))
    if g.settings.sym or g.packing == "marlin":
        zero = ParamSpec("int16", whole(g.shape), constant=float(1 << (g.bits - 1)))
    else:
        zero = ParamSpec("uint8" if g.bits < 8 else "int16", tile)
    may_permute = g.index == "stored" and g.groups > 1
    return Scheme(g.shape, Integer(g.bits), (ParamSpec(FLOATS[g.scale], tile),), zero, group_index=may_permute)


def _check_parts(module: Module) -> None:
    parts = module.parts
    for leaf in ("qweight", "scales", "qzeros"):
        if leaf not in parts:
            found = ", ".join(sorted(parts))
            raise BadFile(
                f"missing-{leaf}", f"GPTQ module has no {leaf} (found {found})", tensor=module.name, hint="a shard may be missing"
            )
        if len(parts[leaf].shape) != 2 or 0 in parts[leaf].shape:
            raise wrong_shape(module, leaf, "two dimensions, none of them 0")
    unknown = sorted(set(parts) - (SUFFIXES - {"B", "s"}) - {"bias"})
    if unknown:
        raise Unsupported("unknown-part", f"GPTQ module has parts of another kind: {', '.join(unknown)}", tensor=module.name)
    if module.name.rsplit(".", 1)[-1] in _EMBEDDINGS:
        raise Unsupported("gptq-embedding", "quantized input embeddings are stored transposed and are not read", tensor=module.name)
    for leaf, allowed in (("scales", tuple(FLOATS)), ("bias", tuple(FLOATS)), ("g_idx", ("I32", "I64"))):
        check_dtype(module, leaf, allowed)


def _transposed(module: Module, word_bits: int) -> BadFile | None:
    """The planes of another layout under a GPTQ config: AWQ GEMM packs N, AWQ GEMV has the output rows first."""
    qweight, scales = module.parts["qweight"].shape, module.parts["scales"].shape
    if any(qweight[1] == words_for(scales[1], b, word_bits) and qweight[0] % scales[0] == 0 for b in (2, 3, 4, 8)) or (
        qweight[0] == scales[0] and qweight[0] != qweight[1]
    ):
        text = f"the config says GPTQ, but qweight {tuple(qweight)} beside scales {tuple(scales)} is an AWQ layout"
        return BadFile("config-disagrees", text, tensor=module.name, hint="check quant_method in config.json")
    return None


def _word_bits(module: Module) -> int:
    dtype = module.parts["qweight"].dtype
    if dtype not in _WORD_BITS:
        raise BadFile("wrong-dtype", f"qweight is {dtype}, expected I32 (or I8, I16, I64)", tensor=f"{module.name}.qweight")
    if module.parts["qzeros"].dtype != dtype:
        raise BadFile("wrong-dtype", f"qzeros is {module.parts['qzeros'].dtype}, expected {dtype}", tensor=f"{module.name}.qzeros")
    return _WORD_BITS[dtype]


def _index_length(module: Module) -> int:
    part: RawTensor | None = module.parts.get("g_idx")
    if part is None:
        return 0
    if len(part.shape) != 1:
        raise wrong_shape(module, "g_idx", "one dimension")
    return int(part.shape[0])


def _bits(module: Module, settings: Settings, word_bits: int, length: int) -> int:
    """The width: the config's if it fits the shapes, else the shapes' only one where a rule of the config names it or nothing is said."""
    (rows, n), columns = module.parts["qweight"].shape, module.parts["qzeros"].shape[1]
    fits = [b for b in range(2, 9) if words_for(n, b, word_bits) == columns and (not length or words_for(length, b, word_bits) == rows)]
    said = settings.bits
    if said in fits:
        bits = said
    elif len(fits) == 1 and (said is None or fits[0] in settings.rule_bits):
        bits = fits[0]
    elif fits and said is not None:
        raise BadFile("bits-disagree", f"the config says {said} bits, the shapes say {' or '.join(map(str, fits))}", tensor=module.name)
    else:
        found = f"qweight {(rows, n)}, qzeros {tuple(module.parts['qzeros'].shape)}" + (f", g_idx ({length},)" if length else "")
        raise BadFile("wrong-shape", f"{found} fit no width{f' (config: {said} bits)' if said else ''}", tensor=module.name)
    if bits in (5, 6, 7) and settings.label != "gptq_p" and not _by_autoround(module):
        text = f"{bits}-bit weights labelled {settings.label} are read only from AutoRound (GPTQModel labels its own gptq_p)"
        raise Unsupported("gptq-width", text, tensor=module.name)
    if word_bits != 32 and bits in (3, 5, 6, 7):
        raise Unsupported("gptq-words", f"{bits}-bit weights in {word_bits}-bit words are not read", tensor=module.name)
    return bits


def _by_autoround(module: Module) -> bool:
    """AutoRound alone writes 5, 6 and 7 bits as a stream, in its own dialect and in its plain GPTQ export."""
    return module.match.dialect == autoround.DIALECT or module.match.config.get("provider") == autoround.DIALECT


def _inner(module: Module, settings: Settings, rows: int, groups: int, bits: int, word_bits: int) -> int:
    """K without g_idx: what the words hold, cut to what the groups cover if the last word allows it."""
    most = rows * word_bits // bits
    least = (rows - 1) * word_bits // bits + 1
    covered = groups * settings.group if settings.group and settings.group > 0 else most
    return covered if least <= covered < most else most


def _group(module: Module, settings: Settings, k: int, groups: int, leaf: str = "scales") -> int:
    said = settings.group
    if said is None:
        if k % groups:
            raise BadFile("group-size", f"the config has no group_size and {groups} groups do not divide {k}", tensor=module.name)
        return k // groups
    group = k if said == -1 else min(said, k)
    if -(-k // group) != groups:
        text = f"the config says groups of {said}, that is {-(-k // group)} for {k} inputs; {leaf} has {groups} rows"
        raise BadFile("group-size", text, tensor=f"{module.name}.{leaf}")
    return group
