"""Low-rank adapters, PEFT directory ↔ GGUF file, row for row: W + scale · B A stays the same matrix.

| PEFT (``adapter_model.safetensors``)                      | GGUF                                           |
|-----------------------------------------------------------|------------------------------------------------|
| ``base_model.model.<module>.lora_A.weight`` (r, K)        | ``<tensor>.weight.lora_a`` (r, K)              |
| ``….lora_B.weight`` (N, r)                                | ``….lora_b`` (N, r), rows ordered as W's       |
| ``….lora_embedding_A`` (r, V), ``….lora_embedding_B`` (H, r) | ``token_embd.weight.lora_a`` (V, r), ``lora_b`` (H, r) |
| one pair for each expert                                  | (E, r, K) and (E, N, r)                        |
| scale lora_alpha / r, by sqrt(r) with ``use_rslora``, by module with ``alpha_pattern`` | ``adapter.lora.alpha`` / r |

Sources: llama.cpp v0.5.0, ``src/llama-adapter.cpp`` and ``convert_lora_to_gguf.py``; PEFT 0.21, ``tuners/lora/layer.py`` and
``utils/save_and_load.py``. A scale of a module that the file's one alpha does not give is multiplied into ``lora_b``.
The base model says which rows are permuted: its ``config.json`` or a GGUF of it is enough.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats import architectures
from qformats.architectures.places import Place, Places
from qformats.architectures.rows import inverse_order, row_order
from qformats.checkpoint import fetched, fetched_config, fetched_file, open_checkpoint
from qformats.containers.atomic import OutputDirectory, OutputFile, check_not_same
from qformats.containers.gguf import GGUFFile, Metadata, TensorInfo, Value, layout_gguf, open_gguf
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import SafetensorsFile, layout_safetensors, open_safetensors, parse_json
from qformats.containers.torch_zip import flatten, open_torch_zip
from qformats.errors import BadFile, Unsafe, Unsupported
from qformats.formats.dense import FLOAT_DTYPES, read_float, write_float

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.architectures.binding import Binding

__all__ = [
    "CONFIG", "FLOATS", "PREFIX", "WEIGHTS", "WRONG_BASE", "LoraResult", "gguf_to_lora", "lora_to_gguf", "pattern_value", "read_json",
]  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what PEFT wrote before safetensors
PREFIX = "base_model.model."
RECORD = "qformats.adapter"
FLOATS = ("F32", "F16", "BF16")
_LEAF = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?")
_COPY = ".base_layer.weight"  # PEFT saves the base model's own embedding beside an adapter of it
_MAX_CONFIG_NBYTES = 16 << 20
WRONG_BASE = "check that --base is this adapter's model"
# fields of adapter_config.json that change the arithmetic in a way a GGUF cannot say, with the values that do not
_PLAIN = {
    "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None), "modules_to_save": (None, []),
    "target_parameters": (None, []), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None), "use_bdlora": (False, None), "arrow_config": (None,), "peft_type": ("LORA",),
}  # fmt: skip


@dataclass(frozen=True)
class LoraResult:
    """``pairs`` low-rank pairs of ranks ``ranks``; ``lossless`` unless numbers were rounded, of which ``notes`` tell."""

    pairs: int
    ranks: tuple[int, ...]
    alpha: float
    nbytes: int
    lossless: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "pairs": self.pairs, "ranks": list(self.ranks), "alpha": self.alpha, "nbytes": self.nbytes,
            "kind": "exact" if self.lossless else "dequantized", "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """One module's factors as stored; ``factor`` is what ``lora_b`` must be multiplied by in the target."""

    place: Place
    a: RawTensor
    b: RawTensor
    factor: float = 1.0

    @property
    def embedding(self) -> bool:
        return self.place.rule.kind == "embedding"


def _base(base: str | Path) -> Binding:
    """The architecture of the base model, from its ``config.json`` (weights are not needed) or a GGUF."""
    path = Path(fetched_config(base))
    beside = path / "config.json"
    if path.is_dir() and beside.is_file():
        return architectures.find(config := read_json(beside)).bind(config)
    with open_checkpoint(base if path == Path(base) else path) as checkpoint:
        return checkpoint.binding


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_NBYTES:
            raise BadFile("side-file-size", f"is larger than {_MAX_CONFIG_NBYTES} bytes", path=path)
        raw = path.read_bytes()
    except OSError as error:
        raise BadFile("not-found", f"cannot be read: {error.strerror}", path=path, hint="check the path") from None
    value = parse_json(raw, "json", str(path))
    if not isinstance(value, dict):
        raise BadFile("json", "is not a JSON object", path=path)
    return value


# ---------------------------------------------------------------- PEFT to GGUF


def lora_to_gguf(
    adapter: str | Path,
    base: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> LoraResult:
    """Write the PEFT adapter in directory ``adapter`` as a GGUF for the model ``base``; floats keep their dtype unless one is named.
    ``allow_pickle``: read an ``adapter_model.bin`` too, as data.

    Raises ``Unsupported('lora-config')`` for kinds of adapter that a GGUF cannot hold, ``Unsupported('lora-tensor')`` for tensors
    that are no low-rank pair, ``BadFile('lora-pair')`` and ``BadFile('tensor-shape')`` where they do not fit the base model.
    """
    adapter, destination = fetched(adapter), Path(destination)
    config, places = _peft_config(adapter), Places(_base(base))
    weights = _adapter_weights(adapter, allow_pickle)
    check_not_same(weights.name, destination)
    alpha, pairs, notes = _scaled(config, _pairs(weights.tensors, places))
    targets = _by_target(pairs)
    infos = [info for name, group in targets.items() for info in _infos(name, group, places, dtype)]
    text = (adapter / CONFIG).read_text(encoding="utf-8")
    layout = layout_gguf(_adapter_metadata(places.binding, alpha, config, text, weights.metadata, pairs), infos)
    kinds = {info.name: info.dtype for info in infos}
    with OutputFile(destination, layout.size, overwrite) as out:
        out.pwrite(0, layout.header)
        for target, group in targets.items():
            for name, values in _to_gguf(target, group, places).items():
                out.pwrite(layout.offsets[name], write_float(values, kinds[name], name=name).tobytes())
        out.commit()
    rounded = [p for p in pairs if not _keeps(p, dtype)]
    notes += [f"{name} is left out: it is the base model's own weight" for name in weights.tensors if name.endswith(_COPY)]
    notes += [f"rounded once to {(dtype or 'F32').upper()}: {len(rounded)} pairs"] if rounded else []
    ranks = tuple(sorted({p.b.shape[-1] for p in pairs}))
    return LoraResult(len(pairs), ranks, alpha, layout.size, not rounded, tuple(notes))


def _peft_config(adapter: Path) -> dict[str, Any]:
    config = read_json(adapter / CONFIG)
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise Unsupported(
                "lora-config", f"adapter config field {name!r} is {config[name]!r}; a GGUF adapter only holds plain low-rank pairs",
                path=adapter / CONFIG, hint="merge the adapter into the base model and convert that",
            )  # fmt: skip
    if not isinstance(config.get("lora_alpha"), int | float) or not config["lora_alpha"]:
        raise BadFile("lora-config", f"lora_alpha is {config.get('lora_alpha')!r}, expected a number other than 0", path=adapter / CONFIG)
    return config


def _adapter_weights(adapter: Path, allow_pickle: bool) -> SafetensorsFile:
    """The tensors of an adapter directory; those of an ``adapter_model.bin`` only where that is allowed."""
    path = adapter / PICKLED
    if (adapter / WEIGHTS).is_file() or not path.is_file():
        return open_safetensors(adapter / WEIGHTS)
    if not allow_pickle:
        hint = "save it as safetensors, or add --allow-pickle: it is then read without running anything"
        raise Unsafe("pickle", "is a pickle, which can run code when it is loaded", path=adapter, hint=hint)
    found = open_torch_zip(path)
    return SafetensorsFile(str(path), {}, flatten(found.value, str(path)), found.source.size)


def _pairs(tensors: Mapping[str, RawTensor], places: Places) -> list[_Pair]:
    sides: dict[str, dict[str, RawTensor]] = {}
    for name, raw in tensors.items():
        if name.endswith(_COPY):
            continue
        match = _LEAF.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match is None:
            hint = "merge the adapter into the base model and convert that"
            raise Unsupported("lora-tensor", "is not half of a low-rank pair", tensor=name, hint=hint)
        sides.setdefault(match["module"].removeprefix(PREFIX), {})[match["side"]] = raw
    if not sides:
        raise BadFile("lora-pair", "the adapter holds no low-rank pair")
    found = {}
    for module, both in sides.items():
        place = places.find(module)
        if place is None or place.rule.kind == "norm":
            raise BadFile("unmapped-tensor", "the base model has no such layer", tensor=module, hint=WRONG_BASE)
        if place.rule.kind in ("output", "embedding") and places.binding.tied:
            why = "this base model uses one matrix as embedding and output, and llama.cpp cannot adapt that"
            raise Unsupported("lora-tied", why, tensor=module, hint="merge the adapter into the base model and convert that")
        if len(both) != 2:
            raise BadFile("lora-pair", f"has lora_{next(iter(both))} alone", tensor=module)
        found[place.hf] = _checked(_Pair(place, both["A"], both["B"]))
    return [found[name] for name in places.by_hf if name in found]


def _checked(pair: _Pair) -> _Pair:
    n, k = pair.place.shape if len(pair.place.shape) == 2 else (1, *pair.place.shape)
    if pair.embedding and pair.a.shape[-1:] != (n,) and pair.place.rule.resizable:
        n = pair.a.shape[-1]
    rank = pair.a.shape[0]
    wanted = ((rank, n), (k, rank)) if pair.embedding else ((rank, k), (n, rank))
    if (pair.a.shape, pair.b.shape) != wanted:
        raise BadFile("tensor-shape", f"A {pair.a.shape} and B {pair.b.shape}, the base model means {wanted}", tensor=pair.place.hf)
    for raw in (pair.a, pair.b):
        if raw.dtype not in FLOATS:
            raise Unsupported("not-float", f"is {raw.dtype}", tensor=raw.name, hint=f"expected one of {', '.join(FLOATS)}")
    return pair


def pattern_value(patterns: object, module: str, default: float) -> float:
    """PEFT's lookup: the first key that is the end of the module's name, as a regular expression."""
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{key.removeprefix('^')})", module):
                return float(value)
        except (re.error, TypeError, ValueError):
            raise BadFile("lora-config", f"pattern {key!r}: {value!r} is not REGEX: NUMBER") from None
    return default


def _scaled(config: Mapping[str, Any], pairs: Sequence[_Pair]) -> tuple[float, list[_Pair], list[str]]:
    """The file's one alpha, and what each ``lora_b`` must be multiplied by for its own scale: 1 for most."""
    own = []
    for pair in pairs:
        rank = pair.b.shape[-1]
        alpha = pattern_value(config.get("alpha_pattern"), pair.place.hf, float(config["lora_alpha"]))
        own.append(alpha * rank**0.5 if config.get("use_rslora") else alpha)
    common = Counter(own).most_common(1)[0][0]
    factors = [alpha / common for alpha in own]
    notes = []
    if config.get("use_rslora"):
        notes.append("the scale alpha / sqrt(r) is stored as alpha in float32")
    if any(f != 1.0 for f in factors):
        notes.append(f"scales of their own, multiplied into lora_b: {sum(f != 1.0 for f in factors)} pairs")
    return common, [_Pair(p.place, p.a, p.b, f) for p, f in zip(pairs, factors, strict=True)], notes


def _keeps(pair: _Pair, dtype: str | None) -> bool:
    """Whether the stored numbers are the adapter's own: same dtype or a wider one, no factor but a power of two."""
    from math import frexp

    kept = all(dtype is None or dtype.upper() in (raw.dtype, "F32") for raw in (pair.a, pair.b))
    return kept and abs(frexp(pair.factor)[0]) == 0.5


def _by_target(pairs: Sequence[_Pair]) -> dict[str, list[_Pair]]:
    found: dict[str, list[_Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.place.gguf, []).append(pair)
    return found


def _infos(name: str, pairs: Sequence[_Pair], places: Places, dtype: str | None) -> list[TensorInfo]:
    """Dtypes and shapes of the two tensors ``_to_gguf`` makes: ``lora_b`` is float32 where a factor goes into it."""
    place, rank = pairs[0].place, pairs[0].b.shape[-1]
    if any(pair.b.shape[-1] != rank for pair in pairs):
        raise Unsupported("lora-rank", "its experts have adapters of different ranks", tensor=name, hint="a GGUF stacks them")
    n, k = place.shape if len(place.shape) == 2 else (1, *place.shape)
    lead = () if place.expert is None else (len(places.by_gguf[name]),)
    a, b = ((min(n, pairs[0].a.shape[-1]), rank), (k, rank)) if pairs[0].embedding else ((*lead, rank, k), (*lead, n, rank))
    kinds_a, kinds_b = {pair.a.dtype for pair in pairs}, {"F32" if pair.factor != 1.0 else pair.b.dtype for pair in pairs}
    own = (kinds.pop() if len(kinds) == 1 else "F32" for kinds in (kinds_a, kinds_b))
    kind_a, kind_b = (dtype.upper(),) * 2 if dtype else own
    return [TensorInfo(f"{name}.weight.lora_a", kind_a, a), TensorInfo(f"{name}.weight.lora_b", kind_b, b)]


def _to_gguf(name: str, pairs: Sequence[_Pair], places: Places) -> dict[str, Tensor]:
    """``lora_a`` and ``lora_b`` of one GGUF tensor, from one pair or one for each expert."""
    import torch

    made = [_one_to_gguf(pair, places) for pair in pairs]
    a, b = made[0]
    if pairs[0].place.expert is not None:
        by_expert = {pair.place.expert: both for pair, both in zip(pairs, made, strict=True)}
        none = torch.zeros_like(a), torch.zeros_like(b)  # an expert without an adapter has the pair zero
        stacks = [by_expert.get(expert, none) for expert in range(len(places.by_gguf[name]))]
        a, b = (torch.stack([both[side].to(torch.float32) for both in stacks]) for side in (0, 1))
    return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}


def _one_to_gguf(pair: _Pair, places: Places) -> tuple[Tensor, Tensor]:
    import torch

    a, b = read_float(pair.a), read_float(pair.b)
    if pair.factor != 1.0:
        b = (b.to(torch.float64) * pair.factor).to(torch.float32)
    if pair.embedding:
        return a.T[: pair.place.shape[0]].contiguous(), b
    order = _order(pair.place, places)
    return a, b if order is None else b[torch.from_numpy(order)]


def _order(place: Place, places: Places) -> Any:
    return row_order(place.rule.order, places.binding.dims)[0] if place.rule.order else None


def _adapter_metadata(
    binding: Binding, alpha: float, config: Mapping[str, Any], text: str, header: Mapping[str, str], pairs: Sequence[_Pair]
) -> Metadata:
    metadata: Metadata = {
        "general.architecture": Value("str", binding.architecture.gguf),
        "general.type": Value("str", "adapter"),
        "adapter.type": Value("str", "lora"),
        "adapter.lora.alpha": Value("f32", alpha),
    }
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        metadata["general.base_model.count"] = Value("u32", 1)
        metadata["general.base_model.0.name"] = Value("str", base.partition("/")[2])
        metadata["general.base_model.0.organization"] = Value("str", base.partition("/")[0])
        metadata["general.base_model.0.repo_url"] = Value("str", f"https://huggingface.co/{base}")
    tokens = config.get("alora_invocation_tokens")
    if tokens:
        metadata["adapter.alora.invocation_tokens"] = Value("[u32]", tuple(int(t) for t in tokens))
    names = {pair.place.hf: [pair.a.name, pair.b.name] for pair in pairs}
    usual = all(names[pair.place.hf] == list(_peft_names(pair.place.hf, pair.embedding)) for pair in pairs)
    record = {"version": 1, "config": text, "header": dict(header), "folded": any(p.factor != 1.0 for p in pairs)}
    metadata[RECORD] = Value("str", json.dumps({**record, **({} if usual else {"names": names})}, separators=(",", ":"), sort_keys=True))
    return metadata


def _peft_names(module: str, embedding: bool) -> tuple[str, str]:
    """The names PEFT gives to the halves of ``module``'s pair."""
    kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
    return f"{PREFIX}{module}.{kind}A{end}", f"{PREFIX}{module}.{kind}B{end}"


# ---------------------------------------------------------------- GGUF to PEFT


def gguf_to_lora(source: str | Path, base: str | Path, destination: str | Path, *, overwrite: bool = False) -> LoraResult:
    """Write the GGUF adapter ``source`` as a PEFT directory for the model ``base``; blocks become float32.

    One made by ``lora_to_gguf`` comes back with its own configuration and names. Raises ``BadFile('lora-metadata')`` for a GGUF
    that is no adapter or one of another architecture, and what ``lora_to_gguf`` raises for pairs that do not fit.
    """
    source, destination = fetched_file(source), Path(destination)
    file, places = open_gguf(source), Places(_base(base))
    check_not_same(source, destination)
    alpha, record = _read_metadata(file, places.binding)
    pairs = _gguf_pairs(file, places)
    made = {}
    for name, (a, b) in pairs.items():
        of = places.by_gguf[name]
        made.update({place.hf: _Half(place, *_shapes(place, len(of), a, b)) for place in of})
    config, names, header = _restored(record, made, alpha, places)
    nbytes = _write_peft(destination, config, names, header, pairs, made, places, overwrite)
    notes = ["PEFT finds the modules of experts only in a model where each expert has layers of its own"]
    experts = any(half.place.expert is not None for half in made.values())
    return LoraResult(len(made), tuple(sorted({half.rank for half in made.values()})), alpha, nbytes, True, tuple(notes if experts else ()))


def _read_metadata(file: GGUFFile, binding: Binding) -> tuple[float, dict[str, Any]]:
    def text(key: str) -> object:
        value = file.metadata.get(key)
        return None if value is None else value.value

    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", binding.architecture.gguf)):
        if text(key) != wanted:
            hint = WRONG_BASE if key == "general.architecture" else "give a GGUF that holds a LoRA adapter"
            raise BadFile("lora-metadata", f"{key} is {text(key)!r}, expected {wanted!r}", path=file.name, hint=hint)
    alpha = text("adapter.lora.alpha")
    record = text(RECORD)
    try:
        kept = json.loads(record) if isinstance(record, str) else {}
    except (ValueError, RecursionError):
        kept = {}
    return (float(alpha) if isinstance(alpha, int | float) else 0.0), kept if isinstance(kept, dict) else {}


def _gguf_pairs(file: GGUFFile, places: Places) -> dict[str, tuple[RawTensor, RawTensor]]:
    sides: dict[str, dict[str, RawTensor]] = {}
    for name, raw in file.tensors.items():
        module, _, leaf = name.rpartition(".weight.lora_")
        if leaf not in ("a", "b") or module not in places.by_gguf:
            why = "is not half of a low-rank pair" if leaf not in ("a", "b") else "the base model has no such tensor"
            raise BadFile("unmapped-tensor", why, path=file.name, tensor=name, hint=WRONG_BASE)
        sides.setdefault(module, {})[leaf] = raw
    for module, both in sides.items():
        if len(both) != 2:
            raise BadFile("lora-pair", f"has lora_{next(iter(both))} alone", path=file.name, tensor=module)
    if not sides:
        raise BadFile("lora-pair", "the adapter holds no low-rank pair", path=file.name)
    return {name: (sides[name]["a"], sides[name]["b"]) for name in places.by_gguf if name in sides}


def _floats(raw: RawTensor) -> Tensor:
    """A tensor's values in its own float dtype, or its blocks' in float32."""
    if raw.dtype in FLOAT_DTYPES:
        return read_float(raw)
    import numpy as np
    import torch

    from qformats.formats import ggml

    out = np.empty((raw.rows, raw.shape[-1]), np.float32)
    ggml.dequantize(raw.dtype, raw.row_range(0, raw.rows), out)
    return torch.from_numpy(out).reshape(raw.shape)


@dataclass(frozen=True)
class _Half:
    """What one module's pair becomes: the dtypes and shapes of A and B."""

    place: Place
    a: tuple[str, tuple[int, ...]]
    b: tuple[str, tuple[int, ...]]

    @property
    def embedding(self) -> bool:
        return self.place.rule.kind == "embedding"

    @property
    def rank(self) -> int:
        return self.b[1][-1]


def _shapes(place: Place, experts: int, a: RawTensor, b: RawTensor) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """Check a GGUF pair against the base model; dtypes and shapes of the PEFT pair."""
    n, k = place.shape if len(place.shape) == 2 else (1, *place.shape)
    embedding, rank, lead = place.rule.kind == "embedding", b.shape[-1], () if place.expert is None else (experts,)
    rows = min(n, a.shape[0]) if embedding and place.rule.resizable else n
    wanted = ((rows, rank), (k, rank)) if embedding else ((*lead, rank, k), (*lead, n, rank))
    if (a.shape, b.shape) != wanted:
        raise BadFile("tensor-shape", f"A {a.shape} and B {b.shape}, the base model means {wanted}", tensor=place.gguf)
    kind_a, kind_b = (raw.dtype if raw.dtype in FLOAT_DTYPES else "F32" for raw in (a, b))
    return (kind_a, (rank, n if embedding else k)), (kind_b, (k if embedding else n, rank))


def _to_peft(of: Sequence[Place], raw_a: RawTensor, raw_b: RawTensor, places: Places) -> dict[str, tuple[Tensor, Tensor]]:
    """One GGUF pair as the pairs of its modules."""
    import torch

    a, b, first = _floats(raw_a), _floats(raw_b), of[0]
    if first.rule.kind == "embedding":
        missing = first.shape[0] - a.shape[0]  # rows behind the vocabulary, which a GGUF leaves out
        return {first.hf: ((torch.cat((a, a.new_zeros(missing, a.shape[1]))) if missing else a).T, b)}
    order = _order(first, places)
    if first.expert is None:
        return {first.hf: (a, b if order is None else b[torch.from_numpy(inverse_order(order))])}
    return {place.hf: (a[e], b[e]) for e, place in enumerate(of)}


def _restored(
    record: Mapping[str, Any], made: Mapping[str, _Half], alpha: float, places: Places
) -> tuple[str, dict[str, tuple[str, str]], Mapping[str, str]]:
    """Configuration, tensor names and header: the adapter's own where a record has them and they still fit, else new ones."""
    names = {module: _peft_names(module, half.embedding) for module, half in made.items()}
    text, kept, header = record.get("config"), record.get("names", {}), record.get("header", {})
    own = isinstance(text, str) and not record.get("folded") and isinstance(kept, dict) and isinstance(header, dict)
    if not own:
        return _new_config(made, alpha, places), names, {"format": "pt"}
    fits = all(isinstance(k, list) and len(k) == 2 and all(isinstance(n, str) for n in k) for k in kept.values())
    if not fits or not all(isinstance(v, str) for v in header.values()):
        raise BadFile("provenance", "the adapter's record is not of its form", hint="remove the key qformats.adapter")
    return str(text), {module: tuple(kept.get(module, names[module])) for module in made}, header


def _new_config(made: Mapping[str, _Half], alpha: float, places: Places) -> str:
    ranks = {module: half.rank for module, half in made.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: r for module, r in ranks.items() if r != rank}
    whole = float(alpha or rank)
    config = {
        "alpha_pattern": {} if alpha else odd,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": any(half.place.rule.transposed for half in made.values()),
        "lora_alpha": int(whole) if whole.is_integer() else whole,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": odd,
        "target_modules": _targets(made, places),
        "task_type": "CAUSAL_LM",
    }
    return json.dumps(config, indent=2, sort_keys=True)


def _targets(made: Mapping[str, Any], places: Places) -> list[str]:
    """Last words of the modules' names where a word means these modules only, whole names otherwise."""
    everywhere: dict[str, set[str]] = {}
    for name in places.by_hf:
        everywhere.setdefault(name.rpartition(".")[2], set()).add(name)
    words = {name.rpartition(".")[2] for name in made}
    short = {word for word in words if everywhere[word] <= made.keys()}
    return sorted({*short, *(name for name in made if name.rpartition(".")[2] not in short)})


def _write_peft(
    destination: Path, config: str, names: Mapping[str, tuple[str, str]], header: Mapping[str, str],
    pairs: Mapping[str, tuple[RawTensor, RawTensor]], made: Mapping[str, _Half], places: Places, overwrite: bool,
) -> int:  # fmt: skip
    """Write the directory, one GGUF pair at a time; returns the bytes of the weights."""
    import torch

    infos = [(name, *info) for module, half in made.items() for name, info in zip(names[module], (half.a, half.b), strict=True)]
    layout = layout_safetensors(infos, header)
    with OutputDirectory(destination, layout.size + len(config), overwrite) as out:
        file = out.file(WEIGHTS, layout.size)
        file.pwrite(0, layout.header)
        for target, (a, b) in pairs.items():
            for module, both in _to_peft(places.by_gguf[target], a, b, places).items():
                for name, values in zip(names[module], both, strict=True):
                    file.pwrite(layout.offsets[name], values.contiguous().view(torch.uint8).numpy().tobytes())
        out.write_bytes(CONFIG, config.encode("utf-8"))
        out.commit()
    return layout.size
