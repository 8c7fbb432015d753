"""``RawTensor``: a named, typed, shaped window on a byte source. Torch-free; knows no quantization.

``dtype`` is the container's own word: a safetensors code (``F32 F16 BF16 F64 I8 U8 I16 U16 I32 U32 I64 U64 BOOL F8_E4M3 F8_E5M2 …``)
or, out of a GGUF, a ggml type name (``F32 F16 BF16 F64 I8 I16 I32 I64 Q4_0 …``). ``shape`` is always in row-major (torch) order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats.containers.source import ByteSource, MemorySource
from qformats.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

__all__ = ["NUMPY_DTYPES", "RawTensor", "ReadAhead"]

# storage view of each plain dtype as little-endian numpy; bfloat16 and 8-bit floats travel as integers of their width
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4",
    "I16": "<i2", "U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|u1", "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1",
    "F8_E4M3FNUZ": "|u1", "F8_E5M2FNUZ": "|u1",
}  # fmt: skip


_NARROW_ROW_NBYTES = 8 << 10
_PIECE_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class RawTensor:
    """``nbytes`` bytes at ``offset`` of ``source``; for block types (GGUF) a row's bytes are ``nbytes // rows``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: ByteSource
    offset: int
    nbytes: int
    big_endian: bool = False

    @property
    def rows(self) -> int:
        """Product of all but the last dimension (1 for vectors and scalars)."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    def read(self) -> bytes:
        """All bytes."""
        return self.source.pread(self.offset, self.nbytes)

    def array(self) -> np.ndarray[Any, Any]:
        """The whole tensor as a fresh, writable numpy array of its storage dtype (plain dtypes), else uint8 ``(rows, row_nbytes)``."""
        return self.row_range(0, self.rows).reshape(self.shape if self.dtype in NUMPY_DTYPES else (self.rows, self.row_nbytes))

    def row_range(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows ``start:stop`` of the tensor flattened to two dimensions, as a fresh numpy array ``(stop - start, K)``."""
        import numpy as np

        dtype = self._numpy_dtype()
        width = self.row_nbytes // dtype.itemsize
        out = np.empty((stop - start, width), dtype)
        if out.nbytes:
            self.source.pread_into(self.offset + start * self.row_nbytes, out.reshape(-1).view("u1").data)
        return self._native(out)

    def column_range(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Columns ``start:stop`` (elements of a plain dtype) of every row, ``(rows, stop - start)``.

        Long rows are read one by one, short ones in whole pieces: a read call costs as much as copying several kilobytes.
        """
        import numpy as np

        dtype = self._numpy_dtype()
        width = self.row_nbytes // dtype.itemsize
        if start == 0 and stop == width:
            return self.row_range(0, self.rows)
        if isinstance(self.source, MemorySource):
            whole = np.frombuffer(self.source.view(self.offset, self.nbytes), dtype).reshape(self.rows, width)
            return self._native(whole[:, start:stop].copy())
        out = np.empty((self.rows, stop - start), dtype)
        if self.row_nbytes <= _NARROW_ROW_NBYTES:
            step = max(1, _PIECE_NBYTES // max(1, self.row_nbytes))
            for row in range(0, self.rows, step):
                out[row : row + step] = self.row_range(row, min(self.rows, row + step))[:, start:stop]
            return out
        flat, step = out.reshape(-1).view("u1").data, (stop - start) * dtype.itemsize
        at, row_nbytes = self.offset + start * dtype.itemsize, self.row_nbytes
        for row in range(self.rows):
            self.source.pread_into(at + row * row_nbytes, flat[row * step : (row + 1) * step])
        return self._native(out)

    def _numpy_dtype(self) -> np.dtype[Any]:
        import numpy as np

        dtype = np.dtype(NUMPY_DTYPES.get(self.dtype, "|u1"))
        return dtype.newbyteorder(">") if self.big_endian and dtype.itemsize > 1 else dtype

    def _native(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array.astype(array.dtype.newbyteorder("<")) if self.big_endian and array.dtype.itemsize > 1 else array

    @classmethod
    def from_array(cls, name: str, dtype: str, array: np.ndarray[Any, Any]) -> RawTensor:
        """Wrap an in-memory array whose bytes are already those of ``dtype`` (plain dtypes only)."""
        import numpy as np

        if dtype not in NUMPY_DTYPES or np.dtype(NUMPY_DTYPES[dtype]).itemsize != array.dtype.itemsize:
            raise BadFile("dtype", f"array of {array.dtype} is not {dtype}", tensor=name)
        data = np.ascontiguousarray(array)
        return cls(name, dtype, tuple(int(n) for n in array.shape), MemorySource(data.reshape(-1).view("u1").data, name), 0, data.nbytes)


@dataclass(frozen=True, slots=True)
class ReadAhead(RawTensor):
    """A tensor whose column ranges come out of wide reads: all of it if it has up to ``limit`` bytes, else as many columns as that holds.

    For one thread that asks for ranges in order. ``column_range`` gives views of what is held, which must not be written to.
    """

    limit: int = 32 << 20
    held: list[tuple[int, int, np.ndarray[Any, Any]]] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def of(cls, raw: RawTensor, limit: int) -> ReadAhead:
        """``raw`` with nothing held yet."""
        return cls(raw.name, raw.dtype, raw.shape, raw.source, raw.offset, raw.nbytes, raw.big_endian, limit)

    def column_range(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Columns ``start:stop`` of every row as a view (rows, stop - start)."""
        if not self.held or start < self.held[0][0] or stop > self.held[0][1]:
            width = self.row_nbytes // self._numpy_dtype().itemsize
            count = width if self.nbytes <= self.limit else self.limit * width // self.nbytes
            first = 0 if count == width else start
            last = min(width, max(stop, first + count))
            self.held.clear()  # before the next piece is allocated
            self.held.append((first, last, RawTensor.column_range(self, first, last)))
        first, _, columns = self.held[0]
        return columns[:, start - first : stop - first]
