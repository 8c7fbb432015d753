"""Write an opened checkpoint in its own format: the same bytes, under a new name. Another format is ``converters.convert``.

A directory of safetensors stays one, with its shards, index and side files; a GGUF is one file, shards joined. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qformats.containers.atomic import OutputDirectory, OutputFile, check_not_same
from qformats.containers.gguf import TensorInfo, layout_gguf
from qformats.containers.index import INDEX_SUFFIX
from qformats.containers.source import ByteSource, check_remote
from qformats.containers.torch_directory import INDEX_SUFFIX as PICKLED_INDEX_SUFFIX
from qformats.errors import Unsupported

if TYPE_CHECKING:
    from qformats.checkpoint import Checkpoint

__all__ = ["save"]

_STEP_NBYTES = 8 << 20
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def save(checkpoint: Checkpoint, path: str | Path, *, overwrite: bool = False) -> None:
    """Save ``checkpoint`` to ``path`` in the format it has.

    Raises ``OutputError`` for the destination (it exists, is the source, cannot be written), ``BadFile`` if the source breaks
    meanwhile, ``Unsupported('big-endian-shards')``. Nothing appears under ``path`` before all of it is on disk.
    """
    final = Path(path)
    check_not_same([checkpoint.path, *checkpoint.sources()], final)
    if checkpoint.path.is_dir() and checkpoint.gguf is None:
        _save_directory(checkpoint, final, overwrite)
    elif checkpoint.gguf is not None and checkpoint.gguf.shards > 1:
        _join_shards(checkpoint, final, overwrite)
    else:
        (source,) = checkpoint.sources()
        with OutputFile(final, source.size, overwrite) as out:
            _copy(source, 0, source.size, out, 0)
            check_remote([source])
            out.commit()


def _chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    for at in range(0, nbytes, _STEP_NBYTES):
        yield at, min(_STEP_NBYTES, nbytes - at)


def _copy(source: ByteSource, offset: int, nbytes: int, out: OutputFile, to: int) -> None:
    buffer = memoryview(bytearray(min(nbytes, _STEP_NBYTES)))
    for at, length in _chunks(nbytes):
        source.pread_into(offset + at, buffer[:length])
        out.pwrite(to + at, buffer[:length])


def _save_directory(checkpoint: Checkpoint, final: Path, overwrite: bool) -> None:
    small = checkpoint.side_files()
    suffix = PICKLED_INDEX_SUFFIX if checkpoint.container == "torch" else INDEX_SUFFIX
    small.update({file.name: file.read_bytes() for file in sorted(checkpoint.path.glob(f"*{suffix}"))})
    sources = checkpoint.sources()
    with OutputDirectory(final, sum(s.size for s in sources) + sum(map(len, small.values())), overwrite) as directory:
        for source in sources:
            out = directory.file(Path(source.name).name, source.size)
            _copy(source, 0, source.size, out, 0)
        check_remote(sources)
        for name, data in small.items():
            folder, _, last = name.rpartition("/")
            directory.write_bytes(last, data, folder=folder)
        directory.commit()


def _join_shards(checkpoint: Checkpoint, final: Path, overwrite: bool) -> None:
    file = checkpoint.gguf
    assert file is not None
    if file.big_endian:
        raise Unsupported("big-endian-shards", "big-endian shards cannot be joined", path=checkpoint.path, hint="copy the files")
    metadata = {key: value for key, value in file.metadata.items() if key not in _SPLIT_KEYS}
    layout = layout_gguf(metadata, [TensorInfo(r.name, r.dtype, r.shape) for r in file.tensors.values()], file.alignment)
    with OutputFile(final, layout.size, overwrite) as out:
        out.pwrite(0, layout.header)
        for raw in file.tensors.values():
            _copy(raw.source, raw.offset, raw.nbytes, out, layout.offsets[raw.name])
        check_remote(checkpoint.sources())
        out.commit()
