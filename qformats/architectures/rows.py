"""Row orders: which source row becomes which target row, as index arrays that invert exactly. Knows no names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["inverse_order", "qkv_order", "rope_order", "row_order"]


def rope_order(heads: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Give the source row of each target row, (heads * head_dim,) int64, from HF's half-split rotary layout to ggml's interleaved one.

    Within one head, target row ``2 j + p`` comes from source row ``p * head_dim / 2 + j`` (llama.cpp, ``conversion/llama.py``
    ``LlamaModel.permute``). Each head maps onto itself, so the period is ``head_dim``.

    >>> rope_order(1, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    import numpy as np

    return np.arange(heads * head_dim, dtype=np.int64).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def qkv_order(heads: int, kv_heads: int, head_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Give the source row of each target row, ((heads + 2 kv_heads) * head_dim,) int64, of a fused projection laid out group by group.

    The source holds, for each key-value head, its query heads, then its key, then its value; the target all queries, all keys, all
    values (llama.cpp, ``conversion/falcon.py`` and, with one query head a group, ``conversion/gptneox.py``).

    >>> qkv_order(4, 2, 1).tolist()
    [0, 1, 4, 5, 2, 6, 3, 7]
    """
    import numpy as np

    rows = np.arange((heads + 2 * kv_heads) * head_dim, dtype=np.int64).reshape(kv_heads, heads // kv_heads + 2, head_dim)
    return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])


def row_order(name: str, dims: Mapping[str, int]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
    """Give (order, period) by a rule's word: ``qkv``, else the letter of the head count of a rotary permutation."""
    if name == "qkv":
        return qkv_order(dims["A"], dims["G"], dims["D"]), 0
    return rope_order(dims[name], dims["D"]), dims["D"]


def inverse_order(order: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Give the order that undoes ``order``: ``x[order][inverse_order(order)] == x``.

    >>> inverse_order(rope_order(1, 6)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    import numpy as np

    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=np.int64)
    return inverse
