"""GPTQ checkpoints: AutoGPTQ, GPTQModel, GPTQ-for-LLaMa, optimum, and AutoRound's dialect of them.

Reference code: gptqmodel 7.7.0 ``nn_modules/qlinear/__init__.py``, auto-gptq 0.7.1 ``nn_modules/qlinear/qlinear_cuda_old.py``,
auto-round 0.16.1 ``auto_round_extension/torch/qlinear_torch_zp.py``. K = in_features, N = out_features, b = bits, g = group size,
G = ceil(K / g), z = true zero point; ``W[n, k] = scale[n, grp(k)] * (code[n, k] - z[n, grp(k)])``.

| tensor | dtype | shape | meaning |
|---|---|---|---|
| ``qweight`` | int32 | (ceil(K*b/32), N) | codes packed along K as one bit stream (``qformats.bits``), rows of words |
| ``qzeros`` | int32 | (G, ceil(N*b/32)) | zero points packed along N as the same stream; z or z - 1 (``zeros``) |
| ``scales`` | float16 (bfloat16, float32) | (G, N) | |
| ``g_idx`` | int32 | (K,) | group of input column k; absent, empty or all zero means k // g |
| ``bias`` | float | (N,) | |

Bit order, b = 4: ``qweight[r, n]`` holds codes k = 8 r … 8 r + 7 of output n, the first in the low bits: codes 1 2 3 4 5 6 7 8 are
0x87654321. Codes are always in the original order of K; act-order permutes only the assignment to groups. GPTQModel can use words of 8, 16
or 64 bits (``pack_dtype``); the width is taken from the tensors' dtype. The bits of a last word beyond K or N are written as zeros
(by GPTQModel's v1 arithmetic in qzeros: borrows) and not kept.

Under ``gptq_p`` 3, 5, 6 and 7 bits are planar (``qformats.bits``; 2, 4, 8 bits equal the stream), K and N multiples of 32, z as it is.

Marlin (``checkpoint_format: marlin``, ``is_marlin_format: true``; auto-gptq 0.7.1 ``nn_modules/qlinear/qlinear_marlin.py``) has other
tensors, 4 bits, z = 8, no act-order; the arrangement is in ``qformats.formats.marlin``:

| tensor | dtype | shape |
|---|---|---|
| ``B`` | int32 | (K / 16, 2 N), codes in tiles of 16 x 16 |
| ``s`` | float16 | (G, N), columns permuted; G = K / 128 or 1 |

``format=marlin`` writes it under ``checkpoint_format`` alone: GPTQModel refuses a config that has the key ``is_marlin_format``.

Refused by name: 2:4 sparse Marlin, BitBLAS, QQQ, quantized embeddings.
"""

from __future__ import annotations

from qformats.formats.gptq.settings import config_beside, config_out, detect, harmonize, module_settings, reconcile, side_files
from qformats.formats.gptq.shapes import SUFFIXES, scheme
from qformats.formats.gptq.weights import ROW_MULTIPLE, can_store, layout, module_warnings, read, storage_of, storages, write

NAME = "gptq"
CONV1D = True

__all__ = [
    "CONV1D",
    "NAME",
    "ROW_MULTIPLE",
    "SUFFIXES",
    "can_store",
    "config_beside",
    "config_out",
    "detect",
    "harmonize",
    "layout",
    "module_settings",
    "module_warnings",
    "read",
    "reconcile",
    "scheme",
    "side_files",
    "storage_of",
    "storages",
    "write",
]
