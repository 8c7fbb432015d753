"""``qmodel.pt``, the file of hqq's own saver: a dict of state dicts by module name, plain values beside tensors.

Source: ``serialize_weights``, ``save_weights`` in ``models/base.py``, ``HQQLinear.load_state_dict`` in ``core/quantize.py`` of hqq 0.2.8.
A layer's values stand beside its tensors, or, in older files, in a dict ``meta`` that may hold the dicts ``meta_scale`` and ``meta_zero``.
Modules that are not quantized are there with their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.containers.torch_zip import encode

__all__ = ["PICKLE_FILES", "flatten"]

PICKLE_FILES = ("qmodel.pt",)


def flatten(value: Any, config: Mapping[str, Any]) -> Mapping[str, RawTensor] | None:
    """The tensors of such a file by full name, values as tiny tensors; None for a value that is no dict of dicts with ``W_q``."""
    if type(value) is not dict or not any(type(state) is dict and "W_q" in state for state in value.values()):
        return None
    return {name: encode(name, found) for name, found in _leaves(value)}


def _leaves(modules: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for module, state in modules.items():
        if type(state) is not dict:
            yield str(module), state
            continue
        for leaf, found in state.items():
            inner = found.items() if leaf == "meta" and type(found) is dict else [(leaf, found)]
            for name, entry in inner:
                yield from _entries(f"{module}.{name}", name, entry)


def _entries(full: str, name: str, entry: Any) -> Iterator[tuple[str, Any]]:
    """One value; the dict of a quantized statistic as its values, what is None left out."""
    if name in ("meta_scale", "meta_zero") and type(entry) is dict:
        yield from ((f"{full}.{key}", found) for key, found in entry.items() if found is not None)
    elif entry is not None:
        yield full, entry
