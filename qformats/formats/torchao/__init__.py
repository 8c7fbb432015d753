"""torchao's tensor classes as transformers 5 saves them: parts in safetensors, what they mean in ``__metadata__``.

Source: torchao 0.18.0 ``prototype/safetensors``, ``quantization/quantize_/workflows``, ``prototype/mx_formats``. The parameter ``M.weight``
has parts ``M._weight_<part>``; ``__metadata__["M.weight"]`` is JSON with its class ``_type``, attributes ``_data`` and
``_tensor_data_names``; ``__metadata__["tensor_names"]`` lists all parameters, dense ones too (class ``Tensor``). g = columns of a block.

| class | parts | weight |
|---|---|---|
| Int8Tensor | qdata I8 (N, K); scale F32 (N, K/g), any block; zero_point I8, the same shape, or absent | (q - z) s |
| IntxUnpackedToInt8Tensor | qdata I8 (N, K), a code a byte for any ``target_dtype``; scale, zero_point (I8, float) (N, K/g) | (q - z) s |
| Float8Tensor | qdata F8_E4M3 or F8_E5M2 (N, K); scale F32 (N, 1), one, or (N/128, K/128) | q s |
| Int4Tensor | qdata I8 (N, K/2), signed codes, the even column in the low bits; scale, zero_point float (K/g, N) | q s + z |
| Int4TilePackedTo4dTensor | qdata I32 (N/8, K/(16 i), 32, i/2) (``tiles``), sizes padded; scale_and_zero BF16 (K/g, N, 2) | (q - 8) s + z |
| Int4PlainInt32Tensor (XPU) | qdata I32 (N, K/8), column k in bits 4 (k mod 8); scale float, zero_point I8 (K/g, N) | (q - z) s |
| MXTensor | qdata fp8 (N, K), fp6 U8 (N, K), fp4 U8 (N, K/2), low bits first; scale F8_E8M0 (N, K/32) or swizzled | q 2^e |
| NVFP4Tensor | qdata U8 (N, K/2), low bits first; scale F8_E4M3 (N, K/16) or swizzled; per_tensor_scale F32 () or absent | q s t |

Codes 1 2 3 4 5 6 7 8 in columns 0 … 7 are, packed in bytes, 21 43 65 87. Stacks of experts (E, N, K) have one more dimension in front.
``act_pre_scale`` multiplies the inputs and is read as one more scale, one number a column. ``act_quant_scale`` and the like belong to
the activations. int4's formula with a float zero point is that of ``int4_row_quantize_zp`` in FBGEMM (``quantize.py`` of ``fbgemm_gpu``
1.3), the XPU packing that of ``WeightInt4PackKernel.cpp`` in torch-xpu-ops.
"""

from __future__ import annotations

from qformats.formats.torchao.inputs import inputs
from qformats.formats.torchao.names import EXTRAS, SUFFIXES, join_name, split_name
from qformats.formats.torchao.pickled import PICKLED_CLASSES, flatten
from qformats.formats.torchao.settings import config_out, detect, metadata_out, module_warnings
from qformats.formats.torchao.shapes import scheme
from qformats.formats.torchao.targets import ROW_MULTIPLE, can_store, embeddings, layout, stacks, storage_of, storages
from qformats.formats.torchao.weights import read, write

NAME = "torchao"
BARE = frozenset({"_qdata"})
KEEPS_AXES = True
STACKS = (  # torchao 0.18 in transformers 5.23 on a CPU
    "of torchao's tensors transformers multiplies a stack in Float8Tensor alone, and with outputs as rows"
)

__all__ = [
    "BARE",
    "EXTRAS",
    "KEEPS_AXES",
    "NAME",
    "PICKLED_CLASSES",
    "ROW_MULTIPLE",
    "STACKS",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "embeddings",
    "flatten",
    "inputs",
    "join_name",
    "layout",
    "metadata_out",
    "module_warnings",
    "read",
    "scheme",
    "split_name",
    "stacks",
    "storage_of",
    "storages",
    "write",
]
