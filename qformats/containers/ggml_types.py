"""The ggml tensor types: id, weights per block, bytes per block. Only sizes are known here, never a block's meaning.

Ids from ``enum ggml_type`` (llama.cpp v0.5.0, ``ggml/include/ggml.h``), sizes from the ``static_assert`` lines behind each
``block_*`` struct (``ggml/src/ggml-common.h``). gguf-py 0.19 agrees except Q8_1 (it says 40 bytes, the C struct has 36) and
Q2_0 (unknown to it). Blocks run along the last (row-major) dimension and never span two rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from qformats.errors import BadFile, Unsupported

__all__ = ["GGML_TYPES", "GGML_TYPE_NAMES", "MAX_DIMS", "MAX_ELEMENTS", "REMOVED_TYPES", "tensor_nbytes", "type_name"]

MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 2**63 - 1  # ggml keeps element counts and byte sizes in int64

GGML_TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 36), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18),
}  # fmt: skip
GGML_TYPE_NAMES: dict[int, str] = {number: name for name, (number, _, _) in GGML_TYPES.items()}
# ids that once existed; every current loader rejects them
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


def type_name(number: int, *, path: str | None = None, tensor: str | None = None, offset_bytes: int | None = None) -> str:
    """Return the name of ggml type ``number``; raises ``Unsupported`` ``gguf-type-removed`` or ``gguf-type-unknown``."""
    name = GGML_TYPE_NAMES.get(number)
    if name is not None:
        return name
    if number in REMOVED_TYPES:
        raise Unsupported(
            "gguf-type-removed",
            f"ggml type {number} ({REMOVED_TYPES[number]}) was removed from GGUF",
            path=path,
            tensor=tensor,
            offset_bytes=offset_bytes,
            hint="quantize the original model again; runtime repacking replaced this type",
        )
    raise Unsupported(
        "gguf-type-unknown",
        f"ggml type {number} is not a mainline type; known ids are 0 to {max(GGML_TYPE_NAMES)}",
        path=path,
        tensor=tensor,
        offset_bytes=offset_bytes,
        hint="the file is corrupt or was written by a fork with its own types",
    )


def tensor_nbytes(
    dtype: str, shape: Sequence[int], *, path: str | None = None, tensor: str | None = None, offset_bytes: int | None = None
) -> int:
    """Return the bytes of a ggml tensor; ``shape`` in row-major order, ``()`` is one element.

    Raises ``Unsupported('gguf-type-unknown')`` for a name not in ``GGML_TYPES`` and ``BadFile`` for more than four dimensions
    (``gguf-dims``), one of zero (``gguf-dimension-zero``: llama.cpp divides by it), a negative or overflowing size (``gguf-size``)
    or a ragged last dimension (``gguf-row-size``).

    >>> tensor_nbytes("Q4_0", (2, 64))
    72
    """

    def bad(code: str, message: str) -> BadFile:
        return BadFile(code, message, path=path, tensor=tensor, offset_bytes=offset_bytes)

    if dtype not in GGML_TYPES:
        raise Unsupported("gguf-type-unknown", f"{dtype!r} is not a ggml type", path=path, tensor=tensor)
    _, block, block_nbytes = GGML_TYPES[dtype]
    if len(shape) > MAX_DIMS:
        raise bad("gguf-dims", f"{len(shape)} dimensions, ggml has at most {MAX_DIMS}")
    count = 1
    for size in shape:
        if not 0 <= size <= MAX_ELEMENTS:
            raise bad("gguf-size", f"dimension {size} is outside 1 to 2^63 - 1")
        if not size:
            raise bad("gguf-dimension-zero", f"shape {tuple(shape)} has a dimension of zero, which loaders divide by")
        count *= size
    if count >= MAX_ELEMENTS or count // block * block_nbytes >= MAX_ELEMENTS:
        raise bad("gguf-size", f"shape {tuple(shape)} has {count} elements, which overflows 63 bits")
    if (shape[-1] if shape else 1) % block:
        raise bad("gguf-row-size", f"rows of {shape[-1] if shape else 1} elements are not whole {dtype} blocks of {block}")
    return count // block * block_nbytes
