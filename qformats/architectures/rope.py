"""Rotary-embedding parameters: both of transformers' spellings, GGUF's keys, and Llama 3's factors as a tensor and back.

transformers 4 writes ``rope_theta`` + ``rope_scaling``; transformers 5 writes ``rope_parameters``, flat or one entry a layer type.
GGUF has ``rope.freq_base``, ``rope.scaling.*`` and, for Llama 3, the tensor ``rope_freqs.weight`` (head_dim / 2,) F32 that divides
each frequency (llama.cpp, ``conversion/base.py`` and ``conversion/llama.py`` ``generate_extra_tensors``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import number
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DEFAULT_THETA", "frequency_factors", "full_rope", "recover_llama3", "rope_keys", "rope_parameters", "rope_to_config", "sliding_theta",
]  # fmt: skip

Array = Any
DEFAULT_THETA = 10000.0  # llama.cpp's where a file has no rope.freq_base
_LINEAR = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
_PLAIN = ("default", "llama3", "none")
# yarn keys beside factor and original length: (GGUF key, config names)
_YARN = (
    ("rope.scaling.yarn_ext_factor", ("extrapolation_factor",)),
    ("rope.scaling.yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("rope.scaling.yarn_beta_fast", ("beta_fast",)),
    ("rope.scaling.yarn_beta_slow", ("beta_slow",)),
)
# parameter sets in use, tried first when a factor tensor is turned back into parameters: (low, high, original length)
_KNOWN = ((1.0, 4.0, 8192), (1.0, 4.0, 4096), (1.0, 4.0, 16384), (1.0, 4.0, 32768))


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the parameters in transformers 5's spelling from either spelling; a copy, possibly empty."""
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(stored, Mapping):
        raise BadFile("config-field", f"rope parameters are {type(stored).__name__}, expected an object")
    rope = {key: dict(value) if isinstance(value, Mapping) else value for key, value in stored.items()}
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope
    if (local := config.get("rope_local_base_freq")) is not None:
        rope["sliding_attention"] = {"rope_theta": local}
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    if "rope_type" not in rope and rope.get("type") is not None:
        rope["rope_type"] = rope["type"]
    if "original_max_position_embeddings" not in rope and config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


def full_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of full attention, where layer types differ, else the only ones."""
    full = rope.get("full_attention", rope)
    if not isinstance(full, Mapping):
        raise BadFile("config-field", f"rope parameters are {type(full).__name__}, expected an object")
    return dict(full)


def sliding_theta(rope: Mapping[str, Any]) -> float | None:
    """The base frequency of sliding-window layers, or None where there is just one."""
    sliding = rope.get("sliding_attention")
    if not isinstance(sliding, Mapping) or sliding.get("rope_theta") is None:
        return None
    return number(sliding, "rope_theta")


def rope_keys(rope: Mapping[str, Any], default_theta: float) -> list[tuple[str, str, Any]]:
    """List (key after the architecture, GGUF type, value) in llama.cpp's order; ``Unsupported('rope')`` for a scaling GGUF lacks."""
    full = full_rope(rope)
    kind = str(full.get("rope_type") or "default").lower()
    keys: list[tuple[str, str, Any]] = []
    if kind in _LINEAR:
        keys.append(("rope.scaling.type", "str", _LINEAR[kind]))
        if kind in ("linear", "yarn"):
            keys.append(("rope.scaling.factor", "f32", number(full, "factor")))
        if kind == "yarn":
            keys.extend(_yarn_keys(full))
    elif kind not in _PLAIN:
        raise Unsupported("rope", f"rope type {kind!r} cannot be written to GGUF for this architecture")
    if _identity_factors(full) is not None:  # factors of both lengths agree: they are written as rope_freqs, not as longrope
        keys = []
    keys.append(("rope.freq_base", "f32", number(full, "rope_theta", default_theta)))
    if (local := sliding_theta(rope)) is not None:
        keys.append(("rope.freq_base_swa", "f32", local))
    return keys


def _yarn_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    original = full.get("original_max_position_embeddings")
    if not isinstance(original, int):
        raise BadFile("config-field", "rope type 'yarn' has no original_max_position_embeddings")
    keys: list[tuple[str, str, Any]] = [("rope.scaling.original_context_length", "u32", original)]
    for key, names in _YARN:
        name = next((name for name in names if full.get(name) is not None), None)
        if name is not None:
            keys.append((key, "f32", number(full, name)))
    return keys


def _identity_factors(full: Mapping[str, Any]) -> list[float] | None:
    """The factor list of a longrope whose short and long factors agree and whose attention factor is 1, else None."""
    long, short = full.get("long_factor"), full.get("short_factor")
    if not isinstance(long, list) or long != short or full.get("attention_factor") != 1.0:
        return None
    return [number({"long_factor": value}, "long_factor") for value in long]


def frequency_factors(rope: Mapping[str, Any], head_dim: int, default_theta: float) -> np.ndarray[Any, Any] | None:
    """Compute ``rope_freqs.weight``, (head_dim / 2,) float32, or None where no frequency is rescaled one by one.

    Float32 arithmetic in llama.cpp's order: factor where the wavelength is longer than original / low, 1 where shorter than
    original / high, ``1 / ((1 - s) / factor + s)`` between.
    """
    import numpy as np

    full = full_rope(rope)
    if (listed := _identity_factors(full)) is not None:
        if len(listed) != head_dim // 2:
            raise BadFile("config-field", f"rope parameters list {len(listed)} factors, expected {head_dim // 2}")
        return np.array(listed, np.float32)
    if str(full.get("rope_type") or "").lower() != "llama3":
        return None
    numbers = [full.get("factor", 8.0), full.get("low_freq_factor", 1.0), full.get("high_freq_factor", 4.0)]
    numbers.append(full.get("original_max_position_embeddings", 8192))
    if not all(isinstance(n, (int, float)) and 0 < n < 1e30 for n in numbers) or numbers[1] == numbers[2]:
        raise BadFile("config-field", f"llama3 rope parameters are not usable: {full}")
    made: np.ndarray[Any, Any] = _llama3(number(full, "rope_theta", default_theta), head_dim, *numbers)
    return made


def _llama3(base: float, head_dim: int, factor: float, low: float, high: float, original: float) -> Array:
    import numpy as np

    one = np.float32(1.0)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # the power is rounded once from float64: the closest float32, which is what the float32 power of torch gives
    frequency = one / np.power(np.float64(base), exponent.astype(np.float64)).astype(np.float32)
    wavelength = np.float32(2 * math.pi) / frequency
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    between = one / ((one - smooth) / np.float32(factor) + smooth)
    short, long = wavelength < np.float32(original / high), wavelength > np.float32(original / low)
    made: Array = np.where(short, one, np.where(long, np.float32(factor), between)).astype(np.float32)
    return made


def recover_llama3(factors: np.ndarray[Any, Any], base: float, head_dim: int, context: int) -> dict[str, Any]:
    """Find rope parameters that reproduce ``factors`` bit for bit.

    Only the ratios original / low and original / high matter, so ``low_freq_factor`` is taken as 1 unless a set in common use
    fits. Factors that no llama3 rule gives come back as a ``longrope`` whose two lists are the factors themselves.
    """
    import numpy as np

    values = np.asarray(factors, np.float32).reshape(-1)
    if len(values) != head_dim // 2 or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise BadFile("tensor-shape", f"has no {head_dim // 2} values above zero", tensor="rope_freqs.weight")
    factor = float(values[-1])
    for low, high, original in (*_KNOWN, *_fitted(values, base, head_dim)):
        if factor > 1.0 and np.array_equal(_llama3(base, head_dim, factor, low, high, original), values):
            return {
                "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    listed = [float(value) for value in values]
    return {
        "rope_type": "longrope", "rope_theta": base, "short_factor": listed, "long_factor": listed, "attention_factor": 1.0,
        "factor": 1.0, "original_max_position_embeddings": context,
    }  # fmt: skip


def _fitted(values: Array, base: float, head_dim: int) -> list[tuple[float, float, int]]:
    """Solve original / low and original / high from the factors strictly between 1 and the last one (needs two of them)."""
    import numpy as np

    last = float(values[-1])
    inside = np.flatnonzero((values > 1.0) & (values < last))
    if len(inside) < 2:
        return []
    smooth = (1.0 / values[inside].astype(np.float64) - 1.0 / last) / (1.0 - 1.0 / last)
    turns = np.power(base, -2.0 * inside / head_dim) / (2 * math.pi)  # 1 / wavelength
    slope, minus_start = np.polyfit(turns, smooth, 1)
    if slope <= 0 or minus_start >= 0:
        return []
    high, original = 1.0 - 1.0 / minus_start, slope / -minus_start
    return [(1.0, float(round(high * scale) / scale), round(original)) for scale in (1, 2, 4, 10, 100)]


def rope_to_config(values: Mapping[str, Any], full: Mapping[str, Any] | None, default_theta: float) -> dict[str, Any]:
    """Build ``rope_parameters`` (transformers 5) from GGUF values keyed after the architecture; ``full`` holds recovered ones."""
    theta = number(values, "rope.freq_base", default_theta)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    kind = values.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope = {"rope_theta": theta, "rope_type": kind, "factor": values.get("rope.scaling.factor", 1.0)}
    elif kind != "none":
        raise Unsupported("rope", f"GGUF rope scaling {kind!r} cannot be written as a config for this architecture")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values.get("rope.scaling.original_context_length")
        rope.update({names[0]: values[key] for key, names in _YARN if key in values})
    if full is not None:
        rope = dict(full)
    if "rope.freq_base_swa" in values:
        sliding = {"rope_theta": values["rope.freq_base_swa"], "rope_type": "default"}
        return {"full_attention": rope, "sliding_attention": sliding}
    return rope
