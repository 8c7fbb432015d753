"""The quantization config of bitsandbytes checkpoints, in and out; and the storages a target's words stand for.

Source: ``BitsAndBytesConfig.to_dict`` and ``quantizers/auto.py`` of transformers 5.23. ``load_in_4bit`` or ``load_in_8bit`` decides there,
before ``quant_method``, which files of 2023 lack; ``llm_int8_skip_modules`` speaks of 4 bits too. Which modules are quantized is read off
the tensors alone. Without a skip list transformers leaves out the output layer, with one only what it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qformats.errors import Unsupported, UsageError
from qformats.formats.bitsandbytes import fourbit, int8
from qformats.formats.bitsandbytes.state import BLOCKSIZES, DTYPES, NESTED_BLOCKSIZE
from qformats.formats.packed import dtype_word
from qformats.formats.protocol import Match, Target
from qformats.scheme import Flat, Integer, Scheme, Storage, Table, Tile

__all__ = ["NAME", "TYPES", "config_out", "detect", "storages"]

NAME = "bitsandbytes"
TYPES = ("nf4", "fp4", "int8")
_OUTPUT = "lm_head"
_YES, _NO = ("", "1", "true", "yes"), ("0", "false", "no")


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config of this method, one of 2023 that only says ``load_in_…bit``, or none at all beside tensors of quantization states."""
    method = str(config.get("quant_method") or "").lower()
    loads = bool(config.get("load_in_4bit") or config.get("load_in_8bit"))
    if method == NAME or (not method and loads):
        return Match(NAME, config)
    if config or not any(f".{fourbit.STATE}" in f".{name}" for name in names):
        return None
    return Match(NAME, config, warnings=("there is no quantization config: the quantization states say what it is",))


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """What ``target`` could be for a weight of ``scheme``: without a type its own codes' first, without a blocksize its own runs first.

    ``UsageError`` for unknown types and options.
    """
    if target.type is not None and target.type not in TYPES:
        raise UsageError("target-type", f"bitsandbytes has no type {target.type!r}", hint=f"types: {', '.join(TYPES)}")
    unknown = sorted(target.options.keys() - {"blocksize", "double", "storage", "dtype"})
    if unknown or (target.type == "int8" and target.options):
        hint = "int8 has none" if target.type == "int8" else "options: blocksize, double, storage, dtype"
        raise UsageError("target-option", f"bitsandbytes takes no option {', '.join(unknown or sorted(target.options))}", hint=hint)
    if target.type is None and isinstance(scheme.grid, Integer) and scheme.grid.bits == 8 and not target.options:
        return [int8.storage(scheme.shape[-1]), *_four_bits(target, "nf4", scheme)]
    if target.type == "int8":
        return [int8.storage(scheme.shape[-1])]
    own = scheme.grid.name if isinstance(scheme.grid, Table) and scheme.grid.name in TYPES else "nf4"
    return _four_bits(target, target.type or own, scheme)


def _four_bits(target: Target, kind: str, scheme: Scheme) -> list[Storage]:
    options = target.options
    words, dtype = (dtype_word(options.get(key, default)) for key, default in (("storage", "uint8"), ("dtype", "bfloat16")))
    if words not in fourbit.STORAGE_DTYPES:
        raise UsageError("storage-dtype", f"{words!r} is no quant_storage", hint=f"choose one of {', '.join(fourbit.STORAGE_DTYPES)}")
    if dtype not in DTYPES:
        raise UsageError("result-dtype", f"{dtype!r} is no dtype of a result", hint=f"choose one of {', '.join(DTYPES)}")
    same = isinstance(scheme.grid, Table) and scheme.grid.name == kind
    nested = NESTED_BLOCKSIZE if _double(options, same and scheme.scales[0].nested is not None) else 0
    sizes = [_blocksize(options["blocksize"])] if "blocksize" in options else _own_sizes(scheme) if same else [64]
    return [fourbit.storage(kind, scheme.shape, blocksize=size, nested=nested, words=words, dtype=dtype) for size in sizes]


def _double(options: Mapping[str, str], own: bool) -> bool:
    word = options.get("double")
    if word is not None and word.lower() not in (*_YES, *_NO):
        raise UsageError("double", f"double={word} is neither true nor false", hint="say double or double=false")
    return own if word is None else word.lower() in _YES


def _blocksize(word: str) -> int:
    if not word.isdecimal() or int(word) not in BLOCKSIZES:
        raise UsageError("blocksize", f"{word!r} is no blocksize", hint=f"choose one of {', '.join(map(str, BLOCKSIZES))}")
    return int(word)


def _own_sizes(scheme: Scheme) -> list[int]:
    """The blocksizes whose runs are those of the scheme's scale, else 64."""
    block = scheme.scales[0].block if scheme.scales else None
    run = block.n if isinstance(block, Flat) else block.sizes[-1] if isinstance(block, Tile) else 0
    if run in BLOCKSIZES:
        return [run]
    return [64]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The keys transformers 5.23 writes.

    ``Unsupported('bitsandbytes-mixed')`` for 4 and 8 bits, two tables or two sorts of words in one checkpoint.
    """
    eight = {storage.type == "int8" for storage in modules.values()}
    kinds = {(s.type, s.options.get("storage", "uint8"), s.options.get("dtype", "float16")) for s in modules.values()}
    if len(eight) > 1 or len({kind[:2] for kind in kinds}) > 1:
        found = ", ".join(sorted(f"{kind[0]} in {kind[1]}" for kind in kinds))
        raise Unsupported("bitsandbytes-mixed", f"one checkpoint has one type and one quant_storage, not {found}")
    kind, words, dtype = min(kinds) if kinds else ("nf4", "uint8", "bfloat16")
    four = kind != "int8"
    config: dict[str, Any] = {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": words,
        "bnb_4bit_quant_type": kind if four else "fp4",
        "bnb_4bit_use_double_quant": any("nested" in storage.options for storage in modules.values()),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skipped(modules, skipped, original),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": NAME,
    }
    kept = {key: original[key] for key in ("bnb_4bit_compute_dtype", "llm_int8_threshold") if original and key in original}
    if "llm_int8_threshold" in kept:
        kept["llm_int8_threshold"] = float(kept["llm_int8_threshold"])  # bitsandbytes takes no integer
    return config | kept


def _skipped(modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None) -> list[str] | None:
    """The original list where it names just these modules, None where transformers' own rule does, else all their names.

    A name there is a pattern for the beginning or the end of a module's: ``Unsupported('skip-name')`` where one would hit a quantized one.
    """
    dense = sorted(set(skipped))
    known = None if original is None else original.get("llm_int8_skip_modules")
    if isinstance(known, list) and _names_just(known, modules, dense):
        return [str(name) for name in known]
    if not set(dense) - {_OUTPUT} and _OUTPUT not in modules:
        return None
    names = dense if _OUTPUT in modules or _OUTPUT in dense else [*dense, _OUTPUT]  # tied outputs have no tensor, and no codes
    hit = [name for name in modules if _hits(names, name)]
    if hit:
        raise Unsupported("skip-name", f"a list of the modules that stay dense would leave out {hit[0]} too", tensor=hit[0])
    return names


def _names_just(patterns: Iterable[Any], modules: Mapping[str, Storage], dense: Iterable[str]) -> bool:
    words = [str(word) for word in patterns]
    return not any(_hits(words, name) for name in modules) and all(_hits(words, name) for name in dense)


def _hits(patterns: Iterable[str], name: str) -> bool:
    """Whether transformers takes one of ``patterns`` for the module ``name``, read as plain names (``should_convert_module``)."""
    return any(name.endswith(p) or re.match(rf"{re.escape(p)}(?:(?<=\.)|(?=\.|$))", name) for p in patterns if p)
