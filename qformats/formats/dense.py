"""Dense weights: F32, F16, BF16 and F64, in safetensors and GGUF alike, as plain float torch tensors.

| stored | dtype word | bytes | meaning |
|--------|-----------|-------|---------|
| weight | F32       | 4     | IEEE binary32, little-endian |
| weight | F16       | 2     | IEEE binary16 |
| weight | BF16      | 2     | the upper half of a binary32 |
| weight | F64       | 8     | IEEE binary64, read only |

``read_float`` gives rows in their own dtype, ``write_float`` rounds to a named one, once, to nearest even: the two doors for every
embedding, norm, bias and dequantized weight. ``ggml_compute_fp32_to_bf16`` (llama.cpp v0.5.0, ``ggml-impl.h``) rounds finite values
the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError, WouldLose
from qformats.formats.protocol import Match, Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, Scheme, Storage, Yes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = [
    "FLOAT_DTYPES",
    "NAME",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "layout",
    "read",
    "read_float",
    "scheme",
    "storages",
    "write",
    "write_float",
]

NAME = "hf"
SUFFIXES: frozenset[str] = frozenset({"weight"})
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}  # container's word -> torch's word
_WRITABLE = ("F32", "F16", "BF16")
_BITS = {"F32": 32, "F16": 16, "BF16": 16}


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A checkpoint without a quantization config."""
    return Match(NAME, config) if not config else None


def read_float(raw: RawTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start:stop`` (all but the last dimension flattened) of a float tensor in its own dtype, bits unchanged.

    A whole tensor (no ``stop``) keeps its shape; a range is (stop - start, K). ``Unsupported('not-float')`` for other dtypes.
    """
    import torch

    word = FLOAT_DTYPES.get(raw.dtype)
    if word is None:
        known = ", ".join(FLOAT_DTYPES)
        raise Unsupported("not-float", f"{raw.dtype} is not a float dtype", tensor=raw.name, hint=f"expected one of {known}")
    last = raw.rows if stop is None else stop
    if not 0 <= start <= last <= raw.rows:
        raise UsageError("row-range", f"rows {start}:{last} of a tensor of {raw.rows} rows", tensor=raw.name)
    wanted = prod(raw.shape) * _itemsize(raw.dtype)
    if raw.nbytes != wanted:
        raise BadFile("size", f"{raw.nbytes} bytes, expected {wanted} for {raw.dtype} {raw.shape}", tensor=raw.name)
    array = raw.row_range(start, last)
    if raw.dtype == "BF16":
        array = array.view("<i2")
    values = torch.from_numpy(array).view(getattr(torch, word))
    return values.reshape(raw.shape) if start == 0 and stop is None else values


def _itemsize(dtype: str) -> int:
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def write_float(tensor: Tensor, dtype: str, *, name: str | None = None) -> np.ndarray[Any, Any]:
    """``tensor`` (any float dtype, any shape) as an array of ``F32``, ``F16`` or ``BF16`` (``<f4``, ``<f2``; BF16 as ``<u2``).

    Rounds once, to nearest even: error at most 2^-24, 2^-11 or 2^-8 of the value (F16: 2^-25 below 2^-14). A finite value that
    would become infinite raises ``WouldLose`` (``f16-overflow``, ``bf16-overflow``, ``f32-overflow``); NaN and infinities pass through.
    """
    import torch

    if dtype not in _WRITABLE:
        raise UsageError("target-type", f"{dtype!r} is not a float type to write", hint=f"types: {', '.join(_WRITABLE)}")
    out = _round(tensor, getattr(torch, FLOAT_DTYPES[dtype]))
    lost = torch.isinf(out) & torch.isfinite(tensor)
    if bool(lost.any()):
        worst = float(tensor[lost].abs().max())
        raise WouldLose(
            f"{dtype.lower()}-overflow",
            f"{int(lost.sum())} values become infinite as {dtype}, the largest {worst:g}",
            tensor=name,
            hint="write bf16 or f32" if dtype == "F16" else "write f32",
        )
    out = out.contiguous()
    return out.view(torch.uint16).numpy() if dtype == "BF16" else out.numpy()


def _round(tensor: Tensor, dtype: Any) -> Tensor:
    import torch

    from qformats.real import Real, round_once

    if tensor.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        return round_once(Real(tensor), dtype)  # two plain steps would round twice
    return tensor.to(dtype)


def _weight(module: Module) -> RawTensor:
    raw = module.parts.get("weight")
    if raw is None:
        raise BadFile("missing-part", "there is no weight", tensor=module.name)
    return raw


def scheme(module: Module) -> Scheme:
    """A dense weight has no scheme of codes: ``Unsupported('dense')``. Dense modules are planned by dtype and shape."""
    raw = _weight(module)
    raise Unsupported("dense", f"is dense {raw.dtype}, not quantized", tensor=raw.name, hint="quantize it")


def read(module: Module, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of the module's weight; see ``read_float``."""
    return read_float(_weight(module), start, stop)


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The float type named by ``target`` (f32, f16, bf16), or all of them, the smallest first (bf16, f16, f32).

    Each has no parameters and ``options["float"]`` = torch's dtype word. ``UsageError`` for other types and any option.
    """
    if target.options:
        raise UsageError("target-option", f"hf takes no option {sorted(target.options)}", hint="name a type only, as in hf:bf16")
    names = ("BF16", "F16", "F32") if target.type is None else (target.type.upper(),)
    if names[0] not in _BITS:
        raise UsageError("target-type", f"hf type {target.type!r} cannot be written", hint="types: f32, f16, bf16")
    return [_storage(name) for name in names]


def _storage(name: str) -> Storage:
    bits = _BITS[name]
    return Storage(name.lower(), Integer(bits, signed=True), None, float(bits), scale_dtypes=(), options={"float": FLOAT_DTYPES[name]})


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """One part, ``weight``."""
    return {"weight": PartInfo(storage.type.upper(), shape)}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Codes never fit a float type; they are dequantized on the way."""
    return No("it holds codes, not floats")


def write(storage: Storage, tensor: QuantizedTensor | Tensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of a float tensor (n, K) already of the storage's dtype; ``Unsupported('form')`` otherwise."""
    import torch

    wanted = storage.options.get("float")
    if not isinstance(tensor, torch.Tensor) or str(tensor.dtype) != f"torch.{wanted}":
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise Unsupported("form", f"cannot be stored as {storage.type}: it is {found}, not a {wanted} tensor")
    return [Piece("weight", write_float(tensor.reshape(-1, tensor.shape[-1]), storage.type.upper()), start)]


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A dense checkpoint has no quantization config."""
    return {}
