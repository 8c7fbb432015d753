"""bitsandbytes: NF4 and FP4 weights (``fourbit``, with the JSON blob in ``state``) and LLM.int8() (``int8``); configs in ``settings``.

Facts are read off bitsandbytes 0.50.2 and transformers 5.23. A module with any of ``SUFFIXES`` is quantized, whatever the config says of
skipped modules; ``has_fp16_weights`` checkpoints hold none, so their weights are plain floats. ``weight`` belongs to the codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile
from qformats.formats.bitsandbytes import fourbit, int8
from qformats.formats.bitsandbytes.settings import NAME, config_out, detect, storages
from qformats.formats.protocol import Inputs, Module, PartInfo, Piece
from qformats.scheme import No, Scheme, Storage, Yes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = [
    "CONV1D",
    "NAME",
    "ONE_TYPE",
    "STACKS",
    "SUFFIXES",
    "can_store",
    "config_out",
    "dequantize",
    "detect",
    "inputs",
    "layout",
    "module_warnings",
    "read",
    "renewed",
    "scheme",
    "storage_of",
    "storages",
    "write",
]

SUFFIXES = fourbit.SUFFIXES | int8.SUFFIXES
ONE_TYPE = True  # transformers, ``utils/quantization_config.py``: one table, or eight bits
CONV1D = True  # transposed before they are quantized: transformers, ``integrations/bitsandbytes.py``
STACKS = "bitsandbytes has codes for linear layers alone, and transformers leaves such a parameter in floats itself"


def _is_int8(module: Module) -> bool:
    return not any(leaf in fourbit.SUFFIXES for leaf in module.parts)


def _room(storage: Storage) -> Any:
    return int8 if storage.type == "int8" else fourbit


def scheme(module: Module) -> Scheme:
    """The scheme of the weight (N, K), from the headers, the JSON blob and the maps; ``BadFile`` where they disagree."""
    return int8.scheme(module) if _is_int8(module) else fourbit.scheme(module)


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` in the canonical form that ``fourbit`` and ``int8`` describe."""
    return int8.read(module, start, stop, codes=codes) if _is_int8(module) else fourbit.read(module, start, stop, codes=codes)


def dequantize(module: Module, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``start:stop`` as bitsandbytes rounds them, bit for bit; by default in the dtype it gives.

    The same as ``read(…).dequantize(dtype, like="bitsandbytes")``; 4-bit codes come straight from the packed bytes.
    """
    import torch

    if _is_int8(module):
        return int8.read(module, start, stop).dequantize(dtype or torch.float32, like=NAME)
    wanted: torch.dtype = dtype or getattr(torch, fourbit.state_of(module).dtype)
    made = fourbit.dequantize(module, start, stop, wanted)
    return fourbit.read(module, start, stop).dequantize(wanted, like=NAME) if made is None else made


def storage_of(module: Module) -> Storage:
    """The storage that ``write`` makes these very parts of."""
    return int8.storage_of(module) if _is_int8(module) else fourbit.storage_of(module)


def renewed(storage: Storage) -> Storage:
    """The storage without the offset of the double-quantized scales, which follows from the codes."""
    return replace(storage, options={key: value for key, value in storage.options.items() if key != "offset"})


def inputs(module: Module) -> Inputs | None:
    """LLM.int8(): int8 for each token, columns with a magnitude of at least the config's threshold as they are; 4-bit weights: None.

    bitsandbytes 0.50.2 ``backends/default/ops.py`` (``int8_vectorwise_quant``), in float16; transformers' threshold is 6 by default.
    """
    if not _is_int8(module):
        return None
    threshold = module.match.config.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold < 0:
        raise BadFile("config-value", f"llm_int8_threshold is {threshold!r}, expected a number of at least 0")
    return Inputs("int8", outliers=float(threshold), steps="float16")


def module_warnings(module: Module) -> list[str]:
    """Maps that are not bitsandbytes' own, and words of codes that are not those the config names: transformers would cast them."""
    if _is_int8(module):
        return []
    told = fourbit.map_warnings(module)
    claimed = module.match.config.get("bnb_4bit_quant_storage")
    found = fourbit.storage_of(module).options["storage"]
    if isinstance(claimed, str) and claimed != found:
        told.append(f"its codes are in words of {found}, but the config names {claimed}, into which transformers would cast them")
    return told


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K) in ``storage``."""
    parts: dict[str, PartInfo] = _room(storage).layout(storage, shape)
    return parts


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands."""
    answer: Yes | No = _room(storage).can_store(storage, scheme)
    return answer


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape`` as pieces; ``Unsupported('form')`` for a tensor in another form."""
    pieces: list[Piece] = _room(storage).write(storage, tensor, start, shape)
    return pieces
