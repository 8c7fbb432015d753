"""HQQ (half-quadratic quantization): integer codes with a float scale and a float zero point for each group.

Source: ``core/quantize.py``, ``core/bitpack.py``, ``core/utils.py`` of hqq 0.2.8, ``HqqConfig`` of transformers 5.23. One linear layer is

| leaf | dtype | shape | meaning |
|---|---|---|---|
| ``W_q`` | U8, I32 for 3 bits, the compute dtype with ``view_as_float`` | (rows / slabs, columns) | codes of the grouped matrix, in slabs |
| ``scale``, ``zero`` | compute dtype | (groups, 1) on axis 1, (1, groups) on axis 0, () without ``channel_wise`` | w = (q - zero) * scale |
| ``zero_scale`` | compute dtype | (2, ...) | zero, then scale, where they are stored as one |
| ``shape`` | I64 | (2) | of the weight |
| ``nbits``, ``group_size``, ``axis`` | I32 | () | ``nbits`` is F32 for 1.58 |
| ``packing``, ``unpack_view_dtype``, ``compute_dtype`` | U8 | (letters) | words |
| ten flags | U8 | () | ``state.SCALARS`` |

The grouped matrix is ``W.reshape(-1, group)`` on axis 1, one row a group, and ``W.reshape(group, -1)`` on axis 0, one column a group;
``slabs`` says how its rows share words. The formula is evaluated in the compute dtype: the difference is rounded, then the product.
An older pickled checkpoint may hold quantized scales and zeros (``stats``).
"""

from __future__ import annotations

from qformats.formats.hqq.pickled import PICKLE_FILES, flatten
from qformats.formats.hqq.settings import SUFFIXES, config_out, detect, module_warnings
from qformats.formats.hqq.weights import can_store, layout, read, scheme, storage_of, storages, write

NAME = "hqq"

__all__ = [
    "NAME",
    "PICKLE_FILES",
    "SUFFIXES",
    "can_store",
    "config_out",
    "detect",
    "flatten",
    "layout",
    "module_warnings",
    "read",
    "scheme",
    "storage_of",
    "storages",
    "write",
]
