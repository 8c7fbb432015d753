"""compressed-tensors checkpoints (llm-compressor, vLLM, Red Hat AI): every format the library writes or wrote.

Reference code: compressed-tensors 0.20.0 ``compressors/``; 0.17.0, 0.13.0 and 0.9.4 for what later releases dropped. N = out_features,
K = in_features, b = bits, G = groups of a row, z = zero point, ``W = scale * (code - z)``.

| format | tensor | dtype | shape |
|---|---|---|---|
| pack-quantized | ``weight_packed`` | int32 | (N, ceil(K*b/32)) |
| | ``weight_scale`` | a float | (N, G), (N, 1) or (1,) |
| | ``weight_shape`` | int64 | (2,): N, K |
| asymmetric | ``weight_zero_point`` | int32 | (ceil(N*b/32), G), packed along N |
| one scale for all | ``weight_zero_point`` | int8 | (1,), plain: z - 2^(b-1) |
| up to 0.18 with actorder | ``weight_g_idx`` | int32 | (K,): the group of each column, K/G columns in each |
| int-quantized, naive-quantized | ``weight``, ``weight_scale`` | int8, a float | (N, K), as above |
| asymmetric | ``weight_zero_point`` | int8 | that of the scale |
| float-quantized, naive-quantized | ``weight`` | float8_e4m3fn | (N, K) |
| | ``weight_scale`` | a float | (1,), (N, 1), or one for each tile of ``block_structure`` |
| nvfp4-pack-quantized | ``weight_packed`` | uint8 | (N, K/2) of e2m1 |
| | ``weight_scale`` | float8_e4m3fn | (N, K/16) |
| | ``weight_global_scale`` | float32 | (1,), it divides |
| mxfp4-, mxfp6-pack-quantized | ``weight_packed`` | uint8 | (N, K/2) of e2m1, (N, 3K/4) of e2m3 |
| | ``weight_scale`` | uint8 | (N, K/32): 2^(s - 127) |
| mxfp8-quantized | ``weight``, ``weight_scale`` | float8_e4m3fn, uint8 | (N, K), (N, K/32) |
| dense | ``weight`` | a float | (N, K) |
| sparse bitmasks (up to 0.14) | see ``sparse`` | | |

Bit order: a packed integer is stored unsigned, q + 2^(b-1), the first column in the lowest bits: q = -7 -6 -5 … 0 at b = 4 is 0x87654321.
Widths 3, 5, 6, 7 are one bit stream from release 0.18 on (``qformats.bits``), before that ``32 // b`` values in a word, its upper bits
unused; shapes tell them apart, ``version`` where both have one shape. Small floats: the even column in the low nibble, four e2m3 in
three bytes, the first in the lowest bits.

Refused by name: ``marlin-24``, transforms that run with the model. Read only: sparse and dense weights, stacked experts (E, N, K).
Activation and cache scales (``EXTRAS``) are copied.
"""

from __future__ import annotations

from qformats.formats.compressed_tensors.config import NAME, activations, detect
from qformats.formats.compressed_tensors.config_write import config_out, harmonize, with_activations
from qformats.formats.compressed_tensors.inputs import inputs
from qformats.formats.compressed_tensors.shapes import SUFFIXES, scheme
from qformats.formats.compressed_tensors.storages import can_store, layout, storage_of, storages
from qformats.formats.compressed_tensors.weights import ROW_MULTIPLE, loading_warnings, module_warnings, read, write

EXTRAS = frozenset({f"{what}_{kind}" for what in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point", "global_scale")})
INPUT_SCALES = {"fp8": (("input_scale",), False), "int8": (("input_scale",), False), "nvfp4": (("input_global_scale",), True)}
INPUT_SCALE_SHAPE = (1,)
GROUPS = (64, 32)

__all__ = [
    "EXTRAS",
    "GROUPS",
    "INPUT_SCALES",
    "INPUT_SCALE_SHAPE",
    "NAME",
    "ROW_MULTIPLE",
    "SUFFIXES",
    "activations",
    "can_store",
    "config_out",
    "detect",
    "harmonize",
    "inputs",
    "layout",
    "loading_warnings",
    "module_warnings",
    "read",
    "scheme",
    "storage_of",
    "storages",
    "with_activations",
    "write",
]
