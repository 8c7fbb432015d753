"""A strided view of stored numbers behind the interface of a byte source: what PyTorch saves of a transposed tensor, in row-major order.

The stored bytes stay where they are; the view is gathered when it is first read, and the last few gathered are held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.source import ByteSource, MemorySource

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Gathered", "StridedSource", "is_overlapping", "is_row_major"]

_HELD_NBYTES = 256 << 20


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after another in logical order; strides (in elements) of dimensions of one element mean nothing.

    >>> is_row_major((2, 3), (3, 1)), is_row_major((3, 2), (1, 3)), is_row_major((1, 3), (99, 1))
    (True, False, True)
    """
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def is_overlapping(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements could share a place (an expanded tensor does); some views that do not are called so as well.

    >>> is_overlapping((4, 2), (0, 1)), is_overlapping((3, 2), (1, 3))
    (True, False)
    """
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides) if size > 1):
        if stride < reach:
            return True
        reach = stride * size
    return False


class Gathered:
    """Gathered views of one file, the most recent ones up to 256 MiB (and always the last)."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, view: StridedSource) -> bytes:
        """The bytes of a view."""
        with self._lock:
            found = self._held.pop(id(view), None)
            if found is None:
                while self._held and sum(map(len, self._held.values())) + view.size > _HELD_NBYTES:
                    self._held.popitem(last=False)
                found = view.gather()
            self._held[id(view)] = found
            return found

    def __reduce__(self) -> tuple[type[Gathered], tuple[()]]:
        return Gathered, ()


class StridedSource:
    """Elements of ``itemsize`` bytes at ``offset`` bytes of ``source``, ``shape`` and ``strides`` in elements, as row-major bytes.

    The caller has checked that every element lies in the source and none is there twice.
    """

    def __init__(
        self, source: ByteSource, offset: int, itemsize: int, shape: Sequence[int], strides: Sequence[int], held: Gathered
    ) -> None:
        self.name = source.name
        self.size = prod(shape) * itemsize
        self._source, self._offset, self._itemsize, self._held = source, offset, itemsize, held
        self._shape, self._strides = tuple(shape), tuple(strides)

    def gather(self) -> bytes:
        """Read everything the view spans and put it in order."""
        import numpy as np

        span = 1 + sum((size - 1) * stride for size, stride in zip(self._shape, self._strides))
        flat: np.ndarray[Any, Any] = np.frombuffer(self._source.pread(self._offset, span * self._itemsize), f"V{self._itemsize}")
        steps = tuple(stride * self._itemsize for stride in self._strides)
        return np.lib.stride_tricks.as_strided(flat, self._shape, steps, writeable=False).tobytes()

    def pread(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` of the view in logical order."""
        return MemorySource(self._held.of(self), self.name).pread(offset, nbytes)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of the view in logical order."""
        MemorySource(self._held.of(self), self.name).pread_into(offset, buffer)

    def identity(self) -> str:
        """That of the file and the place in it."""
        return f"{self._source.identity()}:{self._offset}:{self._itemsize}:{self._shape}:{self._strides}"

    def changed(self) -> bool:
        """Whether the file behind it changed."""
        return self._source.changed()

    def close(self) -> None:
        """Nothing of its own to release."""
