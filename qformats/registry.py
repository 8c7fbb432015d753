"""The one table of formats: where each lives, how a checkpoint says that it is one, what it can do. Torch-free.

A new format is one module in ``qformats.formats`` and one row here; everything else (command names, matrix, contract tests)
is generated from the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.containers.torch_zip import flatten
from qformats.errors import Unsupported, UsageError, did_you_mean
from qformats.formats.protocol import Match, Target

__all__ = [
    "REFUSED",
    "ROWS",
    "Row",
    "config_beside",
    "detect",
    "flattened",
    "format_module",
    "join_name",
    "names",
    "parse_target",
    "pickle_files",
    "pickled_classes",
    "row",
    "split_name",
]


@dataclass(frozen=True, slots=True)
class Row:
    """``methods``: values of ``quant_method`` it answers to; ``types``: names a target may carry; ``container``: what holds it.

    ``mixes``: names of whole files that a target may carry too, each a rule for the type of every tensor. ``configs``: JSON files
    beside the weights that may hold its quantization config; its module then has ``config_beside``. ``default``: the type for new
    codes where a target names none. ``aliases``: other words for the format. ``source_options``: what a user may say of a source that
    its files leave open.
    """

    name: str
    module: str
    title: str
    container: str
    methods: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    mixes: tuple[str, ...] = ()
    reads: bool = True
    writes: bool = True
    source_options: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    default: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def default_type(self) -> str:
        """The type of new codes where a target names none: ``default``, else four-bit integers, else the first type."""
        return self.default or ("int4" if "int4" in self.types else next(iter(self.types), ""))


_AUTOROUND = ("auto-round", "auto_round", "autoround", "intel/auto-round")
_INTS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
ROWS: tuple[Row, ...] = (
    Row("gptq", "qformats.formats.gptq", "GPTQ (GPTQModel, AutoGPTQ, AutoRound)", "safetensors",
        ("gptq", *_AUTOROUND, "marlin", "bitblas", "qqq", "gptq_marlin_24"), _INTS,
        ("group", "sym", "asym", "format", "act-order"), configs=("quantize_config.json", "quant_config.json"),
        source_options=("zero-points",)),
    Row("awq", "qformats.formats.awq", "AWQ (AutoAWQ, GPTQModel, llm-awq, AutoRound)", "safetensors",
        ("awq", *_AUTOROUND), ("int4",), ("group", "sym", "version", "zero_point"), source_options=("zero-points",)),
    Row("gguf", "qformats.formats.ggml", "GGUF (llama.cpp, ollama)", "gguf",
        (), ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
         "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs",
         "mxfp4", "nvfp4", "q1_0", "q2_0", "tq1_0", "tq2_0", "f16", "bf16", "f32"),
        mixes=("q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "iq2_m", "iq3_xs", "iq3_m", "mxfp4_moe"),
        aliases=("ggml",)),
    Row("fp8", "qformats.formats.finegrained_fp8", "FP8 with block scales (DeepSeek, Qwen, transformers), MXFP8", "safetensors",
        ("fp8", "mxfp8"), ("fp8", "mxfp8", "fp4"), ("block", "scale")),
    Row("fbgemm_fp8", "qformats.formats.fbgemm_fp8", "FBGEMM FP8 (Meta, transformers)", "safetensors", ("fbgemm_fp8",), ("fp8",)),
    Row("modelopt", "qformats.formats.modelopt", "NVIDIA ModelOpt: FP8, NVFP4, MXFP8, INT4 AWQ", "safetensors",
        ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), ("fp8", "mxfp8", "mxfp4", "nvfp4", "int4", "int8"),
        ("scale", "group"),
        configs=("hf_quant_config.json",)),
    Row("mxfp4", "qformats.formats.mxfp4", "MXFP4 experts of gpt-oss (OpenAI, transformers)", "safetensors", ("mxfp4",)),
    Row("bitsandbytes", "qformats.formats.bitsandbytes", "bitsandbytes NF4, FP4 and LLM.int8()", "safetensors",
        ("bitsandbytes",), ("nf4", "fp4", "int8"), ("blocksize", "double", "storage", "dtype"),
        aliases=("bnb",)),
    Row("torchao", "qformats.formats.torchao", "torchao tensors (int, float8, NVFP4, MX)", "safetensors", ("torchao",),
        (*(f"int{bits}" for bits in range(1, 9)), "fp8", "fp8_e5m2", "nvfp4", "mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"),
        ("group", "channel", "tensor", "block", "sym", "asym")),
    Row("hqq", "qformats.formats.hqq", "HQQ (hqq, transformers)", "safetensors",
        ("hqq",), ("int4", "int3", "int2", "int8", "int1", "int1.58", "int5", "int6"), ("group", "axis", "dtype")),
    Row("quanto", "qformats.formats.quanto", "Quanto (optimum-quanto)", "safetensors",
        ("quanto",), ("qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"), ("dtype", "zeropoint"),
        configs=("quanto_qmap.json", "quantization_map.json")),
    Row("compressed-tensors", "qformats.formats.compressed_tensors", "compressed-tensors (llm-compressor, vLLM)", "safetensors",
        ("compressed-tensors", "compressed_tensors", "sparseml"),
        ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8"),
        ("group", "channel", "tensor", "block", "sym", "asym", "format", "scale", "packing", "act-order"), aliases=("ct",)),
    Row("eetq", "qformats.formats.eetq", "EETQ (int8 for its GPU kernels)", "safetensors", ("eetq",), ("int8",), ("layout", "leaf"),
        source_options=("layout",)),
    Row("bitnet", "qformats.formats.bitnet", "BitNet b1.58 (transformers)", "safetensors", ("bitnet",), ("ternary",), ("class",)),
    Row("mlx", "qformats.formats.mlx", "MLX (mlx-lm; metal of transformers)", "safetensors", ("mlx", "metal"),
        ("int1", "int2", "int3", "int4", "int5", "int6", "int8", "mxfp4", "mxfp8", "nvfp4"), ("group", "dtype", "metal")),
    Row("aqlm", "qformats.formats.aqlm", "AQLM (additive codebooks)", "safetensors", ("aqlm",)),
    Row("gemma", "qformats.formats.gemma_int", "transformers' gemma method (2, 4, 8 bits by rows)", "safetensors", ("gemma",),
        ("int4", "int8", "int2")),
    Row("hf", "qformats.formats.dense", "plain transformers checkpoint in floats", "safetensors", (), ("f32", "f16", "bf16"),
        aliases=("safetensors", "dense", "transformers")),
)  # fmt: skip

# Methods that are known and not read: what each is, and what to do instead.
REFUSED = {
    "vptq": "VPTQ (vector quantization with residual and outlier codebooks), which only the vptq package on a GPU decodes",
    "spqr": "SpQR (3-bit tiles with sparse outliers), which only the spqr_quant package decodes",
    "higgs": "HIGGS (FLUTE tiles made for one GPU, rows turned by a Hadamard transform), which only the flute package decodes",
    "fp_quant": "FP-Quant (MXFP4 or NVFP4 turned by Hadamard matrices), which only the fp_quant package decodes",
    "sinq": "SINQ (codes with scales of rows and of columns), which only the sinq package decodes",
    "quark": "AMD Quark, whose orders of packing only the amd-quark package knows",
    "quip": "QuIP# (lattice codebooks between random transforms), which only its own code decodes",
    "quip_sharp": "QuIP# (lattice codebooks between random transforms), which only its own code decodes",
    "exl2": "ExLlamaV2 (mixed widths in rows put in order), which only the exllamav2 package decodes",
    "exl3": "ExLlamaV3 (trellis codes between transforms), which only the exllamav3 package decodes",
    "fouroversix": "Four Over Six (NVFP4 or MXFP4 under adaptive scales), which only the fouroversix package decodes",
    "paroquant": "ParoQuant (AWQ's planes behind rotations of the inputs), which only the paroquant package carries out",
    "gguf": "blocks of a GGUF inside safetensors, as GPTQModel packs them; the .gguf file itself is read",
    "ipex": "weights repacked for Intel Extension for PyTorch, which only that package decodes",
    "owq": "OWQ (3 and 4 bits with columns left in floats), which only its own code decodes",
    "squeezellm": "SqueezeLLM (a table for each row, with sparse outliers), which only its own code decodes",
    "deepspeedfp": "DeepSpeed FP6 and FP8, which are made when a model is loaded",
    "nvfp4": "NVFP4 made when a model is loaded, whose blocks are arranged for one GPU; the file's weights should be floats",
}
def names() -> list[str]:
    """All format names in table order."""
    return [r.name for r in ROWS]


def row(name: str) -> Row:
    """The row of a format; ``UsageError('unknown-format')`` names the known ones."""
    wanted = name.lower()
    for candidate in ROWS:
        if wanted == candidate.name or wanted in candidate.aliases:
            return candidate
    close = did_you_mean(wanted, (word for candidate in ROWS for word in (candidate.name, *candidate.aliases)))
    raise UsageError("unknown-format", f"unknown format {name!r}", hint=f"{close}known formats: {', '.join(names())}")


def format_module(name: str) -> ModuleType:
    """Import a format's module."""
    return importlib.import_module(row(name).module)


def split_name(name: str, stored: str) -> tuple[str, str]:
    """The module and the leaf of a stored tensor of the format ``name``: its own suffixes first, else what follows the last dot.

    A suffix may hold dots (``weight.absmax``); one that the format lists in ``GLUED`` follows the module's name without a dot. A format
    with other ways has a ``split_name`` and a ``join_name`` of its own.
    """
    form = format_module(name)
    if hasattr(form, "split_name"):
        found: tuple[str, str] = form.split_name(stored)
        return found
    glued = getattr(form, "GLUED", ())
    for suffix in form.SUFFIXES:
        if suffix in glued:
            if stored.endswith(suffix):
                return stored.removesuffix(suffix), suffix
        elif "." in suffix and stored.endswith("." + suffix):
            return stored.removesuffix("." + suffix), suffix
    module, _, leaf = stored.rpartition(".")
    return module, leaf


def join_name(name: str, module: str, leaf: str) -> str:
    """The inverse of ``split_name``."""
    form = format_module(name)
    if hasattr(form, "join_name"):
        return str(form.join_name(module, leaf))
    return f"{module}{leaf}" if not module or leaf in getattr(form, "GLUED", ()) else f"{module}.{leaf}"


def detect(config: Mapping[str, Any], tensor_names: Iterable[str]) -> Match:
    """The format a quantization config (``{}`` for none) and tensor names speak of.

    ``Unsupported('quant-method')`` for a method no row answers to.
    """
    known = list(tensor_names)
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    for candidate in ROWS:
        if candidate.container == "gguf" or (method and method not in candidate.methods):
            continue
        match = format_module(candidate.name).detect(config, known)
        if match is not None:
            assert isinstance(match, Match)
            return match
    if not config:
        return Match("hf", {})
    if method in REFUSED:
        hint = "dequantize it with its own package and convert the floats, or take another quantization of the same model"
        raise Unsupported("quant-method", f"the checkpoint holds {REFUSED[method]}", hint=hint)
    raise Unsupported(
        "quant-method",
        f"quantization method {method or config!r} is not known",
        hint=f"known methods: {', '.join(sorted({m for r in ROWS for m in r.methods}))}",
    )


def config_beside(
    inner: Mapping[str, Any] | None, read: Callable[[str], Mapping[str, Any]]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The quantization config out of config.json's own (None if it has none) and the files that rows name, with warnings.

    ``read`` gives a file's object, ``{}`` where there is no such file. A config that names another method keeps its word.
    """
    method = "" if inner is None else str(inner.get("quant_method") or "").lower()
    for candidate in ROWS:
        found = {name: read(name) for name in candidate.configs}
        if any(found.values()) and (not method or method in candidate.methods):
            merged, warnings = format_module(candidate.name).config_beside(inner, {k: v for k, v in found.items() if v})
            return merged, tuple(warnings)
    return inner or {}, ()


def _pickling_modules() -> list[ModuleType]:
    return [format_module(candidate.name) for candidate in ROWS if candidate.container != "gguf"]


def pickled_classes() -> frozenset[str]:
    """Dotted names of the classes that some format reads out of pickles, as inert records."""
    return frozenset(name for module in _pickling_modules() for name in getattr(module, "PICKLED_CLASSES", ()))


def pickle_files() -> tuple[str, ...]:
    """Names of pickled files that are some format's own, in table order."""
    return tuple(name for module in _pickling_modules() for name in getattr(module, "PICKLE_FILES", ()))


def flattened(value: Any, config: Mapping[str, Any], path: str) -> tuple[Mapping[str, RawTensor], Mapping[str, str]]:
    """The tensors of a pickled value and their metadata: as the first format that knows it says, else by joining its keys."""
    for module in _pickling_modules():
        found = module.flatten(value, config) if hasattr(module, "flatten") else None
        if found is not None:
            tensors, metadata = found if isinstance(found, tuple) else (found, {})
            return tensors, metadata
    return flatten(value, path), {}


def parse_target(text: str) -> Target:
    """Parse ``FORMAT[:TYPE][,key=value…]``; ``UsageError`` for an unknown format, type or option."""
    head, *pairs = [part.strip() for part in text.split(",")]
    name, _, kind = head.partition(":")
    found = row(name)
    kind = kind.lower()
    known = (*found.types, *(name for name in found.mixes if name not in found.types))
    if kind and kind not in known:
        close = did_you_mean(kind, known)
        raise UsageError("target-type", f"{found.name} has no type {kind!r}", hint=f"{close}types: {', '.join(known) or 'none'}")
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in known and not kind:
            kind = key
        elif key not in found.options:
            words = found.options if kind else (*found.options, *known)  # a type may stand there too
            close, allowed = did_you_mean(key, words), ", ".join(found.options) or "none"
            raise UsageError("target-option", f"{found.name} has no option {key!r}", hint=f"{close}options: {allowed}")
        else:
            options[key] = value
    return Target(found.name, kind or None, options)
