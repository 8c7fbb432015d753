"""Which dtype floats get: the one named, the source's, or the smallest that holds every value."""

from __future__ import annotations

from converters.facts import MATRIX_KINDS, Facts
from converters.options import FLOAT_WORDS
from converters.sources import Slab, read_rows, slabs
from qformats.architectures.mapping import TensorMap
from qformats.formats.dense import FLOAT_DTYPES

__all__ = ["float_dtype", "float_kind"]


def float_dtype(facts: Facts, tensor: TensorMap, found: set[str], named: str | None) -> str:
    """The container's dtype of floats stored in the dtypes ``found``; ``named``: the type that the user wants."""
    if named is not None:
        return FLOAT_WORDS[named]
    source = next(iter(found)) if len(found) == 1 else "F32"
    if facts.to_gguf and named is None and facts.mix.file_type is not None and facts.checkpoint.gguf is not None and not tensor.altered:
        return source  # what llama.cpp does not quantize, it copies
    if facts.to_gguf:
        matrix = len(tensor.shape) >= 2 and tensor.kind in MATRIX_KINDS
        return (source if source in ("F16", "BF16") else "F32") if matrix else "F32"
    wanted = facts.dtypes.get(tensor.name)
    if wanted is not None:
        return wanted
    if facts.options.target.type in FLOAT_WORDS:
        return FLOAT_WORDS[facts.options.target.type]
    if source in ("F16", "BF16") and facts.checkpoint.gguf is None and not tensor.altered:
        return source
    return _smallest_exact(facts, tensor, source)


def _smallest_exact(facts: Facts, tensor: TensorMap, source: str) -> str:
    """The smallest dtype that holds every value."""
    order = [facts.float_default, *(d for d in ("F16", "BF16") if d != facts.float_default)]
    if source in order and not tensor.altered:
        return source
    if facts.options.header_only:
        return "F32"
    for dtype in order:
        if _is_exact(facts, tensor, dtype):
            if len(tensor.shape) > 1:
                facts.float_default = dtype  # the rest of the model follows its first matrix where it can
            return dtype
    return "F32"


def _is_exact(facts: Facts, tensor: TensorMap, dtype: str) -> bool:
    """Whether every value is a number of ``dtype``."""
    import torch

    target = getattr(torch, FLOAT_DTYPES[dtype])
    probe = facts.job(tensor, "float", "exact", "", dtype)
    slab = Slab(facts.checkpoint)
    for start, stop in slabs(probe, facts.checkpoint):
        values = read_rows(probe, slab, facts.checkpoint, start, stop)
        assert isinstance(values, torch.Tensor)
        exact = tensor.alter(values.to(torch.float64))
        if bool(((exact.to(torch.float32).to(target).to(torch.float64) != exact) & ~torch.isnan(exact)).any()):
            return False
    return True


def float_kind(facts: Facts, tensor: TensorMap, dtype: str) -> tuple[str, str]:
    """The kind and the reason of floats as ``dtype``."""
    found = {facts.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.leaf}
    widening = all((a, dtype) in {("F16", "F32"), ("BF16", "F32")} or a == dtype for a in found)
    if widening and not tensor.altered:
        return "exact", f"{'/'.join(sorted(found))} values are {dtype} values"
    if not facts.options.header_only and _is_exact(facts, tensor, dtype):
        return "exact", f"every value is a {dtype} number" + (f" after {tensor.altered}" if tensor.altered else "")
    return "dequantized", f"rounded once to {dtype}" + (f" after {tensor.altered}" if tensor.altered else "")
