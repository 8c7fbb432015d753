"""ggml's plain float types F32, F16 and BF16: little-endian values, no blocks. Written here only from a tensor already of that dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformats.errors import Unsupported
from qformats.scheme import Integer, Storage

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FLOATS", "storage", "to_bytes"]

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # ggml type -> torch dtype
_BITS = {"F32": 32, "F16": 16, "BF16": 16}


def storage(name: str) -> Storage:
    """The float type as a storage: no parameters; ``options["float"]`` is torch's word for the dtype."""
    bits = _BITS[name]
    return Storage(name.lower(), Integer(bits, signed=True), None, float(bits), scale_dtypes=(), options={"float": FLOATS[name]})


def to_bytes(target: Storage, tensor: Any) -> np.ndarray[Any, Any]:
    """A torch tensor (n, K) of the storage's dtype as uint8 (n, row bytes); ``Unsupported('form')`` for anything else."""
    import torch

    wanted = target.options.get("float")
    if not isinstance(tensor, torch.Tensor) or str(tensor.dtype) != f"torch.{wanted}":
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise Unsupported("form", f"cannot be stored as {target.type}: it is {found}, not a {wanted} tensor")
    array: np.ndarray[Any, Any] = tensor.contiguous().reshape(-1, tensor.shape[-1]).view(torch.uint8).numpy()
    return array
