"""Quanto (optimum-quanto): 8-bit integers or floats under one scale a row, 4- and 2-bit integers with scale and shift for each group.

Source: ``tensor/qbytes.py``, ``tensor/qbits.py``, ``tensor/packed.py``, ``nn/qmodule.py``, ``models/transformers_models.py`` of
optimum-quanto 0.2.7. One linear layer (N, K) is

| leaf | dtype | shape | meaning |
|---|---|---|---|
| ``weight._data`` | I8, F8_E4M3, F8_E4M3FNUZ, F8_E5M2 | (N, K) | codes of 8 bits: w = scale * q |
| ``weight._data._data`` | U8 | (rows / slabs, columns) | codes of 4 or 2 bits in slabs, the first in the lowest bits |
| ``weight._scale`` | model's | (N, 1), () for one row; (groups, 1) beside packed codes | |
| ``weight._shift`` | model's, U8 | (groups, 1) | w = scale * q - shift; U8: w = scale * (q - shift) |
| ``input_scale``, ``output_scale`` | model's | () | of the activations, 1 where they are not quantized |

The packed matrix is ``W.reshape(-1, group)``, or W where rows are not grouped. Neither the group nor K is stored: the group follows from K
by ``group_of``, and K is known to the model alone. ``quanto_qmap.json`` (``quantization_map.json``) says which layers are quantized and
how; config.json says nothing.
"""

from __future__ import annotations

from qformats.formats.quanto.settings import CONFIG_INSIDE, config_beside, config_out, detect, side_files
from qformats.formats.quanto.weights import (
    EXTRAS,
    SUFFIXES,
    WRITTEN,
    can_store,
    inputs,
    layout,
    module_warnings,
    outputs,
    read,
    scheme,
    storage_of,
    storages,
    write,
)

NAME = "quanto"
NEEDS_COLUMNS = True  # the parts do not say K
NEEDS_DTYPE = True  # its products are of the dtype of the scales, and the layers between are not cast

__all__ = [
    "CONFIG_INSIDE",
    "EXTRAS",
    "NAME",
    "NEEDS_COLUMNS",
    "NEEDS_DTYPE",
    "SUFFIXES",
    "WRITTEN",
    "can_store",
    "config_beside",
    "config_out",
    "detect",
    "inputs",
    "layout",
    "module_warnings",
    "outputs",
    "read",
    "scheme",
    "side_files",
    "storage_of",
    "storages",
    "write",
]
