"""What tensor parallelism leaves of each matrix: sizes of one part, which an engine's kernels must be able to take.

An engine cuts a matrix along its inputs (its JSON's ``cut_inputs``: vLLM's and SGLang's ``RowParallelLinear``) or its outputs
(``cut_outputs``), by the last part of its name; of other names nothing is said. Experts are cut along their intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qformats.errors import UsageError

__all__ = ["capability_of", "heads_of", "shards"]

_EXPERTS = re.compile(r"(^|\.)experts\.")
_GPU = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?")


def capability_of(text: str | None) -> int | None:
    """A GPU's compute capability as a number: ``sm_90``, ``9.0`` and ``90`` are 90. Raises ``UsageError('gpu-capability')``."""
    if text is None:
        return None
    found = _GPU.fullmatch(text.strip().lower())
    if found is None:
        hint = "write sm_90, 9.0 or 90 (nvidia-smi --query-gpu=compute_cap)"
        raise UsageError("gpu-capability", f"{text!r} is no compute capability", hint=hint)
    return int(found[1]) * 10 + int(found[2])


def shards(facts: Mapping[str, Any], lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every matrix in codes that the engine cuts, with ``name bits group inputs outputs expert`` and

    ``cut`` (``inputs`` or ``outputs``), ``part_inputs`` and ``part_outputs`` (of one part; null where it is not whole), ``uneven``,
    ``block_outputs`` and ``block_inputs`` (of scales by blocks), ``tensor_parallel``.
    """
    parts = int(facts["tensor_parallel"])
    found: list[dict[str, Any]] = []
    for module in facts["modules"]:
        leaf = str(module["name"]).rsplit(".", 1)[-1]
        cut = next((way for way in ("inputs", "outputs") if leaf in lists.get(f"cut_{way}", ())), None)
        if cut is not None and "problem" not in module:
            found.append(_shard(module, leaf, cut, parts, facts))
    return found


def _shard(module: Mapping[str, Any], leaf: str, cut: str, parts: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    copied = facts["kv_heads"] if leaf in ("k_proj", "v_proj") else None
    ways = min(parts, copied) if copied and parts % copied == 0 else parts  # heads of keys are copied where there are fewer than parts
    size, left = module[cut] // ways, module[cut] % ways
    rows, columns = _block(facts["quantization"])
    return {
        **{key: module[key] for key in ("name", "bits", "group", "inputs", "outputs")},
        "expert": _EXPERTS.search(str(module["name"])) is not None,
        "cut": cut,
        "uneven": left != 0,
        "part_inputs": module["inputs"] if cut == "outputs" else None if left else size,
        "part_outputs": module["outputs"] if cut == "inputs" else None if left else size,
        "block_outputs": rows,
        "block_inputs": columns,
        "tensor_parallel": parts,
    }


def _block(quantization: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """``weight_block_size`` if it is two numbers."""
    said = quantization.get("weight_block_size")
    whole = isinstance(said, Sequence) and len(said) == 2 and all(isinstance(size, int) and size > 0 for size in said)
    return (said[0], said[1]) if whole and said is not None else (None, None)


def heads_of(config: Mapping[str, Any]) -> Iterator[int | None]:
    """``num_attention_heads`` and ``num_key_value_heads`` of config.json or its ``text_config``."""
    text = config.get("text_config")
    holder = text if isinstance(text, dict) and "num_attention_heads" in text else config
    for key in ("num_attention_heads", "num_key_value_heads"):
        found = holder.get(key)
        yield found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
