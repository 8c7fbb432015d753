"""Build GGUF and safetensors files byte by byte, right or wrong, independently of the code under test."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
U8, U32, STR, ARRAY, F32_KV = 0, 4, 8, 9, 6
F32, F16, Q4_0 = 0, 1, 2


@dataclass
class Gguf:
    """Everything a header says; each field may lie. ``keys``: (key, type id, raw value); ``infos``: (name, ne, type, offset)."""

    magic: bytes = b"GGUF"
    version: int = 3
    order: str = "<"
    keys: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    infos: list[tuple[bytes, tuple[int, ...], int, int]] = field(default_factory=list)
    n_tensors: int | None = None
    n_kv: int | None = None
    n_dims: int | None = None
    alignment: int = 32
    data: bytes = b""

    def number(self, code: str, value: Any) -> bytes:
        return struct.pack(self.order + code, value)

    def count(self, value: int) -> bytes:
        return self.number("I" if self.version == 1 else "Q", value)

    def string(self, raw: bytes, claimed: int | None = None) -> bytes:
        return self.count(len(raw) if claimed is None else claimed) + raw

    def array(self, type_id: int, count: int, raw: bytes) -> bytes:
        return self.number("I", type_id) + self.count(count) + raw

    def key(self, key: bytes, type_id: int, value: Any) -> Gguf:
        raw = value if isinstance(value, bytes) else self.number(SCALAR[type_id], value)
        self.keys.append((key, type_id, raw))
        return self

    def tensor(self, name: bytes, ne: tuple[int, ...], type_id: int = F32, offset: int = 0) -> Gguf:
        self.infos.append((name, ne, type_id, offset))
        return self

    def build(self) -> bytes:
        out = self.magic + self.number("I", self.version)
        out += self.count(len(self.infos) if self.n_tensors is None else self.n_tensors)
        out += self.count(len(self.keys) if self.n_kv is None else self.n_kv)
        for key, type_id, raw in self.keys:
            out += self.string(key) + self.number("I", type_id) + raw
        for name, ne, type_id, offset in self.infos:
            out += self.string(name) + self.number("I", len(ne) if self.n_dims is None else self.n_dims)
            out += b"".join(self.count(size) for size in ne) + self.number("I", type_id) + self.number("Q", offset)
        return out + bytes(-len(out) % self.alignment) + self.data


def valid_gguf(version: int = 3, order: str = "<") -> Gguf:
    """A small right file: one string key, one string array, one F32 and one Q4_0 tensor."""
    gguf = Gguf(version=version, order=order)
    gguf.key(b"general.architecture", STR, gguf.string(b"llama"))
    gguf.key(b"k.words", ARRAY, gguf.array(STR, 3, gguf.string(b"a") + gguf.string(b"") + gguf.string("é".encode())))
    gguf.key(b"k.ints", ARRAY, gguf.array(U32, 2, gguf.number("I", 7) + gguf.number("I", 9)))
    gguf.tensor(b"a.weight", (3, 2), F32, 0).tensor(b"b.weight", (32, 1), Q4_0, 32)
    gguf.data = bytes(range(64))
    return gguf


def safetensors_file(header: dict[str, Any] | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}
