"""Names that engines apply the rules of ``dynamic`` to: one for all matrices that they load into one layer. Torch-free.

vLLM looks a rule up under the fused layer's name alone (vllm 0.33.0, ``quantization/utils/gptq_utils.py get_dynamic_override``), and under
the module of all experts for these (``quantization/gptq_marlin.py get_moe_quant_method``); gptqmodel 7.7.0 ``utils/model.py
fused_unit_members`` knows the same units. gptqmodel itself matches the names of single matrices, which a fused name is none of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

__all__ = ["with_fused"]

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_WHOLES = {part: whole for whole, parts in _PARTS.items() for part in parts}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


def with_fused(names: Sequence[str], everything: Collection[str]) -> list[str]:
    """``names`` of one rule, and every fused layer of which all parts among ``everything``, two or more, are of these ``names``."""
    own: set[str] = set(names)
    parts: dict[str, list[str]] = {}
    for name in everything:
        if (whole := _whole_of(name)) is not None:
            parts.setdefault(whole, []).append(name)
    return [*names, *_agreed(parts, own, everything)]


def _agreed(parts: dict[str, list[str]], own: set[str], everything: Collection[str]) -> Iterator[str]:
    for whole, members in sorted(parts.items()):
        if whole not in everything and len(members) > 1 and own.issuperset(members):
            yield whole


def _whole_of(name: str) -> str | None:
    """The fused layer that a matrix is part of, None for one of its own."""
    expert = _EXPERT.match(name)
    if expert is not None:
        return expert[1]
    base, dot, last = name.rpartition(".")
    return f"{base}{dot}{_WHOLES[last]}" if last in _WHOLES else None
