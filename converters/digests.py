"""Digests of what a conversion read and wrote, so that checking an output again costs no more than reading both sides.

One text under ``qformats.digests`` (GGUF key, safetensors ``__metadata__``), of a length known before the first byte is written:
``xxh3-128 source=<32 hex> output=<32 hex> files=<names, joined by />``. Every file is hashed in chunks of 1 MiB by XXH3-128 (package
xxhash; 128 bits against accidents, not against forgery), its digest is the hash of its chunks' digests, and the digest of a side is the
hash over its files, each as length of its name, name, size and digest. ``source`` covers the files of the weights, numbered, and the
side files that are read; ``output`` covers every byte of every file, its own 32 digits counted as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from converters.outputs import Output
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource, MemorySource

__all__ = ["DIGESTS_KEY", "Digests", "of_found", "of_source", "of_tensors", "of_written", "placeholder", "read_digests", "with_digests"]

DIGESTS_KEY = "qformats.digests"
_CHUNK_NBYTES = 1 << 20
_NONE = "0" * 32
_FORM = re.compile(r"xxh3-128 source=([0-9a-f]{32}) output=([0-9a-f]{32}) files=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of both sides as 32 hexadecimal digits, zeros where not known yet; the output's file names, ``""`` for a single file."""

    source: str = _NONE
    output: str = _NONE
    files: tuple[str, ...] = ("",)

    @property
    def digits(self) -> bytes:
        """The part of the text that is filled in later, as it stands in a file."""
        return f"source={self.source} output={self.output}".encode()

    def __str__(self) -> str:
        return f"xxh3-128 {self.digits.decode()} files={'/'.join(self.files)}"


def placeholder(files: Sequence[str]) -> str:
    """The text before anything is hashed, for an output of these ``files``."""
    return str(Digests(files=tuple(sorted(files))))


def read_digests(checkpoint: Checkpoint) -> Digests | None:
    """What the checkpoint's files say, or None where they say nothing or something else."""
    text = checkpoint.metadata.get(DIGESTS_KEY)
    found = _FORM.fullmatch(str(getattr(text, "value", text)))
    return Digests(found[1], found[2], tuple(found[3].split("/"))) if found else None


def with_digests(output: Output, digests: Digests) -> Output:
    """The output with the placeholders in its headers filled in."""
    before, after = Digests().digits, digests.digits
    layouts = {name: replace(layout, header=layout.header.replace(before, after)) for name, layout in output.layouts.items()}
    return replace(output, layouts=layouts)


def of_source(checkpoint: Checkpoint, workers: int) -> str:
    """The digest of everything a plan reads: the files of the tensors in their order, and the side files by name."""
    sources: dict[str, ByteSource] = {str(at): source for at, source in enumerate(checkpoint.sources())}
    sides = {f"/{name}": MemorySource(data) for name, data in checkpoint.side_files().items()}
    return _digest({**sources, **sides}, {}, workers)


def of_written(output: Output, files: Mapping[str, ByteSource], workers: int) -> str:
    """The digest of an output while it is written: ``files`` by name, their headers with zeros for the output's digest."""
    small = {name: MemorySource(data) for name, data in output.small.items()}
    headers = {name: layout.header for name, layout in output.layouts.items()}
    return _digest({**files, **small}, headers, workers)


def of_found(found: Checkpoint, digests: Digests, workers: int) -> str | None:
    """The digest of a finished output, or None where a file is missing or its header does not hold ``digests`` exactly once."""
    weights = {id(s): s for s in found.sources()}
    starts = {key: min(raw.offset for raw in found.raw.values() if id(raw.source) == key) for key in weights}
    files: dict[str, ByteSource] = {}
    headers: dict[str, bytes] = {}
    for key, source in weights.items():
        name, header = Path(source.name).name if "" not in digests.files else "", source.pread(0, starts[key])
        if header.count(digests.digits) != 1:
            return None
        files[name], headers[name] = source, header.replace(digests.digits, replace(digests, output=_NONE).digits)
    side, base = [name for name in digests.files if name not in files], found.path
    if side and found.prepare is not None:
        found.prepare()
    if len(files) + len(side) != len(digests.files) or not all((base / name).is_file() for name in side):
        return None
    opened = {name: FileSource(base / name) for name in side}
    try:
        return _digest({**files, **opened}, headers, workers)
    finally:
        for source in opened.values():
            source.close()


def of_tensors(tensors: Iterable[RawTensor]) -> str:
    """The digest of names, dtypes, shapes and bytes of tensors, wherever they lie and in whatever order they come."""
    whole, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_NBYTES))
    for raw in sorted(tensors, key=lambda raw: raw.name):
        whole.update(f"{raw.name}\0{raw.dtype}\0{raw.shape}\0".encode("utf-8", "surrogatepass"))
        for at in range(0, raw.nbytes, _CHUNK_NBYTES):
            piece = buffer[: min(_CHUNK_NBYTES, raw.nbytes - at)]
            raw.source.pread_into(raw.offset + at, piece)
            whole.update(piece)
    return whole.hexdigest()


def _digest(files: Mapping[str, ByteSource], headers: Mapping[str, bytes], workers: int) -> str:
    """The digest of ``files``, ``headers`` standing for the first bytes of theirs."""
    chunks = [(name, at) for name in sorted(files) for at in range(0, files[name].size, _CHUNK_NBYTES)]
    share = max(1, -(-len(chunks) // workers))
    runs = [chunks[at : at + share] for at in range(0, len(chunks), share)]
    with ThreadPoolExecutor(workers, thread_name_prefix="qconvert") as pool:
        leaves = [leaf for run in pool.map(lambda run: _leaves(files, headers, run), runs) for leaf in run]
    whole, at = xxhash.xxh3_128(), 0
    for name in sorted(files):
        count = -(-files[name].size // _CHUNK_NBYTES)
        leaf = xxhash.xxh3_128_digest(b"".join(leaves[at : at + count]))
        whole.update(f"{len(name.encode())} {name} {files[name].size} ".encode() + leaf)
        at += count
    return whole.hexdigest()


def _leaves(files: Mapping[str, ByteSource], headers: Mapping[str, bytes], chunks: Sequence[tuple[str, int]]) -> list[bytes]:
    buffer, leaves = bytearray(_CHUNK_NBYTES), []
    for name, at in chunks:
        known = getattr(files[name], "chunk_digest", None)  # of bytes that passed already, where reading them again is dear
        found = None if known is None or name in headers else known(at, min(_CHUNK_NBYTES, files[name].size - at))
        if found is not None:
            leaves.append(found)
            continue
        view = memoryview(buffer)[: min(_CHUNK_NBYTES, files[name].size - at)]
        files[name].pread_into(at, view)
        header = headers.get(name, b"")[at : at + len(view)]
        view[: len(header)] = header
        leaves.append(xxhash.xxh3_128_digest(view))
    return leaves
