"""A PEFT LoRA adapter as what it changes: low-rank pairs and whole tensors by the module's name, read and checked without the model.

Read from ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT 0.21, ``tuners/lora/config.py``, ``layer.py``, ``variants.py``
and ``utils/save_and_load.py``):

| tensor behind ``base_model.model.``                       | meaning |
|-----------------------------------------------------------|---------|
| ``<module>.lora_A.weight`` (r, K), ``lora_B.weight`` (N, r) | W + s B A; transposed with ``fan_in_fan_out`` |
| ``<module>.lora_B.bias`` (N,)                             | bias + s · it (``lora_bias``) |
| ``<module>.lora_embedding_A`` (r, V), ``_B`` (H, r)       | W + s (B A)ᵀ |
| ``<module>.lora_magnitude_vector`` (N,), an embedding's (H,) | DoRA: each output's vector gets this length |
| ``<module>.weight``, ``<module>.bias``, ``<module>.base_layer.…`` | instead of the model's own (``modules_to_save``, ``bias``) |

s = lora_alpha / r, or / sqrt(r) with ``use_rslora``; ``rank_pattern`` and ``alpha_pattern`` give a module its own.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.lora import CONFIG, FLOATS, PREFIX, WEIGHTS, pattern_value, read_json
from qformats.checkpoint import fetched, is_remote_path
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.errors import BadFile, Unsafe, Unsupported, UsageError

__all__ = ["Adapter", "LoraWord", "LowRank", "open_adapters", "recorded_adapters", "same_adapters"]

LoraWord = str | Path | tuple[str | Path, float]
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.default)?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>A|B)(?:\.default)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(?P<leaf>weight|bias)")
# fields that change the arithmetic in a way that is no sum of weights, with the values that do not
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "target_parameters": (None, []), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None), "use_bdlora": (False, None), "arrow_config": (None,), "alora_invocation_tokens": (None, []),
    "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,), "megatron_config": (None,),
}  # fmt: skip
_SUSPECT = "fetch the adapter again, or save it again with PEFT"
# how A and B began where that left the model's own weights alone; the other ways took something out of them (layer.py, *_init)
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """One module's pair: ``a`` (r, K) and ``b`` (N, r), of an embedding (r, V) and (H, r); ``scaling`` before any weight.

    ``transposed``: the adapter says that its modules keep their weights (K, N). ``magnitude``: DoRA's lengths. ``bias``: of ``lora_B``.
    """

    module: str
    a: RawTensor
    b: RawTensor
    scaling: float
    embedding: bool = False
    transposed: bool = False
    magnitude: RawTensor | None = None
    bias: RawTensor | None = None


@dataclass(frozen=True)
class Adapter:
    """``pairs`` by module, ``saved`` whole tensors by (module, leaf), names as the base model's. ``weight``: how much of it is merged.

    ``sha256`` of the weights, ``config_sha256`` of the configuration.
    """

    name: str
    weight: float
    sha256: str
    config_sha256: str
    pairs: Mapping[str, LowRank] = field(default_factory=dict)
    saved: Mapping[tuple[str, str], RawTensor] = field(default_factory=dict)

    @property
    def scalings(self) -> list[float]:
        """The different scalings of its pairs, before the weight."""
        return sorted({pair.scaling for pair in self.pairs.values()})

    @property
    def title(self) -> str:
        """Name and weight for a reader."""
        return self.name if self.weight == 1.0 else f"{self.name} (weight {self.weight:g})"

    def to_json(self) -> dict[str, Any]:
        """What a record keeps."""
        return {
            "name": self.name, "sha256": self.sha256, "config_sha256": self.config_sha256, "weight": self.weight, "scaling": self.scalings,
        }  # fmt: skip


def open_adapters(words: Iterable[LoraWord]) -> tuple[Adapter, ...]:
    """Read adapters: directories, ``DIR=WEIGHT`` or (directory, weight).

    Raises ``UsageError('lora-weight')``, ``BadFile`` (``not-found``, ``lora-config``, ``lora-pair``, ``lora-values``) and ``Unsupported``
    (``lora-config``, ``lora-tensor``, ``not-float``) for what is no adapter or of a kind that weights cannot hold.
    """
    return tuple(_open(*_parse(word)) for word in words)


def _parse(word: LoraWord) -> tuple[Path, float]:
    if isinstance(word, tuple):
        path, weight = Path(word[0]), float(word[1])
    else:
        path, weight = Path(word), 1.0
        name, equals, number = str(word).rpartition("=")
        if equals and not path.exists():
            try:
                path, weight = Path(name), float(number)
            except ValueError:
                raise UsageError("lora-weight", f"{number!r} is not a number", path=name, hint="such as --lora adapter/=0.5") from None
    if not math.isfinite(weight) or weight == 0:
        raise UsageError("lora-weight", f"the weight is {weight}, expected a number other than 0", path=path)
    return path, weight


def _open(path: Path, weight: float) -> Adapter:
    name, path = _name(path), fetched(path)
    if path.is_file() and path.suffix == ".gguf":
        hint = "convert it first: qconvert gguf-to-lora"
        raise Unsupported("lora-config", "is a file; adapters are merged from PEFT directories", path=path, hint=hint)
    try:
        return _read(path, name, weight)
    except (BadFile, Unsupported) as error:
        error.hint = error.hint or _SUSPECT
        error.locate(path=path / WEIGHTS)
        raise


def _name(path: Path) -> str:
    return path.name.partition("@")[0] if is_remote_path(path) else path.resolve().name


def _read(path: Path, name: str, weight: float) -> Adapter:
    config = read_json(path / CONFIG)
    _check_config(config, path)
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise Unsafe("pickle", "is a pickle, which can run code when it is loaded", path=path, hint="save it as safetensors")
    pairs, saved = _sorted(open_safetensors(path / WEIGHTS).tensors, config)
    return Adapter(name, weight, _sha256(path / WEIGHTS), _sha256(path / CONFIG), pairs, saved)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- checks


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    where = path / CONFIG
    refused = [name for name, plain in _PLAIN.items() if name in config and config[name] not in plain]
    if isinstance(begun := config.get("init_lora_weights"), str | int | None) and begun not in _BEGINNINGS:
        refused.append("init_lora_weights")
    if refused:
        name = refused[0]
        message = f"adapter config field {name!r} is {config[name]!r}, which is not merged here"
        raise Unsupported("lora-config", message, path=where, hint="merge it with PEFT, on the float model, and convert that")
    if "peft_type" not in config:
        raise BadFile("lora-config", "does not name a peft_type, expected LORA", path=where)
    for name in ("lora_alpha", "r"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not value:
            raise BadFile("lora-config", f"{name} is {value!r}, expected a number other than 0", path=where)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise BadFile("lora-config", f"bias is {config['bias']!r}, expected none, all or lora_only", path=where)
    if config.get("use_dora") and config.get("lora_bias"):
        message = "adapter config fields 'use_dora' and 'lora_bias' are both set, which PEFT does not know"
        raise Unsupported("lora-config", message, path=where, hint="check where the adapter came from")


def _sorted(tensors: Mapping[str, RawTensor], config: Mapping[str, Any]) -> tuple[dict[str, LowRank], dict[tuple[str, str], RawTensor]]:
    """The adapter's tensors by what they are for."""
    halves: dict[str, dict[str, RawTensor]] = {}
    saved: dict[tuple[str, str], RawTensor] = {}
    for name, raw in tensors.items():
        if raw.dtype not in FLOATS:
            raise Unsupported("not-float", f"is {raw.dtype}", tensor=name, hint=f"expected one of {', '.join(FLOATS)}")
        plain = name.removeprefix(PREFIX)
        if (match := _PAIR.fullmatch(plain)) and (match["side"], match["leaf"]) != ("A", "bias"):
            halves.setdefault(match["module"], {})["bias" if match["leaf"] == "bias" else match["side"]] = raw
        elif match := _EMBEDDING.fullmatch(plain):
            halves.setdefault(match["module"], {})[f"embedding_{match['side']}"] = raw
        elif match := _MAGNITUDE.fullmatch(plain):
            halves.setdefault(match["module"], {})["magnitude"] = raw
        elif "lora_" not in plain and "token_adapter" not in plain and (match := _WHOLE.fullmatch(plain)):
            if saved.setdefault((match["module"], match["leaf"]), raw) is not raw:
                raise BadFile("lora-tensor", "the adapter holds it twice", tensor=name)
        else:
            raise Unsupported("lora-tensor", "is no part of an adapter that is merged here", tensor=name, hint="merge it with PEFT")
    if not halves and not saved:
        raise BadFile("lora-pair", "the adapter holds no low-rank pair")
    return {module: _pair(module, found, config) for module, found in halves.items()}, saved


def _pair(module: str, found: Mapping[str, RawTensor], config: Mapping[str, Any]) -> LowRank:
    embedding = "embedding_A" in found or "embedding_B" in found
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if not all(name in found for name in names):
        raise BadFile("lora-pair", f"has {' and '.join(sorted(found))} alone", tensor=module)
    if embedding and ("A" in found or "B" in found or "bias" in found):
        raise BadFile("lora-pair", "is a layer and an embedding at once", tensor=module)
    a, b = found[names[0]], found[names[1]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise BadFile("lora-pair", f"A {a.shape} and B {b.shape} are no pair of matrices of one rank", tensor=module)
    rank, magnitude = a.shape[0], found.get("magnitude")
    said = pattern_value(config.get("rank_pattern"), module, float(config["r"]))
    if said != rank:
        raise BadFile("lora-pair", f"is of rank {rank}, the adapter's configuration means {said:g}", tensor=module)
    if bool(config.get("use_dora")) != (magnitude is not None):
        lacks = "has a magnitude vector" if magnitude is not None else "has no magnitude vector"
        raise BadFile("lora-pair", f"{lacks}, use_dora is {config.get('use_dora')!r}", tensor=module)
    if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
        raise BadFile("lora-pair", f"magnitudes {magnitude.shape}, expected {b.shape[0]}", tensor=module)
    if bool(config.get("lora_bias")) != ("bias" in found) and not embedding:
        raise BadFile("lora-pair", f"lora_B's bias and lora_bias {config.get('lora_bias')!r} disagree", tensor=module)
    if "bias" in found and found["bias"].shape != (b.shape[0],):
        raise BadFile("lora-pair", f"bias {found['bias'].shape}, expected ({b.shape[0]},)", tensor=module)
    alpha = pattern_value(config.get("alpha_pattern"), module, float(config["lora_alpha"]))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for raw in (a, b, magnitude, found.get("bias")):
        _check_finite(raw)
    return LowRank(module, a, b, scaling, embedding, bool(config.get("fan_in_fan_out")), magnitude, found.get("bias"))


def _check_finite(raw: RawTensor | None) -> None:
    import torch

    from qformats.formats.dense import read_float

    if raw is not None and not bool(torch.isfinite(read_float(raw)).all()):
        raise BadFile("lora-values", "holds values that are not finite", tensor=raw.name, hint="the training broke, or the download")


# ---------------------------------------------------------------- records


def recorded_adapters(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What recorded options say of adapters; ``KeyError`` or ``TypeError`` if they are damaged."""
    words = ("name", "sha256", "config_sha256")
    return [{**{word: str(entry[word]) for word in words}, "weight": entry["weight"]} for entry in options.get("lora", ())]


def same_adapters(wanted: list[dict[str, Any]], given: Iterable[LoraWord], where: object) -> tuple[Adapter, ...]:
    """The given adapters if they are those that were recorded, in their order and weights.

    Raises ``UsageError``: ``lora-missing`` where one is needed, ``lora-other`` where they are not these or none belongs there.
    """
    words = list(given)
    if not wanted and not words:
        return ()
    names = ", ".join(repr(entry["name"]) + ("" if entry["weight"] == 1 else f" of weight {entry['weight']}") for entry in wanted)
    if not wanted:
        raise UsageError("lora-other", "was made without an adapter", path=where, hint="leave --lora out")
    if not words:
        message = f"was made with the adapter {names} merged in, which is needed to do it again"
        raise UsageError("lora-missing", message, path=where, hint="give it with --lora")
    adapters = open_adapters(words)
    keys = ("sha256", "config_sha256", "weight")
    if [[entry[key] for key in keys] for entry in wanted] != [[adapter.to_json()[key] for key in keys] for adapter in adapters]:
        mine = ", ".join(f"{adapter.title!r} of SHA-256 {adapter.sha256[:16]}…" for adapter in adapters)
        message = f"was made with {names} of SHA-256 {', '.join(e['sha256'][:16] + '…' for e in wanted)}, given: {mine}"
        raise UsageError("lora-other", message, path=where, hint="give the same adapters with --lora, in the same order")
    return adapters
