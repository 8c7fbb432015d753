"""Act-order: which modules carry it, and whether permuting the rows of the layers before them makes it disappear exactly.

Columns of ``down_proj`` may be sorted by group if the rows of ``gate_proj`` and ``up_proj`` are sorted alike; columns of ``o_proj``
only inside each head, alike for all query heads that share a key-value head (their input rows come from one ``v_proj`` head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qformats import registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["act_order_modules", "apply_row_orders", "find_orders", "invert_rows"]


def act_order_modules(checkpoint: Checkpoint) -> dict[str, Array]:
    """Modules whose groups are not consecutive, with their group index (K,)."""
    found: dict[str, Array] = {}
    form = registry.format_module(checkpoint.format)
    for name, module in checkpoint.modules.items():
        if not checkpoint.is_quantized(name) or "g_idx" not in module.parts:
            continue
        index = form.read(module, 0, min(32, checkpoint.scheme(name).shape[0]), codes=False).group_index
        if index is not None:
            found[name] = index.numpy()
    return found


def find_orders(checkpoint: Checkpoint, modules: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array], dict[str, str]]:
    """Column order of each absorbable module, row order of each producer, and why the others cannot be absorbed."""
    import numpy as np

    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    refused: dict[str, str] = {}
    for name, index in modules.items():
        producers = checkpoint.binding.producers(name)
        present = [p for p, _ in producers if p in checkpoint.modules]
        if not producers or len(present) != len(producers):
            refused[name] = "act-order on an input that several layers share; no single producer can be reordered"
            continue
        if producers[0][1] == "rows":
            columns[name] = np.argsort(index, kind="stable")
            rows.update(dict.fromkeys(present, columns[name]))
            continue
        order = _within_heads(index, checkpoint.binding.dims)
        if order is None:
            refused[name] = "act-order groups cross attention heads, so no order of the value rows makes them consecutive"
            continue
        columns[name], rows[present[0]] = order
    return columns, rows, refused


def _within_heads(index: Array, dims: Mapping[str, int]) -> tuple[Array, Array] | None:
    """Column order and value-row order if every head sorts inside itself and heads of one key-value head agree."""
    import numpy as np

    heads, kv, width = dims["A"], dims["G"], dims["D"]
    if len(index) != heads * width:
        return None
    per_head = index.reshape(heads, width)
    local = np.stack([_partition_order(row) for row in per_head])
    if any(len(set(per_head[h]) & set(per_head[o])) for h in range(heads) for o in range(h)):
        return None
    shared = local.reshape(kv, heads // kv, width)
    if not (shared == shared[:, :1]).all():
        return None
    columns = (local + np.arange(heads)[:, None] * width).reshape(-1)
    rows = (shared[:, 0] + np.arange(kv)[:, None] * width).reshape(-1)
    return columns, rows


def _partition_order(index: Array) -> Array:
    """Columns sorted by group, the groups in the order in which they first occur: their numbers do not matter."""
    import numpy as np

    _, first, number = np.unique(index, return_index=True, return_inverse=True)
    order: Array = np.argsort(first[number], kind="stable")
    return order


def apply_row_orders(tensor: TensorMap, rows: Mapping[str, Array]) -> TensorMap:
    """Compose a tensor's source rows with the new order of its producers: piece row r = old row order[index[r]]."""
    if not any(s.module in rows for s in tensor.sources):
        return tensor
    return replace(tensor, sources=tuple(_composed(s, rows.get(s.module)) for s in tensor.sources))


def _composed(source: SourceRows, order: Array | None) -> SourceRows:
    import numpy as np

    if order is None:
        return source
    local = np.arange(source.stop - source.start) if source.index is None else source.index
    return replace(source, start=0, stop=source.stop - source.start, index=order[source.start + local].astype(np.int64), period=0)


def invert_rows(tensor: TensorMap, rows: Mapping[str, Array]) -> TensorMap:
    """Put the rows of a restored producer (named by its target) back where they were: the inverse of ``apply_row_orders``."""
    import numpy as np

    order = rows.get(tensor.target)
    if order is None or len(tensor.sources) != 1:
        return tensor
    source = tensor.sources[0]
    if len(order) != source.stop - source.start:
        message = f"the record orders {len(order)} rows, the tensor has {source.stop - source.start}"
        raise BadFile("provenance", message, tensor=tensor.name)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    local = np.arange(source.stop - source.start) if source.index is None else source.index
    return replace(tensor, sources=(replace(source, index=local[inverse].astype(np.int64), period=0),))
