"""Codes packed in slabs, as HQQ and Quanto do it: the row-major vector is cut into equal runs, and word i holds element i of each run.

Sources: ``core/bitpack.py`` of hqq 0.2.8 (first slab in the highest bits; 3 bits: ten slabs in an int32 whose two top bits stay zero) and
``tensor/packed.py`` of optimum-quanto 0.2.7 (first slab in the lowest bits). Both cut a matrix into equal runs of rows, filled up with
rows of zeros; for a row-major matrix that is the same as cutting its vector. With 4 bits the codes 1 2 3 4 are the bytes 13 24 in hqq and
31 42 in Quanto. Not a format itself; torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from qformats.containers.raw import RawTensor

    Array = np.ndarray[Any, Any]

__all__ = ["Slabs"]

_RUN = 1 << 18  # words handled at once: they and what comes of them stay in a core's cache


@dataclass(frozen=True, slots=True)
class Slabs:
    """``rows`` x ``columns`` codes of ``bits`` bits in little-endian words of ``word_nbytes``; ``shifts``: where each slab's codes are."""

    rows: int
    columns: int
    bits: int
    shifts: tuple[int, ...]
    word_nbytes: int = 1

    @property
    def packed_rows(self) -> int:
        """Rows of words: each slab has so many rows of codes, the last ones perhaps of zeros that mean nothing."""
        return -(-self.rows // len(self.shifts))

    @property
    def words(self) -> int:
        return self.packed_rows * self.columns

    @property
    def nbytes(self) -> int:
        return self.words * self.word_nbytes

    def unpack(self, raw: RawTensor, start: int, stop: int) -> Array:
        """Elements ``start:stop`` of the row-major vector of codes, uint8."""
        import numpy as np

        out = np.empty(stop - start, np.uint8)
        if len(self.shifts) == 1 and self.shifts[0] == 0:
            raw.source.pread_into(raw.offset + start, out.data)
            if self.bits < 8:
                np.bitwise_and(out, (1 << self.bits) - 1, out=out)
            return out
        slabs = range(start // self.words, -(-stop // self.words))
        if len(slabs) * self.words <= 2 * (stop - start):  # nearly all words: read each once
            for first in range(0, self.words, _RUN):
                last = min(self.words, first + _RUN)
                words = self._words(raw, first, last)
                for slab in slabs:
                    self._spread(words, first, last, slab, start, stop, out)
            return out
        for slab in slabs:
            low, high = max(start - slab * self.words, 0), min(stop - slab * self.words, self.words)
            for first in range(low, high, _RUN):
                last = min(high, first + _RUN)
                self._spread(self._words(raw, first, last), first, last, slab, start, stop, out)
        return out

    def _words(self, raw: RawTensor, first: int, last: int) -> Array:
        import numpy as np

        words = np.empty(last - first, "u1" if self.word_nbytes == 1 else "<u4")
        raw.source.pread_into(raw.offset + first * self.word_nbytes, words.view("u1").data)
        return words

    def _spread(self, words: Array, first: int, last: int, slab: int, start: int, stop: int, out: Array) -> None:
        """The codes of ``slab`` in ``words`` ``first:last``, as far as they are in ``start:stop``, to their places in ``out``."""
        import numpy as np

        at = slab * self.words
        low, high = max(first, start - at), min(last, stop - at)
        if low >= high:
            return
        field, target = words[low - first : high - first], out[low + at - start : high + at - start]
        shift, mask = self.shifts[slab], (1 << self.bits) - 1
        if self.word_nbytes > 1:
            np.copyto(target, (field >> np.uint32(shift)) & np.uint32(mask), casting="unsafe")
        elif shift == 0:
            np.bitwise_and(field, np.uint8(mask), out=target)
        else:
            np.right_shift(field, np.uint8(shift), out=target)
            if shift + self.bits < 8:
                np.bitwise_and(target, np.uint8(mask), out=target)

    def pack(self, codes: Array) -> Array:
        """All codes, uint8 in row-major order, as words (packed_rows, columns), uint8 or int32."""
        import numpy as np

        flat = codes.reshape(-1)
        dtype = np.dtype("u1" if self.word_nbytes == 1 else "<u4")
        words = np.zeros(self.words, dtype)
        for first in range(0, self.words, _RUN):
            last = min(self.words, first + _RUN)
            into = words[first:last]
            for slab, shift in enumerate(self.shifts):
                fields = flat[slab * self.words + first : slab * self.words + last]  # may be short in the last slabs
                if self.word_nbytes == 1:
                    into[: len(fields)] |= fields << np.uint8(shift) if shift else fields
                else:
                    into[: len(fields)] |= fields.astype(dtype) << np.uint32(shift)
        return words.view("u1" if self.word_nbytes == 1 else "<i4").reshape(self.packed_rows, self.columns)
