"""Importance matrices: mean squares of what each column of a weight meets, read from llama.cpp's two file forms, written in the newer.

GGUF form (``tools/imatrix/imatrix.cpp`` of llama.cpp v0.5.0): keys ``general.type`` = "imatrix", ``imatrix.datasets`` [str],
``imatrix.chunk_count`` u32, ``imatrix.chunk_size`` u32; for each weight, names in byte order, two F32 tensors

| tensor                | shape (torch order)             | meaning                                             |
|-----------------------|---------------------------------|-----------------------------------------------------|
| ``<weight>.in_sum2``  | (n_mat, K); (K,) of one matrix  | sum of the squares of the inputs of each column     |
| ``<weight>.counts``   | (n_mat, 1); (1,) of one matrix  | tokens each matrix (expert) met, 0 if it met none   |

Older form (``.dat``, ``common/imatrix-loader.cpp`` of the same tree), little-endian: i32 entries; for each i32 length, name, i32 ncall,
i32 nval, f32[nval] = mean square times ncall, matrices one after the other; then, perhaps, i32 chunks, and, perhaps, i32 length and
the data set's path. Importances are sum / count; 1 where the count is 0; the older form's values as they are where ncall is 0
(``tools/quantize/quantize.cpp``).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats.containers.atomic import OutputFile
from qformats.containers.gguf import GGUFFile, Metadata, TensorInfo, Value, layout_gguf, open_gguf
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource
from qformats.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["Entry", "ImportanceMatrix", "read_imatrix", "write_imatrix"]

TYPE_KEY, DATASETS_KEY = "general.type", "imatrix.datasets"
CHUNK_COUNT_KEY, CHUNK_SIZE_KEY = "imatrix.chunk_count", "imatrix.chunk_size"
SUM_SUFFIX, COUNT_SUFFIX = ".in_sum2", ".counts"
MAX_NAME_NBYTES = 1024
MAX_PATH_NBYTES = 1 << 16
_DIGEST_NBYTES = 8 << 20
_SMALLEST_ENTRY = 17  # three numbers, a name of one byte, one value
_NO_IMATRIX = "give what `qconvert imatrix` or llama-imatrix writes"


@dataclass(frozen=True, eq=False)
class Entry:
    """One weight: ``sums`` float32 (n_mat, K), finite and not negative; ``counts`` int64 (n_mat,)."""

    sums: Array
    counts: Array

    def importance(self) -> Array:
        """float32 (n_mat, K) mean squares, 1 for a matrix that met no token."""
        import numpy as np

        counts = self.counts.astype(np.float32)[:, None]
        means: Array = np.where(counts > 0, self.sums / np.maximum(counts, np.float32(1)), np.float32(1)).astype(np.float32)
        return means


@dataclass(frozen=True)
class ImportanceMatrix:
    """``entries`` by weight name (``blk.0.attn_q.weight``). ``chunk_size`` in tokens, 0 if the file does not tell.

    ``name`` is the file's own name without its place, ``digest`` the SHA-256 of its content as hexadecimal; both empty in memory.
    """

    entries: Mapping[str, Entry] = field(compare=False)
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    name: str = ""
    digest: str = ""


def read_imatrix(path: str | Path | ByteSource) -> ImportanceMatrix:
    """Read either form.

    Raises ``BadFile``: ``imatrix-kind`` (no importance matrix), ``imatrix-empty``, ``imatrix-metadata``, ``imatrix-counts``,
    ``imatrix-values``, ``imatrix-size``, ``imatrix-duplicate``, ``truncated``, and those of ``open_gguf``.
    """
    source: ByteSource = FileSource(path) if isinstance(path, (str, Path)) else path
    try:
        is_gguf = source.size >= 4 and source.pread(0, 4) == b"GGUF"
        entries, datasets, count, size = _read_gguf(open_gguf(source)) if is_gguf else _Legacy(source).read()
        return ImportanceMatrix(entries, datasets, count, size, Path(source.name).name, _digest(source))
    finally:
        if isinstance(path, (str, Path)):
            source.close()


def _digest(source: ByteSource) -> str:
    found = hashlib.sha256()
    for at in range(0, source.size, _DIGEST_NBYTES):
        found.update(source.pread(at, min(_DIGEST_NBYTES, source.size - at)))
    return found.hexdigest()


_Found = tuple[dict[str, Entry], tuple[str, ...], int, int]


# ---------------------------------------------------------------- the GGUF form


def _read_gguf(file: GGUFFile) -> _Found:
    metadata = file.metadata
    kind = metadata.get(TYPE_KEY)
    if (kind is not None and kind.value != "imatrix") or not any(name.endswith(SUM_SUFFIX) for name in file.tensors):
        raise BadFile("imatrix-kind", "is a GGUF, but no importance matrix", path=file.name, hint=_NO_IMATRIX)
    for key in (DATASETS_KEY, CHUNK_COUNT_KEY, CHUNK_SIZE_KEY):
        wanted = "[str]" if key == DATASETS_KEY else "u32"
        if key not in metadata or metadata[key].type != wanted:
            raise BadFile("imatrix-metadata", f"{key} is missing or not of type {wanted}", path=file.name, hint=_NO_IMATRIX)
    datasets = tuple(metadata[DATASETS_KEY].value)
    names = [name.removesuffix(SUM_SUFFIX) for name in file.tensors if name.endswith(SUM_SUFFIX)]
    lonely = [n for n in file.tensors if n.endswith(COUNT_SUFFIX) and n.removesuffix(COUNT_SUFFIX) + SUM_SUFFIX not in file.tensors]
    if lonely:
        raise BadFile("imatrix-size", f"{lonely[0]} has no {SUM_SUFFIX[1:]} beside it", path=file.name)
    entries = {name: _gguf_entry(file, name) for name in names}
    return entries, datasets, int(metadata[CHUNK_COUNT_KEY].value), int(metadata[CHUNK_SIZE_KEY].value)


def _gguf_entry(file: GGUFFile, name: str) -> Entry:
    import numpy as np

    sums, counts = file.tensors[name + SUM_SUFFIX], file.tensors.get(name + COUNT_SUFFIX)
    if counts is None:
        raise BadFile("imatrix-size", f"has no {COUNT_SUFFIX[1:]} beside its {SUM_SUFFIX[1:]}", path=file.name, tensor=name)
    if (sums.dtype, counts.dtype) != ("F32", "F32"):
        raise BadFile("imatrix-values", f"is {sums.dtype} and {counts.dtype}, expected F32", path=file.name, tensor=name)
    n_values, n_counts = _elements(sums), _elements(counts)
    if n_counts == 0 or n_values == 0 or n_values % n_counts:
        raise BadFile("imatrix-size", f"{n_values} sums do not divide among {n_counts} counts", path=file.name, tensor=name)
    tokens = counts.array().reshape(-1)
    if not (np.isfinite(tokens).all() and (tokens >= 0).all() and (tokens < 2**62).all()):
        raise BadFile("imatrix-counts", "has a count that is negative or no number", path=file.name, tensor=name)
    rounded = np.floor(tokens.astype(np.float64) + 0.5).astype(np.int64)
    return Entry(_checked(sums.array().reshape(n_counts, -1), file.name, name), rounded)


def _elements(raw: RawTensor) -> int:
    count = 1
    for size in raw.shape:
        count *= size
    return count


def _checked(values: Array, path: str, name: str) -> Array:
    import numpy as np

    if not (np.isfinite(values).all() and (values >= 0).all()):
        hint = "the file is damaged, or the model it was computed with overflowed"
        raise BadFile("imatrix-values", "has a value that is negative or no number", path=path, tensor=name, hint=hint)
    return values


# ---------------------------------------------------------------- the older form


class _Legacy:
    """Reads the older form front to back; every length is held against the bytes left before it is believed."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.at = source, 0

    @property
    def left(self) -> int:
        return self.source.size - self.at

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self.left:
            hint = "the file is incomplete: fetch it again"
            message = f"{what} needs {nbytes} bytes, the file has {self.left} left"
            raise BadFile("truncated", message, path=self.source.name, offset_bytes=self.at, hint=hint)
        self.at += nbytes
        return self.source.pread(self.at - nbytes, nbytes)

    def number(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        return value

    def refuse(self, code: str, message: str, tensor: str | None = None) -> BadFile:
        return BadFile(code, message, path=self.source.name, offset_bytes=self.at, tensor=tensor, hint=_NO_IMATRIX)

    def read(self) -> _Found:
        if self.left < 4:
            raise self.refuse("imatrix-kind", "is too short for an importance matrix")
        count = self.number("the number of entries")
        if count == 0:
            raise self.refuse("imatrix-empty", "holds no entries")
        if count < 0 or count * _SMALLEST_ENTRY > self.left:
            raise self.refuse("imatrix-kind", "is no importance matrix")
        entries: dict[str, Entry] = {}
        for number in range(count):
            name, entry = self._entry(number)
            if name in entries:
                raise self.refuse("imatrix-duplicate", "appears twice", name)
            entries[name] = entry
        chunks = self.number("the number of chunks") if self.left else 0
        datasets = (self._text("the data set's name", MAX_PATH_NBYTES, smallest=0),) if self.left else ()
        if self.left:
            raise self.refuse("imatrix-size", f"has {self.left} bytes behind its end")
        if chunks < 0:
            raise self.refuse("imatrix-counts", f"was computed on {chunks} chunks")
        return entries, tuple(name for name in datasets if name), chunks, 0

    def _text(self, what: str, limit: int, smallest: int) -> str:
        length = self.number(f"the length of {what}")
        if not smallest <= length <= limit:
            raise self.refuse("imatrix-kind", f"{what} has {length} bytes, which no importance matrix has")
        return self.take(length, what).decode("utf-8", "replace")

    def _entry(self, number: int) -> tuple[str, Entry]:
        import numpy as np

        name = self._text(f"the name of entry {number}", MAX_NAME_NBYTES, smallest=1)
        calls, count = self.number(f"the calls of {name!r}"), self.number(f"the size of {name!r}")
        if calls < 0:
            raise self.refuse("imatrix-counts", f"was met {calls} times", name)
        if count < 1:
            raise self.refuse("imatrix-size", f"has {count} values", name)
        values = np.frombuffer(self.take(4 * count, f"the values of {name!r}"), "<f4").astype(np.float32).reshape(1, -1)
        return name, Entry(_checked(values, self.source.name, name), np.array([max(1, calls)], np.int64))


# ---------------------------------------------------------------- writing


def write_imatrix(matrix: ImportanceMatrix, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the GGUF form, byte for byte as llama.cpp's tool lays it out. Raises ``OutputError``; ``Unsupported`` for a name too long."""
    import numpy as np

    metadata: Metadata = {
        TYPE_KEY: Value("str", "imatrix"),
        DATASETS_KEY: Value("[str]", matrix.datasets),
        CHUNK_COUNT_KEY: Value("u32", matrix.chunk_count),
        CHUNK_SIZE_KEY: Value("u32", matrix.chunk_size),
    }
    infos: list[TensorInfo] = []
    data: list[Array] = []
    for name in sorted(matrix.entries, key=lambda text: text.encode("utf-8", "surrogatepass")):
        entry = matrix.entries[name]
        n_mat, columns = (int(size) for size in entry.sums.shape)
        infos.append(TensorInfo(name + SUM_SUFFIX, "F32", (n_mat, columns) if n_mat > 1 else (columns,)))
        infos.append(TensorInfo(name + COUNT_SUFFIX, "F32", (n_mat, 1) if n_mat > 1 else (1,)))
        data += [np.ascontiguousarray(entry.sums, "<f4"), entry.counts.astype("<f4")]
    layout = layout_gguf(metadata, infos)
    with OutputFile(Path(path), layout.size, overwrite) as out:
        out.pwrite(0, layout.header)
        for info, array in zip(infos, data, strict=True):
            out.pwrite(layout.offsets[info.name], array.tobytes())
        out.commit()
