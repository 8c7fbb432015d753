"""AWQ checkpoints: AutoAWQ, GPTQModel, and AutoRound's dialect and export.

Reference code: autoawq 0.2.9 ``modules/linear/gemm.py``, ``gemv.py``, ``utils/packing_utils.py``; gptqmodel 7.7.0; auto-round 0.16.1
``export/export_to_awq``. K = in_features, N = out_features, g = group size, G = K / g (consecutive groups, no act-order);
``W[n, k] = scale[n, k // g] * (code[n, k] - z[n, k // g])``; zero points are stored as they are.

| tensor | GEMM | GEMV |
|---|---|---|
| ``qweight`` int32 | (K, N / 8), packed along N in the order 0 2 4 6 1 3 5 7 | (N, K / 8), packed along K in natural order |
| ``qzeros`` int32 | (G, N / 8), as ``qweight``; may be absent where ``zero_point`` is false (z = 8) | (N, Zw), groups in natural order |
| ``scales`` float16 | (G, N) | (N, 8 Zw) |
| ``bias`` float16 | (N,) | (N,) |

Zw = ceil(ceil(G / 8) / m) * m with m = 1 for g >= 128, 2 for 64, 4 for 32 (``calculate_zeros_width``); beyond G everything is zero.
Bit order of GEMM: field i (bits 4 i) of word (k, c) holds column 8 c + (0 2 4 6 1 3 5 7)[i]: columns 1 2 3 4 5 6 7 8 are 0x86427531.
GEMV: word (n, c) holds k = 8 c … 8 c + 7, the first in the low bits: codes 1 2 3 4 5 6 7 8 are 0x87654321.

Other widths (GEMM only): GPTQModel writes every width but 4 as a plain stream along N without the order; AutoRound writes 5, 6 and 7
bits in the order of eight and then as a stream. The config tells whose file it is; if it does not, the order is not known and the file is
refused.

GEMV_FAST (``modules/linear/gemv_fast.py``) and llm-awq (``backend: llm-awq``), which calls ``qzeros`` ``scaled_zeros``; see ``fast``:

| tensor | dtype | shape |
|---|---|---|
| ``qweight`` | int16 | (N / 4, K): word 16 r + 8 h + j of 64 holds row 4 i + r, columns 32 h + j + (0 8 16 24) |
| ``scales``, ``qzeros`` | float16 (llm-awq: the model's) | (8 Zw, N); the latter is -(scale * z), or any offset |

Marlin (``version: marlin``): ``qweight`` int32 (K / 16, 2 N), ``scales`` (G, N), no zero points (z = 8); see ``qformats.formats.marlin``.
``exllama``, ``exllamav2`` and ``ipex`` name kernels: their files are GEMM. Refused by name: BitBLAS. Smoothing is folded into the
neighbouring layers' weights.
"""

from __future__ import annotations

from qformats.formats.awq.settings import config_out, detect, module_settings, side_files
from qformats.formats.awq.shapes import SUFFIXES
from qformats.formats.awq.weights import (
    ROW_MULTIPLE,
    can_store,
    layout,
    module_warnings,
    read,
    scheme,
    storage_of,
    storages,
    write,
)

NAME = "awq"
GROUPS = (64, 32)  # the smaller groups of AutoAWQ's kernels
ONE_TYPE = True  # ``bits``, ``group_size`` and ``version`` are stated once

__all__ = [
    "GROUPS",
    "NAME",
    "ONE_TYPE",
    "ROW_MULTIPLE",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "layout",
    "module_settings",
    "module_warnings",
    "read",
    "scheme",
    "side_files",
    "storage_of",
    "storages",
    "write",
]
