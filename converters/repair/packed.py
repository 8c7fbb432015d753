"""GPTQ's small planes and labels: ``g_idx`` that is missing, zero points under the wrong label, what the config says of both.

How zero points are stored and how a file tells is in ``qformats.formats.gptq.zeros``; what loaders do without a ``g_idx`` is in the rules
of ``converters.lint``. Zero points are only written anew where all of a module are 2^(bits - 1): no information is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.repair.mending import Mending
from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import QFormatError
from qformats.formats.autoround import DIALECT
from qformats.formats.gptq.zeros import encode
from qformats.formats.protocol import Module
from qformats.scheme import Storage

__all__ = ["mend_act_order", "mend_index_planes", "mend_zero_points"]

_WORDS = {"I8": 8, "I16": 16, "I32": 32, "I64": 64}


@dataclass(frozen=True)
class _Weight:
    module: Module
    storage: Storage

    @property
    def index(self) -> str:
        return str(self.storage.options.get("g_idx"))

    @property
    def is_stored_as_it_is(self) -> bool:
        return self.storage.options.get("zeros") == "v2"


def _weights(mending: Mending) -> list[_Weight]:
    """Weights in GPTQ's words; those that contradict the config are left out."""
    checkpoint = mending.checkpoint
    if checkpoint is None or checkpoint.format != "gptq":
        return []
    return list(_readable(checkpoint))


def _readable(checkpoint: Checkpoint) -> Iterator[_Weight]:
    form = registry.format_module(checkpoint.format)
    for name, module in checkpoint.modules.items():
        if checkpoint.is_quantized(name) and "qzeros" in module.parts:
            try:
                yield _Weight(module, form.storage_of(module))
            except QFormatError:  # what is wrong with it is said by lint
                continue


def mend_index_planes(mending: Mending) -> None:
    """``g_idx`` where there is none, or one of zeros: consecutive groups, as every reader takes its absence."""
    if mending.checkpoint is not None and mending.checkpoint.match.dialect == DIALECT:
        return  # AutoRound's own layers have none
    done = []
    for weight in _weights(mending):
        groups = weight.module.parts["scales"].shape[0]
        if weight.index in ("absent", "empty") or (weight.index == "zeros" and groups > 1):
            parts = weight.module.parts
            columns = int(weight.storage.options["in_features"])  # type: ignore[call-overload]
            group = weight.storage.group or columns
            name = parts["g_idx"].name if "g_idx" in parts else parts["qweight"].name.removesuffix("qweight") + "g_idx"
            plane = np.arange(columns, dtype=np.int32) // np.int32(group)
            mending.set_tensor(parts["qweight"], RawTensor.from_array(name, "I32", plane))
            done.append(weight.module.name)
    if done:
        why = "loaders that have the tensor fill it with whatever is in memory where the file has none, or take zeros for one group"
        mending.mend("g-idx", "g_idx of consecutive groups written", why, tuple(done))


def mend_act_order(mending: Mending) -> None:
    """``desc_act`` as ``g_idx`` has it."""
    stated, weights = mending.stated, _weights(mending)
    if stated is None or not weights or stated.get("dynamic") or "desc_act" not in stated:
        return
    ordered = any(weight.index == "act-order" for weight in weights)
    if all(weight.module.parts["scales"].shape[0] == 1 for weight in weights):
        return  # one group: the order says nothing
    if bool(stated["desc_act"]) != ordered:
        why = "g_idx is act-order" if ordered else "every g_idx is of consecutive groups, and some loaders refuse desc_act"
        stated["desc_act"] = ordered
        mending.keep_config()
        mending.mend("desc-act", f"desc_act set to {str(ordered).lower()}", why)


def mend_zero_points(mending: Mending) -> None:
    """The label of the zero points where all contradict it, the zero points where some do."""
    checkpoint, stated, weights = mending.checkpoint, mending.stated, _weights(mending)
    if checkpoint is None or stated is None or checkpoint.match.dialect == DIALECT or stated.get("sym") is False:
        return
    label = str(stated.get("checkpoint_format") or stated.get("format") or "gptq").lower()
    if label not in ("gptq", "gptq_v2"):
        return
    blank = [w for w in weights if w.storage.options.get("zeros") == "unset"]
    plain = [w for w in weights if w not in blank]
    wrong = [w for w in plain if w.is_stored_as_it_is != (label == "gptq_v2") and isinstance(w.storage.zero_point, int)]
    if wrong and len(wrong) == len(plain):
        label = "gptq" if label == "gptq_v2" else "gptq_v2"
        for key in ("checkpoint_format", "format"):
            if key in stated or key == "checkpoint_format":
                stated[key] = label
        mending.keep_config()
        how = "as they are" if label == "gptq_v2" else "minus one"
        mending.mend("zero-point-label", f"checkpoint_format set to {label}", f"all zero points are stored {how}")
        wrong = []
    for weight in (*wrong, *blank):
        _write_zeros(mending, weight, label)
    if wrong or blank:
        why = f"they were not stored as {label} has them" + (", or never filled in" if blank else "")
        names = tuple(weight.module.name for weight in (*wrong, *blank))
        mending.mend("zero-points", "qzeros of symmetric weights written as the label says", why, names)


def _write_zeros(mending: Mending, weight: _Weight, label: str) -> None:
    """All zero points 2^(bits - 1), in words as ``label`` has them."""
    part, bits = weight.module.parts["qzeros"], weight.storage.integers.bits
    groups, outputs = weight.module.parts["scales"].shape
    zeros: Any = np.full((outputs, groups), 1 << (bits - 1), np.int16)
    words = encode(zeros, bits, _WORDS[part.dtype], "v2" if label == "gptq_v2" else "v1")
    mending.set_tensor(part, RawTensor.from_array(part.name, part.dtype, words))
